"""What other projects call a network's tensors, and the same tensors under our names, both ways.

A layout is a naming scheme of state dicts. Ours is torchvision's, with split attention as the released ResNeSt names
it and what else gates a block under `gate`. The others rename parts of a block, call an attention otherwise, or hold
the network as the backbone of a detector or a segmentation model, behind a prefix. No number is changed: at most the
weight of a linear layer gets the shape of a 1x1 convolution's.

Sources of the names: torchvision; rwightman/pytorch-image-models (timm); zhanghang1989/ResNeSt, its port to
detectron2 and its PyTorch-Encoding; BangguWu/ECANet; Jongchan/attention-module (CBAM); open-mmlab/mmdetection and
mmpretrain.

Names do not show everything: mmdetection's ResNets of the "caffe" style have the keys and shapes of those of the
"pytorch" style and are other functions (stride on the first 1x1, BGR images), which only the configuration they come
with tells; and ChannelAttention alone as a gate has the names of SqueezeExcitation. Do not convert those.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from torch import Tensor

Layout = Literal[
    "resnest_det",
    "torchvision",
    "timm",
    "resnest",
    "ecanet",
    "cbam",
    "detectron2",
    "mmdetection",
    "pytorch_encoding",
]

_BLOCK = r"layer[1-4]\.\d+"

# What can stand in the two slots of a block, and how its tensors are called there in our layout.
_SPLIT, _SELECTIVE, _SE, _ECA, _CBAM, _OTHER = _KINDS = (
    "split attention",
    "selective kernels",
    "squeeze-and-excitation",
    "efficient channel attention",
    "CBAM",
    "an attention of another kind",
)
_SLOTS = {
    _SPLIT: r"conv2\.bn0\.",
    _SELECTIVE: r"conv2\.branches\.",
    _SE: r"gate\.fc[12]\.",
    _ECA: r"gate\.conv\.weight",
    _CBAM: r"gate\.(channel|spatial)\.",
    _OTHER: r"gate\.|conv2\.(?!(weight|conv|bn[01]|fc[12])\b)",
}


@dataclass(frozen=True)
class _Rule:
    """One tensor's name in another layout and in ours; what stands in braces is the same on both sides."""

    theirs: str
    ours: str
    linear: bool = False  # theirs is a linear layer's weight (out, in), ours a 1x1 convolution's (out, in, 1, 1)


@dataclass(frozen=True)
class _Form:
    """How a layout names one kind of network.

    Attributes:
        layout: the layout; it has several forms where its names depend on the kind of network.
        mark: a regular expression of how a key of the backbone begins that shows this form; "" where no key does.
        kinds: what it can hold in the slots of a block; a network without attention where `plain`.
        plain: whether it holds networks without attention.
        rules: the first that fits a key names its counterpart.
        prefix: what the backbone's keys begin with in the layout's files, which hold more than a backbone.
        deep_stem: whether it is for networks with three convolutions as their stem, or with one; None: for both.
    """

    layout: Layout
    mark: str
    kinds: tuple[str, ...]
    plain: bool
    rules: tuple[_Rule, ...]
    prefix: str = ""
    deep_stem: bool | None = None


_SAME = _Rule("{rest}", "{rest}")

_DETECTRON2 = "backbone.bottom_up."


def _detectron2_rules() -> tuple[_Rule, ...]:
    """Each convolution holds its norm, the stem's three have names of their own, and stages count from 2."""
    pairs = [
        ("stem.conv1_1.weight", "conv1.0.weight"),
        ("stem.conv1_1.norm.{rest}", "conv1.1.{rest}"),
        ("stem.conv1_2.weight", "conv1.3.weight"),
        ("stem.conv1_2.norm.{rest}", "conv1.4.{rest}"),
        ("stem.conv1_3.weight", "conv1.6.weight"),
        ("stem.conv1_3.norm.{rest}", "bn1.{rest}"),
        ("linear.{rest}", "fc.{rest}"),
    ]
    for stage in (1, 2, 3, 4):
        theirs, ours = f"res{stage + 1}.{{index}}.", f"layer{stage}.{{index}}."
        pairs += [
            (theirs + "conv1.weight", ours + "conv1.weight"),
            (theirs + "conv1.norm.{rest}", ours + "bn1.{rest}"),
            (theirs + "conv2.{rest}", ours + "conv2.{rest}"),
            (theirs + "conv3.weight", ours + "conv3.weight"),
            (theirs + "conv3.norm.{rest}", ours + "bn3.{rest}"),
            (theirs + "shortcut.weight", ours + "downsample.1.weight"),
            (theirs + "shortcut.norm.{rest}", ours + "downsample.2.{rest}"),
        ]
    return tuple(_Rule(_DETECTRON2 + theirs, ours) for theirs, ours in pairs)


