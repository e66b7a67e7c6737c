"""`plots.hang_board`: which ranks made which call, and where each is now. Runs in the parent."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.patches import Patch, Rectangle

from ddp_lessons.diagnosis.calls import Call, Calls
from ddp_lessons.diagnosis.rank_state import position, waits
from ddp_lessons.plots import style
from ddp_lessons.plots.docstrings import documented
from ddp_lessons.text import count, exit_name, ranks_text
from ddp_lessons.wire.ops import JOINING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

    from ddp_lessons.results import RankResult
    from ddp_lessons.run import Run

MOST_COLUMNS = 6
MOST_ROWS = 8  # with more ranks, those that did the same share a row
WIDTH, HEIGHT = 0.94, 0.72  # of a cell
FONT = 8.5
NOTE = 44  # characters beside a row
NOTE_WIDTH = 3.9  # cells
NBSP = "\N{NO-BREAK SPACE}"

SAME: dict[str, Any] = {"facecolor": style.BLUE, "edgecolor": style.BLUE}
OTHER: dict[str, Any] = {"facecolor": style.ORANGE, "edgecolor": style.ORANGE}
OTHER_WAITS: dict[str, Any] = {**OTHER, "edgecolor": style.INK, "hatch": "////", "linewidth": 0.6}
NEVER: dict[str, Any] = {"facecolor": "none", "edgecolor": style.EDGE, "linestyle": "--"}
LABELS = {
    "same": ("done", SAME),
    "waits": ("waits, or lost its partner", style.WAIT_LOOK),
    "other": ("another call than most ranks make", OTHER),
    "never": ("did not come", NEVER),
}
MARKS = {"waits": "…", "other": "!", "never": "–"}  # in a table of text


class Cell(NamedTuple):
    """What a rank did in one column."""

    text: str
    looks: tuple[str, ...]  # keys of LABELS


class Column(NamedTuple):
    """One call, in the order of calls."""

    label: str
    calls: dict[int, Call]
    ranks: tuple[int, ...]  # ranks that must take part
    t0_ns: int  # arrival of the first rank


class Row(NamedTuple):
    """One rank, or ranks that did the same."""

    label: str
    cells: tuple[Cell | None, ...]  # None: the rank is not in that group
    note: str  # the line where it is


@documented
def hang_board(run: Run, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw a table of ranks x calls, in call order: who came, who waits, who called something else.

    It shows the last six calls before the hang, and beside each row the line where the rank is. In
    runs of more than eight ranks, ranks that did the same share a row. Any run of
    `launch(..., check=False)` can be drawn, also one that went well.

    Parameters
    ----------
    run : Run
        The run; of a failed one, `error.run`.
    {title}; by default the title of the run's verdict.
    {ax}
    """
    columns = _columns(run)
    shown = columns[-MOST_COLUMNS:]
    rows = _rows(run, shown)
    ax = ax or style.new_axes(len(rows), 1.15)
    ax.set_xlim(0, max(1, len(shown)) + NOTE_WIDTH)
    for y, row in enumerate(rows):
        for x, cell in enumerate(row.cells):
            if cell is not None:
                _draw(ax, x, y, cell)
        note = textwrap.shorten(row.note, NOTE, placeholder="…")
        # No parse_math: a line of code may contain two dollar signs.
        look: dict[str, Any] = {"family": "monospace", "fontsize": FONT, "parse_math": False}
        ax.text(len(shown) + 0.12, y, note, va="center", **look)
    _label(ax, rows, shown, len(columns) - len(shown))
    used = {look for row in rows for cell in row.cells if cell for look in cell.looks}
    legend = [Patch(**look, label=text) for key, (text, look) in LABELS.items() if key in used]
    finding = title or (run.verdict.title if run.verdict else "every rank came to every call")
    style.head(ax, finding, legend)
    return ax


