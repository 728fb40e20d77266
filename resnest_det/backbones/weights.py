"""Weights from files into networks: published files by name, any file by its path or address, in the usual layouts.

Loading is strict: every tensor of a loaded network is the file's, but for those that the caller names, and a warning
says which they are. Files are read as data (safetensors, or torch.load with weights_only=True), so that a file cannot
run code.
"""

from __future__ import annotations

import errno
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from resnest_det.backbones.key_layouts import (
    convert_state_dict,
    is_backbone_of_a_model,
    with_present_detector_keys,
    without_wrappers,
)
from resnest_det.backbones.published import list_weights, published_weights
from resnest_det.backbones.resnet import ResNet
from resnest_det.backbones.weight_files import find_file, find_weights

# Where checkpoints hold a state dict. The moving average of a run's weights comes first: it is what the run measured.
_WRAPPERS = ("ema", "model", "state_dict", "model_state", "model_state_dict")
_CLASSIFIER = ("fc.weight", "fc.bias")
_LAST_LAYER = re.compile(  # the shapes of these follow from the number of classes
    r"fc\.|classifier\.|aux_head\.4\."
    r"|(.*\.)?(box_predictors?(\.\d+)?\.(cls_score|bbox_pred)|mask_predictor\.mask_fcn_logits"
    r"|classification_head\.cls_logits)\."
)
_GATE = ".gate."  # in the name of what stands in a block's slot for attention
_ECA_KERNEL = re.compile(r"layer\d\.\d+\.gate\.conv\.weight")


