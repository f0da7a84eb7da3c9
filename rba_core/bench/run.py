"""Run methods over a benchmark set and measure them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ..errors import InputError
from ..model import RefineByAlign
from ..refinement import Progress
from . import metrics
from .dataset import BenchmarkSet, Item
from .judges import FIGURES, load_judges
from .methods import METHODS, NEED_MODEL, Outcome

PIXEL_METRICS = ("masked_psnr", "masked_ssim", "hp_ssim", "detail_ncc")
MEASURES = (*PIXEL_METRICS, *FIGURES, "iou", "box_iou", "soft_iou", "token_bound_iou", "end_point_error", "confidence", "outside_changed_pixels", "fell_back", "seconds")
GROUPS = ("task", "difficulty", "artifact", "weak")
HEADINGS = {
    "masked_psnr": "PSNR dB", "masked_ssim": "SSIM", "hp_ssim": "hp-SSIM", "detail_ncc": "NCC", "iou": "IoU", "box_iou": "box IoU",
    "soft_iou": "soft IoU", "token_bound_iou": "bound", "end_point_error": "EPE (median)", "confidence": "confidence", "outside_changed_pixels": "changed", "fell_back": "fell back", "seconds": "s",
} | {name: heading for name, (heading, _) in FIGURES.items()}  # fmt: skip


def run(
    set_folder: str | Path,
    methods: Sequence[str],
    model: RefineByAlign | None,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    on_item: Callable[[Item, dict[str, Outcome], dict[str, dict]], None] | None = None,
    judges: Mapping[str, str | None] | None = None,
    device: str | torch.device = "cpu",
) -> dict:
    """Measure `methods`, names of METHODS, over the first `limit` items of a set (default: all).

    progress   called with (outcomes done, outcomes in all)
    on_item    called after each item with its outcomes and figures by method, say `ContactSheet.add`
    judges     what further metrics are wanted, see `load_judges`; their networks run on `device`
    returns    {"set", "n", "methods": {name: means}, "groups": {label: {value: {name: means}}}, "items": [...], "judges":
               {name: network, crop and fill}, "unavailable": {name: why}}, ready for JSON. PSNR in dB, `seconds` per item,
               `fell_back` the share of items of which alignment said nothing (their IoU counts as 0). What a method or a
               set does not provide is left out.

    Raises `InputError` for an unknown method or judge and a set that cannot be read.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise InputError("methods", f"{unknown[0]!r} is not known", f"use some of {', '.join(METHODS)}")
    if limit is not None and limit < 1:
        raise InputError("limit", f"is {limit}", "use 1 or more")
    if model is None and (needy := NEED_MODEL & set(methods)):
        raise InputError("model", f"is missing for {', '.join(sorted(needy))}", "give one, or run none and telea only")
    ready, unavailable = load_judges(judges or {}, device)
    items = BenchmarkSet(set_folder)
    count = min(limit or len(items), len(items))
    for name in methods:
        if name in NEED_MODEL:  # the first pass also pays for memory and kernels
            METHODS[name](items[0], model, seed)
            break

    rows = []
    for position in range(count):
        item = items[position]
        outcomes, figures = {}, {}
        for name in methods:
            started = time.perf_counter()
            outcomes[name] = METHODS[name](item, model, seed)
            seconds = time.perf_counter() - started
            figures[name] = measure(item, outcomes[name]) | {"seconds": seconds}
            for judge in ready.values():
                figures[name] |= judge(item, outcomes[name])
            rows.append({"id": item.id, "method": name, **figures[name], "task": item.task, **item.labels})
            if progress:
                progress(len(rows), count * len(methods))
        if on_item:
            on_item(item, outcomes, figures)

    groups = {}
    for label in GROUPS:
        values = dict.fromkeys(str(row[label]) for row in rows if label in row)
        if values:
            groups[label] = {value: _by_method(methods, [row for row in rows if str(row.get(label)) == value]) for value in values}
    told = {"judges": {name: judge.about for name, judge in ready.items()}, "unavailable": unavailable}
    return {"set": Path(set_folder).resolve().name, "n": count, "methods": _by_method(methods, rows), "groups": groups, "items": rows} | told


def measure(item: Item, outcome: Outcome) -> dict:
    """The figures of one outcome, as far as the item's truth and M_gt and the outcome's region allow."""
    figures = {}
    if item.truth is not None:
        figures |= {name: getattr(metrics, name)(outcome.image, item.truth, item.mask) for name in PIXEL_METRICS}
    aligned = outcome.region is not None or outcome.fell_back
    if item.correspondence is not None and aligned:
        region = outcome.region
        figures["iou"] = metrics.iou(region.mask, item.correspondence) if region else 0.0
        figures["box_iou"] = metrics.box_iou(region.mask, item.correspondence) if region else 0.0
        figures["soft_iou"] = metrics.soft_iou(region.soft, item.correspondence) if region else 0.0
        figures["token_bound_iou"] = metrics.token_bound_iou(item.correspondence, item.reference_mask)
    if outcome.flow is not None and item.flow is not None and item.correspondence is not None:
        figures["end_point_error"] = metrics.end_point_error(outcome.flow, item.flow, item.correspondence)
    if outcome.confidence is not None:
        figures["confidence"] = outcome.confidence
    if aligned:
        figures["fell_back"] = outcome.fell_back
    figures["outside_changed_pixels"] = metrics.outside_changed_pixels(outcome.image, item.image, item.mask)
    return figures


def format_table(report: dict) -> str:
    """What `run` returns as text: a line a method, then one for each method in each group."""
    sections = [("all", report["n"], report["methods"])]
    for label, values in report["groups"].items():
        for value, by_method in values.items():
            matching = {row["id"] for row in report["items"] if str(row.get(label)) == value}
            sections.append((f"{label} {value}", len(matching), by_method))
    shown = [name for name in MEASURES if any(name in means for means in report["methods"].values())]
    table = [["items", "n", "method", *(HEADINGS[name] for name in shown)]]
    for title, count, by_method in sections:
        for method, means in by_method.items():
            table.append([title, str(count), method, *(figure(name, means.get(name)) for name in shown)])
            title = count = ""
    widths = [max(len(str(row[column])) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        if row[0] and lines:
            lines.append("")
        aligned = [str(cell).ljust(width) if column in (0, 2) else str(cell).rjust(width) for column, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def figure(name: str, value: float | None) -> str:
    """A measure's value as a table shows it; "" where there is none."""
    if value is None:
        return ""
    return f"{value:.2f}" if name in ("masked_psnr", "seconds", "fell_back") else f"{value:.3g}" if name == "outside_changed_pixels" else f"{value:.3f}"


def _by_method(methods: Iterable[str], rows: list[dict]) -> dict[str, dict[str, float]]:
    means = {}
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        present = [name for name in MEASURES if any(name in row for row in own)]
        values = {name: [row[name] for row in own if name in row] for name in present}
        means[method] = {name: statistics.median(column) if name == "end_point_error" else sum(column) / len(column) for name, column in values.items()}
    return means
