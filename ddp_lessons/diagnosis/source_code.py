"""Reads the learner's code around a line: branches, loops, and what a loop goes over.

Runs in the parent. mismatch.py, hangs.py and notes.py ask it. What does not parse, as a cell with
an IPython magic, has no branches and no loops.
"""

from __future__ import annotations

import ast
import functools
import linecache
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ddp_lessons.wire.owners import Owner, owner_of
from ddp_lessons.wire.records import Caught, Frame, split_site
from ddp_lessons.wire.stacks import is_cell

_FILES = 256  # kept at most
_DEPTH = 2  # functions followed, one calling the other, to where an optimizer steps
# What a condition that is true on some ranks only is about: `rank == 0`, `is_main_process()`.
_OF_RANK = re.compile(r"rank|(?<![a-z])main|master|leader|chief|primary", re.IGNORECASE)
_LEAVING = (ast.Return, ast.Continue, ast.Break)


_UNKNOWN = ast.Module([], [])
_trees: dict[str, tuple[list[str], ast.Module]] = {}  # by file: its lines, and what they say


def _parsed(filename: str) -> ast.Module:
    """The code of a file or cell; nothing if it is not known, or no Python.

    As long as linecache has the same lines, it is the same object.
    """
    lines = linecache.getlines(filename)
    known, tree = _trees.get(filename, ([], _UNKNOWN))
    if lines and known is not lines:
        if len(_trees) >= _FILES:
            _trees.clear()
        _trees[filename] = lines, (tree := _parse("".join(lines)))
    return tree if lines else _UNKNOWN


