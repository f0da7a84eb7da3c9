"""Pairs made to fail: does the confidence tell, and what is drawn then?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage, optimize, special

from ..errors import InputError
from ..model import RefineByAlign
from ..pipeline import Settings
from ..refinement import Progress
from .dataset import BenchmarkSet, Item
from .methods import detail, paper
from .run import PIXEL_METRICS, measure

KINDS = {
    "right": "the item as it is",
    "wrong object": "another item's reference",
    "mirrored": "the reference mirrored",
    "hidden": "what corresponds to the mask, and a little around it, painted grey in the reference and taken off its object",
}
LOW = 0.5
"""Below this confidence a registration is more likely wrong than right."""
RIGHT, WRONG = 0.12, 0.25
"""End-point errors up to which a registration counts as right, and from which as wrong, when calibrating."""


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
    for index, position in enumerate(chosen):
        item, other = items[position], items[chosen[(index + len(chosen) // 2) % len(chosen)]]
        for kind in KINDS:
            failing = made_to_fail(item, kind, other)
            if not failing.object_mask.any():
                continue
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
        confidences = np.array([row["detail"].get("confidence", 0.0) for row in own])
        means = {name: {figure: float(np.mean([row[name][figure] for row in own])) for figure in PIXEL_METRICS if figure in own[0][name]} for name in ("detail", "paper")}
        shares = {"low": float((confidences < LOW).mean()), "unused": float((confidences < Settings().min_confidence).mean())}
        kinds[kind] = {"n": len(own), **shares, "confidence": float(np.median(confidences)), **means}
    of = {(row["id"], row["kind"]): row["detail"].get("confidence", 0.0) for row in rows}
    right = [(name, confidence) for (name, kind), confidence in of.items() if kind == "right"]
    return {"kinds": kinds, "told": float(np.mean([confidence > of.get((name, "wrong object"), 0.0) for name, confidence in right]))}


def doubt_table(results: dict) -> list[str]:
    """What `doubt` returns as lines of Markdown."""
    shown = [("hp_ssim", "hp-SSIM"), ("detail_ncc", "NCC")]
    lines = ["| reference | n | confidence below one half | not used | median confidence | " + " | ".join(f"{title}, detail / paper" for _, title in shown) + " |", "| --- " * (5 + len(shown)) + "|"]
    for kind, values in results["kinds"].items():
        pairs = [f"{values['detail'][name]:.3f} / {values['paper'][name]:.3f}" if name in values["detail"] else "" for name, _ in shown]
        lines.append(f"| {kind} | {values['n']} | {values['low']:.0%} | {values['unused']:.0%} | {values['confidence']:.3f} | " + " | ".join(pairs) + " |")
    return lines


def calibrate(results: Sequence[dict]) -> tuple[list[float], float]:
    """`registration.CALIBRATION` anew, from what `doubt` returned for sets that have a flow: a logistic regression on the
    evidence, with a prior of deviation 1.4 over the spread of each."""
    evidence, right = [], []
    for row in (row for result in results for row in result["items"] if row["evidence"]):
        error = row["detail"].get("end_point_error", 1.0)
        if row["kind"] != "right" or not RIGHT < error < WRONG:
            evidence.append(row["evidence"])
            right.append(row["kind"] == "right" and error <= RIGHT)
    if not any(right):
        raise InputError("set", "has no registration that is known to be right", "give sets with flow, say ones of `rba bench make --split validation`")
    evidence, signs = np.array(evidence), np.where(right, 1.0, -1.0)
    middle, spread = evidence.mean(0), evidence.std(0) + 1e-9
    design = np.column_stack([(evidence - middle) / spread, np.ones(len(evidence))])

    def loss(weights: np.ndarray) -> float:
        return -special.log_expit(signs * (design @ weights)).sum() + 0.25 * (weights[:-1] ** 2).sum()

    found = optimize.minimize(loss, np.zeros(design.shape[1])).x
    weights = found[:-1] / spread
    return weights.tolist(), float(found[-1] - weights @ middle)
