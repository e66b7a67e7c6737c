"""The digits and their splits, the two models, and their cost for a rank."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ddp_lessons import data, launch

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def train() -> TensorDataset:
    return data.digits()


@pytest.fixture(scope="module")
def test() -> TensorDataset:
    return data.digits(train=False)


def checksum(dataset: TensorDataset) -> str:
    """A checksum of all images and labels in order."""
    content = b"".join(tensor.numpy().tobytes() for tensor in dataset.tensors)
    return hashlib.sha256(content).hexdigest()[:12]


def numbered(count: int) -> TensorDataset:
    """Images whose pixels are all the image's number."""
    numbers = torch.arange(count)
    return TensorDataset(numbers.reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).float(), numbers)


def sizes(count: int, world_size: int, weights: Any = None) -> list[int]:
    dataset = numbered(count)
    return [
        len(data.unequal_shard(dataset, r, world_size, weights=weights)) for r in range(world_size)
    ]


def test_shapes_and_types(train: TensorDataset, test: TensorDataset) -> None:
    for dataset, count in ((train, 1437), (test, 360)):
        images, labels = dataset.tensors
        assert (images.shape, images.dtype) == ((count, 1, 8, 8), torch.float32)
        assert (labels.shape, labels.dtype) == ((count,), torch.int64)
        assert images.is_contiguous()
        assert (images.min(), images.max()) == (0, 1)
    images, labels = next(iter(DataLoader(train, batch_size=16)))
    assert (images.shape, labels.shape) == ((16, 1, 8, 8), (16,))


def test_both_splits_together_are_the_digits_of_scikit_learn(
    train: TensorDataset, test: TensorDataset
) -> None:
    from sklearn.datasets import load_digits

    both = zip(train.tensors, test.tensors, strict=True)
    images, labels = (torch.cat(parts).numpy() for parts in both)
    ours = np.column_stack([images.reshape(-1, 64) * 16, labels])
    theirs = np.column_stack([load_digits().data, load_digits().target])
    assert ours.shape == theirs.shape
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


def test_no_image_is_in_both_splits(train: TensorDataset, test: TensorDataset) -> None:
    seen, unseen = ({image.numpy().tobytes() for image, _ in split} for split in (train, test))
    assert len(seen) == 1437
    assert not seen & unseen


def test_the_split_is_fixed(train: TensorDataset, test: TensorDataset) -> None:
    assert (checksum(train), checksum(test)) == ("e550dd54abde", "a7eef2653f67")
    np.random.seed(7)
    torch.manual_seed(7)
    assert checksum(data.digits()) == checksum(train)


def test_random_states_are_left_alone() -> None:
    np.random.seed(3)
    torch.manual_seed(3)
    expected = np.random.random(), torch.rand(())
    np.random.seed(3)
    torch.manual_seed(3)
    data.digits()
    assert (np.random.random(), torch.rand(())) == expected


def test_every_digit_has_its_share_of_both(train: TensorDataset, test: TensorDataset) -> None:
    counts = [split.tensors[1].bincount(minlength=10) for split in (train, test)]
    share = counts[1] / (counts[0] + counts[1])
    assert (share - 0.2).abs().max() < 0.005


def test_a_strided_shard_has_every_digit_too(train: TensorDataset) -> None:
    counts = train.tensors[1][::2].bincount(minlength=10)
    assert counts.min() > 55
    assert counts.max() < 90


def test_one_caller_cannot_spoil_the_digits_of_the_next(train: TensorDataset) -> None:
    data.digits().tensors[0].zero_()
    assert checksum(data.digits()) == checksum(train)


@pytest.mark.ranks
def test_scikit_learn_itself_is_not_imported() -> None:
    def work(rank: int) -> tuple[str, bool]:
        return checksum(data.digits()), "sklearn" in sys.modules

    parents = checksum(data.digits())
    assert launch(work, nprocs=2).values == [(parents, False)] * 2


def test_without_scikit_learn_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data._rows.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        data.digits()


