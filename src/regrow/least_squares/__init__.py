"""New weights of one layer from what it reads and what its outputs lack: rows, moments, ridge,
elimination."""
