"""Constants of the folder in which ranks under torchrun record. Writer and reader import them."""

VARIABLE = "DDP_LESSONS_RECORD"  # the environment variable that names the folder
NOTES = "DDP_LESSONS_NOTES"  # the variable that asks for notes, see instrumentation/notes.py
VERSION = 3  # of the format of its files
READABLE = (2, VERSION)  # in format 2 spans lack the processor's time
