"""Models optimised for inference: their outputs are the model's, and what makes them fast is there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import MultiScaleRoIAlign

from resnest_det import create_backbone
from resnest_det.deploy import inference as deploy_inference
from resnest_det.deploy import optimize_for_inference
from resnest_det.deploy.inference import PackedConv2d
from resnest_det.deploy.winograd import WinogradConv2d
from resnest_det.layers.linear import OneDNNLinear
from resnest_det.models import RowRoIAlign, deeplabv3plus, faster_rcnn, fcos, mask_rcnn, retinanet
from tests.random_norms import randomise_norms

NETWORKS = ["resnest14", "resnest50_fast_4s2x40d", "resnest50_fast_1s1x64d", "sk_resnet50", "cbam_resnet18"]
NETWORKS += ["se_resnet18", "eca_resnet18", "resnet18", "resnext50_32x4d"]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    torch.manual_seed(0)
    net = randomise_norms(create_backbone(name, num_classes=5)).eval()
    before = copy.deepcopy(net.state_dict())
    fast = optimize_for_inference(net)
    x = torch.rand(2, 3, 96, 96)
    for images in (x, x.contiguous(memory_format=torch.channels_last), torch.rand(1, 3, 64, 128)):
        with torch.inference_mode():
            expected = net(images)
            torch.testing.assert_close(fast(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(net.state_dict(), before)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    packed = [module for module in fast.modules() if isinstance(module, PackedConv2d)]
    in_two_forms = sum(isinstance(module, WinogradConv2d) for module in fast.modules())
    assert len(packed) == sum(isinstance(module, nn.Conv2d) for module in net.modules()) + in_two_forms
    assert any(module.relu for module in packed)
    assert not fast(x).requires_grad


def test_a_block_is_its_convolutions_with_what_follows_them() -> None:
    fast = optimize_for_inference(create_backbone("resnet50", num_classes=2))
    block = fast.layer1[1]
    assert [node.op for node in block.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    assert block.conv3.relu  # with the shortcut added before


@pytest.mark.parametrize("build", [faster_rcnn, mask_rcnn, retinanet, fcos])
def test_detectors(build: object) -> None:
    torch.manual_seed(0)
    arguments = {} if build in (retinanet, fcos) else {"rpn_proposals_eval": 50}
    model = build(create_backbone("resnest14"), 5, min_size=96, max_size=160, score_threshold=0.0, **arguments)  # type: ignore[operator]
    randomise_norms(model).eval()
    if build in (retinanet, fcos):  # scores far enough apart to have one order
        nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.3)
    fast = optimize_for_inference(model)
    images = [torch.rand(3, 96, 128), torch.rand(3, 80, 100)]
    with torch.inference_mode():
        expected, found = model(images), fast(images)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours["boxes"]) == len(theirs["boxes"]) > 0
        # Each has its like; two of nearly equal scores may change places.
        boxes = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(-1) < 1e-2
        scores = (ours["scores"][:, None] - theirs["scores"]).abs() < 1e-4
        alike = boxes & scores & (ours["labels"][:, None] == theirs["labels"])
        assert alike.any(1).all()
        if "masks" in ours:
            torch.testing.assert_close(ours["masks"], theirs["masks"][alike.int().argmax(1)], rtol=1e-3, atol=1e-3)
    if build is faster_rcnn:
        assert isinstance(fast.roi_heads.box_head.fc6, OneDNNLinear)


def test_deeplabv3plus() -> None:
    torch.manual_seed(0)
    model = randomise_norms(deeplabv3plus(create_backbone("resnest14", output_stride=16), 5)).eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        expected = model(x)["out"]
        torch.testing.assert_close(optimize_for_inference(model)(x)["out"], expected, rtol=1e-5, atol=1e-5)


class Root(nn.Module):
    """ReLU and terms as users write them, in the root itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.bias = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.first, self.second, self.third, self.fourth = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv(x) + x)
        x = self.relu(self.first(x) + self.bias)
        x = self.relu(self.second(x) + 1)
        x = self.relu(self.third(x) + x.mean((2, 3), keepdim=True))
        y = self.fourth(x)
        return self.relu(y + y)


class OptionalShortcut(nn.Module):
    """timm's way of a block whose shortcut may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        if shortcut is None:
            shortcut = x
        out = self.relu(self.conv(x))
        return self.relu(self.conv(out) + shortcut)


@pytest.mark.parametrize("kind", [Root, OptionalShortcut])
def test_what_users_write(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 4, 6, 5)
    with torch.inference_mode():
        torch.testing.assert_close(optimize_for_inference(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_empty_batches() -> None:
    fast = optimize_for_inference(nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU()))
    for _ in range(2):  # before and after packing
        assert fast(torch.zeros(0, 4, 9, 7)).shape == (0, 6, 5, 4)
        assert fast(torch.zeros(1, 4, 9, 7)).shape == (1, 6, 5, 4)


def test_the_layout_of_weights_follows_the_size() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 32, 1).requires_grad_(False)
    packed = PackedConv2d(conv, relu=False)
    for side in (3, 17, 20, 17, 5, 40):
        x = torch.randn(1, 64, side, side)
        torch.testing.assert_close(packed(x), conv(x), rtol=1e-5, atol=1e-5)
    assert [size[-1] for size in packed.packed] == [3, 17, 20, 5, 40]
    assert len({id(weight) for weight in packed.packed.values()}) < 5
    for size, weight in packed.packed.items():
        chosen = torch.ops.aten.mkldnn_reorder_conv2d_weight(
            conv.weight.to_mkldnn(), packed.padding, packed.stride, packed.dilation, packed.groups, list(size)
        )
        assert deploy_inference._layout(weight) == deploy_inference._layout(chosen)
    assert packed.conv is None
    assert all(torch.equal(weight.to_dense(), conv.weight) for weight in packed.packed.values())


def test_without_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy_inference, "has_fused_convolution", lambda: False)
    net = randomise_norms(create_backbone("resnest14", num_classes=5)).eval()
    fast, x = optimize_for_inference(net), torch.rand(1, 3, 64, 64)
    assert not any(isinstance(module, PackedConv2d) for module in fast.modules())
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)


def test_sixteen_bits_are_left_to_torch() -> None:
    net = create_backbone("resnest14", num_classes=5).bfloat16().eval()
    fast, x = optimize_for_inference(net), torch.rand(1, 3, 64, 64).bfloat16()
    assert fast(x).dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled() -> None:
    torch.manual_seed(0)
    net = randomise_norms(create_backbone("resnest14", num_classes=5)).eval()
    fast, x = optimize_for_inference(net, compile=True), torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)
    detector = randomise_norms(retinanet(create_backbone("resnest14"), 5, min_size=64, score_threshold=0.0)).eval()
    nn.init.normal_(detector.head.classification_head.cls_logits.weight, std=0.3)  # scores of one order
    fast = optimize_for_inference(detector, compile=True)
    with torch.inference_mode():
        for ours, theirs in zip(fast([x[0]]), detector([x[0]]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_regions_of_torchvisions_own_detectors_are_pooled_by_rows() -> None:
    pool = MultiScaleRoIAlign(["0", "1"], (3, 5), 2, canonical_scale=112, canonical_level=3)
    fast = optimize_for_inference(nn.ModuleDict({"pool": pool}))
    assert isinstance(fast, nn.ModuleDict)
    assert isinstance(fast["pool"], RowRoIAlign)
    assert repr(fast["pool"]).replace("RowRoIAlign", "MultiScaleRoIAlign") == repr(pool)
    assert (fast["pool"].canonical_scale, fast["pool"].canonical_level) == (112, 3)
