"""What activation checkpointing saves and costs: `python -m tests.benchmarks.activation_checkpointing`.

ResNeSt-101 on two images of 512 x 512, plain and with `checkpoint=True`, in one process; the steps (forward, loss,
backward) are interleaved, so that a slow spell of the machine meets both. Checks that gradients and running statistics
are equal bit for bit, and prints a Markdown table, the seconds as medians with (lowest-highest).

Memory is the peak of what autograd keeps for the backward pass, each storage once, parameters apart. It includes what a
block keeps while it is computed again.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections import Counter

import torch
from torch import Tensor, nn

from resnest_det import create_backbone


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Within it, counts what autograd saves for the backward pass, until it lets go of it.

    Attributes:
        now: bytes held, each storage once.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(self._hold, lambda held: held.tensor)
        self.now = 0
        self._holders: Counter[int] = Counter()
        self._apart = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}

    def _hold(self, tensor: Tensor) -> _Held:
        held = _Held(tensor.detach())  # the tensor itself may own the node that saves it
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._apart:
            self._holders[storage.data_ptr()] += 1
            if self._holders[storage.data_ptr()] == 1:
                self.now += storage.nbytes()
            weakref.finalize(held, self._let_go, storage.data_ptr(), storage.nbytes())
        return held

    def _let_go(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if self._holders[address] == 0:
            self.now -= size


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def blocks(net: nn.Module) -> list[nn.Module]:
    """The residual blocks, in the order they run."""
    return [block for number in (1, 2, 3, 4) for block in net.get_submodule(f"layer{number}")]


def loss_of(net: nn.Module, images: Tensor) -> Tensor:
    return net(images).square().mean()


def step_plain(net: nn.Module, images: Tensor) -> tuple[int, list[int]]:
    """Forward and backward without checkpointing.

    Returns:
        The most bytes that are kept, which is at the end of the forward pass; and what each block adds to them.
    """
    before: list[int] = []
    after: list[int] = []
    saved = SavedBytes(net)
    with saved:
        for block in blocks(net):
            block.register_forward_pre_hook(lambda block, inputs: before.append(saved.now))
            block.register_forward_hook(lambda block, inputs, out: after.append(saved.now))
        loss = loss_of(net, images)
    peak = saved.now
    loss.backward()
    return peak, [end - start for start, end in zip(before, after, strict=True)]


def step_checkpointed(net: nn.Module, images: Tensor, bytes_of_blocks: list[int]) -> int:
    """Forward and backward with checkpointing.

    Args:
        net: the network that checkpoints.
        images: its input.
        bytes_of_blocks: what each block keeps when it is computed again, of which hooks outside of it see nothing.

    Returns:
        The most bytes that are kept, at the end of the forward pass or when a block has been computed again.
    """
    saved = SavedBytes(net)
    with saved:
        loss = loss_of(net, images)
    held = [saved.now]
    for block, own in zip(blocks(net), bytes_of_blocks, strict=True):
        block.register_forward_pre_hook(lambda block, inputs, own=own: held.append(saved.now + own))
    loss.backward()
    assert len(held) == 1 + len(bytes_of_blocks)
    return max(held)


def assert_same_step(one: nn.Module, other: nn.Module) -> None:
    """Check that the gradients and the running statistics of two networks are equal bit for bit."""
    for (name, parameter), same in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter.grad, same.grad), name
    for (name, buffer), same in zip(one.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, same), name


def seconds_of_step(net: nn.Module, images: Tensor) -> float:
    net.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss_of(net, images).backward()
    return time.perf_counter() - start


def spread(seconds: list[float]) -> str:
    """Median (lowest-highest)."""
    low, middle, high = (f"{f(seconds):.2f}" for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnest101", help="a network of ours")
    parser.add_argument("--size", type=int, default=512, help="side of the images")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    images = torch.randn(2, 3, arguments.size, arguments.size)
    plain = create_backbone(arguments.backbone)
    checkpointed = create_backbone(arguments.backbone, checkpoint=True)
    checkpointed.load_state_dict(plain.state_dict())
    plain_bytes, bytes_of_blocks = step_plain(plain, images)
    checkpointed_bytes = step_checkpointed(checkpointed, images, bytes_of_blocks)
    assert_same_step(plain, checkpointed)

    seconds: dict[str, list[float]] = {"plain": [], "checkpoint=True": []}
    for _ in range(arguments.rounds):
        for net, measured in zip((plain, checkpointed), seconds.values(), strict=True):
            measured.append(seconds_of_step(net, images))
    print(
        f"{arguments.backbone}, {len(images)} images of {arguments.size} x {arguments.size}, float32, "
        f"{torch.get_num_threads()} threads; median of {arguments.rounds} (lowest-highest)\n\n"
        f"| form | kept for the backward pass, MB | of plain | seconds a step |\n|---|---|---|---|"
    )
    for (name, measured), kept in zip(seconds.items(), (plain_bytes, checkpointed_bytes), strict=True):
        print(f"| {name} | {kept / 1e6:.0f} | {kept / plain_bytes:.1%} | {spread(measured)} |")


if __name__ == "__main__":
    main()
