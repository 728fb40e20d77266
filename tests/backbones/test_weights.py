"""Loading: what fits loads exactly, what does not fit says why, and what stays as it was is said."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from resnest_det import create_backbone, load_weights
from resnest_det.backbones.weights import load_backbone_weights, load_matching_weights, read_state_dict
from resnest_det.engine import save_checkpoint
from resnest_det.layers import EfficientChannelAttention
from resnest_det.models import deeplabv3plus, faster_rcnn

State = dict[str, torch.Tensor]


def test_loads_every_tensor(small: Path, state: State) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = create_backbone("resnet18", weights=str(small))
    assert net.weights_loaded
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["file.safetensors", "without_the_suffix"])
def test_loads_safetensors(name: str, state: State, tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / name)
    net = create_backbone("resnet18", weights=str(tmp_path / name))
    assert torch.equal(net.layer4[1].bn2.weight, state["layer4.1.bn2.weight"])
    assert torch.equal(net.fc.weight, state["fc.weight"])


def test_loads_the_older_format_of_torch_save(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(create_backbone("resnet18", weights=str(tmp_path / "old.pth")).fc.weight, state["fc.weight"])


def test_loads_what_a_checkpoint_holds(state: State, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", {"model": state, "step": 3})
    for wrapper in ("state_dict", "model_state", "model_state_dict"):
        torch.save({wrapper: state, "epoch": 7, "optimizer": {"param_groups": []}}, tmp_path / f"{wrapper}.pt")
    torch.save({"model": {"state_dict": state}}, tmp_path / "nested.pt")
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == 5
    for file in files:
        net = create_backbone("resnet18", weights=str(file))
        assert torch.equal(net.fc.weight, state["fc.weight"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_what_wrappers_put_before_all_keys_is_dropped(prefix: str, tmp_path: Path) -> None:
    head = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1))
    torch.save({prefix + key: value for key, value in head.state_dict().items()}, tmp_path / "wrapped.pth")
    plain = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1))
    load_weights(plain, tmp_path / "wrapped.pth")
    assert torch.equal(plain[0].weight, head[0].weight)
    torch.save({prefix + "0.weight": head[0].weight.data, "0.bias": head[0].bias.data}, tmp_path / "some.pth")
    with pytest.raises(ValueError, match=f"1 extra: {prefix}0.weight"):
        load_weights(plain, tmp_path / "some.pth")


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_a_wrapped_network(prefix: str, state: State, tmp_path: Path) -> None:
    net = create_backbone("resnet18", num_classes=5)
    wrapped = torch.compile(torch.nn.DataParallel(net))
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"this ResNet:\n  2 of another shape: fc.weight .1000x512 in the file, 5x512"):
        load_weights(wrapped, tmp_path / "file.pth")
    with pytest.warns(UserWarning, match="the network's, of 5, keeps its values"):
        load_weights(wrapped, tmp_path / "file.pth", new_classifier=True)
    assert torch.equal(net.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_a_network_with_a_part_called_module(tmp_path: Path) -> None:
    net = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 1), "other": torch.nn.Linear(2, 1)})
    torch.save({key: value + 1 for key, value in net.state_dict().items()}, tmp_path / "file.pth")
    before = net.other.weight.clone()
    load_weights(net, tmp_path / "file.pth")
    assert torch.equal(net.other.weight, before + 1)


def test_norm_counters_may_be_absent_or_extra(small: Path, tmp_path: Path) -> None:
    frozen = create_backbone("resnet18", weights=str(small), norm="frozen_bn")
    torch.save(frozen.state_dict(), tmp_path / "frozen.pth")
    net = create_backbone("resnet18", weights=str(tmp_path / "frozen.pth"))
    assert torch.equal(net.bn1.running_var, frozen.bn1.running_var)


# --- what does not fit


def test_missing_extra_and_reshaped_are_named_and_nothing_is_loaded(state: State, tmp_path: Path) -> None:
    state["new.weight"] = state.pop("layer1.0.conv1.weight")
    state["bn1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "changed.pth")
    net = create_backbone("resnet18")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="are not those of this ResNet") as error:
        load_weights(net, tmp_path / "changed.pth")
    for line in (
        "1 missing: layer1.0.conv1.weight",
        "1 extra: new.weight",
        "1 of another shape: bn1.bias (3 in the file, 64 in the network)",
    ):
        assert line in str(error.value)
    assert not net.weights_loaded
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_another_networks_file(small: Path) -> None:
    with pytest.raises(ValueError, match="are not those of this ResNet") as error:
        create_backbone("resnest14", weights=str(small), new_classifier=True)
    assert "missing: conv1.0.weight" in str(error.value)
    assert "extra: conv1.weight" in str(error.value)
    assert "Only the classifier" not in str(error.value)


# --- the classifier


def test_wrong_number_of_classes(small: Path) -> None:
    with pytest.raises(ValueError, match=r"fc.weight \(1000x512 in the file, 5x512 in the network\)") as error:
        create_backbone("resnet18", weights=str(small), num_classes=5)
    assert "Only the classifier differs: the network must have the file's number of classes" in str(error.value)
    assert str(error.value).endswith("; new_classifier=True keeps the network's own.")


def test_a_new_classifier_is_asked_for_and_said(small: Path, state: State) -> None:
    with pytest.warns(UserWarning, match="its classifier has 1000 classes, and the network's, of 5, keeps its") as said:
        net = create_backbone("resnet18", weights=str(small), num_classes=5, new_classifier=True)
    assert len(said) == 1
    assert net.weights_loaded
    assert net.fc.weight.shape == (5, 512)
    assert torch.equal(net.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_a_classifier_that_fits_is_the_files_even_if_a_new_one_may_be(small: Path, state: State) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = create_backbone("resnet18", weights=str(small), new_classifier=True)
    assert torch.equal(net.fc.weight, state["fc.weight"])


def test_a_file_without_its_classifier(state: State, tmp_path: Path) -> None:
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, tmp_path / "trunk.pth")
    net = create_backbone("resnet18")
    with pytest.raises(ValueError, match="2 missing: fc.bias, fc.weight\nOnly the classifier is missing") as error:
        load_weights(net, tmp_path / "trunk.pth")
    assert "new_classifier=True keeps the network's own" in str(error.value)
    before = net.fc.weight.clone()
    with pytest.warns(UserWarning, match="it has no classifier, and the network's, of 1000 classes, keeps its values"):
        load_weights(net, tmp_path / "trunk.pth", new_classifier=True)
    assert torch.equal(net.fc.weight, before)
    assert torch.equal(net.conv1.weight, state["conv1.weight"])


def test_another_depth_of_features_is_no_new_classifier(state: State, tmp_path: Path) -> None:
    torch.save(state | {"fc.weight": torch.zeros(5, 2048)}, tmp_path / "deep.pth")
    with pytest.raises(ValueError, match=r"fc.weight \(5x2048 in the file, 1000x512 in the network\)") as error:
        create_backbone("resnet18", weights=str(tmp_path / "deep.pth"), new_classifier=True)
    assert "Only the classifier" not in str(error.value)


def test_a_new_classifier_where_there_is_none(small: Path) -> None:
    net = create_backbone("resnet18")
    net.fc = torch.nn.Identity()
    with pytest.raises(ValueError, match="new_classifier=True needs a network with a classifier `fc`"):
        load_weights(net, small, new_classifier=True)


def test_a_segmenter_with_another_number_of_classes(tmp_path: Path) -> None:
    def segmenter(num_classes: int) -> torch.nn.Module:
        net = create_backbone("resnet18", output_stride=16)
        return deeplabv3plus(net, num_classes, head_channels=8, aux_head=True)

    torch.save(segmenter(3).state_dict(), tmp_path / "three.pth")
    with pytest.raises(ValueError, match="classifier.weight .3x8x1x1 in the file, 5x8x1x1 in the network.") as error:
        load_weights(segmenter(5), tmp_path / "three.pth")
    assert "Only the classifier differs: the network must have the file's number of classes" in str(error.value)
    assert "new_classifier" not in str(error.value)


def test_another_width_is_not_taken_for_another_number_of_classes(tmp_path: Path) -> None:
    def detector(width: int) -> torch.nn.Module:
        return faster_rcnn(create_backbone("resnet18"), 3, fpn_channels=16, box_head_channels=width)

    torch.save(detector(32).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="fc6.weight .32x784 in the file, 16x784 in the network.") as error:
        load_weights(detector(16), tmp_path / "wide.pth")
    assert "Only the classifier" not in str(error.value)


# --- what the caller names


def test_keep_and_drop(state: State, tmp_path: Path) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"extra.{name}"] = state.pop(f"layer1.0.bn2.{name}")
    torch.save(state, tmp_path / "changed.pth")
    net = create_backbone("resnet18")
    net.layer1[0].bn2.bias.data.fill_(7)
    with pytest.warns(UserWarning, match="keep their values") as said:
        load_weights(net, tmp_path / "changed.pth", keep=["layer1.0.bn2.*", "fc.*"], drop=["extra.*"])
    (warning,) = said
    assert str(warning.message) == (
        f"{tmp_path / 'changed.pth'}: 4 of the network's tensors are not in it and keep their values: "
        "layer1.0.bn2.bias, layer1.0.bn2.running_mean, layer1.0.bn2.running_var, layer1.0.bn2.weight; "
        "4 of its tensors are left out: extra.bias, extra.running_mean, extra.running_var, extra.weight"
    )
    assert warning.filename == __file__
    assert (net.layer1[0].bn2.bias == 7).all()
    assert torch.equal(net.fc.weight, state["fc.weight"])  # it may be absent, and is there


def test_what_is_kept_must_still_fit_where_the_file_has_it(state: State, tmp_path: Path) -> None:
    torch.save(state | {"bn1.bias": torch.zeros(3)}, tmp_path / "changed.pth")
    net = create_backbone("resnet18")
    with pytest.raises(ValueError, match="bn1.bias .3 in the file, 64 in the network"):
        load_weights(net, tmp_path / "changed.pth", keep=["bn1.*"])
    with pytest.warns(UserWarning, match="1 of the network's tensors are not in it .*: bn1.bias; 1 of its tensors"):
        load_weights(net, tmp_path / "changed.pth", keep=["bn1.bias"], drop=["bn1.bias"])


def test_patterns_that_match_nothing(small: Path) -> None:
    net = create_backbone("resnet18")
    with pytest.raises(ValueError, match="keep: no tensor of this ResNet matches 'fc1.*'; there are conv1.weight, bn1"):
        load_weights(net, small, keep=["fc.*", "fc1.*"])
    with pytest.raises(ValueError, match=f"drop: no tensor of {small} matches 'head'; there are conv1.weight, bn1"):
        load_weights(net, small, drop=["head"])
    assert not net.weights_loaded


# --- a gate of one's own


def test_a_gate_where_the_file_has_none(small: Path, state: State) -> None:
    net = create_backbone("resnet18", gate=EfficientChannelAttention)
    before = net.layer1[0].gate.conv.weight.clone()
    with pytest.raises(ValueError, match="8 missing: layer1.0.gate.conv.weight"):
        load_backbone_weights(net, "resnet18", str(small))
    with pytest.warns(UserWarning, match="keep their values") as said:
        load_backbone_weights(net, "resnet18", str(small), own_gate=True)
    assert str(said[0].message) == (
        f"{small}: 8 of the network's tensors are not in it and keep their values: layer1.0.gate.conv.weight, "
        "layer1.1.gate.conv.weight, layer2.0.gate.conv.weight, layer2.1.gate.conv.weight, layer3.0.gate.conv.weight, "
        "..."
    )
    assert torch.equal(net.layer1[0].gate.conv.weight, before)
    assert torch.equal(net.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


def test_a_gate_in_place_of_the_files(tmp_path: Path) -> None:
    source = create_backbone("se_resnet18")
    torch.save(source.state_dict(), tmp_path / "se.pth")
    net = create_backbone("se_resnet18", gate=EfficientChannelAttention)
    with pytest.warns(UserWarning, match="8 of the network's tensors are not in it .*; 32 of its tensors are left out"):
        load_backbone_weights(net, "se_resnet18", str(tmp_path / "se.pth"), own_gate=True)
    assert torch.equal(net.layer1[0].conv1.weight, source.layer1[0].conv1.weight)


def test_beside_a_gate_of_ones_own_all_must_fit(state: State, tmp_path: Path) -> None:
    state["layer1.0.bn9.weight"] = state.pop("layer1.0.bn1.weight")
    torch.save(state, tmp_path / "changed.pth")
    net = create_backbone("resnet18", gate=EfficientChannelAttention)
    with pytest.raises(ValueError, match=r"1 missing: layer1.0.bn1.weight\n  1 extra: layer1.0.bn9.weight$"):
        load_backbone_weights(net, "resnet18", str(tmp_path / "changed.pth"), own_gate=True)


# --- unreadable files


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pickle", "saved", "numpy", "truncated", "text", "empty", "list", "mixed"])
def test_unreadable_files(
    kind: str, small: Path, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.pth"
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"conv1.weight": _Evil()}))
    elif kind == "saved":
        torch.save({"conv1.weight": _Evil()}, file)
    elif kind == "numpy":
        file.write_bytes(pickle.dumps({"model": {"conv1.weight": np.zeros(3)}}, protocol=2))
    elif kind == "truncated":
        file.write_bytes(small.read_bytes()[:100_000])
    elif kind == "text":
        file.write_text("<html>not found</html>")
    elif kind == "empty":
        file.touch()
    elif kind == "list":
        torch.save([1, 2], file)
    else:
        torch.save(state | {"epoch": 3}, file)
    no_dict = kind in ("list", "mixed")
    reason = "holds no state dict" if no_dict else "is damaged, or not plain data written by torch.save"
    with pytest.raises(ValueError, match=rf"bad.pth.*({reason})") as error:
        create_backbone("resnet18", weights=str(file))
    if kind in ("pickle", "saved", "numpy", "text"):
        assert "reading it would run code, which is refused" in str(error.value)
        assert "such as detectron2's .pkl of NumPy arrays" in str(error.value)
    if kind == "saved":
        assert "refused (it asks for print)" in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's advice to read it unsafely
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_damaged_safetensors(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    content = safetensors.torch.save({"conv1.weight": torch.zeros(100)})
    file.write_bytes({"truncated": content[:-50], "text": b"<html>not found</html>", "empty": b""}[kind])
    with pytest.raises(ValueError, match="bad.safetensors is damaged, or no safetensors file: "):
        create_backbone("resnet18", weights=str(file))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weights='.*none.pth' is neither 'imagenet' nor the path of a file"):
        create_backbone("resnet18", weights=str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match="no weights at .*none.pth: give the path of a file"):
        load_weights(create_backbone("resnet18"), tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="no weights at .*none.pth: give the path of a file"):
        read_state_dict(tmp_path / "none.pth")


def small_detector(num_classes: int, **arguments: Any) -> torch.nn.Module:
    return faster_rcnn(
        create_backbone("resnet18"), num_classes, fpn_channels=8, box_head_channels=8, min_size=64, **arguments
    )


def test_fine_tuning_takes_all_but_the_last_layers(tmp_path: Path) -> None:
    other, model = small_detector(91), small_detector(4)
    torch.save({"model": other.state_dict()}, tmp_path / "coco.pt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = load_matching_weights(model, tmp_path / "coco.pt")
    heads = {
        f"roi_heads.box_predictor.{layer}.{kind}" for layer in ("cls_score", "bbox_pred") for kind in ("weight", "bias")
    }
    assert set(found.replaced) == heads
    assert found.missing == found.unused == ()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in heads else other.state_dict()[name]), name
    assert set(found.reused) == {name for name in before if name not in heads and "num_batches" not in name}
    lines = found.summary().splitlines()
    assert lines[0].startswith("reused: backbone.body (100 tensors), backbone.fpn (16 tensors), rpn.head (6 tensors)")
    assert lines[1:] == ["new, for other classes: roi_heads.box_predictor (4 tensors)"]


def test_fine_tuning_takes_parts_that_both_have(tmp_path: Path) -> None:
    """As of Mask R-CNN into Faster R-CNN, and the other way."""
    whole, part = small_detector(4), small_detector(4)
    del part.rpn
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    torch.save(part.state_dict(), tmp_path / "part.pt")
    rpn = {name for name in whole.state_dict() if name.startswith("rpn.")}
    assert set(load_matching_weights(part, tmp_path / "whole.pt").unused) == rpn
    found = load_matching_weights(whole, tmp_path / "part.pt")
    assert set(found.missing) == rpn
    assert "new, not in the file: rpn.head (6 tensors)" in found.summary()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: small_detector(4, box_head="4conv1fc"), r"missing: roi_heads\.box_head\.0\.0\.bias"),
        (lambda: create_backbone("resnet18", num_classes=4), "have no part in common.*of a backbone alone are given"),
    ],
)
def test_fine_tuning_refuses_the_file_of_another_model(
    model: Callable[[], torch.nn.Module], message: str, tmp_path: Path
) -> None:
    torch.save(small_detector(4).state_dict(), tmp_path / "det.pt")
    other = model()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_matching_weights(other, tmp_path / "det.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_fine_tuning_on_as_many_other_classes(tmp_path: Path) -> None:
    torch.save(small_detector(4).state_dict(), tmp_path / "det.pt")
    assert load_matching_weights(small_detector(4), tmp_path / "det.pt").replaced == ()
    found = load_matching_weights(small_detector(4), tmp_path / "det.pt", new_classes=True)
    assert len(found.replaced) == 4


def test_fine_tuning_refuses_a_file_without_the_backbone(tmp_path: Path) -> None:
    """Its place would be taken by random weights, and frozen without a word."""
    state = small_detector(4).state_dict()
    state = {key.replace("backbone.body.", "backbone.bottom_up."): tensor for key, tensor in state.items()}
    torch.save(state, tmp_path / "det.pt")
    with pytest.raises(ValueError, match=r"100 missing: backbone\.body\.bn1"):
        load_matching_weights(small_detector(4), tmp_path / "det.pt")


def test_fine_tuning_refuses_another_backbone(tmp_path: Path) -> None:
    other = faster_rcnn(create_backbone("resnet34"), 4, fpn_channels=8, box_head_channels=8)
    torch.save(other.state_dict(), tmp_path / "det.pt")
    with pytest.raises(ValueError, match=r"extra: backbone\.body\.layer1\.2\.bn1"):
        load_matching_weights(small_detector(4), tmp_path / "det.pt")


def test_fine_tuning_from_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="no weights at nowhere.pt: give the path of a checkpoint, or a URL"):
        load_matching_weights(small_detector(4), "nowhere.pt")


def old_names(state: State) -> State:
    """What torchvision's detectors called their tensors before there were norms beside them."""
    renamed = {}
    for key, tensor in state.items():
        key = re.sub(r"(fpn\.(inner|layer)_blocks\.\d)\.0\.", r"\1.", key)
        key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        key = re.sub(r"mask_head\.(\d)\.0\.", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}.", key)
        key = re.sub(r"(_head\.conv)\.(\d)\.0\.", lambda match: f"{match[1]}.{2 * int(match[2])}.", key)
        renamed[key] = tensor
    return renamed


@pytest.mark.parametrize("name", ["fasterrcnn", "maskrcnn", "retinanet", "fcos"])
def test_the_first_files_of_torchvisions_detectors(name: str, tmp_path: Path) -> None:
    """As those of its COCO_V1 weights, which its own class renames while it loads them."""
    build = getattr(torchvision.models.detection, f"{name}_resnet50_fpn")
    theirs, ours = (build(weights=None, weights_backbone=None, num_classes=3) for _ in range(2))
    state = old_names(theirs.state_dict())
    assert state.keys() != theirs.state_dict().keys()
    torch.save(state, tmp_path / "v1.pth")
    load_weights(ours, tmp_path / "v1.pth")
    for other in (build(weights=None, weights_backbone=None, num_classes=3), theirs):
        other.load_state_dict(dict(state))
        assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in other.state_dict().items())
    assert load_matching_weights(ours, tmp_path / "v1.pth").replaced == ()
