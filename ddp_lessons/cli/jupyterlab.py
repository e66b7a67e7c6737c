"""JupyterLab on a copy of the lessons, for the command `ddp-lessons`, which becomes that server.

The process is replaced, not started: Ctrl-C, the exit code and the printed address with its token
are then Jupyter's own. It listens on loopback and asks for its token, as Jupyter does by itself.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

from ddp_lessons.cli.lesson_files import PACKAGE, CommandError

# A folder of settings that hold for this server only: it does not ask whether to fetch news. A
# user's own choice in JupyterLab's settings stands above it, since these are defaults.
SETTINGS = PACKAGE / "cli" / "jupyter"
PATH = "JUPYTER_CONFIG_PATH"


def become_lab(folder: Path, file: str, options: list[str]) -> NoReturn:
    """Replace this process by JupyterLab with a lesson open.

    Parameters
    ----------
    folder : Path
        The copy, the root of what the server shows.
    file : str
        The lesson's file in it.
    options : list of str
        More options for ``jupyter lab``; they win, since they come last.

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
    """True if root is allowed by an option, or may be by a file of settings."""
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
    """The command line; -P keeps files of the current folder from passing for Jupyter's modules."""
    root = f"--ServerApp.root_dir={folder.resolve()}"
    return [
        *(sys.executable, "-P", "-m", "jupyterlab"),
        *(root, f"--LabApp.default_url=/lab/tree/{file}", *options),
    ]


def environment() -> dict[str, str]:
    """The environment of this process, with our settings added to Jupyter's path of settings."""
    paths = [path for path in (os.environ.get(PATH), str(SETTINGS)) if path]
    return {**os.environ, PATH: os.pathsep.join(paths)}
