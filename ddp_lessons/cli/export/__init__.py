"""`ddp-lessons export`: a script for torchrun from a function of a notebook.

    notebook.py        the notebook's cells as top-level statements
    launch_call.py     the function, and its launch(...), whose arguments the script passes
    dependencies.py    the statements that the function needs, imports among them
    rank_dependent.py  refuses what the notebook made once but each rank would make anew
    script_text.py     writes all of it as a script

Runs in the command; nothing of the notebook is executed, and torch is not loaded.
"""

from ddp_lessons.cli.export.notebook import CannotExport
from ddp_lessons.cli.export.script_text import script

__all__ = ["CannotExport", "script"]
