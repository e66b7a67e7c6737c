"""What the learner's code around a line tells: lines that only some ranks reach, loops' ends."""

from __future__ import annotations

import linecache
from collections.abc import Iterator

import pytest

from ddp_lessons.diagnosis import source_code
from ddp_lessons.diagnosis.source_code import Loop
from ddp_lessons.wire.records import Caught, Frame

CODE = """\
def train(rank, batches):
    setup(rank)
    for batch in batches:
        forward(batch)
        if rank == 0:
            save(batch)
        if rank == 1:
            continue
        else:
            report()
        for one in batch:
            inner(one)
    done()

def other():
    if True:
        helper()

def stops():
    for batch in batches:
        for part in batch:
            if part:
                break
        step()
    while True:
        step()
    for batch in batches:
        if batch:
            return

def early(rank):
    if rank == 0:
        mine()
        return
    theirs()
"""


@pytest.fixture
def file() -> str:
    name = "Cell of test_source_code"
    linecache.cache[name] = len(CODE), None, CODE.splitlines(True), name
    return name


def line(text: str) -> int:
    return next(n for n, row in enumerate(CODE.splitlines(), 1) if text in row)


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ("forward(", "save(", "save("),
        ("save(", "forward(", "save("),
        ("forward(", "inner(", "inner("),
        ("setup(", "done(", None),
        ("save(", "report(", None),  # both are under an if
        ("setup(", "helper(", None),  # another function
        ("mine(", "theirs(", None),  # a branch that does not rejoin the rest
        ("forward(", "forward(", None),
    ],
)
def test_the_line_that_only_some_ranks_reach(
    file: str, one: str, other: str, found: str | None
) -> None:
    sites = [f"{file}:{line(text)}" for text in (one, other)]
    assert source_code.optional(*sites) == (found and f"{file}:{line(found)}")


def test_of_two_files_nothing_is_known(file: str) -> None:
    assert source_code.optional(f"{file}:{line('save(')}", "elsewhere.py:4") is None
    assert source_code.optional(None, f"{file}:4") is None


@pytest.mark.parametrize(
    ("first", "last", "ends"), [(20, 24, False), (25, 26, True), (27, 29, True), (3, 12, False)]
)
def test_whether_a_loop_ends_by_decision(file: str, first: int, last: int, ends: bool) -> None:
    assert Loop(file, first, last).ends_by_decision == ends


def test_the_loops_around_a_loop(file: str) -> None:
    """Those in its own function and in the callers', but none within it."""
    frames = [Frame(file, line("inner("), "train", ""), Frame(file, 22, "stops", "")]
    assert source_code.loops_around(Loop(file, 21, 23), frames) == [
        Loop(file, 3, 12),
        Loop(file, 11, 12),
        Loop(file, 20, 24),
    ]
    assert source_code.loops_around(Loop(file, 20, 24), frames[1:]) == []
    assert source_code.loops_around(Loop(file, 25, 26), frames) == []


def test_what_comes_after_a_loop(file: str) -> None:
    loop = Loop(file, line("for batch"), line("inner("))
    assert loop.is_before(Frame(file, line("done("), "train", ""))
    assert not loop.is_before(Frame(file, line("forward("), "train", ""))
    assert not loop.is_before(Frame(file, line("helper("), "other", ""))


TRIES = """\
def work(rank):
    try:
        try:
            first()
        finally:
            clean()
        second()
    except (KeyError,
            ValueError):
        skip()
    else:
        third()
    with suppress(OSError), \\
            open(name):
        fourth()
    try:
        fifth()
    except KeyboardInterrupt:
        pass
    except OSError:
        note()
        raise
    last()


def other():
    helper()
"""


@pytest.fixture
def tries() -> str:
    linecache.cache["tries.py"] = len(TRIES), None, TRIES.splitlines(keepends=True), "tries.py"
    return "tries.py"


@pytest.mark.parametrize(
    ("passed", "handler", "lines"),
    [(4, 8, (3, 12)), (7, 9, (3, 12)), (15, 13, (15, 15)), (15, 14, (15, 15)), (24, 8, None)],
)
def test_what_an_exception_left_out(
    passed: int, handler: int, lines: tuple[int, int] | None, tries: str
) -> None:
    what = Caught(1, "OSError", f"{tries}:99", f"{tries}:{passed}", f"{tries}:{handler}")
    found = source_code.guarded(what)
    assert (found and (found.first, found.last)) == lines