def as_text(run: Run) -> str:
    """The same as a table of text, with a mark where a rank waits or makes another call."""
    columns = _columns(run)
    shown = columns[-MOST_COLUMNS:]
    head = ["", *(" ".join(column.label.split()) for column in shown), "now"]
    table = [head, *([row.label, *map(_as_text, row.cells), row.note] for row in _rows(run, shown))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    if earlier := len(columns) - len(shown):
        lines.append(f"not shown: {count(earlier, 'earlier call')}")
    marks = {look for row in _rows(run, shown) for cell in row.cells if cell for look in cell.looks}
    lines += [f"{mark} {LABELS[look][0]}" for look, mark in MARKS.items() if look in marks]
    return "\n".join(lines)


def _as_text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    marks = "".join(MARKS.get(look, "") for look in cell.looks if look != "never")
    return " ".join([*cell.text.split(), *([marks] if marks else [])])


def _columns(run: Run) -> list[Column]:
    """The calls, in order of the first arrival."""
    calls = Calls.of(run)
    still = {(call.rank, call.group, call.seq): call.state for call in _still(run, calls)}
    found = []
    for group, numbers in calls.met.items():
        name = "" if group == "world" else f"\nin group\n{group.replace(' #', f', no.{NBSP}')}"
        for seq, made in numbers.items():
            there = {
                rank: call._replace(state=still.get((rank, group, seq), call.state))
                for rank, call in made.items()
            }
            found.append(_column(f"call {seq + 1}{name}", there, calls.members(group)))
    standing = [calls.standing(rank) for rank in range(calls.world_size)]
    for call in standing:
        if call is not None and call.pairwise:
            found.append(_pair(call))
    joining = {call.rank: call for call in standing if call is not None and call.op in JOINING}
    if joining:
        found.append(_column("to join", joining, range(calls.world_size)))
    return sorted(found, key=lambda column: column.t0_ns)


def _still(run: Run, calls: Calls) -> Iterator[Call]:
    """The calls that ranks are in, or in which they lost a partner.

    Work in flight, such as the buckets of a backward, counts as done for its rank, unless that
    waits for it.
    """
    for rank in run.ranks:
        yield from (opened := calls.open(rank.rank))
        last = calls.last_met(rank.rank)
        if not opened and last is not None and waits(rank) and calls.missing(last):
            yield last._replace(state="failed")


def _column(label: str, calls: dict[int, Call], ranks: Sequence[int]) -> Column:
    return Column(label, calls, tuple(ranks), min(call.t0_ns for call in calls.values()))


def _pair(call: Call) -> Column:
    """The column of an unmatched send or recv."""
    peer = "any" if call.peer is None else call.peer
    arrow = "→" if "send" in call.op else "←"
    ranks = [call.rank] if call.peer is None else [call.rank, call.peer]
    return _column(f"{call.rank} {arrow} {peer}", {call.rank: call}, ranks)


def _rows(run: Run, columns: Sequence[Column]) -> list[Row]:
    """One row for each rank, or for ranks that did the same."""
    odd = [_odd(column) for column in columns]
    found: dict[object, list[int]] = {}
    for rank in run.ranks:
        pairs = zip(columns, odd, strict=True)
        cells = tuple(_cell(column, rank.rank, others) for column, others in pairs)
        alone = rank.rank if run.world_size <= MOST_ROWS else None
        found.setdefault((alone, cells, _note(rank)), []).append(rank.rank)
    return [Row(ranks_text(ranks), key[1], key[2]) for key, ranks in found.items()]  # type: ignore[index]


def _odd(column: Column) -> set[int]:
    """The ranks whose call differs from the most common one."""
    kinds = {rank: (*call.kind[:2], call.look) for rank, call in column.calls.items()}
    ((most, _),) = Counter(kinds.values()).most_common(1)
    return {rank for rank, kind in kinds.items() if kind != most}


def _cell(column: Column, rank: int, odd: set[int]) -> Cell | None:
    call = column.calls.get(rank)
    if call is None:
        return Cell("–", ("never",)) if rank in column.ranks else None
    looks = ["other"] if rank in odd else []
    looks += ["waits"] if call.state != "done" else []
    return Cell(f"{call.op}{_unlike(column, call)}", tuple(looks) or ("same",))


def _unlike(column: Column, call: Call) -> str:
    """A second line if tensors differ in the call: this one's shape, or else its dtype."""
    alike = [other for other in column.calls.values() if other.op == call.op]
    if len({other.look for other in alike}) == 1 or call.tensor is None:
        return ""
    dtype, _, shape = call.tensor.partition(" ")
    shapes = {other.tensor.partition(" ")[2] for other in alike if other.tensor}
    return f"\n{shape if len(shapes) > 1 else dtype}"


def _note(rank: RankResult) -> str:
    """Where a rank is, or how it ended, in a few words."""
    frame = position(rank).frame
    where = f"line {frame.lineno}: {frame.source}".removesuffix(": ") if frame else ""
    match rank.status:
        case "returned" | "unsendable":
            return "has returned"
        case "died":
            return f"died: {exit_name(rank.exitcode)}"
        case "raised" if not waits(rank):
            return f"{rank.error.type_name if rank.error else 'raised'}, {where}"
    if waits(rank) or not where:
        return where or rank.activity or "did not answer"
    return f"{rank.activity or 'stopped'}, {where}"


def _draw(ax: Axes, x: int, y: int, cell: Cell) -> None:
    look = OTHER_WAITS if len(cell.looks) > 1 else LABELS[cell.looks[0]][1]
    corner = x + (1 - WIDTH) / 2, y - HEIGHT / 2
    ax.add_patch(Rectangle(corner, WIDTH, HEIGHT, **look))
    box = {"facecolor": look["facecolor"], "edgecolor": "none", "pad": 1}
    style.write(
        ax,
        _texts(cell.text),
        (x, x + 1),
        y,
        FONT - 0.5,
        color=style.ink_on(look["facecolor"]),
        bbox=box if "hatch" in look else None,
    )


def _texts(text: str) -> list[str]:
    """The text and shorter alternatives; one of them is the second line alone."""
    return [text, text.partition("\n")[2] or text.replace("_tensor", ""), f"{text[:7]}…"]


def _label(ax: Axes, rows: Sequence[Row], columns: Sequence[Column], left_out: int) -> None:
    ax.set_yticks(range(len(rows)), [row.label for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    width = max(8, int(style.points_per_unit(ax) / (style.CHARACTER * FONT)))  # characters
    labels = [_folded(column.label, width) for column in columns]
    ax.set_xticks([x + 0.5 for x in range(len(columns))], labels, fontsize=FONT)
    if left_out:
        ax.set_xlabel(f"not shown: {count(left_out, 'earlier call')}", fontsize=FONT, loc="left")
    if not columns:
        ax.set_xlabel("no rank called torch.distributed", fontsize=FONT, loc="left")
    style.bare(ax)
    ax.tick_params(axis="x", length=0)
    ax.spines["bottom"].set_visible(False)


def _folded(label: str, width: int) -> str:
    """A column's label with its lines folded: neighbours with the names of groups must not meet."""
    lines = label.split("\n")
    return "\n".join(textwrap.fill(line, width, break_long_words=False) for line in lines)
