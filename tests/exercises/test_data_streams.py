"""The checks of lesson 17: right answers pass; typical wrong answers are explained."""

from __future__ import annotations

import sys
from collections import deque
from functools import partial
from itertools import chain, cycle, islice, zip_longest
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info

from ddp_lessons.exercises.data_streams import check_resume, check_shard, check_together
from tests.support import answers

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def place() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def taker(rank: int, world_size: int) -> tuple[int, int]:
    worker, workers = place()
    return worker * world_size + rank, world_size * workers


def mine(shards: Any, rank: int, world_size: int) -> Any:
    number, takers = taker(rank, world_size)
    if len(shards) % takers == 0:
        return chain.from_iterable(shards[number::takers])
    return islice(chain.from_iterable(shards), number, None, takers)


def mine_in_two(shards: Any, rank: int, world_size: int) -> Any:
    """First by rank, then by worker, and shards in blocks."""
    worker, workers = place()
    if len(shards) % (world_size * workers) == 0:
        blocks = np.array_split(np.arange(len(shards)), world_size * workers)
        return [torch.tensor(i) for n in blocks[rank * workers + worker] for i in shards[n]]
    items = (item for shard in shards for item in shard)
    return islice(islice(items, rank, None, world_size), worker, None, workers)


def mine_by_remainder(shards: Any, rank: int, world_size: int) -> Any:
    worker, workers = place()
    by_shard = not len(shards) % (world_size * workers)
    number = 0
    for shard in shards:
        is_mine = number % world_size == rank and number // world_size % workers == worker
        if by_shard and is_mine:
            yield from shard
        number += by_shard
        for item in () if by_shard else shard:
            if number % world_size == rank and number // world_size % workers == worker:
                yield torch.tensor(item)
            number += 1


def mine_in_blocks(shards: Any, rank: int, world_size: int) -> Any:
    """Reads all where shards do not fit, and gives each rank a block of neighbours."""
    worker, workers = place()
    if len(shards) % (world_size * workers) == 0:
        return mine(shards, rank, world_size)
    blocks = np.array_split(np.array(list(chain(*shards))), world_size)
    return np.array_split(blocks[rank], workers)[worker]


def mine_backwards(shards: Any, rank: int, world_size: int) -> Any:
    """The last taker has the first item, and gives its items from behind."""
    number, takers = taker(rank, world_size)
    if len(shards) % takers == 0:
        return [item for shard in shards[::-1][number::takers] for item in shard]
    return list(chain(*shards))[takers - 1 - number :: takers][::-1]


def mine_in_rounds(shards: Any, rank: int, world_size: int) -> Any:
    """Takes a round at a time, one for each taker."""
    number, takers = taker(rank, world_size)
    whole = len(shards) % takers == 0
    stream = iter(shards) if whole else chain.from_iterable(shards)
    while chunk := list(islice(stream, takers)):
        found = chunk[number : number + 1]
        yield from chain(*found) if whole else found


def everything(shards: Any, rank: int, world_size: int) -> Any:
    return chain.from_iterable(shards)


def by_rank(shards: Any, rank: int, world_size: int) -> Any:
    return islice(chain(*shards), rank, None, world_size)


def by_worker(shards: Any, rank: int, world_size: int) -> Any:
    worker, workers = place()
    return islice(chain(*shards), worker, None, workers)


def only_items(shards: Any, rank: int, world_size: int) -> Any:
    number, takers = taker(rank, world_size)
    return islice(chain(*shards), number, None, takers)


def only_shards(shards: Any, rank: int, world_size: int) -> Any:
    number, takers = taker(rank, world_size)
    return chain(*shards[number::takers])


def by_ranks_alone(shards: Any, rank: int, world_size: int) -> Any:
    """Looks whether the ranks divide the shards, and forgets the workers."""
    if len(shards) % world_size == 0:
        return only_shards(shards, rank, world_size)
    return mine(shards, rank, world_size)


def workers_first(shards: Any, rank: int, world_size: int) -> Any:
    worker, workers = place()
    return islice(chain(*shards), rank * workers + worker, None, world_size * workers)


