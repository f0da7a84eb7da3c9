"""Files of weights from where their publishers keep them, each pinned to a revision, its size and its digest. The only
module that uses the network, and only when a user asks for a file."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .errors import InputError
from .refinement import Progress

CHUNK = 1 << 20
TIMEOUT = 30.0
"""Seconds without a byte after which the network is held for away."""


@dataclass(frozen=True)
class Download:
    """A file at a revision that does not change.

    size      bytes
    sha256    of the whole file, lower case hex
    folder    of ComfyUI's folders of models, by name
    file      its name there
    """

    url: str
    size: int
    sha256: str
    file: str
    folder: str = "."
    licence: str = ""
    what: str = ""

    def __post_init__(self):
        if urlsplit(self.url).scheme not in ("https", "http"):
            raise InputError("url", f"is {self.url!r}", "give one that begins with https://")
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise InputError("sha256", f"is {self.sha256!r}", "give the 64 hexadecimal digits that the publisher states for the file")
        if self.size < 1:
            raise InputError("size", f"is {self.size}", "give the file's bytes, as the publisher states them")
        if self.file in ("", ".", "..") or Path(self.file).name != self.file:
            raise InputError("file", f"is {self.file!r}", "give a plain file name")

    def __str__(self) -> str:
        terms = f"; {self.licence}" if self.licence else ""
        return f"{self.url}\n{self.size:,} bytes, sha256 {self.sha256}{terms}"


DOWNLOADS = {name: Download(**entry) for name, entry in json.loads((Path(__file__).parent / "downloads.json").read_text()).items()}
"""What `rba convert` starts from. Size and digest are those that the hub's pointer files and several others who pin them state."""


def known(name: str) -> Download:
    if name not in DOWNLOADS:
        raise InputError("name", f"{name!r} is not known", f"use one of {', '.join(DOWNLOADS)}, or give --url, --size and --sha256")
    return DOWNLOADS[name]


def models_folder() -> Path | None:
    """`models` of the ComfyUI that this pack lies in, if it lies in one."""
    custom_nodes = Path(__file__).absolute().parents[2]
    models = custom_nodes.parent / "models"
    return models if custom_nodes.name == "custom_nodes" and models.is_dir() else None


def download(wanted: Download, folder: str | Path, progress: Progress | None = None) -> Path:
    """Fetch a file into a folder, which is made if need be, and return its path; a file that is there already is only checked.

    What arrived before a cut or a cancellation stays beside it under a name of its own and is gone on from. The file has its
    own name only once size and digest are right. progress is called with bytes. Raises InputError where the network or the
    file is not there, the disk is too small, or other bytes come than were pinned.
    """
    target = Path(folder) / wanted.file
    partial = target.with_name(f".{target.name}.{wanted.sha256[:12]}.partial")
    if target.exists():
        if not target.is_file() or target.stat().st_size != wanted.size or digest_of(target) != wanted.sha256:
            raise InputError("file", f"{target} is there, and is another", "move it away, or give another folder")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        there = partial.stat().st_size if partial.exists() else 0
        if there > wanted.size:
            partial.unlink()
            there = 0
        if (free := shutil.disk_usage(target.parent).free) < wanted.size - there:
            raise InputError("folder", f"{target.parent} has room for {free / 1e9:.2f} GB, {(wanted.size - there) / 1e9:.2f} GB are needed", "make room there, or give another folder")
        if there < wanted.size:
            _fetch(wanted, partial, there, progress)
        if partial.stat().st_size != wanted.size or digest_of(partial) != wanted.sha256:
            partial.unlink()
            raise InputError("sha256", f"of what {wanted.url} gave is not {wanted.sha256}", "nothing was kept; try again, or do not trust that place")
        os.replace(partial, target)
    except OSError as error:
        raise InputError("folder", f"{target.parent} cannot be written ({error.strerror or error})", "make room there, or give another folder") from error
    return target


def _fetch(wanted: Download, partial: Path, there: int, progress: Progress | None) -> None:
    """Append what is missing, or begin again where the server sends no parts of files."""
    with _opened(wanted, there) as response:
        if response.status != 206:
            there = 0
        with partial.open("ab" if there else "wb") as file:
            while there < wanted.size and (chunk := _read(response, wanted)):
                file.write(chunk)
                there += len(chunk)
                if progress:
                    progress(min(there, wanted.size), wanted.size)
    if there < wanted.size:
        raise InputError("network", f"the connection ended after {there:,} of {wanted.size:,} bytes", "what arrived is kept: the same again goes on from there")


def _opened(wanted: Download, there: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "refine-by-align", "Accept-Encoding": "identity"} | ({"Range": f"bytes={there}-"} if there else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(wanted.url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        raise InputError("url", f"{wanted.url} answers {error.code} {error.reason}", "look there with a browser: it may ask for a login, or have moved") from error
    except (OSError, http.client.HTTPException) as error:
        raise _away(wanted, error) from error


def _read(response: http.client.HTTPResponse, wanted: Download) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _away(wanted, error) from error


def _away(wanted: Download, error: Exception) -> InputError:
    return InputError(
        "network", f"{urlsplit(wanted.url).netloc} cannot be reached ({getattr(error, 'reason', error)})",
        f"what arrived is kept: try again once there is a network; or fetch {wanted.url} elsewhere and put it here as {wanted.file}",
    )  # fmt: skip


def digest_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
