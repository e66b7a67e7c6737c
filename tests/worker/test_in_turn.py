"""Writing in turn: threads wait, and what a signal handler writes comes after."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from ddp_lessons.worker.in_turn import InTurn


def test_what_a_signal_handler_writes_comes_after_what_it_interrupted() -> None:
    in_turn, written = InTurn(), ""

    def write(text: str) -> None:
        nonlocal written
        written += text

    def write_slowly() -> None:
        write("begin ")
        os.kill(os.getpid(), signal.SIGUSR1)
        write("end ")

    before = signal.signal(signal.SIGUSR1, lambda *_: in_turn(lambda: write("handler")))
    try:
        in_turn(write_slowly)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert written == "begin end handler"


def test_a_thread_waits_until_its_own_is_written() -> None:
    in_turn, written = InTurn(), []
    begun, goes_on = threading.Event(), threading.Event()

    def write_slowly() -> None:
        begun.set()
        goes_on.wait()
        written.append("first")

    thread = threading.Thread(target=in_turn, args=(write_slowly,))
    thread.start()
    begun.wait()
    threading.Thread(target=goes_on.set).start()
    in_turn(lambda: written.append("second"))
    assert written == ["first", "second"]
    thread.join()


def test_after_a_failure_the_next_is_written() -> None:
    in_turn, written = InTurn(), []
    with pytest.raises(ZeroDivisionError):
        in_turn(lambda: written.append(1 // 0))
    in_turn(lambda: written.append(1))
    assert written == [1]