def _parse(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError:
        return _UNKNOWN


def exclusive(one: str | None, other: str | None) -> bool:
    """Whether two lines are in different branches of one `if`."""
    if one is None or other is None:
        return False
    (file, line), (other_file, other_line) = split_site(one), split_site(other)
    return file == other_file and _exclusive(_parsed(file), line, other_line)


@functools.lru_cache(maxsize=256)
def _exclusive(tree: ast.Module, line: int, other_line: int) -> bool:
    return any(
        (_within(node.body, line) and _within(node.orelse, other_line))
        or (_within(node.body, other_line) and _within(node.orelse, line))
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
    )


def optional(one: str | None, other: str | None, *, by_loops: bool = True) -> str | None:
    """Of two lines of one function, the one to which only some ranks may come.

    It is under an `if`, or behind one that may leave, and the other one is not; or else, with
    `by_loops`, it is in a loop of its own. None if that tells nothing: neither or both are, or they
    are in branches of one `if`, or the other one is in a loop of its own, which ranks may leave at
    different times, and the `if` does not ask for a rank.
    """
    if one is None or other is None or one == other:
        return None
    (file, line), (other_file, other_line) = split_site(one), split_site(other)
    way, other_way = _way_to(file, line), _way_to(other_file, other_line)
    if file != other_file or _functions(way) != _functions(other_way):
        return None
    under, other_under = _chosen(file, line), _chosen(other_file, other_line)
    under, other_under = under - other_under, other_under - under
    loops, other_loops = _loops_in(way), _loops_in(other_way)
    loops, other_loops = loops - other_loops, other_loops - loops
    if {node for node, _ in under} & {node for node, _ in other_under}:
        return None
    if by_loops and not under and not other_under:
        under, other_under = loops, other_loops
    elif (other_loops if under else loops) and not _asks_for_rank(under or other_under):
        return None
    if bool(under) == bool(other_under):
        return None
    return one if under else other


def _asks_for_rank(branches: Iterable[tuple[ast.AST, str]]) -> bool:
    tests = [node.test for node, _ in branches if isinstance(node, ast.If)]
    return any(_OF_RANK.search(ast.unparse(test)) for test in tests)


def next_of(one: str, other: str, before: str | None) -> str | None:
    """Of two lines of one function, the one that comes next after line `before`.

    Of two in no common loop it is the first. None if that tells nothing, as in branches of one
    `if`, or where one of them is in a loop within the common one.
    """
    (file, line), (other_file, other_line) = split_site(one), split_site(other)
    way, other_way = _way_to(file, line), _way_to(other_file, other_line)
    if file != other_file or _functions(way) != _functions(other_way) or exclusive(one, other):
        return None
    first, second = sorted((one, other), key=lambda site: split_site(site)[1])
    loops, other_loops = _loops_in(way), _loops_in(other_way)
    if not loops & other_loops:
        return first
    at_file, at = split_site(before) if before is not None else ("", 0)
    if loops != other_loops or at_file != file or not loops <= _loops_in(_way_to(file, at)):
        return None
    return second if split_site(first)[1] <= at < split_site(second)[1] else first


def depends_on_rank(frame: Frame) -> bool:
    """Whether only some ranks come to a line in its function: an `if` around or before it asks."""
    return _asks_for_rank(_chosen(frame.filename, frame.lineno))


Way = tuple[tuple[ast.AST, str], ...]  # statements around a line, and in which of their parts it is


def _way_to(file: str, line: int) -> Way:
    """The functions, loops and branches around a line, from the outermost on."""
    return _way(_parsed(file), line)


@functools.lru_cache(maxsize=256)
def _way(tree: ast.Module, line: int) -> Way:
    kinds = (
        ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.For, ast.While,
        ast.ExceptHandler, ast.match_case,
    )  # fmt: skip
    found = [
        (node, part)
        for node in ast.walk(tree)
        if isinstance(node, kinds)
        for part in ("body", "orelse")
        if _within(getattr(node, part, []), line)
    ]
    return tuple(sorted(found, key=lambda step: getattr(*step)[0].lineno))


def _chosen(file: str, line: int) -> set[tuple[ast.AST, str]]:
    """The branches of its function that a line is in, and the `if`s before it that may leave."""
    way = _way_to(file, line)
    functions = _functions(way)
    inner = way[way.index((functions[-1], "body")) + 1 :] if functions else way
    blocks = [getattr(node, part) for node, part in inner]
    if functions:
        blocks.append(functions[-1].body)
    before = {
        (node, "after")
        for block in blocks
        for node in block
        if isinstance(node, ast.If) and (node.end_lineno or node.lineno) < line
        if any(part and isinstance(part[-1], _LEAVING) for part in (node.body, node.orelse))
    }
    return _conditions(inner) | before


def _loops_in(way: Way) -> set[tuple[ast.AST, str]]:
    return {step for step in way if isinstance(step[0], ast.For | ast.While)}


class Lines(NamedTuple):
    """Some lines of a file."""

    file: str
    first: int
    last: int

    def holds(self, frame: Frame) -> bool:
        """Whether a line is among them."""
        return frame.filename == self.file and self.first <= frame.lineno <= self.last


def guarded(caught: Caught) -> Lines | None:
    """The lines that an exception may have left out: what the `try` or `with` that caught it holds.

    None if they are not known.
    """
    (file, line), (_, handler) = split_site(caught.passed), split_site(caught.handler)
    found = []
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.Try | ast.TryStar):
            catches = any(_holds(each, handler) for each in node.handlers)
        elif isinstance(node, ast.With | ast.AsyncWith):
            catches = node.lineno <= handler < node.body[0].lineno
        else:
            continue
        if catches and _within(node.body, line):
            found.append(_lines_in(file, node))
    return max(found, key=lambda lines: lines.first, default=None)


def swallowed(frame: Frame) -> tuple[Lines, int] | None:
    """The `try` around a line from which an exception does not get out, and its `except`.

    None if there is none, or it always raises.
    """
    nodes = [
        node
        for node in ast.walk(_parsed(frame.filename))
        if isinstance(node, ast.Try | ast.TryStar)
        and (_within(node.body, frame.lineno) or _within(node.orelse, frame.lineno))
    ]
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):
        for handler in node.handlers:
            ends = {"KeyboardInterrupt", "SystemExit"} & {n.id for n in _names(handler.type)}
            if not ends and not isinstance(handler.body[-1], ast.Raise):
                return _lines_in(frame.filename, node), handler.lineno
    return None


def handles(file: str, line: int, other: int) -> bool:
    """Whether a line is in an `except` of the `try` around another, and that does not fail anew."""
    return any(
        _within(handler.body, other) and not _fails_after(handler.body, other)
        for node in ast.walk(_parsed(file))
        if isinstance(node, ast.Try | ast.TryStar) and _within(node.body, line)
        for handler in node.handlers
    )


