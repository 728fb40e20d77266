"""Models written as files that run without this package: ONNX, and torch.export's programs.

A file takes images as contract 1 has them, RGB in [0, 1] (or bytes, which it scales itself), and normalises them; a
detector's resizes them too, suppresses duplicates, and answers in pixels of the image it was given. Nothing is written
before what would be written has been run and gives what the model gives, at more than one size.

ONNX is written by torch's exporter that traces, `torch.onnx.export(dynamo=False)`: the newer one, and torch.export
under it, stop at sizes that depend on the data, such as how many boxes are left, which every detector has.
"""

from __future__ import annotations

import io
import json
import operator
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch._meta_registrations as meta
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from resnest_det.deploy.onnx_model import open_session, required
from resnest_det.deploy.resizing import resized_as_eager

Images = Tensor | list[Tensor]
Outputs = dict[str, NDArray[Any]]

OPSETS = range(
    16, 21
)  # from the first that has torchvision's RoIAlign to the last that torch's tracing exporter writes
METADATA_FILE = "metadata.json"  # of a program of torch.export, whose file is an archive

_SMALLEST_SCALE = 1e-30  # of outputs that are all zero
_DETECTION_KEYS = ("boxes", "labels", "scores", "masks")


@dataclass(frozen=True, slots=True)
class Check:
    """What a file gave beside what the model gave, of one input.

    Attributes:
        images: the input's shape, such as "2x3x224x224"; of a detector each image's.
        differences: the largest difference in each output: of a tensor as a share of its largest absolute value; of
            detections' boxes as a share of the image's longer side, of scores and masks as they are, in [0, 1].
        num_detections: how many of a detector's were compared.
    """

    images: str
    differences: dict[str, float]
    num_detections: int | None = None


@dataclass(frozen=True, slots=True)
class Export:
    """A file that was written, and what it was checked by.

    Attributes:
        path: the file.
        metadata: what the file says of itself.
        checks: one for each input that it was run on.
    """

    path: Path
    metadata: dict[str, str]
    checks: tuple[Check, ...]

    def largest_difference(self) -> float:
        """The largest of all checks and outputs."""
        return max(value for check in self.checks for value in check.differences.values())


