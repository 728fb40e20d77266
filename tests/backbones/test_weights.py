"""Loading: what fits loads exactly, what does not fit says why, and published files come from a server once."""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
import time
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from resnest_det import create_backbone, load_weights
from resnest_det.backbones import published, weights
from resnest_det.backbones.published import PublishedWeights
from resnest_det.engine import save_checkpoint
from resnest_det.models import deeplabv3plus, faster_rcnn

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of resnet18's random weights with 1000 classes."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("small") / "resnet18.pth"
    torch.save(create_backbone("resnet18").state_dict(), file)
    return file


@pytest.fixture
def state(small: Path) -> State:
    return torch.load(small, weights_only=True)


def test_loads_every_tensor(small: Path, state: State) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = create_backbone("resnet18", weights=str(small))
    assert net.weights_loaded
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["file.safetensors", "without_the_suffix"])
def test_loads_safetensors(name: str, state: State, tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / name)
    net = create_backbone("resnet18", weights=str(tmp_path / name))
    assert torch.equal(net.layer4[1].bn2.weight, state["layer4.1.bn2.weight"])
    assert torch.equal(net.fc.weight, state["fc.weight"])


def test_loads_the_older_format_of_torch_save(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(create_backbone("resnet18", weights=str(tmp_path / "old.pth")).fc.weight, state["fc.weight"])


def test_loads_what_a_checkpoint_holds(state: State, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", {"model": state, "step": 3})
    for wrapper in ("state_dict", "model_state", "model_state_dict"):
        torch.save({wrapper: state, "epoch": 7, "optimizer": {"param_groups": []}}, tmp_path / f"{wrapper}.pt")
    torch.save({"model": {"state_dict": state}}, tmp_path / "nested.pt")
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == 5
    for file in files:
        net = create_backbone("resnet18", weights=str(file))
        assert torch.equal(net.fc.weight, state["fc.weight"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_what_wrappers_put_before_all_keys_is_dropped(prefix: str, tmp_path: Path) -> None:
    head = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1))
    torch.save({prefix + key: value for key, value in head.state_dict().items()}, tmp_path / "wrapped.pth")
    plain = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1))
    load_weights(plain, tmp_path / "wrapped.pth")
    assert torch.equal(plain[0].weight, head[0].weight)
    torch.save({prefix + "0.weight": head[0].weight.data, "0.bias": head[0].bias.data}, tmp_path / "some.pth")
    with pytest.raises(ValueError, match=f"1 extra: {prefix}0.weight"):
        load_weights(plain, tmp_path / "some.pth")


def test_a_wrapped_network_loads_its_own_keys(tmp_path: Path) -> None:
    wrapped = torch.nn.DataParallel(torch.nn.Conv2d(2, 3, 1))
    torch.save({key: value + 1 for key, value in wrapped.state_dict().items()}, tmp_path / "wrapped.pth")
    before = wrapped.module.weight.clone()
    load_weights(wrapped, tmp_path / "wrapped.pth")
    assert torch.equal(wrapped.module.weight, before + 1)


def test_norm_counters_may_be_absent_or_extra(small: Path, tmp_path: Path) -> None:
    frozen = create_backbone("resnet18", weights=str(small), norm="frozen_bn")
    torch.save(frozen.state_dict(), tmp_path / "frozen.pth")
    net = create_backbone("resnet18", weights=str(tmp_path / "frozen.pth"))
    assert torch.equal(net.bn1.running_var, frozen.bn1.running_var)


# --- what does not fit


def test_missing_extra_and_reshaped_are_named_and_nothing_is_loaded(state: State, tmp_path: Path) -> None:
    state["new.weight"] = state.pop("layer1.0.conv1.weight")
    state["bn1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "changed.pth")
    net = create_backbone("resnet18")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="are not those of this ResNet") as error:
        load_weights(net, tmp_path / "changed.pth")
    for line in (
        "1 missing: layer1.0.conv1.weight",
        "1 extra: new.weight",
        "1 of another shape: bn1.bias (3 in the file, 64 in the network)",
    ):
        assert line in str(error.value)
    assert not net.weights_loaded
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_another_networks_file(small: Path) -> None:
    with pytest.raises(ValueError, match="are not those of this ResNet") as error:
        create_backbone("resnest14", weights=str(small), new_classifier=True)
    assert "missing: conv1.0.weight" in str(error.value)
    assert "extra: conv1.weight" in str(error.value)
    assert "Only the classifier" not in str(error.value)


# --- the classifier


