"""One call that makes a trained network smaller, within a budget."""
