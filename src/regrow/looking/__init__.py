"""Running a copy of a model and watching its layers."""
