"""SyncBatchNorm on CPU tensors, compared with batch norm over the whole batch in one process."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Sequence
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lessons import launch
from ddp_lessons.data import SmallCNN, digits
from ddp_lessons.syncbn import SyncBatchNorm, combine, convert_sync_batchnorm

pytestmark = pytest.mark.ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

CHANNELS = 3
TRAILING: dict[int, tuple[int, ...]] = {2: (), 3: (5,), 4: (4, 2), 5: (2, 3, 2)}  # by dimensions
LAYER = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHARES: dict[int, list[tuple[int, ...]]] = {
    1: [(6,)],
    2: [(4, 4), (5, 2), (1, 1), (0, 3)],
    3: [(2, 2, 2), (1, 4, 2)],
    4: [(2, 2, 2, 2), (3, 1, 4, 2), (0, 3, 0, 1)],
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"affine": False},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-2},
    {"track_running_stats": False},
]
Case = tuple[Sequence[int], int, dict[str, Any]]
CASES: dict[int, list[Case]] = {
    world_size: [
        (shares, dims, options)
        for shares in all_shares
        for dims in LAYER
        for options in OPTIONS
        if sum(shares) > 2 or dims > 2 or "affine" not in options
    ]
    for world_size, all_shares in SHARES.items()
}


def quietly_converted(layer: nn.Module, group: Any = None) -> nn.Module:
    torch_made = nn.SyncBatchNorm.convert_sync_batchnorm(layer, group)
    torch_made.__class__ = SyncBatchNorm
    return torch_made


def make_layer(dims: int, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = LAYER[dims](CHANNELS, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def make_batches(shares: Sequence[int], dims: int, steps: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    shape = (sum(shares), CHANNELS, *TRAILING[dims])
    return [torch.randn(shape).double() * 3 + 20 for _ in range(steps)]


def trained(layer: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    """Outputs, gradients and buffers after a forward and backward pass for each batch."""
    outputs, of_inputs = [], []
    for batch in batches:
        x = batch.clone().requires_grad_()
        y = layer(x)
        (y * torch.linspace(-1, 1, CHANNELS).view(-1, *[1] * (x.dim() - 2)) * x).sum().backward()
        outputs.append(y.detach())
        of_inputs.append(x.grad)
    layer.eval()
    outputs += [layer(batches[0]).detach()] if layer.track_running_stats else []
    return {
        "outputs": outputs,
        "of_inputs": of_inputs,
        "gradients": [p.grad for p in layer.parameters()],
        "buffers": list(layer.buffers()),
    }


def difference(of_rank: Any, expected: Any, part: slice) -> float:
    """The largest difference of a rank's results from those for the whole batch."""
    for gradient in of_rank["gradients"]:
        dist.all_reduce(gradient)
    pairs = [
        (a, b[part])
        for name in ("outputs", "of_inputs")
        for a, b in zip(of_rank[name], expected[name], strict=True)
    ]
    pairs += zip(of_rank["gradients"], expected["gradients"], strict=True)
    pairs += zip(of_rank["buffers"], expected["buffers"], strict=True)
    return max([float((a - b).abs().max()) for a, b in pairs if a.numel()], default=0.0)


def differences(rank: int, cases: list[Case]) -> list[float]:
    dist.init_process_group("gloo")
    results = []
    for shares, dims, options in cases:
        batches = make_batches(shares, dims)
        part = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
        layer = quietly_converted(make_layer(dims, options))
        of_rank = trained(layer, [batch[part] for batch in batches])
        results.append(difference(of_rank, trained(make_layer(dims, options), batches), part))
    dist.destroy_process_group()
    return results


@pytest.mark.parametrize("world_size", CASES)
def test_it_is_batch_norm_over_the_whole_batch(world_size: int) -> None:
    cases = CASES[world_size]
    run = launch(differences, (cases,), nprocs=world_size)
    for found in run.values:
        for case, value in zip(cases, found, strict=True):
            assert value < 1e-10, case


