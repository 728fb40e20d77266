from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from resnest_det import create_backbone
from resnest_det.engine.precise_bn import recompute_batch_norms
from resnest_det.layers import SyncBatchNorm


def images(number: int, seed: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 5 + (1 + seed) * torch.randn(number, channels, 6, 5, generator=generator)


def pooled_moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over all values, the slow way."""
    channels = torch.cat([batch.transpose(0, 1).flatten(1) for batch in batches], dim=1).double()
    return channels.mean(1), (channels - channels.mean(1, keepdim=True)).square().mean(1)


def assert_statistics(norm: nn.Module, batches: Iterable[Tensor]) -> None:
    mean, var = pooled_moments(batches)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-6, atol=1e-6, check_dtype=False)


def test_statistics_are_those_of_all_values_whatever_the_batches() -> None:
    batches = [images(2, 0), images(5, 1), images(1, 2)]
    norm = nn.BatchNorm2d(3)
    recompute_batch_norms(norm, iter(batches), norm)
    assert_statistics(norm, batches)
    mean_of_variances = torch.stack([pooled_moments([batch])[1] for batch in batches]).mean(0)
    assert ((norm.running_var / mean_of_variances - 1).abs() > 0.1).all()  # what averaging over batches would give


def test_deeper_norms_see_what_batch_statistics_make() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    batches = [images(3, 0), images(3, 1)]
    with torch.no_grad():
        inner = [net[1](nn.functional.batch_norm(batch, None, None, training=True)) for batch in batches]
    recompute_batch_norms(net, batches, net)
    assert_statistics(net[0], batches)
    assert_statistics(net[2], inner)


def test_one_batch_gives_a_network_of_its_statistics() -> None:
    """In evaluation, the network then does to that batch what it does in training."""
    torch.manual_seed(0)
    net = create_backbone("resnest14", num_classes=3)
    x = torch.randn(4, 3, 64, 64)
    expected = net(x).detach()
    recompute_batch_norms(net, [x, x], net)
    torch.testing.assert_close(net.eval()(x).detach(), expected, rtol=1e-4, atol=1e-4)


def test_a_norm_that_runs_several_times_sees_every_input() -> None:
    norm = nn.BatchNorm1d(3)
    levels = [images(2, seed)[..., 0] for seed in (0, 1, 2)]
    recompute_batch_norms(norm, [levels], lambda batch: [norm(x) for x in batch])
    assert_statistics(norm, levels)


def test_large_means_cost_no_digits() -> None:
    norm = nn.BatchNorm2d(3).double()
    batches = [1e6 + images(2, seed).double() for seed in (0, 1)]
    recompute_batch_norms(norm, batches, norm)
    torch.testing.assert_close(norm.running_var, pooled_moments(batches)[1], rtol=1e-9, atol=0)


def test_halves_are_measured_in_float32() -> None:
    norm = nn.BatchNorm2d(3)
    batches = [images(2, seed).bfloat16() for seed in (0, 1)]
    recompute_batch_norms(norm, batches, norm)
    assert_statistics(norm, batches)


def test_empty_inputs_count_nothing() -> None:
    norm = nn.BatchNorm2d(3)
    batches = [images(2, 0), images(0, 1)]
    recompute_batch_norms(norm, batches, norm)
    assert_statistics(norm, batches[:1])


class Counting(nn.Module):
    """A module with a buffer of its own, changed in place and replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.last = x.mean((0, 2, 3))
        return x


class PartlyFixed(nn.Sequential):
    """A network whose own train() leaves its third child in evaluation."""

    def train(self, mode: bool = True) -> PartlyFixed:
        super().train(mode)
        self[2].eval()
        return self


def network() -> nn.Sequential:
    torch.manual_seed(0)
    unreached = nn.BatchNorm2d(3)
    net = PartlyFixed(
        nn.BatchNorm2d(3), Counting(), nn.BatchNorm2d(3), FrozenBatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3)
    )
    net[0].unused = unreached
    net(images(4, 3))
    return net


