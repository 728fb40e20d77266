"""Where a file of weights is: at a path, in a folder of such files, or at an address, from which it is fetched once.

What an address gives is kept in torch.hub's folder, as torch.hub keeps it, but for files whose names have no hash to
know them by: those of different addresses often share a name.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.request
import uuid
import warnings
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from tqdm import tqdm

from resnest_det.backbones.published import PublishedWeights, list_weights

FOLDER_VARIABLE = "RESNEST_DET_WEIGHTS"  # the environment variable with a folder of files that are not fetched
_SECONDS_OF_SILENCE = 30  # after which an address is given up
_DATE = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])\d*")  # YYYYMMDD, maybe with the time


def find_file(source: str | Path) -> Path | None:
    """The file at a path or an http(s) address, or of published weights by "network/name"; None if it is none of them.

    Raises:
        FileNotFoundError: it is published where no program can fetch it.
        ConnectionError: no address gave the file.
        OSError: torch.hub's folder cannot be written to.
        ValueError: an address of another kind or of no file, or see find_weights.
    """
    if isinstance(source, str) and (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)):
        if scheme[1].lower() not in ("http", "https"):
            raise ValueError(
                f"{source}: files are fetched from http:// and https:// alone; give a file on disk by its path"
            )
        return _find_url(source)
    path = Path(source).expanduser()
    if _is_file(path):
        return path
    network, _, name = str(source).partition("/")
    return next((find_weights(entry) for entry in list_weights(network) if network and entry.name == name), None)


def find_weights(published: PublishedWeights) -> Path:
    """The file of published weights, with its hash checked where one is known.

    It is looked for in the folder that the environment variable RESNEST_DET_WEIGHTS names, then in `checkpoints`
    under torch.hub.get_dir(); else it is fetched into the latter, from the first address that gives it.

    Raises:
        FileNotFoundError: it is in neither folder, and no program can fetch it.
        ConnectionError: it is in neither folder, and no address gave it.
        OSError: torch.hub's folder cannot be written to.
        ValueError: RESNEST_DET_WEIGHTS is no folder.

    Warns:
        UserWarning: a damaged copy was passed over for another.
    """
    folders = _folders()
    if published.urls:
        return _find_or_fetch(published.file_name, published.urls, published.sha256, folders)
    copies = [folder / published.file_name for folder in folders if published.file_name]
    found = next(filter(_is_file, copies), None)
    if found is None:
        place = f", or put it into {folders[0]}" if published.file_name else ""
        raise FileNotFoundError(
            f"{published.network}/{published.name} is published where no program can fetch it: get "
            f"{published.file_name or 'the file'} from {published.page} and give its path{place}"
        )
    return found


def _find_url(url: str) -> Path:
    entry = next((entry for entry in list_weights() if url in entry.urls), None)
    if entry is not None:
        return find_weights(entry)
    name = re.split(r"[/\\]", unquote(urlsplit(url).path))[-1]
    if name in ("", ".", ".."):
        raise ValueError(f"{url} names no file: give the address of the file itself")
    in_name = re.search(r"-([0-9a-f]{8,64})\.[^-]*$", name)  # torch.hub's convention
    sha256 = in_name[1] if in_name and not _DATE.fullmatch(in_name[1]) else ""  # one hash in 50,000 looks like a date
    of_this_address = "" if sha256 else hashlib.sha256(url.encode()).hexdigest()[:16] + "-"
    return _find_or_fetch(of_this_address + name, (url,), sha256, _folders())


def _folders() -> list[Path]:
    """Where files are looked for, in order; the last is the one that fetched files are kept in."""
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    if own := os.environ.get(FOLDER_VARIABLE):
        folders.insert(0, Path(own).expanduser())
        if not folders[0].is_dir():
            raise ValueError(f"{FOLDER_VARIABLE}={own!r} is no folder; set it to one that holds weights, or unset it")
    return folders


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # it cannot be one: a name that is too long, a folder that may not be read
        return False


def _find_or_fetch(name: str, urls: Sequence[str], sha256: str, folders: Sequence[Path]) -> Path:
    """The file `name` whose SHA-256 begins with `sha256`: in one of the folders, or fetched into the last of them."""
    damaged = []
    for path in filter(_is_file, (folder / name for folder in folders)):
        try:
            with path.open("rb") as file:
                _check_hash(hashlib.file_digest(file, "sha256").hexdigest(), sha256)
        except OSError as error:
            damaged.append(f"  {path}: {error}")
        else:
            break
    else:
        path = folders[-1] / name
        reasons = _fetch(path, urls, sha256)
        if reasons:
            raise ConnectionError(
                f"{name} could not be downloaded:\n"
                + "\n".join([*damaged, *reasons])
                + f"\nfetch it elsewhere and put it into {folders[0]} as {name}, or give its path as weights"
                + (", which checks no hash" if sha256 else "")
            )
    if damaged:
        warnings.warn(f"passed over for {path}:\n" + "\n".join(damaged), stacklevel=2)
    return path


def _fetch(path: Path, urls: Sequence[str], sha256: str) -> list[str]:
    """Fetch a file from the first address that gives it; else return why each did not.

    Until the file is complete and its hash is right it has another name.

    Raises:
        OSError: its folder cannot be written to.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise OSError(
            f"cannot write to {path.parent} ({error}); set TORCH_HOME to a folder that can be written to, or "
            f"{FOLDER_VARIABLE} to one that has {path.name}"
        ) from error
    reasons = []
    try:
        for url in urls:
            try:
                _download(url, partial, sha256, path.name)
            except (OSError, HTTPException) as error:
                reasons.append(f"  {url}: {error or type(error).__name__}")
            else:
                partial.replace(path)
                return []
    finally:
        partial.unlink(missing_ok=True)
    return reasons


def _download(url: str, path: Path, sha256: str, name: str) -> None:
    """Write what an address gives, whole and of the right hash, to a file; a bar shows its name.

    torch.hub.download_url_to_file waits for a silent host for ever and takes a cut-off file for a whole one.

    Raises:
        OSError: the address fails or is silent, the connection is cut off, or the file is a page or has another hash.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "resnest_det"})
    digest = hashlib.sha256()
    with urllib.request.urlopen(request, timeout=_SECONDS_OF_SILENCE) as response, path.open("wb") as file:
        if response.headers.get_content_type() == "text/html":
            raise OSError("a page for browsers, not a file of weights")
        length = response.headers.get("Content-Length")
        num_bytes = int(length) if length else None
        with tqdm(total=num_bytes, desc=name, unit="B", unit_scale=True, disable=None) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
        if num_bytes is not None and file.tell() != num_bytes:
            raise OSError(f"cut off after {file.tell()} of {num_bytes} bytes")
    _check_hash(digest.hexdigest(), sha256)


def _check_hash(digest: str, sha256: str) -> None:
    if not digest.startswith(sha256):
        raise OSError(f"SHA-256 {digest[: len(sha256)]}..., where {sha256} is expected by its file name")
