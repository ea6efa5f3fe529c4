"""What makes up for removed filters, on unlabelled images."""
