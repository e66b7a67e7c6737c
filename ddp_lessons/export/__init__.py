"""`ddp-lessons export`: a script for torchrun from a function of a notebook.

    cells.py         the notebook's cells as statements
    launches.py      the launch(...) call that gives the arguments
    needs.py         what the function needs of the notebook, at that call
    per_rank.py      what each rank would make anew: refused
    import_lines.py  the imports, sorted
    writing.py       all of it as a script

Runs in the command; nothing of the notebook is executed, and torch is not loaded.
"""

from ddp_lessons.export.cells import CannotExport
from ddp_lessons.export.writing import script

__all__ = ["CannotExport", "script"]
