"""Execute notebooks from a fresh kernel and store their outputs, normalised: `make notebooks`.

What differs from run to run without meaning anything is removed, so that a change in a stored
notebook is a change in what a learner sees. Cells tagged `raises-exception` may fail; others not.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELL_SECONDS = 120
PICTURES = Path("notebooks/pictures")
README_PICTURES = {  # (notebook, the place of the picture in it): the file that README.md shows
    ("00_start_here", 0): "00_start_here.png",
    ("07_ddp_timing", 1): "07_buckets.png",
    ("07_ddp_timing", 7): "07_waits.png",
    ("10_hang_clinic", 1): "10_hang_board.png",
}
MOST_BYTES = 1 << 20  # of a notebook with its outputs
_TITLE = re.compile(r'title="([^"]+)"')  # a picture's title states what it shows: its alt text
_CELL_FILE = re.compile(r"/\S*/ipykernel_\d+/\d+\.py")


def store(path: Path) -> None:
    """Run one notebook and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    write(notebook, path)
    if path.parent.name == "notebooks":
        for (stem, place), name in README_PICTURES.items():
            if stem == path.stem:
                (PICTURES / name).write_bytes(base64.b64decode(pictures(notebook)[place]))


def adopt(executed: Path, path: Path) -> None:
    """Store the outputs of a copy that was run elsewhere: on a GPU, by `benchmarks/gpu.sh`."""
    notebook, stored = (nbformat.read(p, as_version=4) for p in (executed, path))
    if [c.source for c in notebook.cells] != [c.source for c in stored.cells]:
        sys.exit(f"{executed} has other cells than {path}")
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = number  # also of the first cell, which only Jupyter runs
    write(notebook, path)


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook that was run, normalised; exit if it is too large."""
    normalise(notebook)
    nbformat.write(notebook, path)
    size = path.stat().st_size
    print(f"{path}: {size // 1024} kB")
    if size > MOST_BYTES:
        sys.exit(f"{path} is larger than {MOST_BYTES} bytes")


def pictures(notebook: nbformat.NotebookNode) -> list[str]:
    """The pictures of a notebook, as base64."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [str(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Remove what changes from run to run: widget state, Python's version, times, cell files."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        for output in cell.outputs:
            if "image/png" in output.get("data", {}) and (titles := _TITLE.findall(cell.source)):
                output.metadata["image/png"] = {"alt": "; ".join(titles)}
            for line in range(len(output.get("traceback", ()))):
                output.traceback[line] = _CELL_FILE.sub("cell", output.traceback[line])


def main() -> None:
    """Run and store the notebooks named on the command line, or `--from EXECUTED NOTEBOOK`."""
    os.environ["DDP_LESSONS_LIVE"] = "0"  # a panel of the run would be stored, too
    if sys.argv[1:2] == ["--from"]:
        adopt(*map(Path, sys.argv[2:]))
        return
    for name in sys.argv[1:]:
        store(Path(name))


if __name__ == "__main__":
    main()