class NormalisedNetwork(nn.Module):
    """A network that takes images in [0, 1]: the normalisation of its training stands before it.

    Args:
        net: takes normalised images (N, 3, H, W).
        image_mean: mean of each channel of the images in [0, 1]; ImageNet's.
        image_std: standard deviation of each channel.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        net: nn.Module,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("image_mean", torch.tensor(image_mean)[:, None, None], persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Any:
        """What the network gives of images (N, 3, H, W), float in [0, 1]."""
        return self.net((images - self.image_mean) / self.image_std)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example: Images,
    *,
    opset: int = 17,
    dynamic: bool = True,
    checks: Sequence[Images] | None = None,
    reference: nn.Module | None = None,
    tolerance: float = 1e-4,
    metadata: Mapping[str, str] | None = None,
) -> Export:
    """Write a model as an ONNX file, once ONNX Runtime has given with it what the model gives.

    A model of tensors has the input "images" (N, 3, H, W), and its outputs are named as the keys of the dict that it
    returns, or "logits" where it returns a tensor. A detector has the input "image" (3, H, W) and the outputs "boxes",
    "labels", "scores" and, where it has masks, "masks", as it returns them; of an example of several images, "image_0",
    "boxes_0", and so on.

    Args:
        model: in evaluation mode; takes images in [0, 1]. onnx_form(model) is faster in ONNX Runtime.
        path: the file, which ends in .onnx; one that is there is replaced.
        example: what the model is traced with, float32 or uint8, which the file scales by 255: images (N, 3, H, W), or
            of a detector a list of images (3, H, W).
        opset: version of ONNX's operators, 16 to 20.
        dynamic: whether N, H and W may be others than the example's. A detector's number of images stays.
        checks: inputs of the example's kind that the file is tried on. None: the example and, where the file is
            dynamic, one of other sizes and one image more.
        reference: what the file must agree with; None is the model itself. Where that is a form of another model, give
            the other one.
        tolerance: largest difference that is allowed, as a Check measures it.
        metadata: what the file is to say of itself, beside versions, input and checks.

    Returns:
        What was written.

    Raises:
        OSError: the file cannot be written.
        ValueError: an argument is out of range, the model returns what has no names, onnx or onnxruntime is missing,
            or the file would give something else than the model. Nothing is written then.
    """
    path = checked_output(path, ".onnx")
    _check_tolerance(tolerance)
    if opset not in OPSETS:
        raise ValueError(
            f"opset={opset} must be {OPSETS[0]} to {OPSETS[-1]}, which torch's exporter of detectors writes"
        )
    onnx = required("onnx")
    required("onnxruntime")  # by which the file is checked
    graph = _Graph(model, example, flat=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        # Of tracing, which the checks verify, and of this exporter being the older one.
        warnings.simplefilter("ignore")
        traced = Path(folder) / "traced.onnx"
        torch.onnx.export(
            graph,
            graph.inputs(example),
            traced,
            dynamo=False,
            opset_version=opset,
            input_names=graph.input_names,
            output_names=graph.output_names,
            dynamic_axes=graph.dynamic_axes(dynamic),
        )
        proto = onnx.load(traced)
    session = open_session(proto.SerializeToString())

    def run(images: Images) -> Outputs:
        inputs = {
            name: tensor.numpy(force=True) for name, tensor in zip(graph.input_names, graph.inputs(images), strict=True)
        }
        return dict(zip(graph.output_names, session.run(None, inputs), strict=True))

    done = _check(run, reference or model, example, checks, dynamic=dynamic, tolerance=tolerance)
    written = {
        **(metadata or {}),
        **_description(example, done, dynamic=dynamic, packages=("torch", "torchvision", "onnx")),
        "opset": str(opset),
    }
    onnx.helper.set_model_props(proto, written)
    write_whole(path, proto.SerializeToString())
    return Export(path, written, done)


def export_program(
    model: nn.Module,
    path: str | Path,
    example: Tensor,
    *,
    dynamic: bool = True,
    checks: Sequence[Images] | None = None,
    reference: nn.Module | None = None,
    tolerance: float = 1e-4,
    metadata: Mapping[str, str] | None = None,
) -> Export:
    """Write a model as a program of torch.export, once the program, read back, has given what the model gives.

    `torch.export.load(path).module()(images)` runs it; it returns what the model returns. Its metadata are the
    archive's file metadata.json: `torch.export.load(path, extra_files={"metadata.json": ""})` reads them.

    Args:
        model: see export_onnx; no detector.
        path: the file, which ends in .pt2; one that is there is replaced.
        example: see export_onnx.
        dynamic: see export_onnx.
        checks: see export_onnx.
        reference: see export_onnx.
        tolerance: see export_onnx.
        metadata: see export_onnx.

    Returns:
        What was written.

    Raises:
        OSError: the file cannot be written.
        ValueError: as export_onnx, and for a detector: how many boxes are left depends on the image, at which
            torch.export stops.
    """
    path = checked_output(path, ".pt2")
    _check_tolerance(tolerance)
    if not isinstance(example, Tensor):
        raise ValueError(
            "the model is a detector, which torch.export does not take: how many boxes are left depends on the image, "
            "and torchvision's suppression asks for it; export it as ONNX"
        )
    graph = _Graph(model, example, flat=False)
    auto = torch.export.Dim.AUTO
    # Older torch asks for the remainder where it divides the sizes that pools see: a program would be for sizes of the
    # example's remainder alone.
    floor_division = patch.object(meta, "div_rtn", operator.floordiv, create=True)
    with torch.no_grad(), warnings.catch_warnings(), floor_division:
        warnings.simplefilter("ignore")
        program = torch.export.export(
            graph,
            # A batch of one would be taken for a constant.
            (torch.cat([example, example]) if dynamic and len(example) == 1 else example,),
            dynamic_shapes=(({0: auto, 2: auto, 3: auto},),) if dynamic else None,
            strict=False,
        )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    module = torch.export.load(buffer).module()

    def run(images: Images) -> Outputs:
        with torch.no_grad():
            return _as_arrays(_named(module(*graph.inputs(images)), several=False))

    done = _check(run, reference or model, example, checks, dynamic=dynamic, tolerance=tolerance)
    written = {
        **(metadata or {}),
        **_description(example, done, dynamic=dynamic, packages=("torch", "torchvision")),
    }
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(written)})
    write_whole(path, buffer.getvalue())
    return Export(path, written, done)


class _Graph(nn.Module):
    """A model as a file has it: images one by one, bytes scaled, and of `flat` the outputs as a tuple of tensors.

    Attributes:
        input_names: of the images.
        output_names: of the tuple.
    """

    def __init__(self, model: nn.Module, example: Images, *, flat: bool) -> None:
        super().__init__()
        if model.training:
            raise ValueError("the model is in training mode, where it gives losses; call eval()")
        _check_images(example)
        self.model = resized_as_eager(model)
        self.eval()  # the exporter leaves the mode, and the model's with it, as it finds this one's
        self.flat = flat
        self.is_detector = not isinstance(example, Tensor)
        self.several = self.is_detector and len(example) > 1
        if self.several:
            self.input_names = [f"image_{index}" for index in range(len(example))]
        else:
            self.input_names = ["image" if self.is_detector else "images"]
        with torch.no_grad():
            self._shapes = {
                name: tensor.ndim for name, tensor in _named(_run(model, example), several=self.several).items()
            }
        self.output_names = list(self._shapes)

    def forward(self, *images: Tensor) -> Any:
        given = list(images) if self.is_detector else images[0]
        outputs = _run(self.model, given)
        return tuple(_named(outputs, several=self.several).values()) if self.flat else outputs

    def inputs(self, images: Images) -> tuple[Tensor, ...]:
        """Images as forward takes them."""
        return (images,) if isinstance(images, Tensor) else tuple(images)

    def dynamic_axes(self, dynamic: bool) -> dict[str, dict[int, str]]:
        """The names of the sizes that may change. How many detections there are always may."""
        axes: dict[str, dict[int, str]] = {}
        for name in self.input_names if dynamic else ():
            tail = name.removeprefix("image").removeprefix("s")
            sizes = {1: f"height{tail}", 2: f"width{tail}"}
            axes[name] = sizes if self.is_detector else {0: "batch", 2: "height", 3: "width"}
        for name, ndim in self._shapes.items():
            sizes = {2: f"{name}_height", 3: f"{name}_width"} if ndim == 4 and dynamic else {}
            if self.is_detector:
                tail = name.removeprefix(name.split("_")[0])
                axes[name] = {0: f"detections{tail}", **sizes}
            elif dynamic:
                axes[name] = {0: "batch", **sizes}
        return axes


def _run(model: Callable[..., Any], images: Images) -> Any:
    """The model's outputs of images that may be bytes."""
    if isinstance(images, Tensor):
        return model(_scaled(images))
    return model([_scaled(image) for image in images])


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _named(outputs: Any, *, several: bool) -> dict[str, Tensor]:
    """The tensors of what a model returned, by the names that a file gives them."""
    if isinstance(outputs, Tensor):
        return {"logits": outputs}
    if isinstance(outputs, Mapping) and all(isinstance(value, Tensor) for value in outputs.values()):
        return dict(outputs)
    if isinstance(outputs, list) and all(isinstance(found, Mapping) for found in outputs):
        return {
            f"{key}_{index}" if several else key: found[key]
            for index, found in enumerate(outputs)
            for key in _DETECTION_KEYS
            if key in found
        }
    raise ValueError(
        f"the model returned a {type(outputs).__name__}; what can be exported returns a tensor, a dict of tensors, or "
        f"a detector's list of dicts"
    )


