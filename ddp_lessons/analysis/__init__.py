"""What the recorded calls say about time: who waited for whom, and how long. Runs in the parent."""
