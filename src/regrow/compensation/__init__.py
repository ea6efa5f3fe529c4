"""Compensate for removed filters with unlabelled images."""
