"""How many denoising steps are enough: the figures of `detail` over the number of steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..model import RefineByAlign
from ..refinement import Progress
from .dataset import BenchmarkSet
from .methods import detail
from .run import HEADINGS, PIXEL_METRICS, figure, measure

STEPS = (1, 2, 4, 8, 16, 50)
NEAR = 0.02
"""Loss against the most steps, as a share of each metric, that is too small to pay for."""


def compare_steps(
    set_folder: str | Path, model: RefineByAlign, steps: Sequence[int] = STEPS, limit: int | None = None, seed: int = 0, progress: Progress | None = None
) -> dict:
    """The pixel metrics of `detail` by number of steps, over the first `limit` items of a set (default: all) that have a truth.

    progress   called with (outcomes done, outcomes in all)
    returns    {"set", "n", "steps": {"1": means, ...}, "fewest"}, ready for JSON; fewest, the smallest number that
               stays within NEAR of the largest in every metric

    Raises `InputError` for a set without truth.
    """
    items = BenchmarkSet(set_folder)
    chosen = items.having("truth", limit)
    sums = {count: dict.fromkeys((*PIXEL_METRICS, "seconds"), 0.0) for count in sorted(steps)}
    detail(items[chosen[0]], model, seed, steps=1)  # the first pass also pays for memory and kernels
    done = 0
    for place in chosen:
        item = items[place]
        for count, means in sums.items():
            started = time.perf_counter()
            outcome = detail(item, model, seed, steps=count)
            figures = {"seconds": time.perf_counter() - started} | measure(item, outcome)
            for name in means:
                means[name] += figures[name] / len(chosen)
            done += 1
            if progress:
                progress(done, len(chosen) * len(sums))
    return {"set": Path(set_folder).resolve().name, "n": len(chosen), "steps": {str(count): means for count, means in sums.items()}, "fewest": fewest(sums)}


def fewest(means: dict[int, dict[str, float]]) -> int:
    """Of numbers of steps, the smallest whose every metric is within NEAR of the largest number's, or better."""
    most = means[max(means)]
    return min(count for count, own in means.items() if all(own[name] >= most[name] - NEAR * abs(most[name]) for name in PIXEL_METRICS))


def steps_table(results: dict) -> list[list[str]]:
    """What `compare_steps` returns as rows of a table, the fewest steps that are enough in bold."""
    shown = (*PIXEL_METRICS, "seconds")
    rows = [["steps", *(HEADINGS[name] for name in shown)]]
    for count, means in results["steps"].items():
        rows.append([f"**{count}**" if int(count) == results["fewest"] else count, *(figure(name, means[name]) for name in shown)])
    return rows