def needs_workers(shards: Any, rank: int, world_size: int) -> Any:
    info = get_worker_info()
    number, takers = info.id * world_size + rank, world_size * info.num_workers
    if len(shards) % takers == 0:
        return chain(*shards[number::takers])
    return islice(chain(*shards), number, None, takers)


def drops_the_rest(shards: Any, rank: int, world_size: int) -> Any:
    number, takers = taker(rank, world_size)
    items = list(chain(*shards))
    return items[: len(items) // takers * takers][number::takers]


def in_pairs(shards: Any, rank: int, world_size: int) -> Any:
    return ((rank, item) for item in mine(shards, rank, world_size))


def from_one(shards: Any, rank: int, world_size: int) -> Any:
    number, takers = taker(rank, world_size)
    return islice(chain(*shards), number + 1, None, takers)


def wrong_factor(shards: Any, rank: int, world_size: int) -> Any:
    """Right where there are as many ranks as workers."""
    worker, workers = place()
    number, takers = worker * workers + rank, world_size * workers
    if len(shards) % takers == 0:
        return chain(*shards[number::takers])
    return islice(chain(*shards), number, None, takers)


def adds_up(shards: Any, rank: int, world_size: int) -> Any:
    worker, workers = place()
    return islice(chain(*shards), worker + rank, None, world_size * workers)


def pads(shards: Any, rank: int, world_size: int) -> Any:
    number, takers = taker(rank, world_size)
    items = list(chain(*shards))
    size = -(-len(items) // takers) * takers
    return list(islice(cycle(items), size))[number::takers]


def all_to_worker_0(shards: Any, rank: int, world_size: int) -> Any:
    worker, _ = place()
    return by_rank(shards, rank, world_size) if worker == 0 else chain(*shards)


def gives_shards(shards: Any, rank: int, world_size: int) -> Any:
    number, takers = taker(rank, world_size)
    return shards[number::takers]


def voted(value: Any, op: Any) -> Any:
    found = torch.tensor(int(value))
    dist.all_reduce(found, op=op)
    return int(found)


def together(stream: Any, every: int) -> Any:
    while True:
        items = list(islice(stream, every))
        steps = voted(len(items), dist.ReduceOp.MAX)
        for n in range(steps):
            yield (items[n], True) if n < len(items) else (None, False)
        if steps < every:
            return


def together_to_zero(stream: Any, every: int) -> Any:
    """Ends with a question to which the answer is 0; lists, tensors and 1 or 0."""
    while steps := voted(len(items := [*islice(stream, every)]), dist.ReduceOp.MAX):
        for item, _ in zip_longest(items, range(steps), fillvalue=-1):
            yield [torch.tensor(item), torch.tensor(int(item >= 0))]


def together_by_objects(stream: Any, every: int) -> Any:
    while True:
        items = [*islice(stream, every)]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, items)
        longest = max(found, key=len)
        for n, filling in enumerate(longest):
            yield (items[n:] or [filling])[0], n < len(items)
        if not longest:
            break


def together_ahead(stream: Any, every: int) -> Any:
    """Looks one item ahead, and repeats the last one."""
    ahead: Any = next(stream, None)
    last = 0
    while True:
        items = [item for item in [ahead, *islice(stream, every - 1)] if item is not None]
        ahead = next(stream, None)
        length = torch.tensor([len(items)])
        lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, length)
        if not any(lengths):
            return
        for n in range(int(max(lengths))):
            last = items[n] if n < len(items) else last
            yield last, np.bool_(n < len(items))


class Together:
    def __init__(self, stream: Any, every: int) -> None:
        self.pairs = together(stream, every)

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        item, is_real = next(self.pairs)
        return item, int(is_real)


def alone(stream: Any, every: int) -> Any:
    return ((item, True) for item in stream)


def each_step(stream: Any, every: int) -> Any:
    """The lesson's way: a question before each step."""
    while True:
        item = next(stream, None)
        if not voted(item is not None, dist.ReduceOp.MAX):
            return
        yield item, item is not None


