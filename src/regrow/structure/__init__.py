"""Which layers read which channels: a proposal by torch-pruning's graph, confirmed by forward passes."""
