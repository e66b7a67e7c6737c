"""Run a notebook's cells without Jupyter: `python -m benchmarks.run_notebook NOTEBOOK FOLDER`.

FOLDER gets the notebook with its new outputs and every picture as a file. After a cell that fails
the next one runs, so that one call returns as much as possible. The exit code is the number of
cells that failed. Cells tagged `remove-cell` are for Jupyter and are left out.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import linecache
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

Output = dict[str, Any]


def run(notebook: dict[str, Any]) -> int:
    """Run all code cells in one `__main__` and replace their outputs; return how many failed."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    failed = number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code" or "remove-cell" in cell["metadata"].get("tags", ()):
            continue
        number += 1
        cell["outputs"] = outputs = run_cell("".join(cell["source"]), number, main.__dict__)
        cell["execution_count"] = number
        failed += any(output["output_type"] == "error" for output in outputs)
    return failed


def run_cell(source: str, number: int, namespace: dict[str, Any]) -> list[Output]:
    """Run one cell and return its outputs as a notebook stores them."""
    name = f"Cell In[{number}]"
    # As in IPython: linecache keeps text without a modification time, so tracebacks show its lines.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    outputs: list[Output] = []
    result = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            statements = ast.parse(source, name).body
            last = statements[-1] if statements else None
            if isinstance(last, ast.Expr):
                statements.pop()
            exec(compile(ast.Module(statements, []), name, "exec"), namespace)
            if isinstance(last, ast.Expr):
                result = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
        except Exception as error:
            outputs.append(failure(error))
    if printed.getvalue():
        outputs.insert(0, stream(printed.getvalue()))
    figures = [plt.figure(n) for n in plt.get_fignums()]
    if result is not None:
        outputs.append(
            {"output_type": "execute_result", "execution_count": number, **bundle(result)}
        )
    outputs += [{"output_type": "display_data", **picture(figure)} for figure in figures]
    plt.close("all")
    return outputs


def stream(text: str) -> Output:
    """A cell's printed output."""
    return {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}


def failure(error: Exception) -> Output:
    """A cell's exception."""
    return {
        "output_type": "error",
        "ename": type(error).__name__,
        "evalue": str(error),
        "traceback": traceback.format_exc().splitlines(),
    }


def bundle(value: Any) -> dict[str, Any]:
    """A value as text, and as HTML if it has that form."""
    data = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(keepends=True)
    return {"data": data, "metadata": {}}


def picture(figure: Any) -> dict[str, Any]:
    """A figure as IPython's inline backend stores it."""
    buffer = io.BytesIO()
    text = repr(figure)
    figure.savefig(buffer, format="png", bbox_inches="tight")
    png = base64.b64encode(buffer.getvalue()).decode()
    return {"data": {"image/png": png, "text/plain": [text]}, "metadata": {}}


def show(notebook: dict[str, Any], folder: Path) -> None:
    """Print every cell's outputs, and write the pictures."""
    for cell in notebook["cells"]:
        for place, output in enumerate(cell.get("outputs", ())):
            head = f"--- cell {cell['execution_count']}: "
            print(head + "".join(cell["source"]).splitlines()[-1])
            if "traceback" in output:
                print("\n".join(output["traceback"]))
                continue
            data = output.get("data", {})
            print("".join(output.get("text", data.get("text/plain", ""))).rstrip())
            if "image/png" in data:
                file = folder / f"cell-{cell['execution_count']:02}-{place}.png"
                file.write_bytes(base64.b64decode(data["image/png"]))


def main() -> int:
    """Run the notebook named on the command line."""
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    notebook = json.loads(path.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    failed = run(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    (folder / path.name).write_text(text + "\n", encoding="utf-8")
    show(notebook, folder)
    print(f"cells that failed: {failed}")
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())
