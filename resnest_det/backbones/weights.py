"""Weights from files: published files by the network's name, and any file by its path.

Loading is strict: a network that was loaded has every one of its tensors from the file. Files are read as data
(torch.load with weights_only=True), so that a file cannot run code.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import urllib.error
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_RESNEST = "https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1/"
_GLUON = "https://github.com/rwightman/pytorch-pretrained-gluonresnest/releases/download/v0.1/"
_TORCHVISION = "https://download.pytorch.org/models/"

# The eight hex digits in a file's name are the start of its SHA-256. torchvision's files are its IMAGENET1K_V1,
# the weights that published detection results start from.
IMAGENET_FILES: dict[str, str] = {
    "resnet18": _TORCHVISION + "resnet18-f37072fd.pth",
    "resnet34": _TORCHVISION + "resnet34-b627a593.pth",
    "resnet50": _TORCHVISION + "resnet50-0676ba61.pth",
    "resnet101": _TORCHVISION + "resnet101-63fe2227.pth",
    "resnet152": _TORCHVISION + "resnet152-394f9c45.pth",
    "resnext50_32x4d": _TORCHVISION + "resnext50_32x4d-7cdf4587.pth",
    "resnext101_32x8d": _TORCHVISION + "resnext101_32x8d-8ba56ff5.pth",
    "resnest14": _GLUON + "gluon_resnest14-9c8fe254.pth",
    "resnest26": _GLUON + "gluon_resnest26-50eb607c.pth",
    "resnest50": _RESNEST + "resnest50-528c19ca.pth",
    "resnest101": _RESNEST + "resnest101-22405ba7.pth",
    "resnest200": _RESNEST + "resnest200-75117900.pth",
    "resnest269": _RESNEST + "resnest269-0cc87c48.pth",
    "resnest50_fast_1s1x64d": _RESNEST + "resnest50_fast_1s1x64d-d8fbf808.pth",
    "resnest50_fast_2s1x64d": _RESNEST + "resnest50_fast_2s1x64d-44938639.pth",
    "resnest50_fast_4s1x64d": _RESNEST + "resnest50_fast_4s1x64d-f74f3fc3.pth",
    "resnest50_fast_1s2x40d": _RESNEST + "resnest50_fast_1s2x40d-32830b84.pth",
    "resnest50_fast_2s2x40d": _RESNEST + "resnest50_fast_2s2x40d-9d126481.pth",
    "resnest50_fast_4s2x40d": _RESNEST + "resnest50_fast_4s2x40d-41d14ed0.pth",
    "resnest50_fast_1s4x24d": _RESNEST + "resnest50_fast_1s4x24d-d4a4f76f.pth",
}


def load_imagenet_weights(net: nn.Module, name: str) -> None:
    """Load the published ImageNet weights of the network called `name` into `net`.

    The file is downloaded once, into `checkpoints` under torch.hub.get_dir(), and its hash is checked each time.

    Raises:
        ValueError: no weights are published for `name`, the file's hash is wrong, or it does not fit `net`.
        ConnectionError: the file could not be downloaded.
    """
    if name not in IMAGENET_FILES:
        raise ValueError(f"no ImageNet weights are published for {name!r}; use weights=None or a file's path")
    load_weights(net, _download(IMAGENET_FILES[name]))


def load_weights(net: nn.Module, file: str | Path) -> None:
    """Load a file's weights into `net`, all of them or none.

    Args:
        net: a backbone, a detector, or any other module.
        file: a state dict as torch.save writes it, or a checkpoint that holds one under "model" or
            "state_dict". The counters `num_batches_tracked` may be there or not: FrozenBatchNorm has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as data, or its tensors are not those of `net`; the message names
            what is missing, extra or of another shape, and `net` is unchanged.
    """
    path = Path(file).expanduser()
    state = read_state_dict(path)
    own = net.state_dict()
    missing = sorted(_without_counters(own.keys() - state.keys()))
    extra = sorted(_without_counters(state.keys() - own.keys()))
    reshaped = [key for key in own if key in state and state[key].shape != own[key].shape]
    shapes = [f"{key} ({_shape(state[key])} in the file, {_shape(own[key])} in the network)" for key in reshaped]
    problems = [
        f"  {len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("extra", extra), ("of another shape", shapes))
        if names
    ]
    if problems:
        hint = ""
        if not (missing or extra) and all(_is_classifier(key, state[key], own[key]) for key in reshaped):
            hint = (
                "\nOnly the classifier differs: the network must have the file's number of classes, which is the data "
                "set's, and for a detector one more, the background."
            )
        raise ValueError(
            f"the tensors of {path} are not those of this {type(net).__name__}:\n" + "\n".join(problems) + hint
        )
    net.load_state_dict(state, strict=False)  # what strict would refuse now are the counters alone


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict that a file is, or that it holds under "model" or "state_dict", on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not plain data, or holds no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: give the path of a file")
    content = read_plain(path)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict: a dict of tensors, or one under 'model' or 'state_dict'")
    return content


def read_plain(path: Path) -> Any:
    """What torch.save wrote to a file, on the CPU, if it is plain data: tensors, numbers, strings, lists and dicts.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, no file of torch.save, or would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:  # torch's own text advises to read the file unsafely
        raise ValueError(
            f"{path} is damaged, or not plain data written by torch.save: it is another kind of file, or reading it "
            f"would run code, which is refused; save the state dict alone, as torch.save(model.state_dict(), file)"
        ) from error
    except Exception as error:  # bytes that mean nothing fail in every way that a reader can fail in
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged, or not plain data written by torch.save: {reason}") from error


def _is_classifier(key: str, in_file: Tensor, in_network: Tensor) -> bool:
    """Whether a tensor belongs to a last layer, and only the number of its outputs differs."""
    last = re.match(r"fc\.|classifier\.|aux_head\.4\.|(.*\.)?box_predictor\.(cls_score|bbox_pred)\.", key)
    return last is not None and in_file.shape[1:] == in_network.shape[1:]


def _download(url: str) -> Path:
    """The file at `url`, from torch.hub's folder or fetched into it, with the hash in its name checked."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    prefix = path.stem.rsplit("-", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
        except (urllib.error.URLError, OSError) as error:
            raise ConnectionError(
                f"{url} could not be downloaded ({error}); fetch it elsewhere and put it at {path}, "
                f"or give its path as weights"
            ) from error
        except RuntimeError as error:
            raise ValueError(f"{url} is damaged or replaced: {error}") from error
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(prefix):
        raise ValueError(
            f"{path} has SHA-256 {digest[:8]}..., where its name says {prefix}: it is damaged; "
            f"delete it to have it fetched again"
        )
    return path


def _without_counters(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"
