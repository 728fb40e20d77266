"""Image files to classes: the quick check that a backbone's weights were loaded right.

A published accuracy belongs to one way of resizing and cropping, so the pictures are prepared as the published
file's own evaluation prepares them.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Literal
from urllib.parse import unquote, urlsplit

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from resnest_det.backbones import create_backbone
from resnest_det.backbones.published import Preprocessing, list_weights
from resnest_det.backbones.weight_files import find_file
from resnest_det.backbones.weights import load_backbone_weights, read_state_dict
from resnest_det.data.files import UnreadableImageError, describe_near, read_rgb
from resnest_det.distributed import images_to_device, select_device

IMAGENET_CLASS_NAMES: tuple[str, ...] = tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])

_DEFAULT_NUM_SHOWN = 5  # classes an image
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in [0, 1]


@dataclass(frozen=True, slots=True)
class Prediction:
    """One of an image's most probable classes."""

    class_index: int  # of the network's outputs, from 0
    class_name: str
    probability: float  # in [0, 1], of the softmax over all classes


class Classifier:
    """A network that names what is in a picture.

    The short side is resized and the centre cropped with Pillow's antialiased filters, as torchvision's and timm's
    evaluations do, bit for bit the former's. ResNeSt's released evaluation crops first and resizes what is left:
    the same field of view, to within the rounding of the crop's edges to whole pixels.

    Args:
        net: from images (N, 3, crop, crop), normalised with ImageNet's mean and standard deviation, to logits
            (N, classes). It is moved to the device and put into evaluation mode.
        class_names: one for each of the network's outputs, in their order.
        preprocessing: the short side, the crop and the interpolation.
        top_k: how many classes an image gets, the most probable first; None: 5, or all where there are fewer.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".

    Raises:
        ValueError: top_k is not in 1 to the number of classes, the crop not in 1 to the short side, or there is no
            such device.
    """

    def __init__(
        self,
        net: nn.Module,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        top_k: int | None = None,
        device: str = "auto",
    ) -> None:
        if top_k is None:
            top_k = min(_DEFAULT_NUM_SHOWN, len(class_names))
        if not 1 <= top_k <= len(class_names):
            raise ValueError(f"top_k is {top_k}, expected 1 to {len(class_names)}, the number of classes")
        if not 1 <= preprocessing.crop <= preprocessing.resize:
            raise ValueError(
                f"crop is {preprocessing.crop} and resize is {preprocessing.resize}; the crop is the centre of an "
                f"image whose short side is resize pixels long, so give 1 <= crop <= resize"
            )
        self.class_names, self.preprocessing, self.top_k = tuple(class_names), preprocessing, top_k
        self.device = select_device(device)
        self.net = net.to(self.device).eval()
        self._mean = torch.tensor(_MEAN, device=self.device).reshape(3, 1, 1)
        self._std = torch.tensor(_STD, device=self.device).reshape(3, 1, 1)

    def __call__(self, images: Sequence[str | Path | Image.Image]) -> list[list[Prediction]]:
        """The most probable classes of each image, the most probable first.

        Args:
            images: at least one; files, or Pillow's RGB images. They are one batch. Files are read as `prepare` says.

        Raises:
            UnreadableImageError: a file cannot be decoded.
            ValueError: an image that is no file is not RGB, or the network's classes are not as many as the names.
        """
        return self.rank(torch.stack([self.prepare(image) for image in images]))

    def prepare(self, image: str | Path | Image.Image) -> Tensor:
        """The centre of an image as the network's input, uint8 RGB (3, crop, crop).

        Args:
            image: a file of any mode, turned as its EXIF tag says (torchvision's and timm's evaluations leave it);
                or an RGB image of Pillow, taken as it is.
        """
        if not isinstance(image, Image.Image):
            image = Image.fromarray(read_rgb(Path(image), 0, 0))  # of no expected size, so always turned
        elif image.mode != "RGB":
            raise ValueError(f"the image is of mode {image.mode!r}, not RGB; give image.convert('RGB') or its file")
        resized = F.resize(
            image,
            [self.preprocessing.resize],
            interpolation=InterpolationMode(self.preprocessing.interpolation),
            antialias=True,
        )
        return F.pil_to_tensor(F.center_crop(resized, [self.preprocessing.crop] * 2))

    def normalised(self, prepared: Tensor) -> Tensor:
        """Prepared images as the network takes them: float32 on its device, normalised with ImageNet's statistics.

        Args:
            prepared: uint8 RGB (..., 3, crop, crop), of `prepare`.
        """
        pixels: Tensor = images_to_device(prepared, self.device)
        return (pixels - self._mean) / self._std

    def check_num_classes(self, num_classes: int) -> None:
        """Raise a ValueError where a network of so many outputs has not as many class names."""
        if num_classes != len(self.class_names):
            raise ValueError(
                f"the network has {num_classes} classes, but {len(self.class_names)} class names were given; "
                f"give one name for each output, in their order"
            )

    @torch.inference_mode()
    def rank(self, prepared: Tensor) -> list[list[Prediction]]:
        """The most probable classes of each prepared image, the most probable first.

        Args:
            prepared: uint8 RGB (N, 3, crop, crop), of `prepare`.
        """
        logits = self.net(self.normalised(prepared))  # (N, classes)
        self.check_num_classes(logits.shape[1])
        probabilities, indices = logits.float().softmax(1).topk(self.top_k)  # (N, top_k)
        return [
            [Prediction(index, self.class_names[index], value) for index, value in zip(*pair, strict=True)]
            for pair in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]


