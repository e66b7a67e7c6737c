"""The life of a rank, in its own process; and what the forkservers import."""
