"""Plots are legible for colour-blind readers, and texts have enough contrast: computed.

Colour vision deficiencies as Machado, Oliveira and Fernandes (2009) model them, fully developed;
differences of colours in CIELAB, where about 2 is just seen; contrast as WCAG 2.2 defines it.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from ddp_lessons.plots import style
from ddp_lessons.plots.hang_board import LABELS
from ddp_lessons.plots.tensors import COLOURS

SEEN = {
    "usual": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
    "grey": [[0.2126, 0.7152, 0.0722]] * 3,
}
WAITING = style.WAIT_LOOK["facecolor"]
# Colours that one plot shows side by side, without hatching or another distinction.
BESIDE = {
    "work and flights": (*style.WORK, style.ORANGE, style.PALE),
    "ranks": COLOURS,
}
CLEAR, CLEAR_IN_GREY = 12.0, 4.0
READABLE = 4.5  # contrast ratio, WCAG 2.2 AA for text of any size


def lab(colour: Any, sight: str) -> Any:
    """A colour in CIELAB (D65) as somebody sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(SEEN[sight]) @ linear, 0, 1)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = to_xyz @ linear / (to_xyz @ np.ones(3))
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SEEN)
@pytest.mark.parametrize("colours", BESIDE.values(), ids=BESIDE)
def test_colours_side_by_side_are_told_apart(colours: tuple[Any, ...], sight: str) -> None:
    least = CLEAR_IN_GREY if sight == "grey" else CLEAR
    for one, other in itertools.combinations(colours, 2):
        difference = np.linalg.norm(lab(one, sight) - lab(other, sight))
        assert difference > least, (one, other, sight)


def contrast(one: Any, other: Any) -> float:
    dark, light = sorted((style.luminance(one), style.luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    "fill", [*style.WORK, style.ORANGE, style.PALE, WAITING, *COLOURS, style.INK, "white"]
)
def test_a_text_is_read_on_every_fill(fill: Any) -> None:
    assert contrast(style.ink_on(fill), fill) > READABLE


@pytest.mark.parametrize("look", [look for _, look in LABELS.values()])
def test_a_text_is_read_on_every_call_of_the_board(look: dict[str, Any]) -> None:
    assert contrast(style.ink_on(look["facecolor"]), look["facecolor"]) > READABLE


def test_what_waits_is_hatched() -> None:
    assert style.WAIT_LOOK["hatch"]
    assert contrast(style.WAIT_LOOK["edgecolor"], WAITING) > 3  # the hatching itself
