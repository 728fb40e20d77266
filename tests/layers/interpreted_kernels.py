"""The Triton kernels of split attention, in Triton's interpreter on the CPU, against torch's operators.

Triton interprets in a process that was told so before it imported Triton: `test_attention_kernels.py` starts one.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torchvision.ops import FrozenBatchNorm2d

from resnest_det import create_backbone
from resnest_det.layers import SplitAttentionConv2d, attention_kernels, selection, split_attention, use_triton
from resnest_det.layers.selection import selection_shares
from tests.benchmarks.activation_checkpointing import SavedBytes
from tests.layers.test_attention_kernels import LAYOUTS, assert_same_steps, images, layer_of, step


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take the kernels for tensors of the CPU, which are cut into few programs."""

    def may_fuse(x: Tensor, *modules: nn.Module | None, device: str = "cpu") -> bool:
        return device == "cuda" and type(x) is Tensor

    monkeypatch.setattr(split_attention, "may_fuse", may_fuse)
    monkeypatch.setattr(split_attention, "trains_fused", lambda *_: False)
    monkeypatch.setattr(attention_kernels, "_PROGRAMS", 8)


@pytest.mark.parametrize("radix", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
def test_a_training_step_is_that_of_the_modules(
    radix: int, layout: torch.memory_format, norm: type[nn.Module], training: bool
) -> None:
    plain = layer_of(radix, norm=norm).train(training)
    ours = copy.deepcopy(plain)
    use_triton(ours)
    assert_same_steps(ours, plain, images(3, 4 * radix, 9, 7, layout=layout), tolerance=1e-9)


@pytest.mark.parametrize(("layout", "channels"), [(torch.contiguous_format, 10), (torch.channels_last, 70)])
def test_several_blocks_and_parts(layout: torch.memory_format, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_PROGRAMS", 30)
    plain = layer_of(2, channels=channels)
    ours = copy.deepcopy(plain)
    use_triton(ours)
    x = images(2, 8, 24, 45, layout=layout)
    grid = attention_kernels._Grid(plain.conv(x), channels)
    assert grid.parts > 1
    assert grid.programs_of_blocks > 2 * grid.pixels // grid.block_p  # more than one block of channels
    assert_same_steps(ours, plain, x, tolerance=1e-9)


def test_gradients_are_those_of_finite_differences() -> None:
    layer = SplitAttentionConv2d(4, 4, groups=2, radix=2, reduction=1).double()
    use_triton(layer)
    for module in (layer.bn0, layer.bn1):
        module.momentum = 0.0  # it is called often
    x = images(2, 4, 3, 3, layout=torch.channels_last).requires_grad_()
    parameters = [parameter for name, parameter in layer.named_parameters() if name != "fc1.bias"]
    assert gradcheck(lambda x, *_: layer(x), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(training: bool) -> None:
    plain = layer_of(2).train(training)
    ours = copy.deepcopy(plain)
    use_triton(ours)
    x = images(3, 8, 9, 7, layout=torch.channels_last)
    with torch.inference_mode():
        assert torch.allclose(ours(x), plain(x), rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They err from float32 as torch's operators do, whose intermediate maps have 16 bits too."""
    for module in (selection, split_attention):  # CUDA's autocast has softmax in float32, the CPU's has not
        monkeypatch.setattr(module, "selection_shares", lambda logits, splits: selection_shares(logits.float(), splits))
    exact = layer_of(2).float()
    plain, ours = copy.deepcopy(exact), copy.deepcopy(exact)
    use_triton(ours)
    x = images(16, 8, 9, 7, layout=torch.channels_last).float()
    expected = step(exact, x)
    with torch.autocast("cpu", dtype):
        found, rounded = step(ours, x), step(plain, x)
    assert found["output"].dtype == dtype
    for name, value in expected.items():
        if value.is_floating_point():
            error, theirs = ((other[name].float() - value).norm() for other in (found, rounded))
            assert error <= 1.2 * theirs + 1e-6 * value.norm(), name


def test_a_norm_without_parameters_and_what_is_not_trained() -> None:
    plain = layer_of(2)
    plain.bn0 = nn.BatchNorm2d(20, affine=False, momentum=None).double()
    plain.fc2.requires_grad_(False)
    ours = copy.deepcopy(plain)
    use_triton(ours)
    assert_same_steps(ours, plain, images(3, 8, 5, 5, layout=torch.contiguous_format), tolerance=1e-9)


def test_what_is_no_number_stays_so() -> None:
    layer = layer_of(2).eval()
    use_triton(layer)
    x = images(2, 8, 5, 5, layout=torch.contiguous_format)
    x[0, 0, 2, 2] = torch.nan
    with torch.no_grad():
        out = layer(x)
    assert out[0].isnan().any()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_network(checkpoint: bool) -> None:
    torch.manual_seed(0)
    plain = create_backbone("resnest14", num_classes=3, checkpoint=checkpoint).double()
    ours = copy.deepcopy(plain)
    use_triton(ours)
    assert_same_steps(ours, plain, images(2, 3, 48, 48, layout=torch.channels_last), tolerance=1e-8)


def test_less_is_kept_for_the_backward_pass() -> None:
    layer = layer_of(2)
    x = images(4, 8, 32, 32, layout=torch.channels_last)
    plain, kept = SavedBytes(layer), SavedBytes(layer)
    with plain:
        outputs = [layer(x)]
    use_triton(layer)
    with kept:
        outputs.append(layer(x))
    assert kept.now < 0.6 * plain.now