def in_subgroups(rank: int) -> bool:
    """Ranks 0 and 2 share their statistics, and so do ranks 1 and 3."""
    dist.init_process_group("gloo")
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    torch.manual_seed(2)
    batches = [torch.randn(4, CHANNELS).double() + 5 * number for number in range(4)]
    layer = quietly_converted(make_layer(2, {}), groups[rank % 2])
    output = layer(batches[rank])
    whole = make_layer(2, {})(torch.cat(batches[rank % 2 :: 2]))
    dist.destroy_process_group()
    return bool(torch.allclose(output, whole[4 * (rank // 2) :][:4], atol=1e-12))


def test_subgroups_have_statistics_of_their_own() -> None:
    assert launch(in_subgroups, nprocs=4).values == [True] * 4


def types_and_precision(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    layer = SyncBatchNorm(CHANNELS)
    half = layer(torch.randn(6, CHANNELS, dtype=torch.bfloat16))
    layer = SyncBatchNorm(CHANNELS, momentum=1.0)
    torch.manual_seed(rank)
    far = torch.randn(500, CHANNELS) + 10_000
    y = layer(far)
    layer.eval()
    channels_last = SyncBatchNorm(CHANNELS)(
        torch.randn(2, CHANNELS, 4, 4).contiguous(memory_format=torch.channels_last)
    )
    if rank == 0:  # evaluation needs no other rank
        layer(far)
    dist.destroy_process_group()
    return {
        "half": half.dtype,
        "variance": layer.running_var.tolist(),
        "largest": y.abs().max().item(),
        "channels_last": channels_last.is_contiguous(memory_format=torch.channels_last),
    }


def test_types_precision_and_evaluation() -> None:
    run = launch(types_and_precision, nprocs=2)
    assert [value["half"] for value in run.values] == [torch.bfloat16] * 2
    assert run.values[0]["variance"] == run.values[1]["variance"]
    # Far from zero, sums of squares in float32 would lose all digits of the variance.
    assert run.values[0]["variance"] == pytest.approx([1.0] * CHANNELS, rel=0.2)
    assert all(value["largest"] < 6 for value in run.values)
    assert all(value["channels_last"] for value in run.values)
    assert {span.op for span in run.spans() if span.op} == {
        "init_process_group",
        "all_gather",
        "destroy_process_group",
    }


def sums_and_hooks(rank: int) -> tuple[list[str], bool]:
    """A first layer's input needs no gradient, so backward sends nothing."""
    dist.init_process_group("gloo")
    layer = SyncBatchNorm(CHANNELS)
    layer(torch.randn(4, CHANNELS)).square().sum().backward()
    equal_names = list(layer.state_dict()) == list(nn.BatchNorm1d(CHANNELS).state_dict())
    dist.destroy_process_group()
    return list(layer.state_dict()), equal_names


def test_an_input_without_gradient_costs_no_all_reduce() -> None:
    run = launch(sums_and_hooks, nprocs=2)
    assert all(equal for _, equal in run.values)
    assert "all_reduce" not in {span.op for span in run.spans()}


def bad_input(rank: int, shape: tuple[int, ...]) -> None:
    dist.init_process_group("gloo")
    SyncBatchNorm(CHANNELS)(torch.ones(shape if rank == 0 or shape[0] > 1 else (0, *shape[1:])))


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, CHANNELS), r"more than 1 value per channel.*all 2 ranks together have 1"),
        ((4, 7), r"SyncBatchNorm\(3\) got an input of shape \(4, 7\).*must be 3"),
        ((4,), "expected at least 2D input"),
    ],
)
def test_bad_input_is_explained(shape: tuple[int, ...], said: str) -> None:
    run = launch(bad_input, (shape,), check=False)
    text = run.explain().replace("\n", " ")
    assert "ValueError" in text
    assert re.search(said, text), text


def test_one_value_on_one_rank_alone_is_refused_as_by_batch_norm() -> None:
    def alone(rank: int) -> None:
        dist.init_process_group("gloo")
        SyncBatchNorm(CHANNELS)(torch.ones(1, CHANNELS))

    run = launch(alone, nprocs=1, check=False)
    assert "Expected more than 1 value per channel" in run.explain()


def test_without_a_group_it_is_batch_norm() -> None:
    batch = make_batches((6,), 4, steps=1)[0]
    layer = make_layer(4, {})
    assert torch.equal(quietly_converted(copy.deepcopy(layer))(batch), layer(batch))


def test_combining_parts_gives_the_whole() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(n, CHANNELS).double() + n for n in (5, 1, 0, 7)]
    counts = torch.tensor([[float(len(part))] for part in parts]).double()
    means = torch.stack([p.mean(0) if len(p) else p.new_zeros(CHANNELS) for p in parts])
    squares = torch.stack([(p - m).square().sum(0) for p, m in zip(parts, means, strict=True)])
    count, mean, variance = combine(counts, means, squares)
    whole = torch.cat(parts)
    assert count.tolist() == [13]
    torch.testing.assert_close(mean, whole.mean(0))
    torch.testing.assert_close(variance, whole.var(0, correction=0))