@pytest.mark.parametrize(("line", "handler"), [(4, 8), (12, 8), (10, None), (17, None), (15, None)])
def test_where_an_exception_does_not_get_out(line: int, handler: int | None, tries: str) -> None:
    found = source_code.swallowed(Frame(tries, line, "work"))
    assert (found and found[1]) == handler


GUARDS = """\
def work(rank):
    for epoch in range(3):
        for batch in batches:
            train(batch)
        if rank != 0:
            continue
        save(rank)

def measure(rank):
    for batch in batches:
        learn(batch)
    gather()

def check(x):
    if x is None:
        raise ValueError
    use(x)

def write(x):
    if not main:
        return
    with open(x):
        barrier()

def turns():
    first()
    second()
    for turn in range(3):
        third()
        fourth()
        fifth()
        for inner in range(2):
            sixth()

def apart():
    first()
"""


@pytest.fixture
def guards() -> str:
    linecache.cache["guards.py"] = len(GUARDS), None, GUARDS.splitlines(keepends=True), "guards.py"
    return "guards.py"


def test_a_line_behind_one_that_may_leave_is_one_to_which_only_some_come(guards: str) -> None:
    train, save, learn, gather = (f"{guards}:{line}" for line in (4, 7, 11, 12))
    assert source_code.optional(train, save) == source_code.optional(save, train) == save
    assert source_code.optional(learn, gather) == source_code.optional(gather, learn) == learn
    of_rank = [n for n in range(1, 24) if source_code.depends_on_rank(Frame(guards, n, ""))]
    assert of_rank == [6, 7, 21, 22, 23]


@pytest.mark.parametrize(
    ("one", "other", "before", "found"),
    [
        (26, 27, None, 26),  # in no loop: the first
        (29, 30, 29, 30),
        (29, 30, 30, 29),
        (29, 30, 31, 29),
        (29, 30, None, None),
        (29, 33, 31, None),  # ranks may leave the inner loop at different times
        (26, 36, None, None),  # another function
    ],
)
def test_which_of_two_lines_comes_next(
    one: int, other: int, before: int | None, found: int | None, guards: str
) -> None:
    sites = [None if n is None else f"{guards}:{n}" for n in (one, other, before, found)]
    for first, second in (sites[:2], sites[1::-1]):
        assert first is not None
        assert second is not None
        assert source_code.next_of(first, second, sites[2]) == sites[3]


HANDLERS = """\
def work():
    try:
        load()
    except OSError:
        tell()
        raise
    try:
        parse()
    except ValueError as error:
        if "sample" in str(error):
            skip()
        else:
            with lock:
                report()
            raise
    try:
        save()
    except OSError:
        try:
            retry()
        except OSError:
            give_up()
            sys.exit(1)
"""


@pytest.mark.parametrize(
    ("line", "other", "handles"),
    [(3, 5, False), (8, 11, True), (8, 14, False), (17, 20, True), (17, 22, False), (3, 11, False)],
)
def test_whether_an_exception_is_dealt_with(line: int, other: int, handles: bool) -> None:
    linecache.cache["handlers"] = (
        len(HANDLERS), None, HANDLERS.splitlines(keepends=True), "handlers"
    )  # fmt: skip
    assert source_code.handles("handlers", line, other) == handles


STEPS = """\
def train(rank, loader):
    for epoch in range(3):
        for number, batch in enumerate(loader):
            loss = forward(batch)
            if number % 4 == 3:
                optimizer.step()
                report()
        scheduler.step()
        if rank == 0:
            save()
    for batch in loader:
        if bad(batch):
            continue
        scaler.step(optimizer)
        if rank == 0:
            log()
    for batch in loader:
        if good(batch):
            optimizer.step()
    for batch in loader:
        try:
            trainer.step(batch)
        except ValueError:
            pass
    for batch in loader:
        optimizer.step()
        if done(batch):
            continue
"""


@pytest.fixture
def steps() -> str:
    linecache.cache["steps.py"] = len(STEPS), None, STEPS.splitlines(keepends=True), "steps.py"
    return "steps.py"


def within(file: str, text: str) -> Loop | None:
    number = next(n for n, row in enumerate(STEPS.splitlines(), 1) if text in row)
    return source_code.training_loop([Frame(file, number, "train", "")])


