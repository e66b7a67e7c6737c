"""`launch`: from a function in a cell to a `Run`. Runs in the parent."""
