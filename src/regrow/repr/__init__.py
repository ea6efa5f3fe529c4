"""RePr (arXiv 1811.07275, CVPR 2019): drop the filters that overlap most, train on, regrow them."""