def test_unequal_shards_cover_everything_once() -> None:
    for count, world_size in ((1437, 4), (10, 3), (7, 7), (5, 1)):
        shards = [data.unequal_shard(numbered(count), r, world_size) for r in range(world_size)]
        assert torch.equal(torch.cat([s.tensors[1] for s in shards]), torch.arange(count))
        assert all(torch.equal(s.tensors[0][:, 0, 0, 0].long(), s.tensors[1]) for s in shards)


def test_unequal_shards_are_as_unequal_as_asked() -> None:
    assert sizes(100, 4) == [10, 20, 30, 40]
    assert sizes(8, 2, weights=[3, 1]) == [6, 2]
    assert sizes(9, 3, weights=(1, 1, 1)) == [3, 3, 3]
    assert sizes(1000, 2, weights=np.array([0.999, 0.001])) == [999, 1]
    assert sizes(10, 2, weights=[0.1, 0.1]) == [5, 5]


def test_shifted_shards_cover_everything_once_and_grow_brighter(train: TensorDataset) -> None:
    shards = [data.shifted_shard(train, rank, 4, shift=0.5) for rank in range(4)]
    assert [len(shard) for shard in shards] == [360, 359, 359, 359]
    for rank, shard in enumerate(shards):
        assert torch.equal(shard.tensors[0], train.tensors[0][rank::4] + 0.5 * rank)
        assert torch.equal(shard.tensors[1], train.tensors[1][rank::4])
    means = [shard.tensors[0].mean().item() for shard in shards]
    assert np.allclose(np.diff(means), 0.5, atol=0.02)
    assert checksum(train) == checksum(data.digits())


@pytest.mark.parametrize("shard", [data.unequal_shard, data.shifted_shard])
def test_ranks_that_are_none(shard: Any) -> None:
    for rank in (-1, 3, 4):
        with pytest.raises(ValueError, match=f"rank must be from 0 to 2, got {rank}"):
            shard(numbered(9), rank, 3)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        shard(numbered(9), 0, 0)


@pytest.mark.parametrize(
    "weights", [[1, 2], [1, 2, 3, 4], [], [1, 0, 1], [1, -1, 1], [1, np.nan, 1], [1, np.inf, 1], 3]
)
def test_weights_that_make_no_sense(weights: Any) -> None:
    with pytest.raises(ValueError, match="weights must be 3 positive numbers, one a rank, got"):
        data.unequal_shard(numbered(9), 0, 3, weights=weights)


@pytest.mark.parametrize(("model", "count"), [(data.SmallMLP, 2410), (data.SmallCNN, 1922)])
def test_shapes_and_parameters_of_the_models(model: type[nn.Module], count: int) -> None:
    net = model()
    assert sum(p.numel() for p in net.parameters()) == count
    for batch in (1, 5):
        assert net.eval()(torch.zeros(batch, 1, 8, 8)).shape == (batch, 10)
    assert f"{count:,} parameters" in (model.__doc__ or "")


def test_the_cnn_has_batch_norm_and_the_mlp_no_state_but_its_parameters() -> None:
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in data.SmallCNN().modules()) == 2
    assert not list(data.SmallMLP().buffers())


def learn(rank: int, model: type[nn.Module]) -> float:
    torch.manual_seed(0)
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        for images, labels in DataLoader(data.digits(), batch_size=64, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
    images, labels = data.digits(train=False).tensors
    return float((net.eval()(images).argmax(1) == labels).float().mean())


@pytest.mark.ranks
@pytest.mark.parametrize("model", [data.SmallMLP, data.SmallCNN])
def test_the_models_learn_the_digits_in_a_worker(model: type[nn.Module]) -> None:
    (accuracy,) = launch(learn, args=(model,), nprocs=1).values
    assert accuracy > 0.9


def test_each_call_returns_tensors_of_its_own() -> None:
    data.digits().tensors[0].zero_()
    assert data.digits().tensors[0].max() == 1


@pytest.mark.parametrize("shard", [data.unequal_shard, data.shifted_shard])
def test_what_is_no_dataset_is_refused(shard: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a TensorDataset of images and labels.*got tuple"):
        shard(data.digits()[:10], 0, 2)
