"""Run methods over a benchmark set and measure them: what was done stays done, and processes share the work."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..errors import InputError
from ..model import RefineByAlign
from ..refinement import Progress
from . import metrics
from .dataset import BenchmarkSet, Item
from .judges import FIGURES, Judge
from .methods import NEED_MODEL, Method, Outcome
from .sheet import save_tiles
from .speed import cpu_name, versions

PIXEL_METRICS = ("masked_psnr", "masked_ssim", "hp_ssim", "detail_ncc")
MEASURES = (*PIXEL_METRICS, *FIGURES, "iou", "box_iou", "soft_iou", "token_rounding_iou", "token_bound_iou", "end_point_error", "confidence", "outside_changed_pixels", "fell_back", "seconds")
GROUPS = ("task", "difficulty", "artifact", "weak")
HEADINGS = {
    "masked_psnr": "PSNR dB", "masked_ssim": "SSIM", "hp_ssim": "hp-SSIM", "detail_ncc": "NCC", "iou": "IoU", "box_iou": "box IoU",
    "soft_iou": "soft IoU", "token_rounding_iou": "rounded", "token_bound_iou": "bound", "end_point_error": "EPE (median)", "confidence": "confidence", "outside_changed_pixels": "changed", "fell_back": "fell back", "seconds": "s",
} | {name: heading for name, (heading, _) in FIGURES.items()}  # fmt: skip

RESAMPLES = 2000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Share:
    """Which of several processes this is: it measures the items whose position leaves `rank` when divided by `count`."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def of_this_process() -> Share:
        """As `accelerate launch` started it; alone without."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return Share()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))  # the others may have much left to do
        return Share(state.process_index, state.num_processes)

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def run(
    set_folder: str | Path,
    methods: Mapping[str, Method],
    model: RefineByAlign | None,
    folder: str | Path,
    judges: Mapping[str, Judge] | None = None,
    weights: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    share: Share = Share(),
    progress: Progress | None = None,
) -> dict | None:
    """Measure methods, see `load_methods`, over the first `limit` items of a set (default: all).

    folder     where figures and tiles of each item go as soon as they are there; what lies there from a run cut short, or
               with fewer methods or items, is not done again
    judges     further metrics, see `load_judges`
    weights    where methods have theirs from, by name: others' results are not taken for theirs
    share      what part this process does; the first one gets the whole result, when the others have finished, they `None`
    progress   called with (items done, items in all) of this process's share
    returns    {"set", "n", "made": what made it, "judges": {name: what it looks at}, "methods": {name: means}, "groups": {label: {value: {name: means}}},
               "items": [figures of one method on one item, ...], "failed": [{"id", "method", "problem"}, ...]}, ready for
               JSON. PSNR in dB, `seconds` per item, `fell_back` the share of items of which alignment said nothing (their IoU
               counts as 0). What a method or a set does not provide is left out; an item on which a method failed is left
               out of that method's means.

    Raises `InputError` for a set that cannot be read, and a folder of another run.
    """
    if limit is not None and limit < 1:
        raise InputError("limit", f"is {limit}", "use 1 or more")
    if model is None and (needy := NEED_MODEL & set(methods)):
        raise InputError("model", f"is missing for {', '.join(sorted(needy))}", "give one, or run none and telea only")
    items = BenchmarkSet(set_folder)
    count, folder = min(limit or len(items), len(items)), Path(folder)
    made = _claimed(folder, {"seed": seed, **hashes(items, model), **{f"weights of {name}": str(Path(path).resolve()) for name, path in (weights or {}).items()}}, share)
    mine, judges = range(share.rank, count, share.count), judges or {}
    warm = False
    for number, position in enumerate(mine, 1):
        kept = _kept(folder, position)
        missing = {name: method for name, method in methods.items() if name not in kept["judged"] or not judges.keys() <= kept["judged"][name].keys()}
        if missing:
            if not warm and (needy := [name for name in missing if name in NEED_MODEL]):
                with suppress(Exception):  # what is wrong with this item is found when it is measured
                    missing[needy[0]](items[position], model, seed)  # the first pass also pays for memory and kernels
                warm = True
            _measure_item(items, position, missing, judges, model, seed, folder, kept)
        if progress:
            progress(number, len(mine))
    share.wait()
    if share.rank:
        return None
    found = summary(items.folder.resolve().name, list(methods), [_kept(folder, position) for position in range(count)], judges)
    return found | {"made": made | environment(), "judges": {name: judge.about for name, judge in judges.items()}}


def hashes(items: BenchmarkSet, model: RefineByAlign | None) -> dict[str, str]:
    """What results depend on besides the seed, as short digests: the set's index, the model's configuration and weights,
    and the code of the steps, the methods and the metrics."""

    def digest(parts: Iterable[bytes]) -> str:
        found = hashlib.sha256()
        for part in parts:
            found.update(part)
        return found.hexdigest()[:12]

    core = Path(__file__).parents[1]
    code = sorted({*core.glob("*.py"), *core.glob("bench/methods/*.py"), *(core / "bench" / f"{name}.py" for name in ("metrics", "judges"))} - {core / "cli.py"})
    found = {"set": digest([(items.folder / "index.jsonl").read_bytes()]), "code": digest(path.read_bytes() for path in code)}
    if model is not None:
        tensors = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() for tensor in model.state_dict().values())
        found["model"] = digest([repr(model.config).encode(), *tensors])
    return found


def environment() -> dict[str, str]:
    """What a timing, and perhaps a last digit, depends on."""
    threads = torch.get_num_threads()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()} ({threads} thread{'s' * (threads > 1)})"
    return {"machine": machine, "system": platform.system(), "refine-by-align": __version__, **versions()}


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
        for name in ("token_rounding_iou", "token_bound_iou", "region_tokens"):
            figures[name] = getattr(metrics, name)(item.correspondence, item.reference_mask)
    if outcome.flow is not None and item.flow is not None and item.correspondence is not None:
        figures["end_point_error"] = metrics.end_point_error(outcome.flow, item.flow, item.correspondence)
    if outcome.confidence is not None:
        figures["confidence"] = outcome.confidence
    if aligned:
        figures["fell_back"] = outcome.fell_back
    figures["outside_changed_pixels"] = metrics.outside_changed_pixels(outcome.image, item.image, item.mask)
    return figures


def summary(name: str, methods: Sequence[str], kept: Iterable[dict], judges: Iterable[str] = ()) -> dict:
    """What `run` returns, from what it kept of each item; of the judges those that saw all."""
    rows, failed = [], []
    for item in kept:
        for method in methods:
            if method in item["figures"]:
                judged = {key: value for judge in judges for key, value in item["judged"][method][judge].items()}
                rows.append({"id": item["id"], "method": method, **item["figures"][method], **judged, **item["labels"]})
        failed += [{"id": item["id"], "method": method, "problem": item["failed"][method]} for method in methods if method in item["failed"]]
    groups = {}
    for label in GROUPS:
        values = dict.fromkeys(str(row[label]) for row in rows if label in row)
        if values:
            groups[label] = {value: by_method(methods, [row for row in rows if str(row.get(label)) == value]) for value in values}
    return {"set": name, "n": len({row["id"] for row in rows}), "methods": by_method(methods, rows), "groups": groups, "items": rows, "failed": failed}


def by_method(methods: Iterable[str], rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Means of the measures that each method has; of the end-point error, which a few lost items would rule, the median."""
    means = {}
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        values = {name: [row[name] for row in own if name in row] for name in MEASURES}
        means[method] = {name: (statistics.median if name == "end_point_error" else statistics.fmean)(column) for name, column in values.items() if column}
    return means


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% confidence interval of the mean: percentile bootstrap (Efron 1979), the same each time."""
    values = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def format_table(report: dict) -> str:
    """What `run` returns as text: a line a method, then one for each method in each group."""
    sections = [("all", report["n"], report["methods"])]
    for label, values in report["groups"].items():
        for value, means in values.items():
            matching = {row["id"] for row in report["items"] if str(row.get(label)) == value}
            sections.append((f"{label} {value}", len(matching), means))
    shown = [name for name in MEASURES if any(name in means for means in report["methods"].values())]
    table = [["items", "n", "method", *(HEADINGS[name] for name in shown)]]
    for title, count, means in sections:
        for method, own in means.items():
            table.append([title, str(count), method, *(figure(name, own.get(name)) for name in shown)])
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


def write_json(path: Path, results: dict) -> None:
    """Whole or not at all; a line an item, so that a change of one shows as one."""
    head = json.dumps({key: value for key, value in results.items() if key != "items"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in results.get("items", ()))
    write_whole(path, f'{head[:-2]},\n "items": [\n{rows}\n ]\n}}\n' if rows else head + "\n")


def write_whole(path: Path, text: str) -> None:
    """Or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _claimed(folder: Path, made: dict, share: Share) -> dict:
    """The folder is this run's from now on; returns what made all that lies in it. Raises `InputError` where it is another's."""
    ours = folder / "made.json"
    other = json.loads(ours.read_text()) if ours.exists() else {}
    if differing := [key for key in other if key in made and other[key] != made[key]]:
        raise InputError("output", f"{folder} holds a run with another {', '.join(differing)}", "give another folder, or delete it to start anew")
    share.wait()
    if share.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(ours, other | made)
    share.wait()
    return other | made


