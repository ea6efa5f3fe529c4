"""regrow's methods as callbacks of other people's training loops; each file needs the package that it names."""
