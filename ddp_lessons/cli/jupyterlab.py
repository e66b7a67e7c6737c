"""Replaces the process of the command `ddp-lessons` by JupyterLab on a copy of the lessons.

After the exec, Ctrl-C, the exit code and the printed address with its token are Jupyter's own. The
server listens on loopback and asks for its token, as Jupyter does by default.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

from ddp_lessons.course.lesson_files import PACKAGE, CommandError

# Settings for this server only: it does not ask whether to fetch news. They are defaults, so the
# user's own choice in JupyterLab's settings has priority.
SETTINGS = PACKAGE / "cli" / "jupyter"
PATH = "JUPYTER_CONFIG_PATH"


def become_lab(folder: Path, file: str, options: list[str]) -> NoReturn:
    """Replace this process by JupyterLab with a lesson open.

    Parameters
    ----------
    folder : Path
        The copy, the server's root folder.
    file : str
        The lesson's file in it.
    options : list of str
        More options for ``jupyter lab``; they come last, so they have priority.

    Raises
    ------
    CommandError
        If JupyterLab is not installed, or would refuse to start for root.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise CommandError("JupyterLab is not installed: pip install jupyterlab")
    if os.geteuid() == 0 and not _root_may(options):
        raise CommandError(
            "you are root, for whom JupyterLab starts only if told so: ddp-lessons --allow-root"
        )
    sys.stdout.flush()
    os.execve(sys.executable, command(folder, file, options), environment())


def _root_may(options: list[str]) -> bool:
    """True if an option allows root, or a configuration file exists that may."""
    if any("allow-root" in option or "allow_root" in option for option in options):
        return True
    from jupyter_core.paths import jupyter_config_path

    names = ("jupyter", "jupyter_server", "jupyter_lab")
    files = [
        Path(folder, f"{name}_config.{kind}")
        for folder in jupyter_config_path()
        for name in names
        for kind in ("py", "json")
    ]
    return any(file.is_file() and "allow_root" in file.read_text() for file in files)


def command(folder: Path, file: str, options: list[str]) -> list[str]:
    """The command line; -P keeps files in the current folder from hiding Jupyter's modules."""
    root = f"--ServerApp.root_dir={folder.resolve()}"
    return [
        *(sys.executable, "-P", "-m", "jupyterlab"),
        *(root, f"--LabApp.default_url=/lab/tree/{file}", *options),
    ]


def environment() -> dict[str, str]:
    """The process's environment, with our settings added to Jupyter's configuration path."""
    paths = [path for path in (os.environ.get(PATH), str(SETTINGS)) if path]
    return {**os.environ, PATH: os.pathsep.join(paths)}