def _fails_after(block: Sequence[ast.stmt], line: int) -> bool:
    """Whether a line of a block leads to a statement that raises, or ends the process."""
    return _fails(block[-1]) or any(
        _fails_after(part, line) for node in block for part in _blocks(node) if _within(part, line)
    )


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The blocks of a statement: its `body`, its `else`, those of its `except`s."""
    for _, value in ast.iter_fields(node):
        parts = value if isinstance(value, list) else []
        if parts and isinstance(parts[0], ast.stmt):
            yield parts
        for part in parts:
            if isinstance(part, ast.ExceptHandler | ast.match_case):
                yield from _blocks(part)


def _fails(node: ast.stmt) -> bool:
    """Whether a statement raises, or ends the process."""
    match node:
        case ast.Raise():
            return True
        case ast.Expr(value=ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name))):
            return name in ("exit", "_exit", "quit", "abort")
    return False


def _names(node: ast.expr | None) -> list[ast.Name]:
    return [] if node is None else [n for n in ast.walk(node) if isinstance(n, ast.Name)]


def _lines_in(file: str, node: ast.Try | ast.TryStar | ast.With | ast.AsyncWith) -> Lines:
    block = [*node.body, *getattr(node, "orelse", ())]
    return Lines(file, block[0].lineno, block[-1].end_lineno or block[-1].lineno)


# What holds code that does not run where it stands.
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


class Loop(Lines):
    """The lines of a loop."""

    def is_before(self, frame: Frame) -> bool:
        """Whether a line comes after it, in the same function."""
        way = _way_to(self.file, frame.lineno)
        return (
            frame.filename == self.file
            and frame.lineno > self.last
            and _functions(way) == _functions(_way_to(self.file, self.first))
        )

    @property
    def ends_by_decision(self) -> bool:
        """Whether a rank may leave it by a decision: it is a `while`, or a line of it leaves."""
        return any(
            isinstance(node, ast.While) or any(map(_ends, node.body)) for node in self._nodes()
        )

    @property
    def may_skip(self) -> bool:
        """Whether a turn may make no step: by a `continue`, an `if`, or an exception it catches."""
        return _may_skip(self.file, self._own_nodes(), self.first, ast.Continue)

    def is_before_step(self, frames: Sequence[Frame], counted: str | None) -> bool | None:
        """Whether a stack in it is at a line before its step, or in the step, in every turn.

        `counted` is the site of the steps that were counted. None if none of the loop's calls makes
        those, or if the site is not known (`steps` counted) and it is not known which call does.
        """
        inside = max(number for number, frame in enumerate(frames) if self.holds(frame))
        steps = self.steps()
        if counted is not None:
            steps = [step for step in steps if _makes(self.file, step, *split_site(counted))]
        elif len(steps) > 1:
            steps = [step for step in steps if not _is_step(step) or _is_of_optimizer(step)]
        return _is_before(steps[0], frames[inside:]) if len(steps) == 1 else None

    def steps(self) -> list[ast.Call]:
        """The calls that make a step in its body, but in no function or loop there."""
        return _steps(self.file, self._own_nodes())

    def _own_nodes(self) -> list[ast.AST]:
        return [own for node in self._nodes() for own in _own_nodes(node.body)]

    def _nodes(self) -> list[ast.For | ast.While]:
        return [node for node in _loop_nodes(self.file) if node.lineno == self.first]


def _functions(way: Way) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node, _ in way if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _ends(node: ast.AST, in_another: bool = False) -> bool:
    """Whether a statement in a loop's body may end that loop."""
    if isinstance(node, _SCOPES):
        return False
    if isinstance(node, ast.Break):
        return not in_another
    in_another = in_another or isinstance(node, ast.For | ast.While)
    ends = isinstance(node, ast.Return) or (isinstance(node, ast.stmt) and _fails(node))
    return ends or any(_ends(child, in_another) for child in ast.iter_child_nodes(node))


def _is_step(call: ast.Call) -> bool:
    """Whether this is a call such as `optimizer.step()`; that of a scheduler is none."""
    match call.func:
        case ast.Attribute(value=owner, attr="step"):
            return not re.search(r"sched|\blr_|profiler|\bprof\b", ast.unparse(owner))
    return False