def _kept(folder: Path, position: int) -> dict:
    path = folder / f"{position:06d}.json"
    return json.loads(path.read_text()) if path.exists() else {"id": "", "labels": {}, "figures": {}, "judged": {}, "failed": {}}


def _measure_item(
    items: BenchmarkSet, position: int, methods: Mapping[str, Method], judges: Mapping[str, Judge], model: RefineByAlign | None, seed: int, folder: Path, kept: dict
) -> None:
    """Run methods on one item and keep the figures, and tiles for a contact sheet; one that fails is kept with its problem."""
    kept = kept | {"id": items.lines[position]["id"], "failed": {}}
    try:
        item = items[position]
    except InputError as error:
        kept["failed"] = dict.fromkeys(methods, str(error))
    else:
        kept["labels"] = {"task": item.task, **item.labels}
        outcomes = {}
        for name, method in methods.items():
            try:
                started = time.perf_counter()
                outcomes[name] = method(item, model, seed)
                seconds = round(time.perf_counter() - started, 3)
                figures = _rounded(measure(item, outcomes[name]))
                judged = {judge: _rounded(ask(item, outcomes[name])) for judge, ask in judges.items()}
            except Exception as error:  # whatever it is, a thousand other items are not to be lost for it
                kept["failed"][name] = f"{type(error).__name__}: {error}"
                kept["figures"].pop(name, None), kept["judged"].pop(name, None)
                continue
            kept["figures"][name] = figures | {"seconds": seconds}
            kept["judged"][name] = kept["judged"].get(name, {}) | judged
        save_tiles(folder / f"{position:06d}", item, outcomes)
    write_json(folder / f"{position:06d}.json", kept)


def _rounded(figures: dict) -> dict:
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in figures.items()}
