"""An engine's part in a run, without a cluster: start, polls, signals, the lease, the end."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import cloudpickle
import psutil
import pytest

from ddp_lessons.cluster import engine
from ddp_lessons.cluster.engine import PollReply, PollRequest, RemoteCall, Signal, StartRequest
from ddp_lessons.processes import packing
from ddp_lessons.processes.base import MESSAGES, OUTPUT, STACKS
from ddp_lessons.system import host
from ddp_lessons.wire.messages import STACK_SIGNAL
from ddp_lessons.wire.task import MasterAddress, places

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])
RUN = "a run"


def on_an_engine(body: Callable[[], Any]) -> Any:
    """Call the body as an engine does a task: within its event loop."""

    async def main() -> Any:
        try:
            return body()
        finally:
            engine.finish(RUN)

    return asyncio.run(main())


def order(fn: Callable[..., Any], *args: Any) -> StartRequest:
    (place,) = places(1, 1)
    packed = packing.pack(fn, {}, profile=False, notes=False, post_mortem=False)
    return StartRequest(packed, place, packing.pack_arguments(args, fn), MasterAddress(1), None)


def until(wanted: Callable[[PollReply], bool], heard: int = 0, **question: Any) -> PollReply:
    """Poll until a reply is as wanted, without acknowledging any."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        news = engine.news(RUN, PollRequest(1.0, heard, **question))
        assert news is not None
        if wanted(news):
            return news
    raise AssertionError("it did not come")


def ended(news: PollReply) -> bool:
    return news.end is not None


def through(news: PollReply, channel: int) -> bytes:
    return b"".join(data for number, data in news.pieces if number == channel)


def greet(rank: int, name: str) -> str:
    print("hello", name)
    return name


def test_what_a_rank_sends_is_told_until_it_was_heard() -> None:
    def body() -> None:
        engine.start(RUN, order(greet, "Ada"))
        first = until(ended)
        again = engine.news(RUN, PollRequest(0, 0))
        assert again is not None
        assert again.pieces == first.pieces
        assert through(again, OUTPUT) == b"hello Ada\n"
        assert b"Ada" in through(again, MESSAGES)
        heard = engine.news(RUN, PollRequest(0, again.number))
        assert heard is not None
        assert heard.pieces == ()
        assert heard.end == again.end
        assert heard.end is not None
        assert (heard.end.exitcode, heard.end.lost) == (0, None)

    on_an_engine(body)


def wait(rank: int) -> None:
    print("waits")
    time.sleep(100)


def waits(news: PollReply) -> bool:
    return b"waits" in through(news, OUTPUT)


def test_signals_reach_the_rank_and_its_group() -> None:
    def body() -> None:
        engine.start(RUN, order(wait))
        until(waits)
        asked = (Signal(STACK_SIGNAL, group=False),)
        stack = until(lambda news: bool(through(news, STACKS)), signals=asked)
        assert b" in wait" in through(stack, STACKS)
        end = until(ended, signals=(Signal(signal.SIGKILL, group=True),)).end
        assert end is not None
        assert end.exitcode == -signal.SIGKILL

    on_an_engine(body)


def test_activity_is_noted_where_it_is_asked_for() -> None:
    def body() -> None:
        engine.start(RUN, order(wait))
        assert until(waits).activity is None
        until(lambda news: news.activity == "idle", note_activity=True)

    on_an_engine(body)


def test_a_rank_that_nobody_asks_for_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LEASE", 0.5)
    monkeypatch.setattr(engine, "LOOK", 0.1)

    async def main() -> None:
        pid, _ = engine.start(RUN, order(wait))
        for _ in range(10):
            await asyncio.sleep(0.1)
            assert engine.news(RUN, PollRequest(0, 0)) is not None
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.05)
        assert engine.news(RUN, PollRequest(0, 0)) is None

    asyncio.run(main())


def test_the_end_of_a_run_ends_the_rank_and_gives_the_port_back() -> None:
    def body() -> int:
        meeting = engine.meet(RUN, None, True)
        assert (meeting.address, meeting.interface) == (
            "127.0.0.1",
            host.LOOPBACK_INTERFACE[sys.platform],
        )
        pid, began_ns = engine.start(RUN, order(wait)._replace(master=meeting))
        assert began_ns <= time.perf_counter_ns()
        return pid

    assert not psutil.pid_exists(on_an_engine(body))


def test_a_run_that_is_unknown() -> None:
    assert engine.news("another run", PollRequest(0, 0)) is None
    assert engine.spans("another run") == []
    engine.finish("another run")


def test_the_state_of_an_engine_holds_for_its_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def look(rank: int) -> tuple[str | None, str, str]:
        return os.environ.get("LESSON_E"), os.getcwd(), sys.path[0]

    def body() -> Any:
        engine.start(RUN, asked)
        return through(until(ended), MESSAGES)

    asked = order(look)
    assert asked.task.environment == {}  # the notebook's variables are not sent
    monkeypatch.setenv("LESSON_E", "engine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    told = on_an_engine(body)
    for text in ("engine", str(tmp_path), str(tmp_path / "lib")):
        assert text.encode() in told


def test_an_engine_says_who_it_is() -> None:
    facts = engine.describe()
    assert facts["versions"]["Python"] == ".".join(map(str, sys.version_info[:2]))
    assert {"torch", "ddp-lessons"} <= set(facts["versions"])
    assert facts["now_ns"] <= time.perf_counter_ns()
    assert pickle.loads(pickle.dumps(RemoteCall("describe")))().keys() == facts.keys()
