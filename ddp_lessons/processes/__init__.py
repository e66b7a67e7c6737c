"""Starting, reading and ending the processes of ranks. Runs in the parent and in engines."""
