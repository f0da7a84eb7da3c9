"""Pairs made to fail: does the confidence tell, and what is drawn then?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage

from ..errors import InputError
from ..model import RefineByAlign
from ..pipeline import Settings
from ..refinement import Progress
from .dataset import BenchmarkSet, Item
from .methods import detail, paper
from .run import PIXEL_METRICS, interval, measure

KINDS = {
    "right": "the item as it is",
    "wrong object": "another item's reference",
    "mirrored": "the reference mirrored",
    "hidden": "what corresponds to the mask, and a little around it, painted grey in the reference and taken off its object",
}
LOW = 0.5
"""Below this confidence a registration is more likely wrong than right."""


def made_to_fail(item: Item, kind: str, other: Item) -> Item:
    """The item with a reference that cannot help, see `KINDS`."""
    if kind == "wrong object":
        return replace(item, reference=other.reference, reference_mask=other.reference_mask)
    if kind == "mirrored":
        return replace(item, reference=item.reference.flip(-1), reference_mask=item.object_mask.flip(-1))
    if kind == "hidden":
        reach = 0.1 * float(item.correspondence.sum()) ** 0.5
        hidden = torch.from_numpy(ndimage.distance_transform_edt(item.correspondence.numpy() < 0.5) <= reach)
        return replace(item, reference=torch.where(hidden, 0.5, item.reference), reference_mask=item.object_mask * ~hidden)
    return item


def each_kind(item: Item, other: Item) -> Iterator[tuple[str, Item]]:
    """The item as each of KINDS, but where nothing of the object is left."""
    for kind in KINDS:
        failing = made_to_fail(item, kind, other)
        if failing.object_mask.any():
            yield kind, failing


def with_another(items: BenchmarkSet, chosen: Sequence[int], index: int) -> tuple[Item, Item]:
    """Of chosen positions the item at `index`, and the one half of them further on, for its wrong object."""
    return items[chosen[index]], items[chosen[(index + len(chosen) // 2) % len(chosen)]]


def doubt(set_folder, model: RefineByAlign, limit: int | None = None, seed: int = 0, progress: Progress | None = None) -> dict:
    """`detail` and `paper` on each item with its own reference and with ones made to fail.

    returns   {"set", "n", "min_confidence", "kinds": {kind: {"low": share of confidences below LOW, "unused": below what
              a registration needs to be used, "confidence": median, "detail": means, "paper": means}}, "told": share of items
              where the right reference has more confidence than the wrong object's, "items": [...]}
    """
    items = BenchmarkSet(set_folder)
    chosen = items.having("correspondence", limit)
    if len(chosen) < 2:
        raise InputError("set", "has a single item", "give two or more: the other's reference is the wrong object")
    rows = []
    for index in range(len(chosen)):
        item, other = with_another(items, chosen, index)
        for kind, failing in each_kind(item, other):
            row = {"id": item.id, "kind": kind}
            for name, method in (("detail", detail), ("paper", paper)):
                outcome = method(failing, model, seed)
                figures = measure(item if kind == "right" else replace(failing, correspondence=None), outcome)
                row[name] = {measure_: figures[measure_] for measure_ in (*PIXEL_METRICS, "end_point_error", "confidence") if measure_ in figures}
                if name == "detail":
                    row["evidence"] = [round(value, 4) for value in outcome.evidence]
            rows.append(row)
        if progress:
            progress(index + 1, len(chosen))

    return {"set": items.folder.resolve().name, "n": len(chosen), "min_confidence": Settings().min_confidence, **summary(rows), "items": rows}


def summary(rows: Sequence[dict]) -> dict:
    """"kinds" and "told" of what `doubt` returns, from its items."""
    kinds = {}
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        means = {name: {figure: float(np.mean([row[name][figure] for row in own])) for figure in PIXEL_METRICS if figure in own[0][name]} for name in ("detail", "paper")}
        kinds[kind] = {"n": len(own), **_confidences(own, Settings().min_confidence), **means}
    of = {(row["id"], row["kind"]): row["detail"].get("confidence", 0.0) for row in rows}
    right = [(name, confidence) for (name, kind), confidence in of.items() if kind == "right"]
    return {"kinds": kinds, "told": float(np.mean([confidence > of.get((name, "wrong object"), 0.0) for name, confidence in right]))}


def _confidences(rows: Sequence[dict], used_from: float) -> dict[str, float]:
    confidences = np.array([row["detail"].get("confidence", 0.0) for row in rows])
    return {"low": float((confidences < LOW).mean()), "unused": float((confidences < used_from).mean()), "confidence": float(np.median(confidences))}


def doubt_table(results: dict) -> list[list[str]]:
    """What `doubt` returns as rows of a table; the last one is of all pairs made to fail."""
    shown = [("hp_ssim", "hp-SSIM"), ("detail_ncc", "NCC")]
    table = [["reference", "n", "confidence below one half", "not used", *(f"{title}, {words}" for _, title in shown for words in ("detail / paper", "difference"))]]
    kinds = {kind: [row for row in results["items"] if row["kind"] == kind] for kind in results["kinds"]}
    kinds["all made to fail"] = [row for row in results["items"] if row["kind"] != "right"]
    for kind, rows in kinds.items():
        shares, cells = _confidences(rows, results["min_confidence"]), []
        for name, _ in shown:
            ours, theirs = (np.array([row[method][name] for row in rows if name in row[method]]) for method in ("detail", "paper"))
            cells += [f"{ours.mean():.3f} / {theirs.mean():.3f}", "{:+.3f} [{:+.3f}, {:+.3f}]".format((ours - theirs).mean(), *interval(ours - theirs))] if len(ours) else ["", ""]
        table.append([kind, str(len(rows)), f"{shares['low']:.0%}", f"{shares['unused']:.0%}", *cells])
    return table
