"""Finding files: published ones come from a folder, or from a server once, and nothing is taken for another's."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from resnest_det import create_backbone, load_weights
from resnest_det.backbones import published, weight_files
from resnest_det.backbones.published import PublishedWeights

State = dict[str, torch.Tensor]


class _Server(ThreadingHTTPServer):
    """Serves `folder`; under /cut a file ends too early, under /silent nothing comes, under /page a page.

    Attributes:
        requests: the paths that were asked for.
        folder: what is served.
        address: the server's own.
    """

    requests: list[str]
    folder: Path
    address: str


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path.startswith("/silent/"):
            time.sleep(1)
        elif self.path.startswith("/cut/"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 300)
        elif self.path.startswith("/page/"):
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(b"<html>sign in</html>")
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    """A file server on this machine, and an empty torch.hub folder."""
    folder = tmp_path / "published"
    folder.mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.delenv(weight_files.FOLDER_VARIABLE, raising=False)
    with _Server(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as running:
        running.requests = []
        running.folder = folder
        running.address = f"http://127.0.0.1:{running.server_address[1]}"
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


class _Publisher:
    """A table of published weights with one line: resnet18's file at some addresses of the server."""

    def __init__(self, server: _Server, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.digest = hashlib.sha256(small.read_bytes()).hexdigest()[:8]
        self.name = f"resnet18-{self.digest}.pth"
        self._server, self._small, self._monkeypatch = server, small, monkeypatch

    def __call__(
        self, *folders: str, at: str = "", by_hand: bool = False, file_name: str | None = None
    ) -> PublishedWeights:
        """Serve the file in the folder `at`, and publish it at `folders` (at `at` where there are none)."""
        (self._server.folder / at).mkdir(exist_ok=True)
        os.link(self._small, self._server.folder / at / self.name)
        urls = tuple(f"{self._server.address}/{folder}{self.name}" for folder in folders or (at,))
        entry = PublishedWeights(
            network="resnet18",
            name="imagenet",
            urls=() if by_hand else urls,
            sha256="" if by_hand else self.digest,
            page="https://example.org/page",
            licence="MIT",
            data="ImageNet-1k",
            metric="top-1",
            value=69.8,
            preprocessing=None,
            file_name=self.name if file_name is None else file_name,
        )
        self._monkeypatch.setattr(published, "PUBLISHED", (entry,))
        return entry


@pytest.fixture
def publish(server: _Server, small: Path, monkeypatch: pytest.MonkeyPatch) -> _Publisher:
    return _Publisher(server, small, monkeypatch)


def hub_files(tmp_path: Path) -> list[str]:
    folder = tmp_path / "hub" / "checkpoints"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def test_imagenet_weights_are_fetched_once(server: _Server, publish: _Publisher, state: State, tmp_path: Path) -> None:
    publish()
    first, second = (create_backbone("resnet18", weights="imagenet") for _ in range(2))
    assert torch.equal(first.fc.weight, state["fc.weight"])
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert server.requests == [f"/{publish.name}"]
    assert hub_files(tmp_path) == [publish.name]


def test_network_and_name_in_any_function(publish: _Publisher, state: State) -> None:
    publish()
    by_load, by_create = create_backbone("resnet18"), create_backbone("resnet18", weights="resnet18/imagenet")
    load_weights(by_load, "resnet18/imagenet")
    assert torch.equal(by_load.fc.weight, state["fc.weight"])
    assert torch.equal(by_create.fc.weight, state["fc.weight"])


def test_a_file_on_disk_comes_before_a_published_name(
    server: _Server, publish: _Publisher, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    (tmp_path / "resnet18").mkdir()
    os.link(small, tmp_path / "resnet18" / "imagenet")
    monkeypatch.chdir(tmp_path)
    load_weights(create_backbone("resnet18"), "resnet18/imagenet")
    assert server.requests == []


def test_mirrors_are_tried_in_turn(server: _Server, publish: _Publisher, state: State, tmp_path: Path) -> None:
    entry = publish("", "cut/", "other/", "mirror/", "never/", at="mirror")
    (server.folder / "other").mkdir()
    (server.folder / "other" / entry.file_name).write_bytes(b"of another hash")
    net = create_backbone("resnet18", weights="imagenet")
    assert torch.equal(net.fc.weight, state["fc.weight"])
    assert server.requests == [f"/{folder}{publish.name}" for folder in ("", "cut/", "other/", "mirror/")]
    assert hub_files(tmp_path) == [publish.name]


def test_every_address_fails(
    server: _Server, publish: _Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "_SECONDS_OF_SILENCE", 0.2)
    entry = publish("none/", "cut/", "other/", "silent/", "page/", at="mirror")
    (server.folder / "other").mkdir()
    (server.folder / "other" / entry.file_name).write_bytes(b"of another hash")
    with pytest.raises(ConnectionError, match=f"{publish.name} could not be downloaded:\n") as error:
        create_backbone("resnet18", weights="imagenet")
    other = hashlib.sha256(b"of another hash").hexdigest()[:8]
    reasons = (
        "HTTP Error 404: File not found",
        "cut off after 300 of 1000 bytes",
        f"SHA-256 {other}..., where {publish.digest} is expected by its file name",
        "timed out",
        "a page for browsers, not a file of weights",
    )
    lines = str(error.value).splitlines()
    assert lines[1:6] == [f"  {url}: {reason}" for url, reason in zip(entry.urls, reasons, strict=True)]
    assert lines[6] == (
        f"fetch it elsewhere and put it into {tmp_path / 'hub' / 'checkpoints'} as {publish.name}, or give its path as "
        "weights, which checks no hash"
    )
    assert hub_files(tmp_path) == []


def test_a_damaged_copy_is_replaced(publish: _Publisher, state: State, tmp_path: Path) -> None:
    publish()
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / publish.name).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=f"passed over for {checkpoints / publish.name}:\n  .*: SHA-256 ") as said:
        net = create_backbone("resnet18", weights="imagenet")
    assert len(said) == 1
    assert torch.equal(net.fc.weight, state["fc.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_backbone("resnet18", weights="imagenet")


def test_an_interrupted_download_leaves_nothing(
    publish: _Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def __init__(self) -> None:
            self.num_blocks = 0

        def update(self, block: bytes) -> None:
            self.num_blocks += 1
            assert len(hub_files(tmp_path)) == 1
            assert hub_files(tmp_path)[0].endswith(".partial")
            if self.num_blocks == 3:
                raise KeyboardInterrupt

    publish()
    monkeypatch.setattr(weight_files.hashlib, "sha256", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        create_backbone("resnet18", weights="imagenet")
    assert hub_files(tmp_path) == []


def test_a_folder_of_files_needs_no_server(
    server: _Server, publish: _Publisher, small: Path, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("RESNEST_DET_WEIGHTS", str(folder))
    os.link(small, folder / publish.name)
    assert torch.equal(create_backbone("resnet18", weights="imagenet").fc.weight, state["fc.weight"])
    assert server.requests == []
    assert hub_files(tmp_path) == []
    (folder / publish.name).unlink()
    create_backbone("resnet18", weights="imagenet")
    assert hub_files(tmp_path) == [publish.name]
    assert list(folder.iterdir()) == []


def test_a_damaged_copy_in_the_folder_of_files_is_passed_over(
    server: _Server, publish: _Publisher, small: Path, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("none/", at="mirror")
    folder, checkpoints = tmp_path / "weights", tmp_path / "hub" / "checkpoints"
    folder.mkdir()
    monkeypatch.setenv("RESNEST_DET_WEIGHTS", str(folder))
    (folder / publish.name).write_bytes(b"damaged")
    digest = hashlib.sha256(b"damaged").hexdigest()[:8]
    fault = f"  {folder / publish.name}: SHA-256 {digest}..., where {publish.digest} is expected by its file name"
    with pytest.raises(ConnectionError, match="could not be downloaded") as error:
        create_backbone("resnet18", weights="imagenet")
    assert str(error.value).splitlines()[1:3] == [
        fault,
        f"  {server.address}/none/{publish.name}: HTTP Error 404: File not found",
    ]
    os.link(small, checkpoints / publish.name)
    with pytest.warns(UserWarning, match="passed over") as said:
        net = create_backbone("resnet18", weights="imagenet")
    assert str(said[0].message) == f"passed over for {checkpoints / publish.name}:\n{fault}"
    assert torch.equal(net.fc.weight, state["fc.weight"])
    assert (folder / publish.name).read_bytes() == b"damaged"


def test_a_folder_that_cannot_be_written_to(server: _Server, publish: _Publisher, tmp_path: Path) -> None:
    publish()
    (tmp_path / "hub").touch()  # a file in the folder's place: unwritable for root too
    with pytest.raises(OSError, match=f"cannot write to {tmp_path}/hub/checkpoints .*; set TORCH_HOME to a") as error:
        create_backbone("resnet18", weights="imagenet")
    assert str(error.value).endswith(f"or RESNEST_DET_WEIGHTS to one that has {publish.name}")
    assert server.requests == []


def test_the_folder_of_files_must_be_one(
    publish: _Publisher, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("none/", at="mirror")
    monkeypatch.setenv("RESNEST_DET_WEIGHTS", str(small))
    with pytest.raises(ValueError, match=f"RESNEST_DET_WEIGHTS='{small}' is no folder; set it to one"):
        create_backbone("resnet18", weights="imagenet")
    monkeypatch.setenv("RESNEST_DET_WEIGHTS", str(tmp_path))
    with pytest.raises(ConnectionError, match=f"fetch it elsewhere and put it into {tmp_path} as {publish.name}, or"):
        create_backbone("resnet18", weights="imagenet")


def test_published_where_no_program_can_fetch_it(
    publish: _Publisher, small: Path, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(by_hand=True, file_name="new name.pth")
    checkpoints, folder = tmp_path / "hub" / "checkpoints", tmp_path / "weights"
    where = "resnet18/imagenet is published where .*: get new name.pth from https://example.org/page and give its path"
    with pytest.raises(FileNotFoundError, match=f"{where}, or put it into {checkpoints}$"):
        create_backbone("resnet18", weights="imagenet")
    folder.mkdir()
    monkeypatch.setenv("RESNEST_DET_WEIGHTS", str(folder))
    with pytest.raises(FileNotFoundError, match=f"{where}, or put it into {folder}$"):
        load_weights(create_backbone("resnet18"), "resnet18/imagenet")
    os.link(small, folder / "new name.pth")
    assert torch.equal(create_backbone("resnet18", weights="imagenet").fc.weight, state["fc.weight"])


def test_published_under_an_unknown_file_name(publish: _Publisher) -> None:
    publish(by_hand=True, file_name="")
    with pytest.raises(FileNotFoundError, match="get the file from https://example.org/page and give its path$"):
        create_backbone("resnet18", weights="imagenet")


def test_no_published_weights(monkeypatch: pytest.MonkeyPatch, publish: _Publisher) -> None:
    publish()
    with pytest.raises(ValueError, match="no weights are published for the network 'resnet34'"):
        create_backbone("resnet34", weights="imagenet")
    with pytest.raises(FileNotFoundError, match="weights='imagnet' is neither .*; for resnet18 there are: imagenet"):
        create_backbone("resnet18", weights="imagnet")
    with pytest.raises(FileNotFoundError, match="no weights at resnet18/coco: .*; for resnet18 there are: imagenet"):
        load_weights(create_backbone("resnet18"), "resnet18/coco")


# --- paths


def test_a_bare_name_is_the_published_file_and_a_path_with_a_dot_the_file(
    publish: _Publisher, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    torch.save(state | {"fc.bias": state["fc.bias"] + 1}, tmp_path / "imagenet")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(create_backbone("resnet18", weights="imagenet").fc.bias, state["fc.bias"])
    assert torch.equal(create_backbone("resnet18", weights="./imagenet").fc.bias, state["fc.bias"] + 1)


def test_a_source_that_is_too_long_for_a_file() -> None:
    with pytest.raises(FileNotFoundError, match=f"no weights at {'x' * 300}: give the path of a file"):
        load_weights(create_backbone("resnet18"), "x" * 300)


# --- addresses


def test_loads_from_an_address_once(server: _Server, small: Path, state: State, tmp_path: Path) -> None:
    os.link(small, server.folder / "my weights.pth")
    url = f"{server.address}/my%20weights.pth?download=1"
    for _ in range(2):
        assert torch.equal(create_backbone("resnet18", weights=url).fc.weight, state["fc.weight"])
    assert server.requests == ["/my%20weights.pth?download=1"]
    assert hub_files(tmp_path) == [f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-my weights.pth"]


def test_files_of_one_name_at_two_addresses(
    server: _Server, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, folder in enumerate(("one", "two", "own")):
        (server.folder / folder).mkdir()
        torch.save(state | {"fc.bias": torch.full((1000,), float(number))}, server.folder / folder / "model.pth")
    monkeypatch.setenv("RESNEST_DET_WEIGHTS", str(server.folder / "own"))
    one, two = (
        create_backbone("resnet18", weights=f"{server.address}/{folder}/model.pth") for folder in ("one", "two")
    )
    assert one.fc.bias.unique().tolist() == [0]
    assert two.fc.bias.unique().tolist() == [1]
    assert len(hub_files(tmp_path)) == 2


def test_a_file_with_a_hash_in_its_name_is_found_in_the_folder_of_files(
    server: _Server, small: Path, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"mine-{hashlib.sha256(small.read_bytes()).hexdigest()[:10]}.pth"
    os.link(small, tmp_path / name)
    monkeypatch.setenv("RESNEST_DET_WEIGHTS", str(tmp_path))
    net = create_backbone("resnet18", weights=f"{server.address}/{name}")
    assert torch.equal(net.fc.weight, state["fc.weight"])
    assert server.requests == []


@pytest.mark.parametrize("name", ["resnet18-20240131.pth", "resnet18-20240131123059.pth"])
def test_a_date_is_no_hash(name: str, server: _Server, small: Path, state: State) -> None:
    os.link(small, server.folder / name)
    assert torch.equal(create_backbone("resnet18", weights=f"{server.address}/{name}").fc.weight, state["fc.weight"])


def test_a_published_address_has_the_hash_of_the_table(
    server: _Server, publish: _Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish.digest, publish.name = "20240131", "resnet18-20240131.pth"
    entry = publish()
    with pytest.raises(ConnectionError, match="where 20240131 is expected by its file name"):
        create_backbone("resnet18", weights=entry.urls[0])


def test_a_hash_in_an_addresss_name_is_checked(server: _Server, small: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(small.read_bytes()).hexdigest()
    for name in (f"right-{digest}.pth", "wrong-00000000.pth.tar"):
        os.link(small, server.folder / name)
    load_weights(create_backbone("resnet18"), f"{server.address}/right-{digest}.pth")
    with pytest.raises(ConnectionError, match=f"SHA-256 {digest[:8]}..., where 00000000 is expected by its file name"):
        load_weights(create_backbone("resnet18"), f"{server.address}/wrong-00000000.pth.tar")
    assert hub_files(tmp_path) == [f"right-{digest}.pth"]


def test_an_address_that_is_cut_off_or_no_file(server: _Server, tmp_path: Path) -> None:
    net = create_backbone("resnet18")
    with pytest.raises(ConnectionError, match="/cut/file.pth: cut off after 300 of 1000 bytes") as error:
        load_weights(net, f"{server.address}/cut/file.pth")
    assert str(error.value).endswith("-file.pth, or give its path as weights")  # there is no hash to check
    with pytest.raises(ConnectionError, match="/page/file.pth: a page for browsers, not a file of weights"):
        load_weights(net, f"{server.address}/page/file.pth")
    for path in ("folder/", "folder%2F", "folder/..", "folder/..%2F..%2F..", "folder%5C.."):
        with pytest.raises(ValueError, match=f"{server.address}/{path} names no file: give the address of the file"):
            load_weights(net, f"{server.address}/{path}")
    assert hub_files(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "served"), [("..%2F..%2Fmine.pth", "mine.pth"), ("..%5C..%5Cmine.pth", "..\\..\\mine.pth")]
)
def test_an_address_cannot_choose_the_folder(
    path: str, served: str, server: _Server, small: Path, tmp_path: Path
) -> None:
    os.link(small, server.folder / served)
    url = f"{server.address}/{path}"
    load_weights(create_backbone("resnet18"), url)
    assert hub_files(tmp_path) == [f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-mine.pth"]


@pytest.mark.parametrize("address", ["file:///weights/resnet18.pth", "s3://bucket/resnet18.pth"])
def test_addresses_of_other_kinds(address: str) -> None:
    with pytest.raises(ValueError, match=f"{address}: files are fetched from http:// and https:// alone; give a file"):
        load_weights(create_backbone("resnet18"), address)
