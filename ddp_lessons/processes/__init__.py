"""Starts, reads and ends the processes of ranks. Runs in the parent and in engines."""
