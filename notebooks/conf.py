"""How the notebooks and the pages beside them become a web site: `make docs`.

Nothing is executed and nothing is fetched: the lessons appear with their stored outputs, and the
pages need no server.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_docs"), str(HERE.parent)]

from ddp_lessons import __version__
from ddp_lessons.course import lesson_files

project = "ddp-lessons"
author = "The ddp-lessons authors"
copyright = author
version = release = __version__
language = "en"
smartquotes_action = "D"  # dashes only: quotes in docstrings are those of Python

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "lesson_pages",
]
of_the_course = lesson_files.files(HERE)
of_readers = (path.relative_to(HERE).as_posix() for path in HERE.rglob("*.ipynb"))
exclude_patterns = ["_docs", *(name for name in of_readers if name not in of_the_course)]
nitpicky = True
# What docstrings refer to outside this site: it has no copy of their indexes, to build offline.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|nn|dist|numpy|np|matplotlib|ipyparallel|os|pathlib|collections|datetime)\..*",
    ),
]

nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # controls need a kernel; their figure is stored
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_render_error_lexer = "text"  # these tracebacks are written for readers, not in Python's form
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
myst_html_meta = {
    "description": "Learn PyTorch distributed training by running it: real ranks, from a notebook."
}

default_role = "code"  # what stands between single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc sections say what a reader needs of the types
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False
napoleon_use_rtype = False

html_theme = "furo"
pygments_dark_style = "github-dark-high-contrast"
html_title = "ddp-lessons"
html_static_path = ["_docs/static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