# mmdetection has no classifiers; OpenMMLab's, mmpretrain's, have theirs beside the backbone.
_OPENMMLAB_CLASSIFIER = "head.fc."

# In the order in which a file is tried for their marks. The last is what a file without any mark is.
_FORMS = (
    _Form(
        "detectron2",
        mark=r"stem\.conv1_1\.",
        kinds=(_SPLIT,),
        plain=False,
        rules=_detectron2_rules(),
        prefix=_DETECTRON2,
    ),
    _Form(
        "mmdetection",
        mark=r"stem\.0\.",
        kinds=(_SPLIT,),
        plain=True,
        rules=(
            _Rule(_OPENMMLAB_CLASSIFIER + "{rest}", "fc.{rest}"),
            *(_Rule(f"backbone.stem.{index}.{{rest}}", f"conv1.{index}.{{rest}}") for index in (0, 1, 3, 4, 6)),
            _Rule("backbone.stem.7.{rest}", "bn1.{rest}"),
            _Rule("backbone.{rest}", "{rest}"),
        ),
        prefix="backbone.",
        deep_stem=True,
    ),
    _Form(
        "mmdetection",
        mark="",
        kinds=(_SPLIT,),
        plain=True,
        rules=(_Rule(_OPENMMLAB_CLASSIFIER + "{rest}", "fc.{rest}"), _Rule("backbone.{rest}", "{rest}")),
        prefix="backbone.",
        deep_stem=False,
    ),
    _Form(
        "pytorch_encoding",
        mark="",
        kinds=(_SPLIT,),
        plain=True,
        rules=(_Rule("pretrained.{rest}", "{rest}"),),
        prefix="pretrained.",
    ),
    _Form(
        "cbam",
        mark=_BLOCK + r"\.cbam\.",
        kinds=(_CBAM,),
        plain=False,
        rules=(
            _Rule("{block}.cbam.ChannelGate.mlp.1.weight", "{block}.gate.channel.fc1.weight", linear=True),
            _Rule("{block}.cbam.ChannelGate.mlp.1.bias", "{block}.gate.channel.fc1.bias"),
            _Rule("{block}.cbam.ChannelGate.mlp.3.weight", "{block}.gate.channel.fc2.weight", linear=True),
            _Rule("{block}.cbam.ChannelGate.mlp.3.bias", "{block}.gate.channel.fc2.bias"),
            _Rule("{block}.cbam.SpatialGate.spatial.{rest}", "{block}.gate.spatial.{rest}"),
            _SAME,
        ),
    ),
    _Form(
        "ecanet",
        mark=_BLOCK + r"\.eca\.",
        kinds=(_ECA,),
        plain=False,
        rules=(_Rule("{block}.eca.{rest}", "{block}.gate.{rest}"), _SAME),
    ),
    _Form(
        "timm",
        mark=_BLOCK + r"\.se\.",
        kinds=(_SE, _ECA),
        plain=False,
        rules=(_Rule("{block}.se.{rest}", "{block}.gate.{rest}"), _SAME),
    ),
    _Form(
        "timm",
        mark=_BLOCK + r"\.conv2\.paths\.",
        kinds=(_SELECTIVE,),
        plain=False,
        rules=(
            _Rule("{block}.conv1.conv.{rest}", "{block}.conv1.{rest}"),
            _Rule("{block}.conv1.bn.{rest}", "{block}.bn1.{rest}"),
            _Rule("{block}.conv2.paths.{index}.conv.{rest}", "{block}.conv2.branches.{index}.0.{rest}"),
            _Rule("{block}.conv2.paths.{index}.bn.{rest}", "{block}.conv2.branches.{index}.1.{rest}"),
            _Rule("{block}.conv2.attn.fc_reduce.{rest}", "{block}.conv2.fc1.{rest}"),
            _Rule("{block}.conv2.attn.bn.{rest}", "{block}.conv2.bn1.{rest}"),
            _Rule("{block}.conv2.attn.fc_select.{rest}", "{block}.conv2.fc2.{rest}"),
            _Rule("{block}.conv3.conv.{rest}", "{block}.conv3.{rest}"),
            _Rule("{block}.conv3.bn.{rest}", "{block}.bn3.{rest}"),
            _SAME,
        ),
    ),
    _Form("timm", mark="", kinds=(_SPLIT,), plain=True, rules=(_SAME,)),
    _Form("torchvision", mark="", kinds=(), plain=True, rules=(_SAME,)),
    _Form("resnest", mark="", kinds=(_SPLIT,), plain=False, rules=(_SAME,)),
    _Form("resnest_det", mark="", kinds=_KINDS, plain=True, rules=(_SAME,)),
)

