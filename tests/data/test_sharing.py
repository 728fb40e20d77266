"""once_per_machine: groups of processes go through every case once, the tests compare what each of them saw."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from resnest_det.data import CocoDetection, DetectionAugmentation, MaskFolder
from resnest_det.data.files import ImageFiles
from resnest_det.data.sharing import once_per_machine

Seen = dict[str, Any]

# The local rank of each process.
GROUPS = {"2 processes": (0, 1), "3 processes": (0, 1, 2), "2 + 1 on two machines": (0, 1, 0)}
SEED = 7


class AwkwardError(ValueError):
    """Needs more than its message, so that pickle cannot make it again."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{what} at {where}")


def write_files(folder: Path) -> None:
    """Three images, the last of which cannot be decoded; boxes and masks for them, and a broken box file."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), np.uint8)
    for number in range(3):
        Image.fromarray(pixels[number]).save(folder / "images" / f"{number}.png")
        Image.fromarray(pixels[number, :, :, 0] % 2).save(folder / "masks" / f"{number}.png")
    (folder / "images" / "2.png").write_bytes(b"no picture")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(3)],
        "annotations": [
            {
                "id": i,
                "image_id": i % 3,
                "category_id": 1,
                "bbox": [i, 5, 10 + i, 12],
                "segmentation": [[i, 5, 10 + 2 * i, 5, 10 + 2 * i, 17]],
            }
            for i in range(5)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "boxes.json").write_text(json.dumps(content))
    (folder / "broken.json").write_text(json.dumps(content | {"categories": []}))


def boxes(folder: Path, **arguments: Any) -> CocoDetection:
    return CocoDetection(folder / "images", folder / "boxes.json", on_unreadable="skip", **arguments)


def augmented_boxes(folder: Path) -> CocoDetection:
    return boxes(folder, train=True, transform=DetectionAugmentation((20, 26), color_jitter=0.5))


def boxes_and_masks(folder: Path) -> CocoDetection:
    return boxes(folder, masks=True)


def class_masks(folder: Path) -> MaskFolder:
    return MaskFolder(folder / "images", folder / "masks", ["even", "odd"], on_unreadable="skip")


SETS: dict[str, Callable[[Path], ImageFiles[Any]]] = {
    "boxes": boxes,
    "augmented": augmented_boxes,
    "boxes and masks": boxes_and_masks,
    "class masks": class_masks,
}


def broken_file(folder: Path) -> ImageFiles[Any]:
    return CocoDetection(folder / "images", folder / "broken.json")


def missing_file(folder: Path) -> ImageFiles[Any]:
    return CocoDetection(folder / "images", folder / "absent.json")


def awkward(folder: Path) -> ImageFiles[Any]:
    raise AwkwardError("line 3", "a mistake")


def on_the_last_process_alone(folder: Path) -> ImageFiles[Any]:
    """An error where that process leads a machine of its own, else on none."""
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the disk of the second machine is not mounted")
    return boxes(folder)


def unpicklable(folder: Path) -> ImageFiles[Any]:
    return boxes(folder, transform=lambda *sample: sample)


def without_room(folder: Path) -> ImageFiles[Any]:
    """No file of this process may grow beyond 1000 bytes from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    return boxes(folder)


FAULTS = (broken_file, missing_file, awkward, on_the_last_process_alone, unpicklable, without_room)


class Loading(Dataset[bool]):
    """Whether each image can be loaded."""

    def __init__(self, images: ImageFiles[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> bool:
        return self.images.load(index) is not None


def is_mapped() -> bool:
    """Whether a file that once_per_machine has written is in this process's memory, as far as the system tells."""
    return sys.platform != "linux" or "/resnest-det-" in Path("/proc/self/maps").read_text()


def go_through_every_case(rank: int, local_ranks: tuple[int, ...], folder: Path) -> None:
    """One process of a group: what it sees is saved as folder/rank."""
    torch.set_num_threads(1)
    local_rank = local_ranks[rank]
    machine = sum(earlier == 0 for earlier in local_ranks[: rank + 1])
    sizes = [sum(own == 0 for own in local_ranks[: i + 1]) for i in range(len(local_ranks))]
    os.environ |= {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(sizes.count(machine))}
    tempfile.tempdir = str(folder / "temporary")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=len(local_ranks),
        timeout=timedelta(seconds=60),
    )
    seen: Seen = {}
    for name, build in SETS.items():
        calls: list[str] = []

        def counted(build: Callable[[Path], ImageFiles[Any]] = build, calls: list[str] = calls) -> ImageFiles[Any]:
            calls.append("")
            return build(folder)

        data = once_per_machine(counted)
        seen[name] = {
            "calls": len(calls),
            "mapped": is_mapped(),
            "length": len(data),
            "summary": data.summary(),
            "samples": [data.load(index, SEED) for index in range(2)],
        }
        # Rank 0 alone has its worker read the image that cannot be decoded.
        loaded = list(DataLoader(Loading(data), num_workers=1, multiprocessing_context="fork")) if rank == 0 else []
        seen[name] |= {"loaded": loaded, "skipped": data.skipped}
        del data
    for fault in FAULTS:
        seen[fault.__name__] = outcome(lambda fault=fault: once_per_machine(lambda: fault(folder)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    load = torch.load
    if rank == 1:
        torch.load = lambda *arguments, **options: load(folder / "absent.pt")  # as if it saw another /tmp
    seen["no file"] = outcome(lambda: once_per_machine(lambda: boxes(folder)))
    torch.load = load
    dist.barrier()
    seen["left"] = [path.name for path in (folder / "temporary").iterdir()]
    torch.save(seen, folder / str(rank))
    dist.destroy_process_group()


def outcome(step: Callable[[], object]) -> tuple[str, str] | None:
    """The kind and the message of the error that the step raises."""
    try:
        step()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


@pytest.fixture(scope="module", params=GROUPS)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Seen]]:
    """The folder of the files, and what each process of a group saw."""
    folder = tmp_path_factory.mktemp("sharing")
    write_files(folder)
    (folder / "temporary").mkdir()
    local_ranks = GROUPS[request.param]
    # Forked from a process that has imported everything: importing takes longer than all that is done here.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        go_through_every_case, (local_ranks, folder), nprocs=len(local_ranks), start_method="forkserver"
    )
    return folder, [torch.load(folder / str(rank), weights_only=False) for rank in range(len(local_ranks))]


