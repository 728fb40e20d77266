from __future__ import annotations

import pytest
import torch

from resnest_det.distributed import gather_objects, images_to_device, rank, select_device, to_device, world_size


def test_a_single_process() -> None:
    assert (rank(), world_size(), gather_objects("x")) == (0, 1, ["x"])


def test_devices() -> None:
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device 'gpu' is not a device; use auto, cpu, cuda, cuda:N or mps"),
        ("cuda:99", "device 'cuda:99' is not on this machine, which has"),
    ],
)
def test_bad_devices(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_device(name)


def test_tensors_inside_of_things_are_moved_and_the_rest_is_kept() -> None:
    given = [{"boxes": torch.zeros(2, 4), "image_id": 7}, (torch.ones(1), "name")]
    moved = to_device(given, torch.device("meta"))
    assert moved[0]["boxes"].device.type == moved[1][0].device.type == "meta"
    assert (moved[0]["image_id"], moved[1][1]) == (7, "name")


def test_bytes_become_fractions() -> None:
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    for images in ([image], image[None]):
        (moved,) = images_to_device(images, torch.device("cpu"))
        assert moved.dtype == torch.float32
        assert moved.flatten().tolist() == pytest.approx([0, 0.2, 1])
    half = torch.full((3, 1, 1), 0.5)
    assert images_to_device([half], torch.device("cpu"))[0].equal(half)
    assert half.mean() == 0.5
