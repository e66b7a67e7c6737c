"""Ranks on the engines of an ipyparallel cluster. Runs in the parent and in engines."""
