"""Stored figures as a page, Markdown or self-contained HTML, so that what the documents claim is what was measured."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..imageio import write_picture
from .doubt import KINDS, doubt_table
from .grid_search import CURVES, HEAT_MAP
from .memory import WORK, memory_setting, memory_tables, memory_title
from .methods import METHODS, NEED_WEIGHTS
from .run import HEADINGS, MEASURES, by_method, figure, interval, write_whole
from .sheet import caption, columns, contact_sheet, tile_of
from .speed import speed_meanings, speed_sentences, speed_setting, speed_table, speed_title
from .steps import NEAR, steps_table
from .study import NOTE, study_table

TITLE = "Results"
UNCERTAIN = ("masked_psnr", "masked_ssim", "hp_ssim", "detail_ncc", "iou")
"""Measures whose tables give a confidence interval."""
LOOKED_AT = 40
"""Items of a run on an HTML page: those with the lowest hp-SSIM."""
ON_A_SHEET = 12
"""Items on a run's contact sheet, those again."""
SMALL = 2
"""Tokens, each way, up to which a region is small."""
COMPARED = ("none", "telea", "sift-warp", "paper", "detail")
"""Methods on it, where the run has more; the HTML page shows all."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 88rem; padding: 0 1rem; color: #1b1b1f; background: #fff }
h1, h2, h3 { line-height: 1.2; margin: 2.2em 0 .6em } h1 { margin-top: 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .25em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd } th:first-child, td:first-child { text-align: left }
td small { color: #777 } img { max-width: 100% } code { background: #eee; padding: 0 .25em }
.sheet { overflow-x: auto } .row { display: flex; gap: 6px; width: max-content } .row figure { margin: 0; width: 150px } .row img { width: 150px; display: block }
figcaption { font-size: 11px; color: #777 } .words { font-size: 12px; margin: .9em 0 .2em }
@media (prefers-color-scheme: dark) { body { color: #e6e6ea; background: #17171a } th, td { border-color: #3a3a40 } code { background: #2a2a30 } td small, figcaption { color: #999 } }
"""


def write_report(sources: Sequence[str | Path], target: str | Path) -> None:
    """Write a page with a section for each JSON file of `rba bench run`, `doubt`, `speed`, `memory`, `grid-search`, `steps`
    and `study-table`; a folder stands for all of them in it. HTML holds its pictures, Markdown refers to those beside the JSON files."""
    target = Path(target)
    page = Html() if target.suffix.lower() in (".html", ".htm") else Markdown(target.parent)
    named = " ".join(Path(source).name for source in sources)
    page.heading(1, TITLE)
    page.text(f"Made by `rba report {named}` from JSON files, each written by `rba bench run`, `doubt`, `speed`, `memory`, `grid-search`, `steps` or `study-table`. In brackets 95% confidence intervals, by bootstrap over items.")
    for source in (path for given in sources for path in _files(Path(given))):
        try:
            results = json.loads(source.read_text())
            section_of(results)(page, results, source)
        except FileNotFoundError as error:
            raise InputError("results", f"{source} does not exist", "write it with rba bench run SET -o DIR") from error
        except (json.JSONDecodeError, KeyError) as error:
            raise InputError("results", f"{source} is not what rba bench writes ({error})", "write it with rba bench run SET -o DIR") from error
    write_whole(target, page.written())


def section_of(results: dict):
    for key, section in (("gamma", grid_section), ("steps", steps_section), ("kinds", doubt_section), ("pairs", study_section), ("speed", speed_section), ("memory", memory_section)):
        if key in results:
            return section
    return run_section


def _files(given: Path) -> list[Path]:
    """Of a folder, its JSON files and those of its folders; not what a run keeps of each item."""
    if not given.is_dir():
        return [given]
    return sorted(given.glob("*.json")) + sorted(path for path in given.glob("*/*.json") if not (path.parent / "made.json").exists())


def grid_section(page: Page, results: dict, source: Path) -> None:
    """Algorithm 1."""
    best = results["best"]
    paper = max(map(max, results["gamma"]))
    page.heading(2, f"Grid search over t and l: {results['set']}, {results['n']} items")
    page.text(
        f"Mean IoU of M* over timestep and layer at the first level of alignment, {results['model']}: by what all cells agree on, best {best['miou']:.3f} "
        f"at t = {best['timestep']}, layer {best['layer']}; by Eq. 5 alone, best {paper:.3f}."
    )
    page.picture(source.with_name(HEAT_MAP), "Mean IoU over timestep and layer")
    page.picture(source.with_name(CURVES), "Mean IoU by layer and by timestep")