def load_weights(
    net: nn.Module,
    source: str | Path,
    *,
    new_classifier: bool = False,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> None:
    """Load a file's weights into `net`, all of them or none.

    The tensors of a backbone are renamed from the layout that the file's keys show, see key_layouts. Detectors load
    their own state dicts and torchvision's, segmentation models their own. "module." and "_orig_mod." before all keys,
    from DataParallel and torch.compile, are dropped on both sides, and the counters `num_batches_tracked` may be there
    or not: FrozenBatchNorm has none.

    Args:
        net: a backbone, a detector, or any other module.
        source: a file's path; or the http(s) address of one; or "network/name" of list_weights(), such as
            "resnest50/imagenet". A file is safetensors or torch.save's: a state dict, or a checkpoint that holds one
            under "ema", "model", "state_dict", "model_state" or "model_state_dict". What is fetched is kept in
            `checkpoints` in torch.hub.get_dir(): under its name, and checked, where that ends in "-" and the first
            eight or more digits of its SHA-256; else with a hash of the address before its name.
        new_classifier: accept a file whose classifier (`fc`) has another number of classes, or that has none: the
            network's stays as it is. The file of a detector or a segmentation model needs no flag for having none.
        keep: fnmatch patterns, such as "layer?.*.gate.*", of tensors of `net` that the file need not have; without
            it they stay as they are.
        drop: fnmatch patterns of tensors of the file, under the names that `net` would have for them, that are left
            out.

    Raises:
        FileNotFoundError: there is no such file, or it is published where no program can fetch it.
        ConnectionError: no address gave the file.
        OSError: torch.hub's folder cannot be written to.
        ValueError: the file cannot be read as data, or its tensors are not those of `net`; the message names
            what is missing, extra or of another shape, and `net` is unchanged. Or a pattern matches no tensor.

    Warns:
        UserWarning: tensors of `net` stay as they are, tensors of the file are left out, or a damaged copy of a
            published file was passed over for another.
    """
    path = find_file(source)
    if path is None:
        raise FileNotFoundError(
            f"no weights at {source}: give the path of a file, a URL, or network/name of published weights, such as "
            f"'resnest50/imagenet'{_names_hint(str(source).partition('/')[0])}"
        )
    _load_file(net, path, new_classifier=new_classifier, keep=keep, drop=drop)


def load_backbone_weights(
    net: nn.Module, network: str, weights: str, *, new_classifier: bool = False, own_gate: bool = False
) -> None:
    """Load weights into a backbone, with what is published for it by the short name.

    Args:
        net: the backbone.
        network: its name, one of list_backbones().
        weights: "imagenet" or another name of list_weights(network); else as load_weights's `source`.
        new_classifier: see load_weights.
        own_gate: what `net` has under `gate` is its user's, not the published network's: its tensors may be missing
            from the file and then stay as they are, and those that the file has there for another are left out.

    Raises:
        FileNotFoundError: `weights` is nothing of the kind, or published where no program can fetch it.
        ConnectionError: no address gave the file.
        OSError: torch.hub's folder cannot be written to.
        ValueError: nothing of that name is published for the network, or see load_weights.
    """
    published = any(entry.name == weights for entry in list_weights(network))
    if published or weights == "imagenet":
        path: Path | None = find_weights(published_weights(network, weights))
    else:
        path = find_file(weights)
    if path is None:
        raise FileNotFoundError(
            f"weights={weights!r} is neither 'imagenet' nor the path of a file, nor a URL or network/name of "
            f"published weights{_names_hint(network)}"
        )
    _load_file(net, path, new_classifier=new_classifier, own_gate=own_gate)


@dataclass(frozen=True)
class PartlyLoaded:
    """What load_matching_weights found, as names of tensors, counters apart.

    Attributes:
        reused: loaded from the file.
        replaced: of another number of classes than the file's; they stay as they are.
        missing: of parts that the file does not have; they stay as they are.
        unused: the file's, of parts that the model does not have.
    """

    reused: tuple[str, ...]
    replaced: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def summary(self) -> str:
        """A line for each kind that there is, by parts of the model."""
        kinds = (
            ("reused", self.reused),
            ("new, for other classes", self.replaced),
            ("new, not in the file", self.missing),
            ("in the file, not used", self.unused),
        )
        return "\n".join(f"{kind}: {_by_part(names)}" for kind, names in kinds if names)


def load_matching_weights(model: nn.Module, source: str | Path, *, new_classes: bool = False) -> PartlyLoaded:
    """Load what a file has in common with a model, to fine-tune it: in place of the file's classes come the model's.

    The last layers, which depend on the classes, keep the model's values where their number differs, and so do whole
    parts that the file does not have, such as the mask head in a file of Faster R-CNN. Everything else must fit, and
    the backbone and its pyramid must be there.

    Args:
        model: a detector or a segmentation model.
        source: as of load_weights: a run's checkpoint, or what torchvision publishes for the same detector.
        new_classes: the classes are others though they may be as many: the last layers keep the model's values.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: no address gave the file.
        ValueError: the file cannot be read as data, or is of another model; the message names the tensors, and
            `model` is unchanged.
    """
    path = find_file(source)
    if path is None:
        raise FileNotFoundError(f"no weights at {source}: give the path of a checkpoint, or a URL")
    model = _unwrapped(model)
    own, state = model.state_dict(), with_present_detector_keys(without_wrappers(read_state_dict(path)))
    replaced = [
        key
        for key in own
        if key in state
        and (new_classes or state[key].shape != own[key].shape)
        and _is_classifier(key, state[key], own[key])
    ]
    parts = {_part(key) for key in own}, {_part(key) for key in state}
    lacking = parts[0] - parts[1]
    missing = [key for key in own if _part(key) in lacking and not key.startswith("backbone.")]
    unused = [key for key in state if key not in own and _part(key) not in parts[0]]
    fitting = {key: tensor for key, tensor in state.items() if key not in {*replaced, *unused}}
    absent = set(_without_counters(own.keys() - state.keys())) - set(missing)
    if not fitting.keys() & own.keys():
        raise ValueError(
            f"{path} and this {type(model).__name__} have no part in common: the file's tensors are "
            f"{_first(list(state))}, the model's {_first(list(own))}; weights of a backbone alone are given by "
            f"model.weights"
        )
    _check_fit(model, own, fitting, sorted(absent), path)
    model.load_state_dict(fitting, strict=False)
    lists = ([key for key in fitting if key in own], replaced, missing, unused)
    return PartlyLoaded(*(tuple(_without_counters(keys)) for keys in lists))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict that a file is, or that a checkpoint holds under one of the usual names, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not plain data, or holds no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: give the path of a file")
    if _is_safetensors(path):
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # its errors have no common class but this one
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    content = read_plain(path)
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"{path} holds no state dict: a dict of tensors, or one under {', '.join(map(repr, _WRAPPERS))}"
        )
    return content


