"""The command `ddp-lessons`: parses its arguments and calls the module for each subcommand.

Runs in the command's own process. Without a subcommand it opens lesson 00. `open`, `list` and
`--help` import nothing heavy.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import operator
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import ddp_lessons
from ddp_lessons.cli.jupyterlab import become_lab
from ddp_lessons.cli.lesson_copies import bring, changed, find_copy, is_copy, reset
from ddp_lessons.course.lesson_files import CommandError, Lesson, find, lessons, source, tasks
from ddp_lessons.course.progress import Counts, UnreadableProgress, containing, path_beside, read

FOLDER = Path("ddp-lessons")
JUPYTER_FLAGS = ("--allow-root", "--debug", "--expose-app-in-browser")
JUPYTER_VALUES = (
    *("--port", "--port-retries", "--ip", "--certfile", "--keyfile"),
    *("--browser", "--config", "--log-level"),
)
JUPYTER_TRAIT = re.compile(r"--[A-Z]\w+\.\w+=")  # --ServerApp.root_dir=...
ABOUT = "Learn PyTorch distributed training by running it, in JupyterLab."
MORE = """\
examples:
  ddp-lessons                          open the course (it is copied to ./ddp-lessons once)
  ddp-lessons open 7 --no-browser --port 8889
                                       open lesson 07 on a server, on another port
  ddp-lessons --allow-root             as root, in a container

Well-known options of JupyterLab are taken as they are; any other goes after --.

What you change in a lesson is never overwritten: a new version is a new folder beside yours.
To begin a lesson afresh: ddp-lessons reset 7 (your own is kept beside it).
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors say where options of Jupyter go."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit with code 2."""
        if message.startswith("argument COMMAND: invalid choice"):
            message += "\nTo open a lesson: ddp-lessons open 7"
        if "invalid choice" in message or message.startswith("unrecognized arguments: -"):
            message += "\nOther options of JupyterLab go after --: ddp-lessons open 7 -- --OPTION"
        super().error(message)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = sys.argv[1:] if argv is None else argv
    cut = given.index("--") if "--" in given else len(given)
    parser = _parser()
    ours, jupyters = _apart(given[:cut])
    arguments = parser.parse_args(ours)
    if given[cut:] and arguments.command not in (None, "open"):
        parser.error(f"{arguments.command} takes nothing after --")
    try:
        return _dispatch(arguments, jupyters + given[cut + 1 :])
    except CommandError as error:
        print(f"ddp-lessons: {error}", file=sys.stderr)
        return 2


def _apart(given: list[str]) -> tuple[list[str], list[str]]:
    """Split our options from JupyterLab's that need no --; only `open` accepts the latter."""
    if {"copy", "list", "progress", "reset", "doctor", "export", "explain"} & {*given}:
        return given, []
    ours: list[str] = []
    jupyters: list[str] = []
    rest = iter(given)
    for word in rest:
        name, _, value = word.partition("=")
        if name in JUPYTER_FLAGS or JUPYTER_TRAIT.match(word):
            jupyters.append(word)
        elif name in JUPYTER_VALUES:
            jupyters += [word] if value else [word, *itertools.islice(rest, 1)]
        else:
            ours.append(word)
    return ours, jupyters


