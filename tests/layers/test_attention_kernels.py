"""Whether split attention's Triton kernels compute what the modules do, where they are taken, and that they compile."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from resnest_det import create_backbone
from resnest_det.layers import SplitAttentionConv2d, split_attention, use_triton
from tests.random_norms import randomise_norms

pytest.importorskip("triton")

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def layer_of(radix: int, channels: int = 10, norm: type[nn.Module] = nn.BatchNorm2d) -> SplitAttentionConv2d:
    torch.manual_seed(0)
    layer = SplitAttentionConv2d(4 * radix, channels, groups=2, radix=radix, norm_layer=norm)  # type: ignore[arg-type]
    randomise_norms(layer)
    return layer.double()


def images(*shape: int, layout: torch.memory_format) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).contiguous(memory_format=layout)


def step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and what the norms have counted, of a training step."""
    net.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = net(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)).sum().backward()
    found = {"output": out.detach(), "input": x.grad} | dict(net.named_buffers())
    # In front of a norm, a bias has a gradient of rounding alone.
    grads = {name: parameter.grad for name, parameter in net.named_parameters() if not name.endswith("fc1.bias")}
    return {name: value for name, value in (found | grads).items() if value is not None}


def assert_same_steps(ours: nn.Module, plain: nn.Module, x: Tensor, *, tolerance: float) -> None:
    found, expected = step(ours, x), step(plain, x)
    assert found.keys() == expected.keys()
    assert found["output"].stride() == expected["output"].stride()
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1e-6) if value.is_floating_point() else 1
        assert (found[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.skipif(
    Version(metadata.version("triton")) < Version("3.8") and Version(metadata.version("numpy")) >= Version("2.4"),
    reason="the interpreter of an older Triton fails with this NumPy",
)
def test_in_the_interpreter() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "interpreted_kernels.py"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=own | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.mark.parametrize("reason", ["device", "relu", "norm", "hook", "gradient hook", "empty", "offsets", "off"])
def test_what_runs_as_before(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(2)
    use_triton(layer)
    x = images(2, 8, 5, 5, layout=torch.contiguous_format)
    if reason != "device":
        monkeypatch.setattr(
            split_attention,
            "may_fuse",
            lambda x, *modules, device="cpu": not any(module._forward_hooks for module in modules),
        )
        assert layer._kernels_take(x)
    if reason == "relu":
        layer.relu = nn.SiLU()
    elif reason == "norm":
        layer.bn0 = nn.InstanceNorm2d(20)
    elif reason == "hook":
        layer.bn0.register_forward_hook(lambda *_: None)
    elif reason == "gradient hook":
        layer.fc2.weight.register_hook(lambda grad: grad)
    elif reason == "empty":
        x = x[:0]
    elif reason == "offsets":
        x = torch.empty(1, 8, 2**14, 2**14, device="meta")
    elif reason == "off":
        use_triton(layer, False)
    assert not (layer.triton and layer._kernels_take(x))


def test_a_model_without_split_attention() -> None:
    with pytest.raises(ValueError, match="ResNet has no split attention"):
        use_triton(create_backbone("resnet18"))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_attention, "find_spec", lambda _: None)
    layer = layer_of(2)
    with pytest.raises(ValueError, match="triton, which is not installed"):
        use_triton(layer)
    use_triton(layer, False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("kernel", ["_pool", "_sum_splits", "_sum_gradients", "_input_gradient"])
def test_kernels_compile_for_a_gpu(
    kernel: str, last: bool, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from resnest_det.layers import attention_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(attention_kernels, kernel)
    constants = {"radix": 2, "block_c": 64 if last else 4, "block_p": 32 if last else 512}
    constants |= dict.fromkeys(("xc", "oc") if last else ("xp", "op"), 1)
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = dict.fromkeys(function.arg_names, "*fp32")
    types |= {name: "i32" for name in ("images", "channels", "pixels", "span", "xc", "xp", "oc", "op") if name in types}
    types |= {name: f"*{dtype}" for name in ("x", "grad", "out") if name in types}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=types, constexprs=constants)
    compiled = compile(source, target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of NVIDIA's")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("radix", [1, 2, 3])
def test_on_a_gpu(layout: torch.memory_format, radix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = layer_of(radix, channels=70).cuda()
    ours = copy.deepcopy(plain)
    use_triton(ours)
    x = images(3, 4 * radix, 33, 47, layout=layout).cuda()
    assert ours._kernels_take(x)
    assert_same_steps(ours, plain, x, tolerance=1e-9)
    assert_same_steps(ours.float(), plain.float(), x.float(), tolerance=1e-4)