def read_plain(path: Path) -> Any:
    """What torch.save wrote to a file, on the CPU, if it is plain data: tensors, numbers, strings, lists and dicts.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, no file of torch.save, or would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a file cut short gives, by where torch.load then wants to read
            raise
        raise ValueError(f"{path} is damaged, or not plain data written by torch.save: it is cut short") from error
    except pickle.UnpicklingError as error:  # torch's own text advises to read the file unsafely
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f" (it asks for {wanted[1]})" if wanted else ""
        raise ValueError(
            f"{path} is damaged, or not plain data written by torch.save: it is another kind of file, such as "
            f"detectron2's .pkl of NumPy arrays, or reading it would run code, which is refused{reason}; save the "
            f"state dict alone, its values as tensors, with torch.save(model.state_dict(), file)"
        ) from error
    except Exception as error:  # bytes that mean nothing fail in every way that a reader can fail in
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged, or not plain data written by torch.save: {reason}") from error


def _is_safetensors(path: Path) -> bool:
    """By the file's name, or by how it begins: the length of a JSON header, in 8 bytes, and the header."""
    with path.open("rb") as file:
        begin = file.read(9)
    in_content = begin[8:] == b"{" and int.from_bytes(begin[:8], "little") < path.stat().st_size
    return path.suffix == ".safetensors" or in_content


def _names_hint(network: str) -> str:
    names = [entry.name for entry in list_weights(network)] if network else []
    return f"; for {network} there are: {', '.join(names)}" if names else ""


# --- from a file into a network


def _load_file(
    net: nn.Module,
    path: Path,
    *,
    new_classifier: bool,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    own_gate: bool = False,
) -> None:
    net = _unwrapped(net)
    own = net.state_dict()
    state = read_state_dict(path)
    may_lack_classifier = new_classifier
    if set(_without_counters(state)) != set(_without_counters(own)):
        state = with_present_detector_keys(without_wrappers(state))
        if isinstance(net, ResNet):
            may_lack_classifier |= is_backbone_of_a_model(state)
            try:
                state = convert_state_dict(state, to="resnest_det")
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error

    dropped = _matching(drop, state, "drop", f"of {path}")
    optional = _matching(keep, own, "keep", f"of this {type(net).__name__}")
    if own_gate:
        dropped |= {key for key in state.keys() - own.keys() if _GATE in key}
        optional |= {key for key in own if _GATE in key}
    state = {key: tensor for key, tensor in state.items() if key not in dropped}
    classifier_kept = _why_classifier_is_kept(own, state, new_classifier, may_lack_classifier)
    if classifier_kept:
        state = {key: tensor for key, tensor in state.items() if key not in _CLASSIFIER}
    absent = set(_without_counters(own.keys() - state.keys()))
    if classifier_kept:
        absent -= set(_CLASSIFIER)
    _check_fit(net, own, state, sorted(absent - optional), path)

    said = [
        classifier_kept,
        _listed(sorted(absent), "of the network's tensors are not in it and keep their values"),
        _listed(sorted(_without_counters(dropped)), "of its tensors are left out"),
    ]
    if any(said):
        warnings.warn(f"{path}: {'; '.join(filter(None, said))}", stacklevel=3)
    net.load_state_dict(state, strict=False)  # what strict would refuse now are counters and what the caller named


def _unwrapped(net: nn.Module) -> nn.Module:
    """The module inside those of DataParallel and torch.compile, whose prefixes without_wrappers takes off a file."""
    for name, inner in net.named_children():
        if name in ("module", "_orig_mod") and all(key.startswith(f"{name}.") for key in net.state_dict()):
            return _unwrapped(inner)
    return net