def leaders(seen: list[Seen]) -> list[int]:
    return [int(own["boxes"]["calls"]) for own in seen]


@pytest.mark.parametrize("name", SETS)
def test_one_process_a_machine_builds_it_and_all_have_it(group: tuple[Path, list[Seen]], name: str) -> None:
    folder, seen = group
    direct = SETS[name](folder)
    for own in seen:
        assert own[name]["length"] == len(direct) == 3
        assert own[name]["summary"] == direct.summary()
        assert own[name]["mapped"]
        assert_equal(own[name]["samples"], [direct.load(index, SEED) for index in range(2)])
    assert [own[name]["calls"] for own in seen] == leaders(seen)


def test_each_machine_has_a_leader(group: tuple[Path, list[Seen]], request: pytest.FixtureRequest) -> None:
    local_ranks = GROUPS[request.node.callspec.params["group"]]
    assert leaders(group[1]) == [int(local_rank == 0) for local_rank in local_ranks]


@pytest.mark.parametrize("name", SETS)
def test_skipped_images_are_shared_with_a_process_s_own_workers(group: tuple[Path, list[Seen]], name: str) -> None:
    first, *others = group[1]
    assert [bool(flag) for flag in first[name]["loaded"]] == [True, True, False]
    assert first[name]["skipped"] == ["2.png"]
    assert [own[name]["skipped"] for own in others] == [[]] * len(others)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (broken_file, ValueError, r"broken\.json is no valid COCO instances file:\n- it lists no categories"),
        (
            missing_file,
            FileNotFoundError,
            r"absent\.json does not exist; .* holds the \.json files boxes\.json, broken",
        ),
        (unpicklable, ValueError, r"CocoDetection cannot be given to .*<lambda>.*; build it, its transform above all"),
        (
            without_room,
            OSError,
            r"could not be written .*\(File too large; \d+ MiB are free\).*set TMPDIR.*temporary'$",
        ),
    ],
)
def test_an_error_is_raised_on_every_process(
    group: tuple[Path, list[Seen]], fault: Callable[[Path], object], kind: type[Exception], message: str
) -> None:
    outcomes = [own[fault.__name__] for own in group[1]]
    assert outcomes[0][0] == kind.__name__
    assert re.search(message, outcomes[0][1])
    assert outcomes == [outcomes[0]] * len(outcomes)


def test_an_error_that_does_not_pickle_keeps_its_message(group: tuple[Path, list[Seen]]) -> None:
    for own in group[1]:
        kind = AwkwardError if own["boxes"]["calls"] else ValueError
        assert own["awkward"] == (kind.__name__, "a mistake at line 3")


def test_an_error_on_one_machine_is_raised_on_the_others(group: tuple[Path, list[Seen]]) -> None:
    seen = group[1]
    raised = ("ValueError", "the disk of the second machine is not mounted") if leaders(seen)[-1] else None
    assert [own["on_the_last_process_alone"] for own in seen] == [raised] * len(seen)


def test_a_process_that_cannot_map_the_file_stops_all(group: tuple[Path, list[Seen]]) -> None:
    for own in group[1]:
        kind, message = own["no file"]
        assert kind == "FileNotFoundError"
        assert "absent.pt" in message


def test_no_file_is_left(group: tuple[Path, list[Seen]]) -> None:
    assert [own["left"] for own in group[1]] == [[]] * len(group[1])


def test_a_single_process_just_builds(tmp_path: Path) -> None:
    write_files(tmp_path)
    data = boxes(tmp_path)
    assert once_per_machine(lambda: data) is data


def assert_equal(actual: Any, expected: Any) -> None:
    """Equal in every tensor, bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert_equal(list(actual.items()), list(expected.items()))
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for own, other in zip(actual, expected, strict=True):
            assert_equal(own, other)
    else:
        assert actual == expected
