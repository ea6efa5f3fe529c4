"""Scores of filters, and the choice of the filters to keep by their scores."""