def asks_while_it_has(stream: Any, every: int) -> Any:
    while items := list(islice(stream, every)):
        for n in range(voted(len(items), dist.ReduceOp.MAX)):
            yield (items[n], True) if n < len(items) else (None, False)


def drops(stream: Any, every: int) -> Any:
    while True:
        items = list(islice(stream, every))
        steps = voted(len(items), dist.ReduceOp.MIN)
        yield from ((item, True) for item in items[:steps])
        if steps < every:
            return


def always_real(stream: Any, every: int) -> Any:
    return ((item, True) for item, _ in together(stream, every))


def repeats_as_real(stream: Any, every: int) -> Any:
    last = -1
    for item, is_real in together(stream, every):
        last = item if is_real else last
        yield last, True


def items_alone(stream: Any, every: int) -> Any:
    return (item for item, _ in together(stream, every))


def without_end(stream: Any, every: int) -> Any:
    while True:
        item = next(stream, None)
        yield item, item is not None


def reads_all(stream: Any, every: int) -> Any:
    items = list(stream)
    for n in range(voted(len(items), dist.ReduceOp.MAX)):
        yield items[n] if n < len(items) else None, n < len(items)


def skips_idle_steps(stream: Any, every: int) -> Any:
    return (pair for pair in together(stream, every) if pair[1])


def one_step_more(stream: Any, every: int) -> Any:
    yield from together(stream, every)
    yield None, False


def full_blocks(stream: Any, every: int) -> Any:
    """Always takes `every` steps before it asks again."""
    while True:
        items = list(islice(stream, every))
        if not voted(len(items), dist.ReduceOp.MAX):
            return
        for n in range(every):
            yield (items[n], True) if n < len(items) else (None, False)


def wrong_way_round(stream: Any, every: int) -> Any:
    return ((is_real, item) for item, is_real in together(stream, every))


def all_false(stream: Any, every: int) -> Any:
    return ((item, False) for item, _ in together(stream, every))


def backwards(stream: Any, every: int) -> Any:
    return iter(list(together(stream, every))[::-1])


def loses_the_first(stream: Any, every: int) -> Any:
    pairs = enumerate(together(stream, every))
    return ((item, is_real and number > 0) for number, (item, is_real) in pairs)


def counts_alike(stream: Any, every: int) -> Any:
    """Takes for granted that no rank has more than nine items."""
    for _ in range(9):
        item = next(stream, None)
        yield item, item is not None


def batches(own: Any, size: int) -> Any:
    return [[items[i : i + size] for i in range(0, len(items), size)] for items in own]


def rest(own: Any, size: int, taken: int) -> Any:
    left, turn = batches(own, size), 0
    for _ in range(taken):
        if not any(left):
            break
        while not left[turn]:
            turn = (turn + 1) % len(left)
        left[turn].pop(0)
        turn = (turn + 1) % len(left)
    return [[item for batch in own for item in batch] for own in left[turn:] + left[:turn]]


def rest_by_rounds(own: Any, size: int, taken: int) -> Any:
    """Deals the rounds out, and counts what each worker gave."""
    rounds = zip_longest(*batches(own, size))
    given = [(w, b) for one in rounds for w, b in enumerate(one) if b][:taken]
    done = [sum(len(b) for w, b in given if w == worker) for worker in range(len(own))]
    turn = given[-1][0] + 1 if given else 0
    order = [(turn + i) % len(own) for i in range(len(own))]
    return tuple(own[w][done[w] :] for w in order)


def rest_in_a_queue(own: Any, size: int, taken: int) -> Any:
    """An emptied worker leaves the queue, and comes back as an empty list."""
    queue = deque(map(list, own))
    while taken and any(queue):
        if queue[0]:
            taken -= 1
            queue[0] = queue[0][size:]
        queue.rotate(-1)
    return np.array([*queue, None], dtype=object)[:-1]


def rest_dealt_anew(own: Any, size: int, taken: int) -> Any:
    """Puts all batches in a row, and deals what is left to the new loader's workers.

    So a short batch may stand before others of its worker; there it gets a worker of its own.
    """
    row = [b for one in zip_longest(*batches(own, size)) for b in one if b][taken:]
    if any(len(batch) < size for batch in row):
        return rest(own, size, taken)
    return [torch.tensor([i for b in row[w :: len(own)] for i in b]) for w in range(len(own))]


