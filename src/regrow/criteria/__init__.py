"""How much a filter is worth keeping, and which filters go by that."""
