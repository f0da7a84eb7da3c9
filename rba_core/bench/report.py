"""Stored figures as a Markdown page, so that what the documents claim is what was measured."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

from ..errors import InputError
from .doubt import KINDS, doubt_table
from .grid_search import CURVES, HEAT_MAP
from .methods import METHODS
from .run import HEADINGS, MEASURES, figure
from .steps import NEAR, steps_table
from .study import study_table


def write_report(sources: list[str | Path], target: str | Path) -> None:
    """Write a page with a section for each JSON file of `rba bench run`, `doubt`, `grid-search`, `steps` and `study-table`; a
    folder stands for all of them in it."""
    named = " ".join(Path(source).name for source in sources)
    lines = ["# Results", "", f"Made by `rba report {named}` from JSON files beside this page, each written by `rba bench run`, `doubt`, `grid-search`, `steps` or `study-table`.", ""]
    for source in (path for given in sources for path in _files(Path(given))):
        try:
            results = json.loads(source.read_text())
            if "gamma" in results:
                lines += grid_section(results, _relative(source.parent, target))
            else:
                lines += steps_section(results) if "steps" in results else doubt_section(results) if "kinds" in results else study_section(results) if "pairs" in results else section(results)
        except FileNotFoundError as error:
            raise InputError("results", f"{source} does not exist", "write it with rba bench run SET --json FILE") from error
        except (json.JSONDecodeError, KeyError) as error:
            raise InputError("results", f"{source} is not what rba bench writes ({error})", "write it with rba bench run SET --json FILE") from error
    Path(target).write_text("\n".join(lines))


def _files(given: Path) -> list[Path]:
    return sorted(given.rglob("*.json")) if given.is_dir() else [given]


def _relative(folder: Path, target: str | Path) -> str:
    return Path(os.path.relpath(folder, Path(target).parent)).as_posix()


def grid_section(results: dict, folder: str) -> list[str]:
    """Algorithm 1; folder, where its pictures are as seen from the page."""
    best = results["best"]
    paper = max(map(max, results["gamma"]))
    chosen = (
        f"Mean IoU of M* over timestep and layer at the first level of alignment, {results['model']}: by what all cells agree on, best {best['miou']:.3f} "
        f"at t = {best['timestep']}, layer {best['layer']}; by Eq. 5 alone, best {paper:.3f}."
    )
    pictures = [f"![Mean IoU over timestep and layer]({folder}/{HEAT_MAP})", "", f"![Mean IoU by layer and by timestep]({folder}/{CURVES})", ""]
    return [f"## Grid search over t and l: {results['set']}, {results['n']} items", "", chosen, "", *pictures]


def steps_section(results: dict) -> list[str]:
    enough = f"{results['fewest']} steps stay within {NEAR:.0%} of the most in every metric ({results['model']})."
    return [f"## Denoising steps: {results['set']}, {results['n']} items", "", *steps_table(results), "", enough, ""]


def doubt_section(results: dict) -> list[str]:
    told = f"Registrations are used from a confidence of {results['min_confidence']:g} ({results['model']}). The right reference has more confidence than the wrong object's in {results['told']:.0%}."
    kinds = [f"- **{kind}**: {KINDS[kind]}" for kind in results["kinds"]]
    return [f"## Pairs made to fail: {results['set']}, {results['n']} items", "", *doubt_table(results), "", told, "", *kinds, ""]


def study_section(results: dict) -> list[str]:
    title = f"## User study: {results['set']}, {results['n']} items, {results['participants']} participant{'s' * (results['participants'] != 1)} ({results['model']})"
    return [title, "", *study_table(results), ""]


def section(results: dict) -> list[str]:
    lines = [f"## {results['set']}, {results['n']} items", ""]
    lines += table(results["methods"])
    lines += [f"- **{name}**: {inspect.cleandoc(METHODS[name].__doc__).splitlines()[0]}" for name in results["methods"]] + [""]
    for label, values in results["groups"].items():
        for value, by_method in values.items():
            count = len({row["id"] for row in results["items"] if str(row.get(label)) == value})
            lines += [f"### {label}: {value} ({count})", ""] + table(by_method)
    return lines


def table(by_method: dict[str, dict[str, float]]) -> list[str]:
    shown = [name for name in MEASURES if any(name in means for means in by_method.values())]
    rows = [["method", *(HEADINGS[name] for name in shown)], ["---"] * (len(shown) + 1)]
    rows += [[method, *(figure(name, means.get(name)) for name in shown)] for method, means in by_method.items()]
    return ["| " + " | ".join(row) + " |" for row in rows] + [""]