# --- checks


def _check(
    run: Callable[[Images], Outputs],
    model: nn.Module,
    example: Images,
    checks: Sequence[Images] | None,
    *,
    dynamic: bool,
    tolerance: float,
) -> tuple[Check, ...]:
    """Compare the file with the model.

    Raises:
        ValueError: they differ, or nothing was compared.
    """
    if checks is None:
        checks = [example, of_other_sizes(example)] if dynamic else [example]
    if not checks:
        raise ValueError("checks is empty, and no file is written unchecked; give inputs, or None")
    done = []
    for images in checks:
        _check_images(images)
        expected = _expected(model, images)
        try:
            given = run(images)
        except Exception as error:  # whatever the runtime raises, the file is not what was asked for
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            fix = "; if it took a size for a constant, export it with dynamic=False (--fixed-size)" if dynamic else ""
            raise ValueError(f"the exported model fails on images of {_sizes(images)}: {said}{fix}") from error
        done.append(_compared(expected, given, images, tolerance))
    if not isinstance(example, Tensor) and not any(check.num_detections for check in done):
        raise ValueError(
            "the model found nothing in the images of the check, so that nothing was compared; give images with objects"
        )
    return tuple(done)


def _check_tolerance(tolerance: float) -> None:
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance} must be between 0 and 1, such as 1e-4")


