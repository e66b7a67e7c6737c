"""The check of lesson 00: right answers pass; typical wrong ones are explained."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from ddp_lessons.exercises.start_here import check_greet
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def greets(condition: Callable[[int, int], Any], text: str = "hello from {} ranks") -> Any:
    def greet(rank: int, world_size: int) -> None:
        if condition(rank, world_size):
            print(text.format(world_size))

    return greet


def is_zero(rank: int, world_size: int) -> bool:
    return rank == 0


def with_debug_prints(rank: int, world_size: int) -> None:
    print("rank", rank)
    greets(is_zero)(rank, world_size)


def by_all_ranks_in_a_loop(rank: int, world_size: int) -> None:
    if rank == 0:
        for other in range(world_size):
            greets(is_zero)(0, world_size + 0 * other)


def in_two_prints(rank: int, world_size: int) -> None:
    if rank == 0:
        print("hello from")
        print(world_size, "ranks")


def with_rank_for_number(rank: int, world_size: int) -> None:
    print(f"hello from {rank} ranks")


def returned(rank: int, world_size: int) -> str:
    return f"hello from {world_size} ranks"


def yielded(rank: int, world_size: int) -> Iterator[None]:
    yield greets(is_zero)(rank, world_size)


def others_wait(rank: int, world_size: int) -> None:
    if rank != 0:
        dist.init_process_group("gloo")
    greets(is_zero)(rank, world_size)


def others_exit(rank: int, world_size: int) -> None:
    greets(is_zero)(rank, world_size)
    if rank:
        os._exit(3)


def divides(rank: int, world_size: int) -> None:
    greets(is_zero)(rank, world_size)
    world_size //= rank


def in_good_english(rank: int, world_size: int) -> None:
    if rank == 0:
        print("hello from", world_size, "rank" if world_size == 1 else "ranks")


def counted(rank: int, world_size: int) -> None:
    dist.init_process_group("gloo")
    ranks = torch.ones(1, dtype=torch.int64)
    dist.all_reduce(ranks)
    dist.destroy_process_group()
    if rank == world_size - 1:
        print(f"hello from {ranks.item()} ranks")


def logged(rank: int, world_size: int) -> None:
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    logging.info("hello from %d ranks", world_size)


class Greeter:
    def __call__(self, rank: int, world_size: int) -> None:
        if not rank:
            sys.stdout.write(f"hello from {world_size} ranks")


RIGHT: list[tuple[Any, Any]] = [
    (check_greet, greets(is_zero)),
    (check_greet, in_good_english),
    (check_greet, counted),
    (check_greet, logged),
    (check_greet, Greeter()),
    (check_greet, functools.partial(greets(is_zero))),
    (check_greet, lambda rank, n: rank or os.write(1, b"hello from %d ranks\n" % n)),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_greet, greets(lambda rank, n: True), "printed 4 times, by .* 2 and 3.*world_size times"),
    (check_greet, greets(lambda rank, n: rank), "by ranks 1, 2 and 3.*`if rank:` is true for"),
    (check_greet, greets(lambda rank, n: rank < 2), "2 times, by ranks 0 and 1.*holds on one"),
    (check_greet, greets(lambda rank, n: rank == 1), "1 rank nothing.*only rank that every"),
    (check_greet, greets(lambda rank, n: n == 4 and rank == 2), "2 ranks nothing was printed"),
    (check_greet, greets(lambda rank, n: rank == n), "4 ranks nothing.*from 0 to world_size - 1"),
    (check_greet, with_debug_prints, "printed once, by rank 0, but rank 0 also printed 'rank 0'"),
    (check_greet, by_all_ranks_in_a_loop, "4 times, by rank 0 alone.*No loop over the ranks"),
    (check_greet, in_two_prints, "rank 0 printed 2 lines, .*'hello from'.*all of it into one"),
    (check_greet, with_rank_for_number, "4 lines, from ranks .*'hello from 0 ranks'; there should"),
    (
        check_greet,
        greets(is_zero, "hello from {{n}} ranks"),
        "'hello from {n} ranks'.* lacks its f",
    ),
    (check_greet, greets(is_zero, "Hello from{} ranks!"), "'Hello from4 ranks!'.*letter by letter"),
    (check_greet, greets(is_zero, "hello from {}"), "'hello from 4', not .*the words are not"),
    (check_greet, greets(is_zero, "hi from {} processes"), "4 ranks the line .*words are not"),
    (check_greet, greets(is_zero, "hello from 4 ranks"), "2 ranks the line was .*choice: take it"),
    (check_greet, returned, "nothing was printed.*that is returned is not printed"),
    (check_greet, lambda rank: print("x"), "failed on real ranks.*TypeError.*does it take these"),
    (check_greet, yielded, "generator function: calling it runs none of its lines"),
    (check_greet, others_wait, "ranks 1, 2 and 3 wait in init_process_group, but rank 0 has"),
    (check_greet, others_exit, r"rank [123] of 4 ended with exit code 3.*os\._exit"),
    (check_greet, divides, "rank 0 of 4 raised ZeroDivisionError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(
    check: Any, answer: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.is_explained(check, answer, said)
    assert capsys.readouterr().out == ""