# Where models hold their backbone, whatever its layout: detectron2's; torchvision's and our detectors; OpenMMLab's
# models, torchvision's and our segmentation models; PyTorch-Encoding's.
_PREFIXES = (_DETECTRON2, "backbone.body.", "backbone.", "pretrained.")

# Files whose shapes fit one of our networks and that are another function, by what begins one of their keys.
_REFUSED = {
    r"(backbone\.bottom_up\.)?stem\.conv1\.": "detectron2's plain ResNets, whose usual files have their strides on "
    "the first 1x1 convolution of a block and want BGR images in the range of Caffe",
    r".*\b(conv2_offset|conv_offset)\.": "networks with deformable convolutions",
    r".*\.se_module\.": "the SENet files of pretrainedmodels (timm: legacy_se*), whose max pool rounds up its size and "
    "whose se_resnet files have their strides on the first 1x1 convolution of a block",
    r"(.*\.)?"
    + _BLOCK
    + r"\.se\.(channel|spatial)\.": "timm's CBAM, whose layers have no biases and pool in another order than "
    "the released CBAM",
}


def detect_layout(state: Mapping[str, Tensor]) -> Layout:
    """The layout that a state dict's keys show.

    Returns:
        "resnest_det" for keys that show no other: so for torchvision's, the released ResNeSt's, mmdetection's and
        timm's plain networks, which have our keys, be it behind the prefix of a model, and for what is no such
        network at all.
    """
    return _form_of(_without_model(without_wrappers(state))).layout


