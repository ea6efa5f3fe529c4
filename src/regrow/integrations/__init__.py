"""regrow's methods as callbacks of others' training loops; a file needs the package of its name."""
