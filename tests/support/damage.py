"""Ways to damage a record: each from a seed, each to one file of a copy. Used by test_damage.py.

As a program it is a notebook that loads damaged records, within limits of memory and time:

    python -m tests.support.damage FOLDER SCRATCH SEED TIMES
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ddp_lessons.wire.span_buffer import RECORD

MEMORY = 512 << 20  # bytes of address space beyond what the imports take
SECONDS = 20  # of the processor; and at most so many times as long in all, on a busy machine
BUSY = 5
WRITTEN = 1 << 20  # where the spans in a .tape file begin
HUGE = 1 << 40
WRONG: tuple[Any, ...] = (
    None, True, -1, 0.5, float("nan"), 1e308, 10**9, 1 << 62, 1 << 70, "", "x" * 100_000,
    "\ud800", "a\0b", "/dev/zero", "../" * 1000, [], {}, [[]] * 1000, [{}], "9" * 5000,
)  # fmt: skip

Damage = Callable[[Path, random.Random], None]


def emptied(file: Path, chance: random.Random) -> None:
    os.truncate(file, 0)


def cut(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(max(1, min(file.stat().st_size, 2 * WRITTEN))))


def removed(file: Path, chance: random.Random) -> None:
    """Without its facts, a rank is missing, which is another error."""
    if file.suffix != ".jsonl":
        file.unlink()


def huge(file: Path, chance: random.Random) -> None:
    os.truncate(file, HUGE)  # it has holes


def random_bytes(file: Path, chance: random.Random) -> None:
    file.write_bytes(chance.randbytes(min(file.stat().st_size, 2 * WRITTEN)))


def random_buffer(file: Path, chance: random.Random) -> None:
    size = file.stat().st_size
    file.write_bytes(chance.randbytes(min(size, 2 * WRITTEN)))
    os.truncate(file, size)


def many_lists(file: Path, chance: random.Random) -> None:
    file.write_text("[" * chance.choice((1000, 1_000_000)))


def a_fifo(file: Path, chance: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def a_folder(file: Path, chance: random.Random) -> None:
    file.unlink()
    file.mkdir()


def a_link(file: Path, chance: random.Random) -> None:
    file.unlink()
    file.symlink_to(chance.choice(("/dev/zero", "/dev/tty", "/etc/passwd", "/missing", file.name)))


def flipped(file: Path, chance: random.Random) -> None:
    """Some bits of what was written."""
    size = file.stat().st_size
    written = WRITTEN + 30 * RECORD.size if size > WRITTEN else size
    near = (range(4096), range(WRITTEN, WRITTEN + 30 * RECORD.size))
    with open(file, "r+b") as opened:
        for _ in range(chance.randrange(1, 5)):
            at = chance.choice(chance.choice(near)) % max(1, written)
            opened.seek(at)
            (byte,) = opened.read(1) or b"\0"
            opened.seek(at)
            opened.write(bytes([byte ^ 1 << chance.randrange(8)]))


def wrong_field(file: Path, chance: random.Random) -> None:
    """A field of a fact with another value."""
    facts = [json.loads(line) for line in file.read_text().rstrip("\0").splitlines()]
    places = [place for fact in facts for place in _places(fact)]
    holder, key = chance.choice(places)
    holder[key] = chance.choice(WRONG)
    file.write_text("".join(json.dumps(fact) + "\n" for fact in facts))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


ANY: tuple[Damage, ...] = (
    emptied, cut, removed, huge, random_bytes, a_fifo, a_folder, a_link, flipped,
)  # fmt: skip
DAMAGES: dict[str, tuple[Damage, ...]] = {
    ".jsonl": (*ANY, many_lists, *[wrong_field] * 16),
    ".tape": (*ANY, random_buffer, *[flipped] * 16),
    ".stack": ANY,
}


def damaged_copy(folder: Path, to: Path, chance: random.Random) -> str:
    """A copy of a record in which one file is damaged; what was done."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    files = sorted(folder.iterdir())
    victim = chance.choice(files)
    for file in files:
        if file != victim:
            os.link(file, to / file.name)
    _copy(victim, to / victim.name)
    damage = chance.choice(DAMAGES[victim.suffix])
    damage(to / victim.name, chance)
    return f"{damage.__name__} {victim.name}"


def _copy(file: Path, to: Path) -> None:
    """With its holes."""
    with open(file, "rb") as old, open(to, "wb") as new:
        for at in itertools.count(0, 1 << 16):
            if not (data := old.read(1 << 16)):
                break
            if data.strip(b"\0"):
                new.seek(at)
                new.write(data)
        new.truncate(file.stat().st_size)


def main(folder: str, scratch: str, seed: str, times: str) -> None:
    """Damage and load; print how many could be, and how what is wrong went wrong."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from ddp_lessons import load_run, plots

    def use(place: Path) -> None:
        run = load_run(place)
        for text in (run.explain(), repr(run), run._repr_html_()):
            assert "root:" not in text, "/etc/passwd is shown"
        plots.timeline(run)
        plt.gcf().canvas.draw()
        plt.close("all")
        for told in (run.waits, run.totals, run.straggler, run.overlap, run.arrivals):
            told()

    use(Path(folder))  # what is imported late is so now
    limit = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _too_long)
    signal.signal(signal.SIGPROF, _too_long)
    loaded = 0
    for number in range(int(times)):
        chance = random.Random(f"{seed} {number}")
        what = damaged_copy(Path(folder), Path(scratch), chance)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, BUSY * SECONDS)  # it waits forever
        try:
            use(Path(scratch))
            loaded += 1
        except ValueError as error:
            named = what.split()[-1].rpartition(".")[0] in str(error)
            if not named or not str(error).startswith(scratch):
                print(f"{number} {what}: the error does not name the file")
                traceback.print_exc(limit=-4, file=sys.stdout)
        except BaseException:
            print(f"{number} {what}:")
            traceback.print_exc(limit=-6, file=sys.stdout)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    print(f"loaded {loaded} of {times}")


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"it takes more than {SECONDS} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