def convert_state_dict(state: Mapping[str, Tensor], to: Layout, source: Layout | None = None) -> dict[str, Tensor]:
    """A network's tensors under the keys of another layout.

    Args:
        state: the state dict of a network, or of a detector or a segmentation model that has one as its backbone;
            "module." and "_orig_mod." before all keys, from DataParallel and torch.compile, are dropped.
        to: the layout to write. The layouts of detectors and segmentation models get the backbone alone.
        source: the layout of `state`; None takes detect_layout's.

    Returns:
        A new dict of the same tensors (or views of them), in the order of `state`. What belongs to no backbone is
        left out; what has no counterpart keeps its name.

    Raises:
        ValueError: an unknown layout, a `source` that the keys are not of, tensors that the layout `to` has no place
            for, or the file of another function under the same shapes.
    """
    for layout in (to, source):
        if layout is not None and layout not in get_args(Layout):
            nearest = difflib.get_close_matches(layout, get_args(Layout), n=1, cutoff=0)[0]
            raise ValueError(
                f"layout {layout!r} is unknown; did you mean {nearest!r}? There are: {', '.join(get_args(Layout))}"
            )
    return _from_ours(_to_ours(without_wrappers(state), source), to)


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without what DataParallel ("module.") and torch.compile ("_orig_mod.") put before all keys."""
    stripped = dict(state)
    while stripped:
        prefix = next(iter(stripped)).partition(".")[0] + "."
        if prefix not in ("module.", "_orig_mod.") or not all(key.startswith(prefix) for key in stripped):
            break
        stripped = {key.removeprefix(prefix): tensor for key, tensor in stripped.items()}
    return stripped


def with_present_detector_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of one of torchvision's detectors under the names that its class has now; others as they are.

    Its first files (those of the weights COCO_V1) are older than the norms in the pyramid and the heads. torchvision
    renames their tensors too, but only once they are in load_state_dict; source: the `_version` of its
    FeaturePyramidNetwork, RPNHead, MaskRCNNHeads and RetinaNet's heads.
    """
    # FCOS has numbered norms between its convolutions; RetinaNet had ReLUs, which have no tensors.
    is_fcos = "head.classification_head.conv.1.weight" in state
    present = {}
    for key, tensor in state.items():
        key = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2", key)
        key = re.sub(r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1", key)
        if mask := re.fullmatch(r"(.*mask_head\.)mask_fcn(\d+)\.(weight|bias)", key):
            key = f"{mask[1]}{int(mask[2]) - 1}.0.{mask[3]}"
        if not is_fcos and (head := re.fullmatch(r"(head\.\w+_head\.conv\.)(\d+)\.(weight|bias)", key)):
            key = f"{head[1]}{int(head[2]) // 2}.0.{head[3]}"
        present[key] = tensor
    return present


def is_backbone_of_a_model(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is a detector's or a segmentation model's, or a backbone named as theirs.

    It need not have a classifier then.
    """
    return bool(_model_prefix(state) or _form_of(state).prefix)


def _model_prefix(state: Mapping[str, Tensor]) -> str:
    """What stands before the keys of the backbone where it is a part of a model; "" where it is none."""
    for prefix in _PREFIXES:
        if any(key.startswith((prefix + "conv1.", prefix + "stem.")) for key in state):
            return prefix
    return ""


def _without_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a model by its own keys, with the classifier that OpenMMLab puts beside it."""
    prefix = _model_prefix(state)
    if not prefix:
        return dict(state)
    bare = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if prefix == "backbone.":
        for key, tensor in state.items():
            if key.startswith(_OPENMMLAB_CLASSIFIER):
                bare["fc." + key.removeprefix(_OPENMMLAB_CLASSIFIER)] = tensor
    return bare


def _form_of(state: Mapping[str, Tensor], layout: Layout | None = None) -> _Form:
    """The form of `layout`, or of any, whose mark a key of a backbone bears; else the one without a mark."""
    forms = [form for form in _FORMS if layout in (None, form.layout)]
    for form in forms:
        if form.mark and any(re.match(form.mark, key) for key in state):
            return form
    if forms[-1].mark:
        raise ValueError(
            f"source={layout!r}, and the state dict has no key of that layout; it begins with "
            f"{next(iter(state), '')!r}; use source=None to have its layout detected"
        )
    return forms[-1]


def _to_ours(state: Mapping[str, Tensor], source: Layout | None) -> dict[str, Tensor]:
    for pattern, what in _REFUSED.items():
        key = next((key for key in state if re.match(pattern, key)), None)
        if key is not None:
            raise ValueError(
                f"the state dict, with its {key!r}, is of {what}: another function than our networks, though shapes "
                f"may agree, so it is not converted; use the project it comes from, or other weights"
            )
    bare = _without_model(state)
    form = _form_of(bare, source)
    converted = {}
    for key, tensor in bare.items():
        for rule in form.rules:
            ours = _renamed(form.prefix + key, rule.theirs, rule.ours)
            if ours is not None:
                converted[ours] = tensor[..., None, None] if rule.linear and tensor.dim() == 2 else tensor
                break
        else:
            converted[key] = tensor
    return converted


def _from_ours(state: Mapping[str, Tensor], to: Layout) -> dict[str, Tensor]:
    kinds = _kinds_in(state)
    deep_stem = "conv1.0.weight" in state
    forms = {
        form.layout: form
        for form in _FORMS
        if (form.plain or kinds) and kinds.keys() <= set(form.kinds) and form.deep_stem in (None, deep_stem)
    }
    if to not in forms:
        what = " and ".join(f"{kind} ({key})" for kind, key in kinds.items()) or "a network without attention"
        raise ValueError(f"the layout {to!r} has no place for {what}; there is one in: {', '.join(forms)}")
    converted = {}
    for key, tensor in state.items():
        for rule in forms[to].rules:
            theirs = _renamed(key, rule.ours, rule.theirs)
            if theirs is not None:
                converted[theirs] = tensor.flatten(1) if rule.linear and tensor.dim() == 4 else tensor
                break
        else:
            raise ValueError(f"the layout {to!r} has no place for the tensor {key}")
    return converted


def _kinds_in(state: Mapping[str, Tensor]) -> dict[str, str]:
    """What stands in the slots of a network's blocks, each with the first key that shows it."""
    found: dict[str, str] = {}
    for key in state:
        for kind, pattern in _SLOTS.items():
            if re.match(rf"{_BLOCK}\.({pattern})", key):
                found.setdefault(kind, key)
                break
    return found


def _renamed(key: str, from_template: str, to_template: str) -> str | None:
    """The key that `to_template` makes of what `from_template` finds in `key`; None if it does not fit."""
    match = _pattern(from_template).fullmatch(key)
    return to_template.format(**match.groupdict()) if match else None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """The regular expression of a template such as "{block}.se.{rest}"."""
    fields = {"block": _BLOCK, "index": r"\d+", "rest": ".+"}
    parts = re.split(r"\{(\w+)\}", template)  # text and names of fields in turn
    return re.compile(
        "".join(f"(?P<{part}>{fields[part]})" if odd % 2 else re.escape(part) for odd, part in enumerate(parts))
    )
