"""Recording inside a rank: wraps torch, writes spans. Runs in workers."""
