"""Make a trained network smaller, within a budget, in one call."""
