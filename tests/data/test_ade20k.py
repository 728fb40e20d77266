"""ADE20K: the official names and colours, 0 becomes 255 once, and the generated set in its layout."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnest_det.data import (
    ADE20K,
    ADE20K_CLASS_NAMES,
    ADE20K_PALETTE,
    SegmentationAugmentation,
    read_class_list,
    train_loader,
)
from resnest_det.data.sample import ADE_CLASS_NAMES, write_sample_dataset

FOLDER = "ADEChallengeData2016"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sample"
    write_sample_dataset(folder, num_train=4, num_val=6, seed=0)
    return folder / "ade20k"


def write(folder: Path, values: np.ndarray, split: str = "training") -> Path:
    for kind, picture, suffix in (
        ("images", Image.new("RGB", values.shape[::-1]), "jpg"),
        ("annotations", Image.fromarray(values), "png"),
    ):
        (folder / kind / split).mkdir(parents=True)
        picture.save(folder / kind / split / f"a.{suffix}")
    return folder


# --- names, colours, values


def test_150_classes_with_names_of_their_own_and_a_colour_each() -> None:
    assert len(ADE20K_CLASS_NAMES) == len(set(ADE20K_CLASS_NAMES)) == len(ADE20K_PALETTE) == 150
    assert ADE20K_CLASS_NAMES[0] == "wall"
    assert ADE20K_CLASS_NAMES[149] == "flag"
    assert all(len(colour) == 3 and min(colour) >= 0 and max(colour) <= 255 for colour in ADE20K_PALETTE)


def test_names_are_the_official_ones(real_data: Callable[[str], Path]) -> None:
    names = read_class_list(real_data("ade20k_samples") / FOLDER / "objectInfo150.txt")
    assert [name.split(",")[0] for name in names] == list(ADE20K_CLASS_NAMES)


def test_colours_are_the_official_ones(real_data: Callable[[str], Path]) -> None:
    loadmat = pytest.importorskip("scipy.io").loadmat
    colours = loadmat(real_data("ade20k_samples") / "meta" / "color150.mat")["colors"]
    assert colours.tolist() == [list(colour) for colour in ADE20K_PALETTE]


def test_zero_becomes_255_exactly_once(tmp_path: Path) -> None:
    values = np.arange(151, dtype=np.uint8)[None]
    data = ADE20K(write(tmp_path, values), "training")
    assert data[0][1].tolist() == [[255, *range(150)]]
    assert data.class_names[0] == "wall"
    assert data.num_classes == 150


def test_zero_is_still_255_after_augmentation_and_loading(tmp_path: Path) -> None:
    values = np.repeat(np.array([[0, 1, 2, 150]], np.uint8), 4, axis=0).repeat(8, axis=0).repeat(8, axis=1)
    data = ADE20K(write(tmp_path, values), "training", transform=SegmentationAugmentation(32, scale=(1, 1)))
    _, (mask,), _ = next(iter(train_loader(data, batch_size=1, num_workers=0, seed=0, group_by_aspect=False)))
    assert mask.unique().tolist() == [0, 1, 149, 255]
    assert [int((mask == value).sum()) for value in (0, 1, 149, 255)] == [256] * 4


@pytest.mark.parametrize("value", [151, 255])
def test_value_beyond_the_150_classes(tmp_path: Path, value: int) -> None:
    data = ADE20K(write(tmp_path, np.array([[0, 1, value]], np.uint8)), "training")
    message = rf"a\.png holds values that are no class: {value}; the 150 classes are 1\.\.150 and 0 is ignored"
    with pytest.raises(ValueError, match=message):
        data[0]


def test_real_pairs(real_data: Callable[[str], Path]) -> None:
    root = real_data("ade20k_samples") / FOLDER
    for split, num_images in (("training", 2), ("validation", 5)):
        data = ADE20K(root, split)
        assert len(data) == num_images
        assert data.file_name(0).startswith("ADE_train_" if split == "training" else "ADE_val_")
        for index, (image, mask) in enumerate(data):
            with Image.open(data.mask_path(index)) as file:
                values = np.array(file).astype(int)
            assert image.shape[1:] == mask.shape == values.shape
            assert (mask.numpy().astype(int) == np.where(values == 0, 255, values - 1)).all()


# --- another data set in this layout


@pytest.mark.parametrize(("split", "num_images"), [("training", 4), ("validation", 6)])
def test_generated_set(sample: Path, split: str, num_images: int) -> None:
    names = read_class_list(sample / "classes.txt")
    assert names == list(ADE_CLASS_NAMES)
    data = ADE20K(sample, split, class_names=names)
    assert len(data) == num_images
    assert list(data.class_names.values()) == names
    values = torch.cat([mask.unique() for _, mask in data]).unique().tolist()
    assert 255 in values
    assert set(values) - {255} <= set(range(len(names)))
    assert len(values) > 4


def test_generated_set_with_too_few_names(sample: Path) -> None:
    data = ADE20K(sample, "training", class_names=ADE_CLASS_NAMES[:1])
    with pytest.raises(ValueError, match=r"no class: .*; the 1 classes are 1\.\.1 and 0 is ignored"):
        list(data)


# --- mistakes


def test_wrong_class_list(tmp_path: Path) -> None:
    root = write(tmp_path, np.array([[0, 1, 2]], np.uint8))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0\t0\t0\tsky\n2\t0\t0\t0\tsea\n")
    message = f"class_names has 150 names, but {root / 'objectInfo150.txt'} lists 2 classes"
    with pytest.raises(ValueError, match=re.escape(message)):
        ADE20K(root, "training")
    assert ADE20K(root, "training", class_names=["sky", "sea"]).num_classes == 2


def test_folder_around_the_data_set(tmp_path: Path) -> None:
    root = write(tmp_path / FOLDER, np.array([[0, 1, 2]], np.uint8))
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} holds the data set but is not it; give {root}")):
        ADE20K(tmp_path, "training")


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split='val' is unknown; use one of 'training', 'validation'"):
        ADE20K(tmp_path, "val")  # type: ignore[arg-type]


def test_missing_split(tmp_path: Path) -> None:
    root = write(tmp_path, np.array([[1]], np.uint8))
    images = root / "images"
    message = f"the image folder {images / 'validation'} does not exist; {images} holds the folders training"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        ADE20K(root, "validation")


def test_missing_masks(tmp_path: Path) -> None:
    root = write(tmp_path, np.array([[1]], np.uint8))
    shutil.rmtree(root / "annotations")
    with pytest.raises(FileNotFoundError, match=r"the mask folder .*annotations/training does not exist"):
        ADE20K(root, "training")
