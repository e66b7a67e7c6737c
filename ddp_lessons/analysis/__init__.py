"""Computes waiting, transfer, overlap and bandwidth from recorded spans. Runs in the parent."""