def _is_of_optimizer(step: ast.Call) -> bool:
    """Whether the name of what has the `step` is that of an optimizer."""
    owner = step.func.value if isinstance(step.func, ast.Attribute) else step.func
    return bool(re.search(r"opt|adam|sgd", ast.unparse(owner), re.IGNORECASE))


def _own_nodes(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """What is in a loop's body, but in no function or other loop there."""
    for node in body:
        yield node
        if not isinstance(node, (*_SCOPES, ast.For, ast.While)):
            yield from _own_nodes(ast.iter_child_nodes(node))


class _Function(NamedTuple):
    """A function that makes a step in its own body."""

    file: str
    node: ast.FunctionDef

    def own_nodes(self) -> Sequence[ast.AST]:
        return _own_nodes_of(self.node)


@functools.lru_cache(maxsize=4096)
def _own_nodes_of(function: ast.FunctionDef) -> Sequence[ast.AST]:
    return tuple(_own_nodes(function.body))


def _steps(file: str, nodes: Iterable[ast.AST], depth: int = _DEPTH) -> list[ast.Call]:
    """The calls such as `optimizer.step()`, and those of functions that make such a call."""
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return [call for call in calls if _is_step(call) or _stepping_functions(file, call, depth)]


def _stepping_functions(file: str, call: ast.Call, depth: int = _DEPTH) -> list[_Function]:
    """The learner's functions of a call's name, if each of them makes a step."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name) if depth:
            found = _functions_named(file, name)
            steps = (_steps(each.file, each.own_nodes(), depth - 1) for each in found)
            return found if all(steps) else []
    return []


def _makes(file: str, step: ast.Call, counted_in: str, line: int) -> bool:
    """Whether a call makes the step at a line, itself or by a function that it calls."""
    if _is_step(step):
        here = Lines(file, step.lineno, step.end_lineno or step.lineno)
        return here.holds(Frame(counted_in, line, ""))
    return any(
        _makes(function.file, inner, counted_in, line)
        for function in _stepping_functions(file, step)
        for inner in _steps(function.file, function.own_nodes())
    )


def _functions_named(file: str, name: str) -> list[_Function]:
    """Those in a file; for a cell that has none, those in the latest cell that has one."""
    others = [other for other in reversed(linecache.cache) if is_cell(other)]
    for each in (file, *(others if is_cell(file) else ())):
        if found := _functions_of(_parsed(each)).get(name):
            return [_Function(each, node) for node in found]
    return []


@functools.lru_cache(maxsize=_FILES)
def _functions_of(tree: ast.Module) -> dict[str, list[ast.FunctionDef]]:
    found: dict[str, list[ast.FunctionDef]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


def _may_skip(
    file: str,
    nodes: Sequence[ast.AST],
    first: int,
    leaving: type[ast.stmt],
    depth: int = _DEPTH,
) -> bool:
    """Whether these nodes, of a body whose first line is given, may make no step."""
    skips = [node.lineno for node in nodes if isinstance(node, leaving)]
    always = _conditions(_way_to(file, first))
    return any(
        any(line < step.lineno for line in skips)
        or any(not _counts(at) for at in _conditions(_way_to(file, step.lineno)) - always)
        or swallowed(Frame(file, step.lineno, "")) is not None
        or any(
            _may_skip(to.file, to.own_nodes(), to.node.body[0].lineno, ast.Return, depth - 1)
            for to in _stepping_functions(file, step, depth)
        )
        for step in _steps(file, nodes, depth)
    )


def _is_before(step: ast.Call, frames: Sequence[Frame]) -> bool:
    """Whether a stack comes before a step that its first frame's function makes, or is in it."""
    first, *below = frames
    here = _conditions(_way_to(first.filename, first.lineno))
    if not here <= _conditions(_way_to(first.filename, step.lineno)):
        return False
    if not step.lineno <= first.lineno <= (step.end_lineno or step.lineno):
        return first.lineno < step.lineno
    for function in _stepping_functions(first.filename, step):
        lines = Lines(function.file, function.node.lineno, function.node.end_lineno or 0)
        for number, frame in enumerate(below):
            if lines.holds(frame):
                steps = _steps(function.file, function.own_nodes())
                return any(_is_before(inner, below[number:]) for inner in steps)
    return True


def _conditions(way: Way) -> set[tuple[ast.AST, str]]:
    return {
        step for step in way if isinstance(step[0], ast.If | ast.ExceptHandler | ast.match_case)
    }


def _counts(condition: tuple[ast.AST, str]) -> bool:
    """Whether an `if` asks for every n-th turn, as where gradients are accumulated."""
    node, _ = condition
    return isinstance(node, ast.If) and any(isinstance(n, ast.Mod) for n in ast.walk(node.test))


def training_loop(frames: Sequence[Frame]) -> Loop | None:
    """The innermost loop around a stack's lines whose own turns make steps, as far as it shows.

    The loop over the epochs is none where another loop in it makes them.
    """
    for frame in reversed(frames):
        if owner_of(frame.filename) is Owner.LIBRARY:
            continue
        found = [loop for loop in _loops(frame.filename) if loop.holds(frame) and loop.steps()]
        if found:
            return min(found, key=lambda loop: loop.last - loop.first)
    return None


def loops_around(loop: Loop, frames: Sequence[Frame]) -> list[Loop]:
    """The loops in which a stack came to a loop: in its own function, and in those that called."""
    inside = [number for number, frame in enumerate(frames) if loop.holds(frame)]
    if not inside:
        return []
    own = frames[inside[-1]]
    return [
        around
        for frame in frames[: inside[-1] + 1]
        for around in _loops(frame.filename)
        if around.holds(frame) and (frame != own or around.first < loop.first)
    ]


def _loops(file: str) -> list[Loop]:
    return [Loop(file, node.lineno, node.end_lineno or node.lineno) for node in _loop_nodes(file)]


def _loop_nodes(file: str) -> list[ast.For | ast.While]:
    return _loop_nodes_of(_parsed(file))


@functools.lru_cache(maxsize=_FILES)
def _loop_nodes_of(tree: ast.Module) -> list[ast.For | ast.While]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While)]