def steps_section(page: Page, results: dict, source: Path) -> None:
    page.heading(2, f"Denoising steps: {results['set']}, {results['n']} items")
    page.table(steps_table(results))
    page.text(f"{results['fewest']} steps stay within {NEAR:.0%} of the most in every metric ({results['model']}).")


def doubt_section(page: Page, results: dict, source: Path) -> None:
    page.heading(2, f"Pairs made to fail: {results['set']}, {results['n']} items")
    page.table(doubt_table(results))
    page.text(f"Registrations are used from a confidence of {results['min_confidence']:g} ({results['model']}). The right reference has more confidence than the wrong object's in {results['told']:.0%}.")
    page.points([f"**{kind}**: {KINDS[kind]}" for kind in results["kinds"]])


def study_section(page: Page, results: dict, source: Path) -> None:
    page.heading(2, f"User study: {results['set']}, {results['n']} items, {results['participants']} participants ({results['model']})")
    page.table(study_table(results))
    page.text(NOTE)


def speed_section(page: Page, results: dict, source: Path) -> None:
    page.heading(2, f"Speed: {speed_title(results)}")
    page.text(speed_setting(results))
    page.table(speed_table(results))
    page.points(speed_sentences(results))
    page.points(speed_meanings(results))


def memory_section(page: Page, results: dict, source: Path) -> None:
    page.heading(2, f"Memory: {memory_title(results)}")
    page.text(memory_setting(results))
    parts, settings = memory_tables(results)
    page.table(settings)
    page.table(parts)
    page.points([f"**{work}**: {meaning}" for work, meaning in WORK.items()])


def run_section(page: Page, results: dict, source: Path) -> None:
    """What `rba bench run` measured on one set; with tiles beside the file, its contact sheet, failures first."""
    rows, methods = results["items"], list(results["methods"])
    page.heading(2, f"{results['set']}, {results['n']} items")
    if "made" in results:
        page.text("Made with " + ", ".join(f"{name} {value}" for name, value in results["made"].items()) + ".")
    page.table(means_table(rows, methods, intervals=True))
    page.points([f"**{name}**: " + " ".join((METHODS | NEED_WEIGHTS)[name].__doc__.split("\n\n")[0].split()) for name in methods])
    page.points([*results.get("judges", {}).values(), *(f"{name}: not available: {reason}" for name, reason in results.get("unavailable", {}).items())])
    against = differences_table(rows, methods)
    if len(against) > 1:
        page.text("`detail` less each other method, item by item:")
        page.table(against)
    small = small_regions_table(rows, methods)
    if len(small) > 1:
        page.text("Small regions, where whole tokens are coarse: `rounded` is M_gt in whole tokens, `bound` the best that a map over the tokens can say.")
        page.table(small)
    chart = source.with_suffix(".png")
    draw_means(rows, methods, chart)
    page.picture(chart, "Means and 95% confidence intervals")
    if results.get("failed"):
        page.text(f"Left out, as a method failed on an item: {len(results['failed'])}.")
        page.points([f"{failure['method']} on {failure['id']}: {failure['problem']}" for failure in results["failed"][:20]])
    page.sheet(source, rows, methods)
    for label, values in results["groups"].items():
        for value in values:
            own = [row for row in rows if str(row.get(label)) == value]
            page.heading(3, f"{label}: {value} ({len({row['id'] for row in own})})")
            page.table(means_table(own, methods, intervals=False))


def means_table(rows: Sequence[dict], methods: Sequence[str], intervals: bool) -> list[list[str]]:
    """A line a method: its means, and of UNCERTAIN measures the interval. How many items, where not all methods have all."""
    means = by_method(methods, rows)
    counts = {name: len({row["id"] for row in rows if row["method"] == name}) for name in methods}
    shown = [name for name in MEASURES if any(name in own for own in means.values())]
    uneven = len(set(counts.values())) > 1
    table = [["method", *["n"] * uneven, *(HEADINGS[name] for name in shown)]]
    for method, own in means.items():
        cells = []
        for name in shown:
            cell = figure(name, own.get(name))
            values = [row[name] for row in rows if row["method"] == method and name in row]
            if intervals and name in UNCERTAIN and len(values) > 1:
                cell += " [" + ", ".join(figure(name, bound) for bound in interval(values)) + "]"
            cells.append(cell)
        table.append([method, *[str(counts[method])] * uneven, *cells])
    return table