def test_wrong_number_of_classes(small: Path) -> None:
    with pytest.raises(ValueError, match=r"fc.weight \(1000x512 in the file, 5x512 in the network\)") as error:
        create_backbone("resnet18", weights=str(small), num_classes=5)
    assert "Only the classifier differs: the network must have the file's number of classes" in str(error.value)
    assert str(error.value).endswith("; new_classifier=True keeps the network's own.")


def test_a_new_classifier_is_asked_for_and_said(small: Path, state: State) -> None:
    with pytest.warns(UserWarning, match="its classifier has 1000 classes, and the network's, of 5, keeps its") as said:
        net = create_backbone("resnet18", weights=str(small), num_classes=5, new_classifier=True)
    assert len(said) == 1
    assert net.weights_loaded
    assert net.fc.weight.shape == (5, 512)
    assert torch.equal(net.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_a_classifier_that_fits_is_the_files_even_if_a_new_one_may_be(small: Path, state: State) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = create_backbone("resnet18", weights=str(small), new_classifier=True)
    assert torch.equal(net.fc.weight, state["fc.weight"])


def test_a_file_without_its_classifier(state: State, tmp_path: Path) -> None:
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, tmp_path / "trunk.pth")
    net = create_backbone("resnet18")
    with pytest.raises(ValueError, match="2 missing: fc.bias, fc.weight\nOnly the classifier is missing") as error:
        load_weights(net, tmp_path / "trunk.pth")
    assert "new_classifier=True keeps the network's own" in str(error.value)
    before = net.fc.weight.clone()
    with pytest.warns(UserWarning, match="it has no classifier, and the network's, of 1000 classes, keeps its values"):
        load_weights(net, tmp_path / "trunk.pth", new_classifier=True)
    assert torch.equal(net.fc.weight, before)
    assert torch.equal(net.conv1.weight, state["conv1.weight"])


def test_another_depth_of_features_is_no_new_classifier(state: State, tmp_path: Path) -> None:
    torch.save(state | {"fc.weight": torch.zeros(5, 2048)}, tmp_path / "deep.pth")
    with pytest.raises(ValueError, match=r"fc.weight \(5x2048 in the file, 1000x512 in the network\)") as error:
        create_backbone("resnet18", weights=str(tmp_path / "deep.pth"), new_classifier=True)
    assert "Only the classifier" not in str(error.value)


def test_a_new_classifier_where_there_is_none(small: Path) -> None:
    net = create_backbone("resnet18")
    net.fc = torch.nn.Identity()
    with pytest.raises(ValueError, match="new_classifier=True needs a network with a classifier `fc`"):
        load_weights(net, small, new_classifier=True)


def test_a_segmenter_with_another_number_of_classes(tmp_path: Path) -> None:
    def segmenter(num_classes: int) -> torch.nn.Module:
        net = create_backbone("resnet18", output_stride=16)
        return deeplabv3plus(net, num_classes, head_channels=8, aux_head=True)

    torch.save(segmenter(3).state_dict(), tmp_path / "three.pth")
    with pytest.raises(ValueError, match="classifier.weight .3x8x1x1 in the file, 5x8x1x1 in the network.") as error:
        load_weights(segmenter(5), tmp_path / "three.pth")
    assert "Only the classifier differs: the network must have the file's number of classes" in str(error.value)
    assert "new_classifier" not in str(error.value)


def test_another_width_is_not_taken_for_another_number_of_classes(tmp_path: Path) -> None:
    def detector(width: int) -> torch.nn.Module:
        return faster_rcnn(create_backbone("resnet18"), 3, fpn_channels=16, box_head_channels=width)

    torch.save(detector(32).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="fc6.weight .32x784 in the file, 16x784 in the network.") as error:
        load_weights(detector(16), tmp_path / "wide.pth")
    assert "Only the classifier" not in str(error.value)


# --- what the caller names


def test_keep_and_drop(state: State, tmp_path: Path) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"extra.{name}"] = state.pop(f"layer1.0.bn2.{name}")
    torch.save(state, tmp_path / "changed.pth")
    net = create_backbone("resnet18")
    net.layer1[0].bn2.bias.data.fill_(7)
    with pytest.warns(UserWarning, match="keep their values") as said:
        load_weights(net, tmp_path / "changed.pth", keep=["layer1.0.bn2.*", "fc.*"], drop=["extra.*"])
    (warning,) = said
    assert str(warning.message) == (
        f"{tmp_path / 'changed.pth'}: 4 of the network's tensors are not in it and keep their values: "
        "layer1.0.bn2.bias, layer1.0.bn2.running_mean, layer1.0.bn2.running_var, layer1.0.bn2.weight; "
        "4 of its tensors are left out: extra.bias, extra.running_mean, extra.running_var, extra.weight"
    )
    assert warning.filename == __file__
    assert (net.layer1[0].bn2.bias == 7).all()
    assert torch.equal(net.fc.weight, state["fc.weight"])  # it may be absent, and is there