def _within(block: Sequence[ast.stmt], line: int) -> bool:
    return bool(block) and block[0].lineno <= line <= (block[-1].end_lineno or 0)


def is_in_loop_over_set(filename: str, lineno: int) -> bool:
    """Whether a line is in a `for` loop over what is certainly a set."""
    tree = _parsed(filename)
    around = [node for node in ast.walk(tree) if _holds(node, lineno)]
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    function = max(
        (node for node in around if isinstance(node, functions)),
        key=lambda node: node.lineno,
        default=tree,
    )
    loops = (n for n in around if isinstance(n, ast.For) and n.body[0].lineno <= lineno)
    return any(_is_set(loop.iter, function) for loop in loops)


def _holds(node: ast.AST, lineno: int) -> bool:
    first, last = getattr(node, "lineno", None), getattr(node, "end_lineno", None)
    return first is not None and last is not None and first <= lineno <= last


def _assigned(function: ast.AST, name: str) -> list[ast.expr]:
    """All that is assigned to a name in a function."""
    found = []
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign | ast.AugAssign | ast.For):
            targets = [node.target]
        value = node.iter if isinstance(node, ast.For) else getattr(node, "value", None)
        if value is not None and any(isinstance(t, ast.Name) and t.id == name for t in targets):
            found.append(value)
    return found


def _is_set(node: ast.expr, function: ast.AST, followed: tuple[str, ...] = ()) -> bool:
    """Whether an expression in a function is a set, or goes through one in its order."""
    match node:
        case ast.Set() | ast.SetComp() | ast.Call(func=ast.Name(id="set" | "frozenset")):
            return True
        case ast.Call(func=ast.Name(id="enumerate" | "list" | "tuple"), args=[inner]):
            return _is_set(inner, function, followed)
        case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub() | ast.BitXor()):
            return _is_set(left, function, followed)
        case ast.Name(id=name) if name not in followed:
            assigned = _assigned(function, name)
            return bool(assigned) and all(
                _is_set(value, function, (*followed, name)) for value in assigned
            )
    return False
