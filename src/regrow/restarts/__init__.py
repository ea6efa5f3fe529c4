"""Relatives of RePr: other ways to start a network, or parts of it, anew while it trains."""
