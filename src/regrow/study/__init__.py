"""The researcher's half: data, reference nets, the training loop, comparison, report."""