def _why_classifier_is_kept(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], new_classifier: bool, may_lack_classifier: bool
) -> str:
    """Why the network's classifier stays as it is; "" where it is the file's, or has to be."""
    if "fc.weight" not in own:
        if new_classifier:
            raise ValueError(
                "new_classifier=True needs a network with a classifier `fc`; for other last layers, name their tensors "
                "in `keep` and `drop`"
            )
        return ""
    num_classes = len(own["fc.weight"])
    if "fc.weight" not in state:
        lacks = f"it has no classifier, and the network's, of {num_classes} classes, keeps its values"
        return lacks if may_lack_classifier else ""
    in_file = state["fc.weight"]
    other_classes = in_file.shape != own["fc.weight"].shape and _is_classifier("fc.weight", in_file, own["fc.weight"])
    if new_classifier and other_classes:
        return f"its classifier has {len(in_file)} classes, and the network's, of {num_classes}, keeps its values"
    return ""


def _check_fit(
    net: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], missing: Sequence[str], path: Path
) -> None:
    """Raise a ValueError that names what is missing, extra or of another shape, and what to do where that is known."""
    extra = sorted(_without_counters(state.keys() - own.keys()))
    reshaped = [key for key in own if key in state and state[key].shape != own[key].shape]
    shapes = [f"{key} ({_shape(state[key])} in the file, {_shape(own[key])} in the network)" for key in reshaped]
    problems = [_listed(missing, "missing"), _listed(extra, "extra"), _listed(shapes, "of another shape")]
    if not any(problems):
        return
    hint = ""
    flag = "; new_classifier=True keeps the network's own" if "fc.weight" in own else ""
    if not extra and not reshaped and set(missing) <= set(_CLASSIFIER):
        hint = f"\nOnly the classifier is missing{flag}."
    elif not extra and not missing and all(_is_classifier(key, state[key], own[key]) for key in reshaped):
        hint = (
            "\nOnly the classifier differs: the network must have the file's number of classes, which is the data "
            f"set's, and for a detector one more, the background{flag}."
        )
    elif not extra and not missing and all(_ECA_KERNEL.fullmatch(key) for key in reshaped):
        hint = _kernel_sizes_hint(own, state)
    raise ValueError(
        f"the tensors of {path} are not those of this {type(net).__name__}:"
        + "".join(f"\n  {problem}" for problem in problems if problem)
        + hint
    )


def _kernel_sizes_hint(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """How to build the network of a file whose efficient channel attention has other kernels than the table's."""
    gates = [f"layer{stage}.0.gate.conv.weight" for stage in (1, 2, 3, 4)]
    sizes = [state[gate].shape[-1] for gate in gates]
    last_norm = "bn3" if "layer1.0.bn3.weight" in own else "bn2"
    of_channels = {len(own[f"layer{stage}.0.{last_norm}.weight"]): size for stage, size in enumerate(sizes, start=1)}
    return (
        f"\nOnly the kernels of efficient channel attention differ: the file's are of size "
        f"{', '.join(map(str, sizes))} in layer1 to layer4. Build the network with them: create_backbone(..., "
        f"gate=lambda channels: EfficientChannelAttention(channels, kernel_size={of_channels}[channels]))"
    )


def _is_classifier(key: str, in_file: Tensor, in_network: Tensor) -> bool:
    """Whether a tensor belongs to a last layer, and only the number of its outputs differs."""
    return _LAST_LAYER.match(key) is not None and in_file.shape[1:] == in_network.shape[1:]


def _part(key: str) -> str:
    """The part of a model that a tensor belongs to, such as "backbone.fpn" or "roi_heads.mask_head"."""
    return ".".join(key.split(".")[:2])


def _by_part(names: Iterable[str]) -> str:
    """The parts that tensors belong to, with how many of them."""
    counts = Counter(map(_part, names))
    return ", ".join(f"{part} ({count} tensor{'s' if count > 1 else ''})" for part, count in counts.items())


def _matching(patterns: Sequence[str], names: Iterable[str], argument: str, whose: str) -> set[str]:
    """The names that match one of the patterns, each of which must match some."""
    names = list(names)
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(
                f"{argument}: no tensor {whose} matches {pattern!r}; there are {_first(names)}, and in these patterns "
                f"* stands for any text"
            )
        found |= matches
    return found


def _without_counters(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _listed(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}: {_first(names)}" if names else ""


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"
