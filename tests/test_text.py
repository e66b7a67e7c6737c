"""The words in which runs speak of ranks, numbers and signals."""

from __future__ import annotations

from ddp_lessons.text import (
    agree,
    all_ranks,
    at_head,
    count,
    exit_name,
    listed,
    ranks_text,
    short_repr,
    wrapped,
)


def test_numbers_and_ranks() -> None:
    assert count(1, "rank") == "1 rank"
    assert count(4, "rank") == "4 ranks"
    assert ranks_text([3]) == "rank 3"
    assert ranks_text(range(0, 32, 2)).endswith(" 26, 28 and 30")
    assert ranks_text(range(0, 64, 2)) == "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 24 more"
    assert ranks_text([2, 0, 1]) == "ranks 0, 1 and 2"
    assert ranks_text(range(8)) == "ranks 0 to 7"
    assert all_ranks(1) == "The rank"
    assert all_ranks(4) == "All 4 ranks"


def test_values_in_few_characters() -> None:
    assert short_repr("x") == "'x'"
    assert short_repr([1, "two"]) == "[1, 'two']"
    assert len(short_repr(list(range(10**5)))) < 100
    assert short_repr(1 << 20_000) == "an int of 20001 bits"  # Python writes no number so long


def test_sentences() -> None:
    assert listed(["a"]) == "a"
    assert listed(iter(["a", "b", "c"])) == "a, b and c"
    assert at_head("rank 1 is busy") == "Rank 1 is busy"
    assert at_head("") == ""
    assert [agree(ranks, "waits", "wait") for ranks in ([0], [0, 1])] == ["waits", "wait"]


def test_exits() -> None:
    assert exit_name(-9) == "SIGKILL"
    assert exit_name(-99) == "signal 99"
    assert exit_name(7) == "exit code 7"


def test_lines_are_broken_between_words_and_code_stays_whole() -> None:
    words = "  " + "some words, " * 12
    assert [*map(str.strip, wrapped(words).splitlines())] == [
        "some words, some words, some words, some words, some words, some words, some words,",
        "some words, some words, some words, some words, some words,",
    ]
    assert all(line.startswith("  some") for line in wrapped(words).splitlines())
    code = f"loss = train({', '.join(['model'] * 20)})  # here"
    place = "rank 1 waits in all_reduce: Cell In[2], line 5:"
    assert wrapped(f"{place}  {code}\nnext") == f"{place}\n    {code}\nnext"
    assert wrapped(f"{place}  x = 1") == f"{place}  x = 1"  # it fits
    assert wrapped(word := "x" * 100) == word