def differences_table(rows: Sequence[dict], methods: Sequence[str], ours: str = "detail") -> list[list[str]]:
    """Paired differences of `ours` and every other method: mean, interval, and on how many items ours is the better."""
    shown = ("hp_ssim", "detail_ncc")
    own = {row["id"]: row for row in rows if row["method"] == ours}
    table = [["against", *(title for name in shown for title in (HEADINGS[name], "better on"))]]
    for method in methods:
        cells = []
        for name in shown:
            pairs = [(own[row["id"]][name], row[name]) for row in rows if row["method"] == method and row["id"] in own and name in row and name in own[row["id"]]]
            if len(pairs) > 1:
                gains = np.subtract(*zip(*pairs))
                low, high = interval(gains)
                cells += [f"{gains.mean():+.3f} [{low:+.3f}, {high:+.3f}]", f"{(gains > 0).mean():.0%}"]
        if method != ours and cells:
            table.append([method, *cells])
    return table


def small_regions_table(rows: Sequence[dict], methods: Sequence[str]) -> list[list[str]]:
    """IoU of each method that aligns over the smallest third of the regions, and over those of at most SMALL x SMALL tokens, against
    what tokens would allow there."""
    sizes = {row["id"]: row["region_tokens"] for row in rows if "region_tokens" in row}
    smallest = set(sorted(sizes, key=sizes.get)[: len(sizes) // 3])
    small = {id for id, size in sizes.items() if size <= SMALL}
    table = [["regions", "n", "method", "IoU", "rounded", "above it", "bound", "above it"]]
    for words, chosen in (("smallest third", smallest), (f"up to {SMALL} x {SMALL} tokens", small)):
        for method in methods:
            own = [row for row in rows if row["method"] == method and row["id"] in chosen and "iou" in row]
            if not own:
                continue
            cells = []
            for name in ("token_rounding_iou", "token_bound_iou"):
                cells += [f"{np.mean([row[name] for row in own]):.3f}", f"{np.mean([row['iou'] > row[name] for row in own]):.0%}"]
            table.append([words, str(len(own)), method, f"{np.mean([row['iou'] for row in own]):.3f}", *cells])
    return table


def draw_means(rows: Sequence[dict], methods: Sequence[str], path: Path) -> None:
    """The UNCERTAIN measures of each method with their intervals, as PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("charts", "are drawn by matplotlib, which is not installed", 'pip install "refine-by-align[bench]"') from error

    shown = [name for name in UNCERTAIN if any(name in row for row in rows)]
    if not shown:
        return
    chart = Figure(figsize=(2.6 * len(shown) + 1.2, 0.32 * len(methods) + 1), layout="constrained")
    axes = chart.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, shown):
        for place, method in enumerate(methods):
            values = [row[name] for row in rows if row["method"] == method and name in row]
            if values:
                mean = float(np.mean(values))
                low, high = interval(values) if len(values) > 1 else (mean, mean)
                colour = "#d1495b" if method == "detail" else "#5b6770"
                axis.errorbar(mean, place, xerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]], fmt="o", color=colour, capsize=3, markersize=5)
        axis.set_title(HEADINGS[name], fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=9)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    chart.savefig(path, dpi=110)


def worst_first(rows: Sequence[dict], methods: Sequence[str]) -> list[dict[str, dict]]:
    """The items' figures by method, those where `detail`, or else the last method, has the lowest hp-SSIM first."""
    by_item = {}
    for row in rows:
        by_item.setdefault(row["id"], {})[row["method"]] = row
    shown = "detail" if "detail" in methods else methods[-1]
    return sorted(by_item.values(), key=lambda own: own.get(shown, {}).get("hp_ssim", -1.0))


def kept_tiles(source: Path) -> dict[str, Path]:
    """Folders of tiles by item, which `rba bench run` left beside a results file; none where it stands alone."""
    return {json.loads(path.read_text())["id"]: path.with_suffix("") for path in source.with_suffix("").glob("[0-9]*.json")}


def contact_sheet_of(results: dict, source: Path) -> None:
    """Write the items with the worst results as a picture beside their results file, from the tiles that lie there."""
    folders, methods = kept_tiles(source), list(results["methods"])
    shown = [name for name in methods if name in COMPARED] if "detail" in methods else methods[-len(COMPARED) :]
    chosen = worst_first([row for row in results["items"] if row["method"] in shown], shown)[:ON_A_SHEET]
    rows = [(folders[next(iter(own.values()))["id"]], caption(own)) for own in chosen]
    write_picture(source.with_suffix(".jpg"), contact_sheet(rows, shown), quality=82)


class Markdown:
    """A page for a repository; folder, where it will lie."""

    def __init__(self, folder: Path):
        self.folder, self.lines = folder, []

    def heading(self, level: int, words: str) -> None:
        self.lines += ["#" * level + " " + words, ""]

    def text(self, words: str) -> None:
        self.lines += [words, ""]

    def points(self, points: Sequence[str]) -> None:
        self.lines += [f"- {point}" for point in points] + [""] * bool(points)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        self.lines += [*markdown_table(rows), ""]

    def picture(self, path: Path, words: str) -> None:
        if path.exists():
            self.lines += [f"![{words}]({Path(os.path.relpath(path, self.folder)).as_posix()})", ""]

    def sheet(self, source: Path, rows: Sequence[dict], methods: Sequence[str]) -> None:
        """The contact sheet stored beside the results."""
        self.picture(source.with_suffix(".jpg"), "Contact sheet, failures first: image, M* (white) and M_gt (green), result, truth, then the masked part enlarged")

    def written(self) -> str:
        return "\n".join(self.lines)


class Html:
    """A page in one file."""

    def __init__(self):
        self.parts = []

    def heading(self, level: int, words: str) -> None:
        self.parts.append(f"<h{level}>{self._inline(words)}</h{level}>")

    def text(self, words: str) -> None:
        self.parts.append(f"<p>{self._inline(words)}</p>")

    def points(self, points: Sequence[str]) -> None:
        if points:
            self.parts.append("<ul>" + "".join(f"<li>{self._inline(point)}</li>" for point in points) + "</ul>")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        head, *body = ("".join(f"<{tag}>{self._inline(cell)}</{tag}>" for cell in row) for tag, row in zip(["th"] + ["td"] * len(rows), rows))
        lines = "".join(f"<tr>{row}</tr>" for row in body)
        self.parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>")

    def picture(self, path: Path, words: str) -> None:
        if path.exists():
            self.parts.append(f'<p><img alt="{escape(words)}" src="{self._data(path)}"></p>')

    def sheet(self, source: Path, rows: Sequence[dict], methods: Sequence[str]) -> None:
        """Tiles of the items where the result is worst."""
        folders, shown = kept_tiles(source), columns(methods)
        chosen = [own for own in worst_first(rows, methods) if next(iter(own.values()))["id"] in folders][:LOOKED_AT]
        if not chosen:
            return
        self.heading(3, f"Failures first: the {len(chosen)} items with the lowest hp-SSIM")
        for own in chosen:
            folder = folders[next(iter(own.values()))["id"]]
            tiles = [(heading, tile) for heading, name in shown.items() if (tile := tile_of(folder, name))]
            figures = "".join(f'<figure><img alt="{escape(heading)}" src="{self._data(tile)}"><figcaption>{escape(heading)}</figcaption></figure>' for heading, tile in tiles)
            self.parts.append(f'<p class="words">{escape(caption(own))}</p><div class="sheet"><div class="row">{figures}</div></div>')

    def written(self) -> str:
        return f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{TITLE}</title><style>{STYLE}</style><body>' + "\n".join(self.parts) + "</body></html>\n"

    def _inline(self, words: str) -> str:
        words = escape(words, quote=False)
        for pattern, tags in ((r"\*\*(.+?)\*\*", r"<b>\1</b>"), (r"`(.+?)`", r"<code>\1</code>"), (r"(\[[^]]*\])", r"<small>\1</small>")):
            words = re.sub(pattern, tags, words)
        return words

    def _data(self, path: Path) -> str:
        kind = "jpeg" if path.suffix == ".jpg" else "png"
        return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


Page = Markdown | Html


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines, the first row its heading."""
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
