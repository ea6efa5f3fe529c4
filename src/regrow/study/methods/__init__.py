"""Training methods by name: what each adds to standard training, behind one protocol (``method.Method``)."""