def _dispatch(arguments: argparse.Namespace, lab_options: list[str]) -> int:
    if arguments.command == "doctor":
        from ddp_lessons.cli.doctor import doctor

        return doctor()
    if arguments.command == "explain":
        from ddp_lessons.cli.explain import explain

        return explain(arguments.record.expanduser(), arguments.attempt, arguments.png)
    if arguments.command == "export":
        return export(arguments.notebook, arguments.function, arguments.args)
    folder = arguments.folder or containing(Path.cwd()) or FOLDER
    folder = folder.expanduser()
    if arguments.command == "copy":
        copy_lessons(source(), folder, "")
        return 0
    if arguments.command == "list":
        return list_lessons(folder)
    if arguments.command == "progress":
        return show_progress(folder)
    if arguments.command == "reset":
        return reset_lesson(arguments.lesson, folder)
    if arguments.no_browser:
        lab_options = ["--no-browser", *lab_options]
    return open_lesson(arguments.lesson, folder, lab_options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ddp-lessons",
        description=ABOUT,
        epilog=MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"ddp-lessons {ddp_lessons.__version__}"
    parser.add_argument("--version", action="version", version=version)
    _add_folder(parser, None)
    _add_no_browser(parser, False)
    parser.set_defaults(lesson="00")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    _add_open(commands)
    _add_folder(_add(commands, "copy", "copy the course here once, without opening it"))
    _add_folder(_add(commands, "list", "show the lessons, and which of them you have changed"))
    _add_folder(_add(commands, "progress", "show which predictions and exercises you have done"))
    _add_reset(commands)
    _add(commands, "doctor", "tell whether this machine can run ranks, and if not, why")
    _add_export(commands)
    _add_explain(commands)
    return parser


def _add(commands: Any, name: str, about: str) -> Any:
    """Add a subcommand; its help line in the list of commands is also its description."""
    return commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")


def _add_open(commands: Any) -> None:
    parser = _add(commands, "open", "open a lesson in JupyterLab (the course is copied here once)")
    parser.epilog = (
        "JupyterLab's --port, --ip, --allow-root and the like are taken, too, and any other of its "
        "options after --."
    )
    what = "a number (7) or a name (ddp_timing); without it, lesson 00"
    parser.add_argument("lesson", nargs="?", default=argparse.SUPPRESS, metavar="LESSON", help=what)
    _add_folder(parser)
    _add_no_browser(parser)


def _add_reset(commands: Any) -> None:
    parser = _add(commands, "reset", "begin a lesson afresh; your own copy of it is kept beside it")
    parser.add_argument("lesson", metavar="LESSON", help="a number (7) or a name (ddp_timing)")
    _add_folder(parser)


# An option that is allowed before and after a subcommand has its default only before it.
def _add_folder(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    about = "your copy of the lessons (by default ./ddp-lessons)"
    parser.add_argument("--folder", type=Path, metavar="PATH", default=default, help=about)


def _add_no_browser(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    about = "print the address only, as on a server"
    parser.add_argument("--no-browser", action="store_true", default=default, help=about)


def _add_export(commands: Any) -> None:
    parser = _add(
        commands, "export", "print a script for torchrun, made from a notebook's function"
    )
    parser.add_argument("notebook", type=Path, help="a .ipynb file; nothing of it is executed")
    parser.add_argument(
        "function", help="a function that a cell defines, called as function(rank, ...)"
    )
    parser.add_argument(
        "--args",
        metavar="TEXT",
        help="the arguments after rank, as in --args \"1000, 'x'\"; "
        "by default those of the function's first launch(...)",
    )


def _add_explain(commands: Any) -> None:
    parser = _add(commands, "explain", "explain a recorded job: what failed or hangs, and where")
    parser.epilog = (
        "A job is recorded by torchrun ... -m ddp_lessons.record train.py. It may still run or "
        "hang. Exit code: 0 if every rank came to its end, 1 if not."
    )
    parser.add_argument("record", type=Path, help="the folder that DDP_LESSONS_RECORD named")
    about = "which of torchrun's attempts, from 0; by default -1, the last"
    parser.add_argument("--attempt", type=int, default=-1, metavar="N", help=about)
    about = "draw every rank's last calls, too"
    parser.add_argument("--png", type=Path, metavar="FILE", help=about)


def export(notebook: Path, function: str, args: str | None = None) -> int:
    """Print the script; or the reason on stderr and return 2, if none can be made."""
    from ddp_lessons.cli.export import CannotExport, script

    try:
        print(script(notebook, function, args), end="")
    except CannotExport as error:
        print(f"ddp-lessons export: {error}", file=sys.stderr)
        return 2
    return 0


def open_lesson(name: str, folder: Path, lab_options: list[str]) -> int:
    """Copy the lessons if needed, and replace this process by JupyterLab on one of them."""
    course = source()
    lesson = find(name, lessons(course))
    become_lab(copy_lessons(course, folder, lesson.file), lesson.file, lab_options)


def copy_lessons(course: Path, folder: Path, wanted: str) -> Path:
    """Copy the lessons if needed, say where they are, and return that folder."""
    copy = find_copy(course, folder)
    if bring(course, copy, wanted):
        print(f"The lessons are now in {copy}/, for you to change.")
        if copy != folder:
            print(f"{folder}/ holds another version, or files of your own, and stays as it is.")
    return copy


def reset_lesson(name: str, folder: Path) -> int:
    """Put a lesson in the copy back to its first state."""
    course = source()
    lesson = find(name, lessons(course))
    copy = find_copy(course, folder)
    if not is_copy(course, copy):
        print(_state(course, folder))
        return 2
    kept = reset(course, copy, lesson.file)
    print(f"{copy / lesson.file} is as it was at first; yours is now {kept}, beside it.")
    print("Is it open in JupyterLab? There, File > Reload Notebook from Disk.")
    return 0


def show_progress(folder: Path) -> int:
    """Print for each lesson how many predictions were made and exercises passed."""
    course = source()
    path = path_beside(folder)
    try:
        done = read(path)
    except UnreadableProgress as error:
        raise CommandError(str(error)) from error
    rows = [(lesson, done.of(tasks(course / lesson.file))) for lesson in lessons(course)]
    rows = [(lesson, counts) for lesson, counts in rows if counts.predictions + counts.exercises]
    named = [(_name(lesson, [one for one, _ in rows]), counts) for lesson, counts in rows]
    width = len(named[0][0])
    print(f"{'lesson':<{width}}  predicted   right   exercises")
    for name, counts in named:
        print(_progress_line(name, counts))
    total = functools.reduce(operator.add, (one for _, one in rows))
    print(_progress_line(f"{'in all':<{width}}", total))
    where = (
        f"is kept in {path}" if path.exists() else f"will be kept in {path}; nothing is done yet"
    )
    print(f"\nYour progress {where}. It never leaves this machine.")
    return 0


def _progress_line(name: str, done: Counts) -> str:
    predicted = f"{done.predicted} of {done.predictions}"
    return f"{name}  {predicted:>9}   {done.right:>5}   {done.passed} of {done.exercises}"


def list_lessons(folder: Path) -> int:
    """Print a line for each lesson, and the state of the learner's copy."""
    course = source()
    found = lessons(course)
    for lesson in found:
        print(f"{_name(lesson, found)}  {lesson.minutes:>2} min  {lesson.question}")
    print()
    print(_state(course, folder))
    return 0


def _name(lesson: Lesson, among: Sequence[Lesson]) -> str:
    """Number and name, as wide as the widest of the lessons among which it is shown."""
    return f"{lesson.number:<6}  {lesson.name:<{max(len(one.name) for one in among)}}"


def _state(course: Path, folder: Path) -> str:
    copy = find_copy(course, folder)
    if not is_copy(course, copy):
        place = "" if folder == FOLDER else f" --folder {folder}"
        return f"No copy of these lessons yet: `ddp-lessons{place}` makes it in {copy}/."
    short = {lesson.file: lesson.number or lesson.name for lesson in lessons(course)}
    names = [short.get(file, file) for file in changed(course, copy)]
    return f"Your copy: {copy.resolve()}\nChanged by you: {', '.join(names) or 'none'}"