@pytest.mark.parametrize(
    ("text", "first"), [("forward(", 3), ("report(", 3), ("log(", 11), ("save(", None)]
)
def test_the_loop_whose_turns_make_steps(steps: str, text: str, first: int | None) -> None:
    """Not the one over the epochs, in which another loop makes them, or a scheduler steps."""
    loop = within(steps, text)
    assert (loop and loop.first) == first


@pytest.mark.parametrize(
    ("text", "skips"),
    [("forward(", False), ("log(", True), ("good(", True), ("trainer.", True), ("done(", False)],
)
def test_whether_a_turn_may_make_no_step(steps: str, text: str, skips: bool) -> None:
    loop = within(steps, text)
    assert loop is not None
    assert loop.may_skip == skips


@pytest.mark.parametrize(
    ("text", "before"), [("forward(", True), ("scaler.", True), ("log(", False), ("done(", False)]
)
def test_whether_a_line_comes_before_the_step(steps: str, text: str, before: bool) -> None:
    loop = within(steps, text)
    assert loop is not None
    number = next(n for n, row in enumerate(STEPS.splitlines(), 1) if text in row)
    frames = [Frame(steps, number, "train", "")]
    assert loop.is_before_step(frames, None) == before
    made = loop.steps()[0].lineno
    assert loop.is_before_step(frames, f"{steps}:{made}") == before
    assert loop.is_before_step(frames, f"{steps}:1") is None
    assert loop.is_before_step(frames, f"another file:{made}") is None


FUNCTIONS = """\
def make_step(batch):
    loss = forward(batch)
    optimizer.step()
    after()


class Trainer:
    def careful(self, batch):
        if bad(batch):
            return
        make_step(batch)

    def plain(self, batch):
        prepare(batch)
        return make_step(batch)

    def again(self, batch):
        return self.again(batch)
"""
CALLS = """\
def train(trainer, loader):
    for epoch in range(3):
        for batch in loader:
            load(batch)
            trainer.plain(batch)
            log()
        evaluate()
    for batch in loader:
        trainer.careful(batch)
    for batch in loader:
        trainer.again(batch)
"""


@pytest.fixture(params=["one cell", "two cells"])
def places(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Where the functions are, and the loops that call them."""
    texts = {"functions": FUNCTIONS, "loops": CALLS}
    if request.param == "one cell":
        texts = {"both": FUNCTIONS + CALLS}
    for name, text in texts.items():
        linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    yield min(texts), max(texts)
    for name in texts:
        del linecache.cache[name]


def stack(places: tuple[str, str], *texts: str) -> list[Frame]:
    """Frames at the lines that have these texts, the outermost first."""
    found = []
    for text in texts:
        for file in dict.fromkeys(places):
            rows = enumerate(linecache.getlines(file), 1)
            found += [Frame(file, number, "", "") for number, row in rows if text in row]
    return found


@pytest.mark.parametrize(
    ("texts", "in_loop", "skips"),
    [
        (("load(",), True, False),
        (("trainer.plain(", "prepare("), True, False),
        (("trainer.careful(", "if bad("), True, True),
        (("trainer.again(",), False, False),
        (("evaluate(",), False, False),
    ],
)
def test_steps_that_a_function_makes(
    places: tuple[str, str], texts: tuple[str, ...], in_loop: bool, skips: bool
) -> None:
    loop = source_code.training_loop(stack(places, *texts))
    assert (loop is not None) == in_loop
    assert (loop is not None and loop.may_skip) == skips


@pytest.mark.parametrize(
    ("texts", "before"),
    [
        (("load(",), True),
        (("trainer.plain(", "prepare("), True),
        (("trainer.plain(", "return make_step(", "loss = forward("), True),
        (("trainer.plain(", "return make_step(", "after("), False),
        (("log(",), False),
    ],
)
def test_whether_a_stack_comes_before_the_step_of_a_function(
    places: tuple[str, str], texts: tuple[str, ...], before: bool
) -> None:
    frames = stack(places, *texts)
    loop = source_code.training_loop(frames)
    assert loop is not None
    assert loop.is_before_step(frames, None) == before
    made = stack(places, "optimizer.step()")[0]
    assert loop.is_before_step(frames, f"{made.filename}:{made.lineno}") == before
    assert loop.is_before_step(frames, f"{made.filename}:{made.lineno + 1}") is None