def load_classifier(
    network: str,
    weights: str,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    top_k: int | None = None,
    device: str = "auto",
) -> Classifier:
    """A classifier from a network's name and its weights.

    Args:
        network: one of list_backbones().
        weights: "imagenet" or another name of the network's published files, a file's path, or a URL. The number of
            classes is the file's.
        class_names: one for each class; None: ImageNet's where there are 1000, else "class 0", "class 1", ...
        preprocessing: None takes find_preprocessing's.
        top_k: see Classifier.
        device: see Classifier.

    Raises:
        FileNotFoundError: there is no file at the path.
        ConnectionError: the file could not be downloaded.
        ValueError: unknown network or name, weights that do not fit or have no classifier, or see Classifier.
    """
    published = [entry.name for entry in list_weights(network)]
    path = None if weights in ("imagenet", *published) else find_file(weights)
    num_classes = (_num_classes(path) if path else None) or len(IMAGENET_CLASS_NAMES)
    net = create_backbone(network, None, num_classes)
    nn.init.constant_(net.fc.weight, math.nan)  # to know it again where no file replaced it
    load_backbone_weights(net, network, weights, new_classifier=True)
    if net.fc.weight.isnan().all():  # a file without a classifier loads, with a warning
        with_one = [entry.name for entry in list_weights(network) if entry.preprocessing is not None]
        raise ValueError(
            f"the weights {weights!r} have no classifier: such as a detector's or a segmentation model's, they name no "
            f"classes; give a classifier's file, or a published one: {', '.join(with_one) or 'there is none'}"
        )
    if class_names is None:
        numbered = [f"class {index}" for index in range(num_classes)]
        class_names = IMAGENET_CLASS_NAMES if num_classes == len(IMAGENET_CLASS_NAMES) else numbered
    if preprocessing is None:
        preprocessing = find_preprocessing(network, weights)
    return Classifier(net, class_names, preprocessing, top_k=top_k, device=device)


def _num_classes(path: Path) -> int | None:
    """The outputs of the classifier in a file of a backbone, however the file's layout prefixes it."""
    state = read_state_dict(path)
    return next(
        (len(state[key]) for key in state if re.search(r"(^|\.)fc\.weight$", key) and state[key].ndim == 2), None
    )