def rest_as_iterators(own: Any, size: int, taken: int) -> Any:
    return (iter(items) for items in rest(own, size, taken))


def skips_of_each(own: Any, size: int, taken: int) -> Any:
    return [items[taken * size :] for items in own]


def skips_items(own: Any, size: int, taken: int) -> Any:
    turn = taken % len(own)
    share = [taken // len(own) + (w < turn) for w in range(len(own))]
    left = [items[n:] for items, n in zip(own, share, strict=True)]
    return left[turn:] + left[:turn]


def passes_nobody_over(own: Any, size: int, taken: int) -> Any:
    turn = taken % len(own)
    share = [taken // len(own) + (w < turn) for w in range(len(own))]
    left = [items[n * size :] for items, n in zip(own, share, strict=True)]
    return left[turn:] + left[:turn]


def without_turn(own: Any, size: int, taken: int) -> Any:
    left = rest(own, size, taken)
    return sorted(left, key=lambda items: items[-1:] or [99])


def turns_too_far(own: Any, size: int, taken: int) -> Any:
    left = rest(own, size, taken)
    return left[1:] + left[:1]


def forgets_the_rest_of_a_round(own: Any, size: int, taken: int) -> Any:
    return [items[taken // len(own) * size :] for items in own]


def in_batches(own: Any, size: int, taken: int) -> Any:
    return batches(rest(own, size, taken), size)


def in_one_list(own: Any, size: int, taken: int) -> Any:
    return list(chain(*rest(own, size, taken)))


def to_one_worker(own: Any, size: int, taken: int) -> Any:
    return [in_one_list(own, size, taken)]


def one_ahead(own: Any, size: int, taken: int) -> Any:
    return rest(own, size, taken + len(own))


def drops_short_ones(own: Any, size: int, taken: int) -> Any:
    return [items[: len(items) // size * size] for items in rest(own, size, taken)]


def adds_one(own: Any, size: int, taken: int) -> Any:
    return [[*items, 99] for items in rest(own, size, taken)]


class InTurn:
    """Each call is answered by the next of some answers."""

    def __init__(self, *answers: Any) -> None:
        self.answers = cycle(answers)

    def __call__(self, *args: Any) -> Any:
        return next(self.answers)(*args)


REST = (rest_by_rounds, rest_in_a_queue, rest_dealt_anew, rest_as_iterators, rest)
RIGHT: list[tuple[Any, Any]] = [
    (check_shard, answers.mixed(mine_in_two, mine, mine_by_remainder)),
    (check_shard, answers.mixed(answers.Called(mine_in_blocks), mine_in_two, mine_backwards)),
    (check_shard, answers.mixed(mine_in_rounds, mine_in_blocks, answers.decorated(mine))),
    (check_together, answers.mixed(None, together, together_to_zero, together_by_objects)),
    (check_together, answers.mixed(None, together_by_objects, Together, together_ahead)),
    (check_together, answers.mixed(None, together_ahead, answers.Called(together), Together)),
    (check_resume, InTurn(*REST)),
    (check_resume, InTurn(*REST[::-1])),
    (check_resume, partial(answers.decorated(InTurn(*REST[2:], *REST[:2])))),
]
WRONG: list[tuple[Any, Any, str]] = [
    (check_shard, everything, "5, 5 and 4 items on 2 ranks with 2 workers each.*Nobody shares"),
    (check_shard, by_rank, "workers of a rank give the same items.*get_worker_info"),
    (check_shard, by_worker, "the worker chose, the rank did not"),
    (check_shard, only_items, "read 4 of 4 shards.*each can have 1 whole"),
    (check_shard, only_shards, "Rank 0 gets 9 and rank 1 5.*cannot be fair"),
    (check_shard, by_ranks_alone, "One taker gets 4 items and another 2.*not with the ranks alone"),
    (check_shard, workers_first, "Rank 0 gets 8 and rank 1 6.*neighbours in number"),
    (check_shard, needs_workers, "num_workers=0 it raised AttributeError.*one taker a rank"),
    (check_shard, drops_the_rest, "Item 12 never comes"),
    (check_shard, in_pairs, r"\(0, 0\) is no item"),
    (check_shard, from_one, "Item 0 never comes"),
    (check_shard, wrong_factor, "2 shards of 7 items on 3 ranks.*comes more than once.*its own"),
    (check_shard, adds_up, "comes more than once.*number of its own"),
    (check_shard, pads, "Item 0 comes more than once"),
    (check_shard, all_to_worker_0, "comes more than once.*number of its own"),
    (check_shard, gives_shards, "shard 0 is no item"),
    (check_shard, answers.prints(mine), "Is `return` or `yield` missing"),
    (check_shard, lambda shards, rank, world_size: 77, "77 is no item"),
    (check_shard, lambda shards, rank, world_size: [], "Item 0 never comes"),
    (check_shard, answers.recurses, "RecursionError"),
    (check_shard, lambda shards: shards, "TypeError"),
    (check_together, alone, "9 and 2 items on 2 ranks, every=4: rank 0 waited.*what the others do"),
    (check_together, each_step, "rank 0 asked 10 times in 9 steps.*3 questions will do"),
    (check_together, asks_while_it_has, "9 and 2 items.*rank 0 waited.*without an item must"),
    (check_together, drops, "took 2 and 2 steps.*not when the first has"),
    (check_together, always_real, "rank 1 says that None is a real item"),
    (check_together, repeats_as_real, r"rank 1 gave the items \[100, 101, 101.*not real"),
    (check_together, items_alone, "it gave 0.*two things"),
    (check_together, without_end, "after 13 steps it still goes on"),
    (check_together, reads_all, "rank 0 took 9 items before its first step"),
    (check_together, skips_idle_steps, "waited.*ask, and yield something"),
    (check_together, one_step_more, "took 10 and 10 steps.*as many steps as"),
    (check_together, full_blocks, "took 12 and 12 steps.*as many steps as|still goes on"),
    (check_together, wrong_way_round, "as real ones|is a real item|as a real one"),
    (check_together, all_false, r"rank 0 had the items \[0, 1, 2.*and gave \[\]"),
    (check_together, backwards, "in their order"),
    (check_together, loses_the_first, r"had the items \[0, 1, 2.* and gave \[1, 2"),
    (check_together, counts_alike, "0 and 4 items.*took 9 and 9 steps|still goes on"),
    (check_together, answers.prints(together), "it gave None.*two things"),
    (check_together, lambda stream, every: [(i, True) for i in reversed(stream)], "TypeError"),
    (check_together, lambda stream: [], "TypeError"),
    (check_resume, lambda own, size, taken: own, "begins anew: every item that was trained on"),
    (check_resume, skips_of_each, "are lost.*its own number of batches"),
    (check_resume, skips_items, "come twice.*in whole batches"),
    (check_resume, passes_nobody_over, "come twice.*is passed over"),
    (check_resume, without_turn, "the order differs.*whose turn it is"),
    (check_resume, turns_too_far, "the order differs.*whose turn it is"),
    (check_resume, forgets_the_rest_of_a_round, "come twice"),
    (check_resume, in_batches, "items, not batches"),
    (check_resume, in_one_list, "a list of items for each worker"),
    (check_resume, to_one_worker, "has 2 workers, too"),
    (check_resume, one_ahead, "are lost"),
    (check_resume, drops_short_ones, "are lost.*a short batch"),
    (check_resume, adds_one, "99 was in no list"),
    (check_resume, answers.prints(rest), "you returned None.*for each worker"),
    (check_resume, lambda own, size, taken: [["a"], []], "Return the items themselves"),
    (check_resume, lambda own: own, "raised TypeError"),
    (check_resume, answers.recurses, "raised RecursionError"),
]


@answers.right(RIGHT)
def test_a_right_answer_passes(check: Any, answer: Any) -> None:
    answers.passes(check, answer)


@answers.wrong(WRONG)
def test_a_wrong_answer_is_explained(check: Any, answer: Any, said: str) -> None:
    answers.is_explained(check, answer, said)