@pytest.mark.parametrize("training", [False, True])
def test_nothing_else_changes(training: bool) -> None:
    net = network().train(training)
    net[4].eval()
    before = {name: (tensor, tensor.clone()) for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
    modes = {name: module.training for name, module in net.named_modules()}
    torch.manual_seed(7)
    random_state = torch.get_rng_state()

    def batches() -> Iterable[Tensor]:
        for seed in (0, 1):
            torch.rand(1)  # as a loader draws its workers' seed
            yield images(2, seed)

    def forward(batch: Tensor) -> None:
        assert net.training
        assert net[4].training
        assert not net(batch).requires_grad

    recompute_batch_norms(net, batches(), forward)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: module.training for name, module in net.named_modules()} == modes
    after = dict([*net.named_parameters(), *net.named_buffers()])
    assert after.keys() == before.keys()
    assert all(after[name] is tensor for name, (tensor, _) in before.items())
    changed = {name for name, (tensor, copy) in before.items() if not torch.equal(tensor, copy)}
    assert changed == {f"{child}.running_{moment}" for child in (0, 5) for moment in ("mean", "var")}
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_an_error_leaves_the_model_as_it_was() -> None:
    net = network().eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random_state = torch.get_rng_state()

    def forward(batch: Tensor) -> None:
        net(batch)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        recompute_batch_norms(net, [images(2, 0)], forward)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module.training or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    "net",
    [create_backbone("resnet18", norm="frozen_bn"), nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False)],
)
def test_without_live_norms_nothing_is_run(net: nn.Module) -> None:
    net.eval()

    def batches() -> Iterable[Tensor]:
        raise AssertionError("a batch was asked for")
        yield

    recompute_batch_norms(net, batches(), net)
    assert not net.training


def test_no_batch() -> None:
    norm = nn.BatchNorm2d(3).eval()
    with pytest.raises(ValueError, match="none of the model's 1 live BatchNorms saw a value in 0 batches; give one"):
        recompute_batch_norms(norm, [], norm)
    assert not norm.training


def test_a_forward_of_another_model() -> None:
    with pytest.raises(ValueError, match="none of the model's 1 live BatchNorms saw a value in 2 batches; .* forward"):
        recompute_batch_norms(nn.BatchNorm2d(3), [images(2, 0)] * 2, nn.BatchNorm2d(3))


def test_compiled_networks_are_seen_into() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    compiled = torch.compile(net, backend="eager")
    batches = [images(2, 0), images(2, 1)]
    with torch.no_grad():
        compiled(batches[0])  # into code that knows of no hook
    recompute_batch_norms(compiled, batches, compiled)
    with torch.no_grad():
        assert_statistics(net[1], [net[0](batch) for batch in batches])


def test_checkpointed_networks() -> None:
    plain, saving = (create_backbone("resnet18", checkpoint=checkpoint) for checkpoint in (False, True))
    saving.load_state_dict(plain.state_dict())
    for net in (plain, saving):
        recompute_batch_norms(net, [torch.ones(2, 3, 32, 32).cumsum(3)], net)
    assert all(torch.equal(tensor, saving.state_dict()[name]) for name, tensor in plain.state_dict().items())


def one_of_two(rank: int, folder: Path) -> None:
    """The statistics of this process's norms, into folder/RANK.pt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    unequal = nn.BatchNorm2d(3)
    recompute_batch_norms(unequal, [images(2 + seed, seed) for seed in ((0, 1), ())[rank]], unequal)
    shared = nn.Sequential(SyncBatchNorm(3), nn.ReLU(), nn.BatchNorm2d(3))
    model = nn.parallel.DistributedDataParallel(shared)
    recompute_batch_norms(model.module, [images(2 + rank, rank + 2)], model.module)
    try:
        recompute_batch_norms(unequal, [], unequal)
    except ValueError as error:
        message = str(error)
    torch.save(
        {"unequal": unequal.state_dict(), "shared": shared.state_dict(), "message": message}, folder / f"{rank}.pt"
    )
    dist.destroy_process_group()


def test_two_processes_pool_their_values(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    batches = [images(2, 2), images(3, 3)]
    normalised = nn.functional.batch_norm(torch.cat(batches), None, None, training=True).relu()
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        unequal, shared = nn.BatchNorm2d(3), nn.Sequential(SyncBatchNorm(3), nn.ReLU(), nn.BatchNorm2d(3))
        unequal.load_state_dict(results["unequal"])
        shared.load_state_dict(results["shared"])
        assert_statistics(unequal, [images(2, 0), images(3, 1)])  # all of them the first process's
        assert_statistics(shared[0], batches)
        assert_statistics(shared[2], [normalised])
        assert results["message"].startswith("none of the model's 1 live BatchNorms saw a value in 0 batches")
