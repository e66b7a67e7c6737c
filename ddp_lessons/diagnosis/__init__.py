"""Explains from its record why a run failed or hung. Runs in the parent, for `Run`."""
