"""`ddp-lessons export`: a script for torchrun from a function of a notebook.

    cells.py           the notebook's cells as top-level statements
    launch_call.py     the launch(...) call, whose arguments the script passes to the function
    dependencies.py    the statements and imports that the function needs
    rank_dependent.py  refuses what the notebook made once but each rank would make anew
    script_text.py     writes all of it as a script

Runs in the command; nothing of the notebook is executed, and torch is not loaded.
"""

from ddp_lessons.cli.export.cells import CannotExport
from ddp_lessons.cli.export.script_text import script

__all__ = ["CannotExport", "script"]
