"""The folder in which the ranks of a script are recorded: what is in it. Used by both processes."""

VARIABLE = "DDP_LESSONS_RECORD"  # the variable of the environment that names the folder
VERSION = 2  # of its files
