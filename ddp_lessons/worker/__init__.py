"""The life of a rank in its own process, and the modules that the forkservers import."""