def find_preprocessing(network: str, weights: str) -> Preprocessing:
    """How the published evaluation of these weights prepared its images.

    Args:
        network: one of list_backbones().
        weights: as load_classifier's. A path or URL is known by its file's name, where that is a published one's.

    Returns:
        The published file's; for any other file that of the network's "imagenet", else 256, 224 and bilinear.
    """
    known = {
        key: entry.preprocessing
        for entry in list_weights(network)
        if entry.preprocessing is not None
        for key in (entry.name, entry.file_name)
    }
    address = urlsplit(weights)
    path = unquote(address.path) if address.scheme in ("http", "https") else weights
    file_name = PureWindowsPath(path).name  # which ends at / and at \
    return known.get(weights) or known.get(file_name) or known.get("imagenet") or Preprocessing(256, 224, "bilinear")


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """The class names of a file, one a line in the order of the network's outputs. Names may repeat, as ImageNet's do.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8 text, names nothing, or has an empty line between names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the class names {path} do not exist; {describe_near(path, '.txt')}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    names = [line.strip() for line in text.rstrip().splitlines()]
    if not names:
        raise ValueError(f"{path} names no class; it should have one name a line")
    if "" in names:
        raise ValueError(
            f"{path}, line {names.index('') + 1} is empty; every line names a class, in the order of the outputs"
        )
    return names


def classify_files(
    classifier: Classifier, files: Sequence[Path], *, batch_size: int = 16
) -> tuple[dict[Path, list[Prediction]], list[UnreadableImageError]]:
    """Classify files in batches, with a progress bar on stderr where that is a terminal.

    Args:
        classifier: what classifies them.
        files: image files.
        batch_size: images that are in memory, and go through the network, at a time.

    Returns:
        Each file's classes, the most probable first; and what was wrong with the files that cannot be decoded.

    Raises:
        ValueError: the batch size is below 1, or none of the files can be decoded.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    predictions: dict[Path, list[Prediction]] = {}
    unreadable: list[UnreadableImageError] = []
    # tqdm reads None as "off where stderr is no terminal".
    with tqdm(total=len(files), desc="classify", unit="image", leave=False, disable=None) as bar:
        for first in range(0, len(files), batch_size):
            batch = files[first : first + batch_size]
            prepared: dict[Path, Tensor] = {}
            for file in batch:
                try:
                    prepared[file] = classifier.prepare(file)
                except UnreadableImageError as error:
                    unreadable.append(error)
            if prepared:
                ranked = classifier.rank(torch.stack(list(prepared.values())))
                predictions.update(zip(prepared, ranked, strict=True))
            bar.update(len(batch))
    if not predictions:
        raise ValueError(f"none of {len(files)} images can be read; the first: {unreadable[0]}")
    return predictions, unreadable


def format_predictions(predictions: Mapping[Path, Sequence[Prediction]], form: Literal["list", "table", "csv"]) -> str:
    """Predictions as text.

    Args:
        predictions: the classes of each of one or more files, the most probable first.
        form: "list" for a block of lines an image; "table" for a line an image, the best class in columns and the
            others behind it; "csv" for a line an image and rank, with the columns image, rank (from 1),
            class_index, class_name and probability.

    Returns:
        The lines, each with its line break.
    """
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "rank", "class_index", "class_name", "probability"])
        for file, ranked in predictions.items():
            for rank, p in enumerate(ranked, start=1):
                writer.writerow([file, rank, p.class_index, p.class_name, f"{p.probability:.6f}"])
        return text.getvalue()
    if form == "list":
        lines = [
            line
            for file, ranked in predictions.items()
            for line in (str(file), *(f"  {p.probability:.3f}  {p.class_index:4}  {p.class_name}" for p in ranked))
        ]
    else:
        path_width = max(len(str(file)) for file in predictions)
        name_width = max(len(ranked[0].class_name) for ranked in predictions.values())
        lines = [f"{'image':{path_width}}  class  {'name':{name_width}}  probability  others"]
        for file, (best, *others) in predictions.items():
            columns = (
                f"{file!s:{path_width}}  {best.class_index:5}  {best.class_name:{name_width}}  {best.probability:11.3f}"
            )
            lines.append(f"{columns}  {', '.join(f'{p.class_name} {p.probability:.3f}' for p in others)}")
    return "".join(f"{line.rstrip()}\n" for line in lines)
