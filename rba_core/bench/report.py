"""Stored figures as a Markdown page, so that what the documents claim is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError
from .run import HEADINGS, MEASURES, figure


def write_report(sources: list[str | Path], target: str | Path) -> None:
    """Write a page with a section for each JSON file of `rba bench run --json`."""
    sections = ["# Results", "", f"Made by `rba report {' '.join(Path(s).name for s in sources)}` from the JSON files beside this page, each written by `rba bench run SET --json FILE`.", ""]
    for source in sources:
        try:
            sections += section(json.loads(Path(source).read_text()))
        except FileNotFoundError as error:
            raise InputError("results", f"{source} does not exist", "write it with rba bench run SET --json FILE") from error
        except (json.JSONDecodeError, KeyError) as error:
            raise InputError("results", f"{source} is not what rba bench writes ({error})", "write it with rba bench run SET --json FILE") from error
    Path(target).write_text("\n".join(sections))


def section(results: dict) -> list[str]:
    lines = [f"## {results['set']}, {results['n']} items", ""]
    lines += table(results["methods"])
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