def test_what_is_kept_must_still_fit_where_the_file_has_it(state: State, tmp_path: Path) -> None:
    torch.save(state | {"bn1.bias": torch.zeros(3)}, tmp_path / "changed.pth")
    net = create_backbone("resnet18")
    with pytest.raises(ValueError, match="bn1.bias .3 in the file, 64 in the network"):
        load_weights(net, tmp_path / "changed.pth", keep=["bn1.*"])
    with pytest.warns(UserWarning, match="1 of the network's tensors are not in it .*: bn1.bias; 1 of its tensors"):
        load_weights(net, tmp_path / "changed.pth", keep=["bn1.bias"], drop=["bn1.bias"])


def test_patterns_that_match_nothing(small: Path) -> None:
    net = create_backbone("resnet18")
    with pytest.raises(ValueError, match="keep: no tensor of this ResNet matches 'fc1.*'; there are conv1.weight, bn1"):
        load_weights(net, small, keep=["fc.*", "fc1.*"])
    with pytest.raises(ValueError, match=f"drop: no tensor of {small} matches 'head'; there are conv1.weight, bn1"):
        load_weights(net, small, drop=["head"])
    assert not net.weights_loaded


# --- unreadable files


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pickle", "saved", "numpy", "truncated", "text", "empty", "list", "mixed"])
def test_unreadable_files(
    kind: str, small: Path, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.pth"
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"conv1.weight": _Evil()}))
    elif kind == "saved":
        torch.save({"conv1.weight": _Evil()}, file)
    elif kind == "numpy":
        file.write_bytes(pickle.dumps({"model": {"conv1.weight": np.zeros(3)}}, protocol=2))
    elif kind == "truncated":
        file.write_bytes(small.read_bytes()[:100_000])
    elif kind == "text":
        file.write_text("<html>not found</html>")
    elif kind == "empty":
        file.touch()
    elif kind == "list":
        torch.save([1, 2], file)
    else:
        torch.save(state | {"epoch": 3}, file)
    no_dict = kind in ("list", "mixed")
    reason = "holds no state dict" if no_dict else "is damaged, or not plain data written by torch.save"
    with pytest.raises(ValueError, match=rf"bad.pth.*({reason})") as error:
        create_backbone("resnet18", weights=str(file))
    if kind in ("pickle", "saved", "numpy", "text"):
        assert "reading it would run code, which is refused" in str(error.value)
        assert "such as detectron2's .pkl of NumPy arrays" in str(error.value)
    if kind == "saved":
        assert "refused (it asks for print)" in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's advice to read it unsafely
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_damaged_safetensors(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    content = safetensors.torch.save({"conv1.weight": torch.zeros(100)})
    file.write_bytes({"truncated": content[:-50], "text": b"<html>not found</html>", "empty": b""}[kind])
    with pytest.raises(ValueError, match="bad.safetensors is damaged, or no safetensors file: "):
        create_backbone("resnet18", weights=str(file))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weights='.*none.pth' is neither 'imagenet' nor the path of a file"):
        create_backbone("resnet18", weights=str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match="no weights at .*none.pth: give the path of a file"):
        load_weights(create_backbone("resnet18"), tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="no weights at .*none.pth: give the path of a file"):
        weights.read_state_dict(tmp_path / "none.pth")


# --- published files and addresses


class _Server(ThreadingHTTPServer):
    """Serves `folder`; under /cut a file ends too early, under /silent nothing comes.

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
    monkeypatch.delenv(weights.FOLDER_VARIABLE, raising=False)
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

    def __call__(self, *folders: str, at: str = "", by_hand: bool = False) -> PublishedWeights:
        """Serve the file in the folder `at`, and publish it at `folders` (at `at` where there are none)."""
        (self._server.folder / at).mkdir(exist_ok=True)
        os.link(self._small, self._server.folder / at / self.name)
        urls = tuple(f"{self._server.address}/{folder}{self.name}" for folder in folders or (at,))
        entry = PublishedWeights(
            "resnet18",
            "imagenet",
            () if by_hand else urls,
            "" if by_hand else self.digest,
            "https://example.org/page",
            "MIT",
            "ImageNet-1k",
            "top-1",
            69.8,
            None,
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
    monkeypatch.setattr(weights, "_SECONDS_OF_SILENCE", 0.2)
    entry = publish("none/", "cut/", "other/", "silent/", at="mirror")
    (server.folder / "other").mkdir()
    (server.folder / "other" / entry.file_name).write_bytes(b"of another hash")
    with pytest.raises(ConnectionError, match=f"{publish.name} could not be downloaded:\n") as error:
        create_backbone("resnet18", weights="imagenet")
    other = hashlib.sha256(b"of another hash").hexdigest()[:8]
    reasons = (
        "HTTP Error 404: File not found",
        "cut off after 300 of 1000 bytes",
        f"SHA-256 {other}..., where {publish.digest} is published",
        "timed out",
    )
    lines = str(error.value).splitlines()
    assert lines[1:5] == [f"  {url}: {reason}" for url, reason in zip(entry.urls, reasons, strict=True)]
    assert (
        lines[5]
        == f"fetch it elsewhere and put it into {tmp_path / 'hub' / 'checkpoints'}, or give its path as weights"
    )
    assert hub_files(tmp_path) == []


def test_a_damaged_copy_is_found(publish: _Publisher, tmp_path: Path) -> None:
    publish()
    create_backbone("resnet18", weights="imagenet")
    copy = tmp_path / "hub" / "checkpoints" / publish.name
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{publish.name} has SHA-256 .* delete it to have it fetched again"):
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
    monkeypatch.setattr(weights.hashlib, "sha256", Interrupted)
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
    (folder / publish.name).write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=f"{folder / publish.name} has SHA-256 .*, where {publish.digest} is published"
    ):
        create_backbone("resnet18", weights="imagenet")


def test_the_folder_of_files_must_be_one(
    publish: _Publisher, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("none/", at="mirror")
    monkeypatch.setenv("RESNEST_DET_WEIGHTS", str(small))
    with pytest.raises(ValueError, match=f"RESNEST_DET_WEIGHTS='{small}' is no folder; set it to one"):
        create_backbone("resnet18", weights="imagenet")
    monkeypatch.setenv("RESNEST_DET_WEIGHTS", str(tmp_path))
    with pytest.raises(ConnectionError, match=f"fetch it elsewhere and put it into {tmp_path}, or"):
        create_backbone("resnet18", weights="imagenet")


def test_published_where_no_program_can_fetch_it(publish: _Publisher) -> None:
    publish(by_hand=True)
    with pytest.raises(
        FileNotFoundError, match="resnet18/imagenet is published where .* from https://example.org/page and give its"
    ):
        create_backbone("resnet18", weights="imagenet")


def test_no_published_weights(monkeypatch: pytest.MonkeyPatch, publish: _Publisher) -> None:
    publish()
    with pytest.raises(ValueError, match="no weights are published for the network 'resnet34'"):
        create_backbone("resnet34", weights="imagenet")
    with pytest.raises(FileNotFoundError, match="weights='imagnet' is neither .*; for resnet18 there are: imagenet"):
        create_backbone("resnet18", weights="imagnet")
    with pytest.raises(FileNotFoundError, match="no weights at resnet18/coco: .*; for resnet18 there are: imagenet"):
        load_weights(create_backbone("resnet18"), "resnet18/coco")


# --- addresses


def test_loads_from_an_address_once(server: _Server, small: Path, state: State, tmp_path: Path) -> None:
    os.link(small, server.folder / "my weights.pth")
    url = f"{server.address}/my%20weights.pth?download=1"
    for _ in range(2):
        assert torch.equal(create_backbone("resnet18", weights=url).fc.weight, state["fc.weight"])
    assert server.requests == ["/my%20weights.pth?download=1"]
    assert hub_files(tmp_path) == ["my weights.pth"]


def test_a_hash_in_an_addresss_name_is_checked(server: _Server, small: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(small.read_bytes()).hexdigest()
    for name in (f"right-{digest}.pth", "wrong-00000000.pth.tar"):
        os.link(small, server.folder / name)
    load_weights(create_backbone("resnet18"), f"{server.address}/right-{digest}.pth")
    with pytest.raises(ConnectionError, match=f"SHA-256 {digest[:8]}..., where 00000000 is published"):
        load_weights(create_backbone("resnet18"), f"{server.address}/wrong-00000000.pth.tar")
    assert hub_files(tmp_path) == [f"right-{digest}.pth"]


def test_an_address_that_is_cut_off_or_no_file(server: _Server, tmp_path: Path) -> None:
    net = create_backbone("resnet18")
    with pytest.raises(ConnectionError, match="/cut/file.pth: cut off after 300 of 1000 bytes"):
        load_weights(net, f"{server.address}/cut/file.pth")
    with pytest.raises(ValueError, match=f"{server.address}/folder/ names no file: give the address of the file"):
        load_weights(net, f"{server.address}/folder/")
    assert hub_files(tmp_path) == []
