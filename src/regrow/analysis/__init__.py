"""What a network has learnt: correlations of its layers and criteria, filters dropped alone, gradients."""
