from __future__ import annotations

from pathlib import Path

import pytest

from resnest_det.data.image_search import find_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.PNG", "b/1.jpg", "a/3.webp", "a/notes.txt", ".hidden/4.png", "b/.5.png", "z.dat", "clip.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(found: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in found]


def test_images_of_files_and_folders(folder: Path) -> None:
    found = find_images([folder / "z.dat", folder, str(folder / "b")])
    assert names(found, folder) == ["z.dat", "a/3.webp", "b/1.jpg", "b/2.PNG"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*/*", ["a/3.webp", "b/1.jpg", "b/2.PNG"]),
        ("**/*.jpg", ["b/1.jpg"]),
        ("b/?.*", ["b/1.jpg", "b/2.PNG"]),
        ("[ab]/[13].*", ["a/3.webp", "b/1.jpg"]),
    ],
)
def test_images_that_match_a_pattern(pattern: str, expected: list[str], folder: Path) -> None:
    assert names(find_images([folder / pattern]), folder) == expected


def test_relative_patterns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find_images(["b/*"]) == [Path("b/1.jpg"), Path("b/2.PNG")]


def test_name_of_a_file_that_looks_like_a_pattern(folder: Path) -> None:
    (folder / "[b].jpg").touch()
    assert names(find_images([folder / "[b].jpg"]), folder) == ["[b].jpg"]


def test_other_suffixes(folder: Path) -> None:
    assert names(find_images([folder], suffixes=(".jpg", ".mp4")), folder) == ["b/1.jpg", "clip.mp4"]


def test_folder_that_is_left_out(folder: Path) -> None:
    out = folder / "a" / ".." / "b"
    assert names(find_images([folder], leave_out=[out]), folder) == ["a/3.webp"]
    assert names(find_images([folder / "**" / "*"], leave_out=[out]), folder) == ["a/3.webp"]
    assert names(find_images([folder / "b" / "1.jpg"], leave_out=[out]), folder) == ["b/1.jpg"]  # it is named


@pytest.mark.parametrize("pattern", ["", "**/*.jpg", "**", "[b]/**/*.jpg"])
def test_links_in_circles(pattern: str, folder: Path) -> None:
    for name in ("one", "two"):
        (folder / "b" / name).symlink_to(folder / "b")
    (folder / "b" / "up").symlink_to(folder)
    (folder / "c").symlink_to(folder / "b")  # no circle, and so a folder of its own
    found = [name for name in names(find_images([folder / pattern]), folder) if name.endswith(".jpg")]
    assert found == (["b/1.jpg"] if pattern.startswith("[b]") else ["b/1.jpg", "c/1.jpg"])


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no images; they end in .jpg"):
        find_images([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"no image or folder .*x\.jpg; .* holds no \.jpg files"):
        find_images([tmp_path / "x.jpg"])
    with pytest.raises(FileNotFoundError, match=r"no image matches .*x\*; images end in \.jpg, \.jpeg"):
        find_images([tmp_path / "x*"])
