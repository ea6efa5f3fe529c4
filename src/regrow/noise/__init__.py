"""Batch Bridgeout (Khan & Stavness 2020, arXiv 2009.10893): noise on the weights while a network trains."""