def _expected(model: nn.Module, images: Images) -> Outputs:
    with torch.no_grad():
        outputs = _named(_run(model, images), several=not isinstance(images, Tensor) and len(images) > 1)
    return _as_arrays(outputs)


def _as_arrays(outputs: Mapping[str, Tensor]) -> Outputs:
    return {name: tensor.numpy(force=True) for name, tensor in outputs.items()}


def _compared(expected: Outputs, given: Mapping[str, Any], images: Images, tolerance: float) -> Check:
    if isinstance(images, Tensor):
        return _compared_tensors(expected, given, images, tolerance)
    differences: dict[str, float] = {}
    num_detections = 0
    for index, image in enumerate(images):
        tail = f"_{index}" if len(images) > 1 else ""
        keys = [key for key in _DETECTION_KEYS if key + tail in expected]
        one, other = ({key: outputs[key + tail] for key in keys} for outputs in (expected, given))
        matched = _match(one, other, _longer_side(image), tolerance)
        num_detections += len(matched)
        differences |= {key + tail: value for key, value in _detection_differences(one, other, matched, image).items()}
    check = Check(_sizes(images), differences, num_detections)
    _refuse_differences(check, tolerance)
    return check


def _compared_tensors(expected: Outputs, given: Mapping[str, Any], images: Tensor, tolerance: float) -> Check:
    differences = {}
    for name, values in expected.items():
        other = np.asarray(given[name])
        if other.shape != values.shape:
            raise ValueError(
                f"the exported model gives {name} of shape {other.shape} on images of {_sizes(images)}, and the model "
                f"{values.shape}: a size was taken for a constant; export it with dynamic=False"
            )
        scale = max(float(np.abs(values).max(initial=0)), _SMALLEST_SCALE)
        differences[name] = float(np.abs(other - values).max(initial=0)) / scale
    check = Check(_sizes(images), differences)
    _refuse_differences(check, tolerance)
    return check


def _refuse_differences(check: Check, tolerance: float) -> None:
    for name, value in check.differences.items():
        if not value <= tolerance:  # NaN is refused too
            raise ValueError(
                f"the exported model's {name} differ from the model's by {value:.3g} on images of {check.images}, more "
                f"than the tolerance of {tolerance:g}; nothing was written"
            )


def _match(expected: Outputs, given: Outputs, side: int, tolerance: float) -> list[tuple[int, int]]:
    """Which detection of the file is which of the model: of its label, the one whose box is nearest.

    By place they cannot be compared: of equal scores, rounding decides which comes first. It also decides which of the
    lowest scores are kept, so that these alone may be without a counterpart.

    Raises:
        ValueError: another detection has no counterpart.
    """
    pairs = []
    free = list(range(len(given["scores"])))
    lonely = []
    for place, (label, box) in enumerate(zip(expected["labels"], expected["boxes"], strict=True)):
        distances = {
            other: float(np.abs(given["boxes"][other] - box).max()) / side
            for other in free
            if given["labels"][other] == label
        }
        nearest = min(distances, key=lambda other: distances[other], default=-1)
        if nearest < 0 or distances[nearest] > tolerance:
            lonely.append(float(expected["scores"][place]))
        else:
            free.remove(nearest)
            pairs.append((place, nearest))
    lonely += [float(given["scores"][place]) for place in free]
    scores = [*expected["scores"], *given["scores"]]
    missing = [score for score in lonely if score > min(scores) + tolerance]
    if missing:
        raise ValueError(
            f"{len(missing)} detections of {len(expected['scores'])} by the model and {len(given['scores'])} by the "
            f"exported one are found by one of them only, within {tolerance:g} of the image's side; the best of them "
            f"scores {max(missing):.3f}; nothing was written"
        )
    return pairs


