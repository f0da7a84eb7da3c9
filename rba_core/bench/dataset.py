"""A benchmark set: a folder with `index.jsonl`, one triple of image, mask and reference a line."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..imageio import read_image, read_mask

REQUIRED = ("id", "task", "image", "mask", "reference")
FILES = ("image", "mask", "reference", "reference_mask", "correspondence", "truth", "flow")


@dataclass(frozen=True)
class Item:
    """One line of a set, its pictures read. What the line does not name is `None`.

    labels           the free fields: `difficulty`, `artifact`, `subject`, `weak`, ...
    image            `[3, H, W]` in [0, 1], I_a
    mask             `[H, W]` in {0, 1}, M_a
    reference        `[3, h, w]` in [0, 1], I_r
    reference_mask   `[h, w]` in {0, 1}, the object in the reference
    correspondence   `[h, w]` in {0, 1}, M_gt
    truth            `[3, H, W]` in [0, 1], the image without its artifact
    flow             `[2, H, W]`, where in the reference each masked pixel's centre is seen, (x, y) in pixels; NaN elsewhere
                     and where hidden; the array `flow` of an .npz
    """

    id: str
    task: str
    labels: dict
    image: Tensor
    mask: Tensor
    reference: Tensor
    reference_mask: Tensor | None = None
    correspondence: Tensor | None = None
    truth: Tensor | None = None
    caption: str | None = None
    flow: Tensor | None = None

    @property
    def object_mask(self) -> Tensor:
        """`reference_mask`, or all of the reference where the item has none."""
        return torch.ones(self.reference.shape[-2:]) if self.reference_mask is None else self.reference_mask


class BenchmarkSet(Sequence):
    """The items of a folder, in the index's order. Pictures are read when an item is asked for.

    Raises `InputError` on opening where the index is missing, a line is not as it should be or a file is
    absent; on reading an item where sizes do not match.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "index.jsonl"
        if not index.is_file():
            raise InputError("set", f"{self.folder} has no index.jsonl", "give the folder of a benchmark set, or make one with `rba bench make`")
        self.lines = []
        for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                self.lines.append(self._checked(line, f"{index} line {number}"))
        if not self.lines:
            raise InputError("set", f"{index} is empty", "write one JSON object a line")

    def _checked(self, line: str, where: str) -> dict:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError("set", f"{where} is not JSON ({error.msg} at column {error.colno})", "write one JSON object a line") from error
        if missing := [name for name in REQUIRED if not isinstance(entry, dict) or name not in entry]:
            raise InputError("set", f"{where} lacks {', '.join(missing)}", f"each line needs {', '.join(REQUIRED)}")
        for name in FILES:
            if entry.get(name) is not None and not (self.folder / entry[name]).is_file():
                raise InputError("set", f"{where}: {name} {entry[name]} does not exist", "give a path relative to the set's folder")
        return entry

    def having(self, name: str, limit: int | None = None) -> list[int]:
        """Positions of the first `limit` items (default: all) that have a file of that name; `InputError` where none has."""
        if limit is not None and limit < 1:
            raise InputError("limit", f"is {limit}", "use 1 or more")
        chosen = [position for position, line in enumerate(self.lines) if line.get(name) is not None][:limit]
        if not chosen:
            raise InputError("set", f"{self.folder} has no item with {name}", f"give a set with {name}, say one of `rba bench make`")
        return chosen

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, position: int) -> Item:
        entry = self.lines[position]
        pictures = {name: self.folder / entry[name] for name in FILES if entry.get(name) is not None}
        for name, path in pictures.items():
            pictures[name] = read_flow(path) if name == "flow" else read_image(path).rgb if name in ("image", "reference", "truth") else read_mask(path)
        for name, owner in (("mask", "image"), ("truth", "image"), ("reference_mask", "reference"), ("correspondence", "reference"), ("flow", "image")):
            if name in pictures and pictures[name].shape[-2:] != pictures[owner].shape[-2:]:
                sizes = [" x ".join(map(str, reversed(pictures[key].shape[-2:]))) for key in (name, owner)]
                raise InputError("set", f"{entry['id']}: {name} is {sizes[0]}, {owner} {sizes[1]}", "make them the same size")
        labels = {key: value for key, value in entry.items() if key not in (*REQUIRED, *FILES, "caption")}
        return Item(id=str(entry["id"]), task=entry["task"], labels=labels, caption=entry.get("caption"), **pictures)


def read_flow(path: Path) -> Tensor:
    """The array `flow` `[2, H, W]` of an .npz. Raises `InputError`."""
    try:
        flow = np.load(path)["flow"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError("set", f"{path} holds no flow ({error})", 'write it as numpy.savez_compressed(path, flow=...)') from error
    if flow.ndim != 3 or len(flow) != 2:
        raise InputError("set", f"{path}: flow has shape {flow.shape}", "give [2, H, W]")
    return torch.from_numpy(flow).float()
