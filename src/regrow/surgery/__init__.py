"""Filters set to zero, removed, and cut out for good."""