def _detection_differences(
    expected: Outputs, given: Outputs, matched: Sequence[tuple[int, int]], image: Tensor
) -> dict[str, float]:
    """The largest differences of the boxes, scores and masks that are the same detection."""
    if not matched:
        return {}
    ours, theirs = (np.array(places) for places in zip(*matched, strict=True))
    differences = {
        "boxes": float(np.abs(expected["boxes"][ours] - given["boxes"][theirs]).max()) / _longer_side(image),
        "scores": float(np.abs(expected["scores"][ours] - given["scores"][theirs]).max()),
    }
    if "masks" in expected:
        differences["masks"] = float(np.abs(expected["masks"][ours] - given["masks"][theirs]).max())
    return differences


def _longer_side(image: Tensor) -> int:
    return max(image.shape[-2], image.shape[-1])


def of_other_sizes(images: Images) -> Images:
    """What a file for any size is tried on beside its example: the images stretched to another aspect ratio.

    Args:
        images: as export_onnx takes an example.

    Returns:
        The like, of other height and width, and of a batch one image more.
    """
    if not isinstance(images, Tensor):
        return [_stretched(image[None])[0] for image in images]
    return _stretched(torch.cat([images, images[:1]]))


def _stretched(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    size = height * 3 // 4 + 1, width * 5 // 4 + 1  # odd, mostly: strides do not divide them
    resized = F.interpolate(images.float(), size, mode="bilinear", align_corners=False)
    return resized.round().to(torch.uint8) if images.dtype == torch.uint8 else resized


def _check_images(images: Images) -> None:
    ndim = 4 if isinstance(images, Tensor) else 3
    listed = [images] if isinstance(images, Tensor) else images
    if not listed:
        raise ValueError("the example is an empty list; give a detector at least one image (3, H, W)")
    for image in listed:
        is_image = image.ndim == ndim and image.shape[-3] == 3 and image.numel() > 0
        if not is_image or image.dtype not in (torch.float32, torch.uint8):
            raise ValueError(
                f"the images are {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}; give float32 in "
                f"[0, 1] or uint8, (N, 3, H, W), or of a detector a list of (3, H, W)"
            )


def _sizes(images: Images) -> str:
    listed = [images] if isinstance(images, Tensor) else images
    return ", ".join("x".join(map(str, image.shape)) for image in listed)


# --- files


def _description(example: Images, checks: Sequence[Check], *, dynamic: bool, packages: Sequence[str]) -> dict[str, str]:
    """What a file says of itself: how it was made, what it takes, and how near it is to the model."""
    dtype = example.dtype if isinstance(example, Tensor) else example[0].dtype
    form = "(N, 3, H, W)" if isinstance(example, Tensor) else "(3, H, W)"
    if not dynamic:
        form = _sizes(example)
    values = "bytes, which the model scales" if dtype == torch.uint8 else "in [0, 1]"
    return {
        "input": f"{str(dtype).removeprefix('torch.')} RGB {form}, {values}; the model normalises",
        "checks": json.dumps([{"images": check.images, **check.differences} for check in checks]),
        "resnest_det": version("resnest-det"),
        **{package: version(package) for package in packages},
    }


def checked_output(path: str | Path, suffix: str) -> Path:
    """The path of a file that is to be written.

    Raises:
        FileNotFoundError: there is no folder for it.
        ValueError: it does not end in the suffix.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"the file {path} must end in {suffix}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for the file {path.name}; create it")
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside `path`, then rename it into place; what fails leaves the old one.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
