"""The digits: real images small enough for every rank, and two small models that learn them.

Runs wherever a lesson calls it, mostly in workers. The 1,797 images of 8 x 8 pixels come with
scikit-learn's wheel, so nothing is downloaded; the file is read without importing scikit-learn,
which would cost each rank a second and 100 MB. A lesson writes out a model or a split in full
before a later lesson imports it from here.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

BRIGHTEST = 16  # pixel value in the file
TEST_EVERY = 5  # every fifth image of each digit is a test image


def digits(train: bool = True) -> TensorDataset:
    """The digits as a dataset of (image, label), always with the same split.

    Parameters
    ----------
    train : bool
        True for the 1,437 training images, False for the 360 test images. Both are in a fixed
        shuffled order, with equal shares of every digit.

    Returns
    -------
    TensorDataset
        Images, float32 `(n, 1, 8, 8)` from 0 to 1, and labels, int64 `(n,)` from 0 to 9.

    Notes
    -----
    Test set of the Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, UCI
    Machine Learning Repository. The file is read once, in some 10 ms; forked ranks inherit it. Each
    call returns new tensors.
    """
    rows = _rows()
    rows = rows[_split(rows[:, -1], train)]
    images = torch.from_numpy(rows[:, :-1] / BRIGHTEST).reshape(-1, 1, 8, 8)
    return TensorDataset(images, torch.from_numpy(rows[:, -1].astype(np.int64)))


@functools.cache
def _rows() -> np.ndarray:
    """The file's rows: 64 pixels and the label of each image."""
    return np.loadtxt(_file(), delimiter=",", dtype=np.float32)


def _file() -> str:
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install scikit-learn")
    return os.path.join(package.submodule_search_locations[0], "datasets/data/digits.csv.gz")


def _split(labels: np.ndarray, train: bool) -> np.ndarray:
    """Indices of the training or test rows, in shuffled order."""
    # The file counts 0 to 9 over and over, so every other image in it is an even digit.
    # RandomState, unlike default_rng, promises the same numbers in every version of NumPy.
    mixed: np.ndarray = np.random.RandomState(0).permutation(len(labels))
    by_digit = np.argsort(labels[mixed], kind="stable")
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[by_digit[::TEST_EVERY]] = True
    rows: np.ndarray = mixed[chosen != train]
    return rows


def unequal_shard(
    dataset: TensorDataset, rank: int, world_size: int, weights: Sequence[float] | None = None
) -> TensorDataset:
    """One rank's consecutive part of a dataset; the parts have different sizes.

    Parameters
    ----------
    dataset : TensorDataset
        All samples.
    rank, world_size : int
        The rank, and the number of ranks.
    weights : sequence of float, optional
        `(world_size,)`: the relative sizes of the parts; by default 1, 2, 3 and so on. Each sample
        is in exactly one part.
    """
    _check(dataset, rank, world_size)
    shares = np.asarray(weights if weights is not None else range(1, world_size + 1), dtype=float)
    if shares.shape != (world_size,) or not (np.isfinite(shares) & (shares > 0)).all():
        raise ValueError(
            f"weights must be {world_size} positive numbers, one a rank, got {weights!r}"
        )
    ends = np.rint(np.cumsum(shares) / shares.sum() * len(dataset)).astype(int).tolist()
    return TensorDataset(*dataset[[0, *ends][rank] : ends[rank]])


def shifted_shard(
    dataset: TensorDataset, rank: int, world_size: int, shift: float = 1.0
) -> TensorDataset:
    """One rank's equal part of a dataset, brighter from rank to rank.

    Rank r gets samples r, r + world_size and so on, with `shift * r` added to each pixel, so one
    rank's mean is not the mean of all. The shards' sizes differ by at most 1.
    """
    _check(dataset, rank, world_size)
    images, *others = dataset[rank::world_size]
    return TensorDataset(images + shift * rank, *others)


def _check(dataset: TensorDataset, rank: int, world_size: int) -> None:
    if not isinstance(dataset, TensorDataset):
        raise TypeError(
            f"dataset must be a TensorDataset of images and labels, as digits() returns it; got "
            f"{type(dataset).__name__}"
        )
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}")


class SmallMLP(nn.Module):  # type: ignore[misc]
    """Two linear layers: 2,410 parameters in 4 tensors. Images `(n, 1, 8, 8)` to scores `(n, 10)`.

    Without batch norm and dropout, by-hand gradients can be compared to the last bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.output = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(torch.relu(self.hidden(images.flatten(1))))


class SmallCNN(nn.Module):  # type: ignore[misc]
    """Two convolutions with batch norm: 1,922 parameters. Images `(n, 1, 8, 8)` to `(n, 10)`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.output = nn.Linear(16 * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.features(images).flatten(1))
