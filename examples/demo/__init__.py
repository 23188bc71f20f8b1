"""Six small tasks: what each op does for its task, and that it computes what the formula written by hand computes."""