def test_convert_keeps_parameters_names_and_mode(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(SmallCNN(), nn.InstanceNorm1d(4), nn.BatchNorm1d(4, affine=False)).eval()
    names, weight = list(model.state_dict()), model[0].features[1].weight
    checkpoint = copy.deepcopy(model.state_dict())
    converted = convert_sync_batchnorm(model)
    assert converted is model
    assert "3 batch norm layers converted to ddp_lessons.syncbn" in capsys.readouterr().out
    assert list(converted.state_dict()) == names
    assert converted[0].features[1].weight is weight
    assert not converted[2].training
    assert isinstance(converted[1], nn.InstanceNorm1d)
    assert sum(isinstance(layer, SyncBatchNorm) for layer in model.modules()) == 3
    nn.Sequential(
        SmallCNN(), nn.InstanceNorm1d(4), nn.BatchNorm1d(4, affine=False)
    ).load_state_dict(converted.state_dict())
    converted.load_state_dict(checkpoint)


def test_convert_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(convert_sync_batchnorm(nn.BatchNorm2d(3)), SyncBatchNorm)
    assert "1 batch norm layer converted" in capsys.readouterr().out
    convert_sync_batchnorm(nn.Linear(2, 2))
    assert "no batch norm layer" in capsys.readouterr().out
    on_meta = convert_sync_batchnorm(nn.BatchNorm2d(3, device="meta"))
    assert isinstance(on_meta, SyncBatchNorm)
    capsys.readouterr()
    assert isinstance(convert_sync_batchnorm(nn.BatchNorm2d(3), quiet=True), SyncBatchNorm)
    assert not capsys.readouterr().out


def test_convert_refuses_nonsense() -> None:
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module"):
        convert_sync_batchnorm([nn.BatchNorm1d(3)])

    def too_late(rank: int) -> None:
        dist.init_process_group("gloo")
        convert_sync_batchnorm(DistributedDataParallel(nn.Linear(2, 2)))

    run = launch(too_late, nprocs=1, check=False)
    assert "Convert first, then wrap" in run.explain()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_it_is_torchs_own() -> None:
    def both(rank: int) -> tuple[bool, float]:
        dist.init_process_group("gloo")
        torch.manual_seed(rank)
        x = torch.randn(4 + rank, CHANNELS, 5)
        on_cpu, on_gpu = SyncBatchNorm(CHANNELS), SyncBatchNorm(CHANNELS).cuda()
        own = type(convert_sync_batchnorm(nn.BatchNorm1d(3).cuda())) is nn.SyncBatchNorm
        worst = (on_cpu(x) - on_gpu(x.cuda()).cpu()).abs().max().item()
        dist.destroy_process_group()
        return own, worst

    for own, worst in launch(both, nprocs=2).values:
        assert own
        assert worst < 1e-5


def train(rank: int, world_size: int, steps: int) -> dict[str, Any]:
    """Train the CNN on global batches of 64; the losses of all ranks together, and the accuracy."""
    if world_size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model: nn.Module = SmallCNN().double()
    if world_size > 1:
        model = DistributedDataParallel(convert_sync_batchnorm(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = digits().tensors
    losses = []
    for step in range(steps):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))
        batch = order[:64][rank::world_size]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch].double()), labels[batch])
        loss.backward()
        optimizer.step()
        total = loss.detach() / world_size
        if world_size > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    model.eval()
    images, labels = digits(train=False).tensors
    accuracy = (model(images.double()).argmax(1) == labels).double().mean().item()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    if world_size > 1:
        dist.destroy_process_group()
    return {"losses": losses, "accuracy": accuracy, "weights": weights}


def test_two_ranks_train_the_cnn_as_one_process_does() -> None:
    alone = launch(train, (1, 20), nprocs=1).values[0]
    for value in launch(train, (2, 20)).values:
        assert value["losses"] == pytest.approx(alone["losses"], rel=1e-9)
        torch.testing.assert_close(value["weights"], alone["weights"], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_two_ranks_learn_the_digits() -> None:
    assert all(value["accuracy"] >= 0.95 for value in launch(train, (2, 120)).values)
