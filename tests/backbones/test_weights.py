"""Loading: what fits loads exactly, what does not fit says why, and published files come from a server once."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from resnest.torch import resnest50 as released_resnest50

from resnest_det import create_backbone, list_backbones, load_weights
from resnest_det.backbones import weights
from resnest_det.engine import save_checkpoint
from resnest_det.models import deeplabv3plus, faster_rcnn


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file of resnet18's random weights with 1000 classes."""
    torch.manual_seed(3)
    file = tmp_path / "resnet18.pth"
    torch.save(create_backbone("resnet18").state_dict(), file)
    return file


def test_loads_every_tensor(small: Path) -> None:
    net = create_backbone("resnet18", weights=str(small))
    assert net.weights_loaded
    saved = torch.load(small, weights_only=True)
    assert all(torch.equal(value, saved[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "make", [released_resnest50, partial(timm.create_model, "resnest50d")], ids=["released", "timm"]
)
def test_loads_files_of_other_implementations(make: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = make().eval()
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    ours = create_backbone("resnest50", weights=str(tmp_path / "file.pth")).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_loads_what_a_checkpoint_holds(small: Path, tmp_path: Path) -> None:
    state = torch.load(small, weights_only=True)
    save_checkpoint(tmp_path / "last.pt", {"model": state, "step": 3})
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "other.pth")
    for name in ("last.pt", "other.pth"):
        net = create_backbone("resnet18", weights=str(tmp_path / name))
        assert torch.equal(net.fc.weight, state["fc.weight"])


def test_norm_counters_may_be_absent_or_extra(small: Path, tmp_path: Path) -> None:
    frozen = create_backbone("resnet18", weights=str(small), norm="frozen_bn")
    torch.save(frozen.state_dict(), tmp_path / "frozen.pth")
    net = create_backbone("resnet18", weights=str(tmp_path / "frozen.pth"))
    assert torch.equal(net.bn1.running_var, frozen.bn1.running_var)


def test_missing_extra_and_reshaped_are_named_and_nothing_is_loaded(small: Path, tmp_path: Path) -> None:
    state = torch.load(small, weights_only=True)
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
        create_backbone("resnest14", weights=str(small))
    assert "missing: conv1.0.weight" in str(error.value)
    assert "extra: conv1.weight" in str(error.value)
    assert "Only the classifier" not in str(error.value)


def test_wrong_number_of_classes(small: Path) -> None:
    with pytest.raises(ValueError, match=r"fc.weight \(1000x512 in the file, 5x512 in the network\)") as error:
        create_backbone("resnet18", weights=str(small), num_classes=5)
    assert "Only the classifier differs: the network must have the file's number of classes" in str(error.value)


def test_a_segmenter_with_another_number_of_classes(tmp_path: Path) -> None:
    def segmenter(num_classes: int) -> torch.nn.Module:
        net = create_backbone("resnet18", output_stride=16)
        return deeplabv3plus(net, num_classes, head_channels=8, aux_head=True)

    torch.save(segmenter(3).state_dict(), tmp_path / "three.pth")
    with pytest.raises(ValueError, match="classifier.weight .3x8x1x1 in the file, 5x8x1x1 in the network.") as error:
        load_weights(segmenter(5), tmp_path / "three.pth")
    assert "Only the classifier differs: the network must have the file's number of classes" in str(error.value)


def test_another_width_is_not_taken_for_another_number_of_classes(tmp_path: Path) -> None:
    def detector(width: int) -> torch.nn.Module:
        return faster_rcnn(create_backbone("resnet18"), 3, fpn_channels=16, box_head_channels=width)

    torch.save(detector(32).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="fc6.weight .32x784 in the file, 16x784 in the network.") as error:
        load_weights(detector(16), tmp_path / "wide.pth")
    assert "Only the classifier" not in str(error.value)


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code ran",)


@pytest.mark.parametrize("kind", ["pickle", "truncated", "text", "empty", "list"])
def test_unreadable_files(kind: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.pth"
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"conv1.weight": _Evil()}))
    elif kind == "truncated":
        file.write_bytes(small.read_bytes()[:100_000])
    elif kind == "text":
        file.write_text("<html>not found</html>")
    elif kind == "empty":
        file.touch()
    else:
        torch.save([1, 2], file)
    reason = "holds no state dict" if kind == "list" else "is damaged, or not plain data written by torch.save"
    with pytest.raises(ValueError, match=rf"bad.pth.*({reason})") as error:
        create_backbone("resnet18", weights=str(file))
    if kind in ("pickle", "text"):
        assert "reading it would run code, which is refused" in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's advice to read it unsafely
    assert "code ran" not in capsys.readouterr().out


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weights='.*none.pth' is neither 'imagenet' nor the path of a file"):
        create_backbone("resnet18", weights=str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match="no weights at .*none.pth: give the path of a file"):
        load_weights(create_backbone("resnet18"), tmp_path / "none.pth")


# --- published files


def test_published_files_are_of_our_networks_and_have_a_hash() -> None:
    assert set(weights.IMAGENET_FILES) <= set(list_backbones())
    assert len(weights.IMAGENET_FILES) == 20
    for name, url in weights.IMAGENET_FILES.items():
        assert url.startswith("https://")
        assert weights.re.fullmatch(rf"(gluon_)?{name}-[0-9a-f]{{8}}\.pth", url.rsplit("/", 1)[1])


class _Server(ThreadingHTTPServer):
    requests: list[str]


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        self.server.requests.append(self.path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    """A file server on this machine with one published file, and an empty torch.hub folder."""
    published = tmp_path / "published"
    published.mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with _Server(("127.0.0.1", 0), partial(_Handler, directory=str(published))) as running:
        running.requests = []
        running.folder = published
        running.address = f"http://127.0.0.1:{running.server_address[1]}"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def publish(server: _Server, small: Path, monkeypatch: pytest.MonkeyPatch, digest: str | None = None) -> str:
    digest = digest or hashlib.sha256(small.read_bytes()).hexdigest()[:8]
    name = f"resnet18-{digest}.pth"
    (server.folder / name).write_bytes(small.read_bytes())
    monkeypatch.setitem(weights.IMAGENET_FILES, "resnet18", f"{server.address}/{name}")
    return name


def test_imagenet_weights_are_fetched_once(server: _Server, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = publish(server, small, monkeypatch)
    first, second = (create_backbone("resnet18", weights="imagenet") for _ in range(2))
    assert torch.equal(first.fc.weight, torch.load(small, weights_only=True)["fc.weight"])
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert server.requests == [f"/{name}"]


def test_wrong_hash_is_refused_and_nothing_kept(
    server: _Server, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(server, small, monkeypatch, digest="00000000")
    with pytest.raises(ValueError, match="is damaged or replaced: invalid hash value"):
        create_backbone("resnet18", weights="imagenet")
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


def test_a_damaged_copy_is_found(server: _Server, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = publish(server, small, monkeypatch)
    create_backbone("resnet18", weights="imagenet")
    copy = tmp_path / "hub" / "checkpoints" / name
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name} has SHA-256 .* delete it to have it fetched again"):
        create_backbone("resnet18", weights="imagenet")


def test_unreachable_host(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights.IMAGENET_FILES, "resnet18", f"{server.address}/resnet18-12345678.pth")
    with pytest.raises(ConnectionError, match="could not be downloaded .*404.*give its path as weights"):
        create_backbone("resnet18", weights="imagenet")


def test_no_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(weights.IMAGENET_FILES, "resnet18")
    with pytest.raises(ValueError, match="no ImageNet weights are published for 'resnet18'"):
        create_backbone("resnet18", weights="imagenet")
