"""The user study: two methods' results side by side, which is better? A page to answer on, and the table of the answers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import stats
from torch import Tensor

from ..errors import InputError
from ..imageio import to_bytes
from ..model import RefineByAlign
from ..refinement import Progress
from .dataset import BenchmarkSet, Item
from .methods import Method, Outcome
from .sheet import surroundings

QUESTIONS = ("realism", "identity")
"""In the order asked: realism is judged without the reference, so before anyone has seen it."""
CHOICES = ("left", "right", "same")
ENOUGH = 5
"""Participants, or items, from which on a bootstrap over them says something."""
RESAMPLES = 10_000
RATES = ("first_won", "second_won", "first_of_decided")
NOTE = (
    f"In brackets, 95 % intervals by bootstrap over participants and items at once; fewer than {ENOUGH} of either are not resampled, and the interval "
    "then holds for those alone. p: exact sign test on the decided trials."
)


def outcomes(
    set_folder: str | Path, methods: Mapping[str, Method], model: RefineByAlign, limit: int | None = None, seed: int = 0, progress: Progress | None = None
) -> Iterator[tuple[Item, dict[str, Outcome]]]:
    """The first `limit` items of a set (default: all), each with what methods, see `load_methods`, make of it.

    Raises `InputError` for a set that cannot be read.
    """
    items = BenchmarkSet(set_folder)
    chosen = items.having("image", limit)
    for done, position in enumerate(chosen, 1):
        item = items[position]
        yield item, {name: method(item, model, seed) for name, method in methods.items()}
        if progress:
            progress(done, len(chosen))


def write_study(folder: str | Path, results: Iterable[tuple[Item, dict[str, Outcome]]], seed: int = 0, **about: str) -> dict:
    """Write a study of every pair of methods on every item; whole or not at all.

    results   items, each with two or more outcomes by method, say `outcomes(...)`
    seed      of the order of the trials, and of which method stands left: of each pair, as often the one as the other
    about     kept in the key: the set's name, the model's
    returns   the key

    `page/` is for the participants: index.html, which opens without a server, and its pictures, named by their content.
    Nothing in it names a method or an item. `key.json` is for `tally`: which trial, an item, a pair and a question, shows what.

    Raises `InputError` where the folder exists, and for an item with a single outcome.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError("output", f"{folder} exists", "give a new folder: answers belong to one key")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        pictures = unfinished / "page" / "pictures"
        pictures.mkdir(parents=True)
        shown, methods = {}, {}
        for item, by_method in results:
            if len(by_method) < 2:
                raise InputError("methods", f"are {', '.join(by_method)} alone", "name two or more to compare")
            methods |= dict.fromkeys(by_method)
            shown[item.id] = {
                "by_method": {name: _write_picture(pictures, outcome.image) for name, outcome in by_method.items()},
                "size": _size(item.image), "zoom": _zoom(item.mask),
                "reference": {"picture": _write_picture(pictures, item.reference), "size": _size(item.reference), "zoom": _zoom(item.correspondence)},
            }  # fmt: skip
        key = dict(about) | {"seed": seed, "methods": list(methods), "trials": _trials(shown, seed)}
        page = {"trials": [_on_the_page(trial, meant, shown[meant["item"]]) for trial, meant in key["trials"].items()]}
        page["id"] = hashlib.sha256(json.dumps([key, page]).encode()).hexdigest()[:12]
        key = {"study": page["id"]} | key
        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        (unfinished / "page" / "index.html").write_text(template.replace("{{study}}", json.dumps(page)), encoding="utf-8")
        (unfinished / "key.json").write_text(json.dumps(key, indent=1) + "\n")
        unfinished.chmod(0o755)  # mkdtemp's folders are private
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return key


def _trials(shown: dict[str, dict], seed: int) -> dict[str, dict]:
    """Trial ids in the order asked, and what each shows: {"item", "question", "left", "right"}."""
    rng, trials = random.Random(seed), []
    for question in QUESTIONS:
        by_pair = {}
        for name, of in shown.items():
            for pair in combinations(of["by_method"], 2):
                by_pair.setdefault(pair, []).append(name)
        own = []
        for pair, names in by_pair.items():
            rng.shuffle(names)
            turn = rng.randrange(2)
            for place, name in enumerate(names, turn):
                left, right = pair if place % 2 else pair[::-1]
                own.append({"item": name, "question": question, "left": left, "right": right})
        rng.shuffle(own)
        trials += own
    return {f"{place:04d}": trial for place, trial in enumerate(trials, 1)}


def _on_the_page(trial: str, meant: dict, of: dict) -> dict:
    entry = {"id": trial, "question": meant["question"], "size": of["size"], "zoom": of["zoom"]}
    entry |= {side: of["by_method"][meant[side]] for side in ("left", "right")}
    return entry | ({"reference": of["reference"]} if meant["question"] == "identity" else {})


def _write_picture(folder: Path, picture: Tensor) -> str:
    """As PNG under a name made from its content, which is returned."""
    content = io.BytesIO()
    Image.fromarray(to_bytes(picture)).save(content, "png")
    name = hashlib.sha256(content.getvalue()).hexdigest()[:16] + ".png"
    (folder / name).write_bytes(content.getvalue())
    return name


def _size(picture: Tensor) -> list[int]:
    return [picture.shape[-1], picture.shape[-2]]


def _zoom(mask: Tensor | None) -> list[int] | None:
    if mask is None:
        return None
    box = surroundings(mask)
    return [box.x, box.y, box.width, box.height]


def tally(key_file: str | Path, answer_files: Sequence[str | Path]) -> dict:
    """What the participants preferred, by question and pair of methods.

    returns   the key's facts of the study, "n" items, "participants", and "pairs": [{"question", "first", "second", "n" trials
              answered, "participants", "items", "first_wins", "second_wins", "ties", "first_won", "second_won" (shares of n),
              "first_of_decided" (its share of the trials not tied, `None` where all are), "intervals": {rate: [low, high] or `None`},
              "resampled", "p"}], ready for JSON

    A participant is a code; of two answers to one trial the later counts, whatever the files.
    intervals   95 %, percentile bootstrap over participants and items at once, each drawn with replacement and a vote counted
                as often as both were drawn (Owen 2007, the pigeonhole bootstrap). Of fewer than ENOUGH, either is left as it is,
                and the interval holds for those alone, see "resampled". There is none where both are few, nor of votes
                that are all alike
    p           of the exact two-sided sign test on the decided trials, as if they were independent

    Raises `InputError` for a file that is not what the page saves, or of another study.
    """
    key = _read(key_file, "key", "give the key.json that rba bench study wrote", ("study", "methods", "trials"))
    votes = {}
    for path in answer_files:
        for participant, answer in _answers(path, key):
            former = votes.get((participant, answer["trial"]))
            if former is None or answer["at"] >= former["at"]:
                votes[participant, answer["trial"]] = answer
    pairs = []
    for question in QUESTIONS:
        for first, second in combinations(key["methods"], 2):
            own = [(participant, key["trials"][trial], answer["choice"]) for (participant, trial), answer in votes.items()]
            own = [vote for vote in own if vote[1]["question"] == question and {vote[1]["left"], vote[1]["right"]} == {first, second}]
            if own:
                pairs.append({"question": question, "first": first, "second": second} | _preferred(own, first, second))
    about = {name: value for name, value in key.items() if name not in ("methods", "trials", "seed")}
    return about | {"n": len({trial["item"] for trial in key["trials"].values()}), "participants": len({participant for participant, _ in votes}), "pairs": pairs}


def _preferred(votes: list[tuple[str, dict, str]], first: str, second: str) -> dict:
    """The figures of one row from (participant, trial, choice)."""
    participants, items = (sorted(set(column)) for column in zip(*((participant, trial["item"]) for participant, trial, _ in votes)))
    counts = np.zeros((3, len(participants), len(items)))  # won by the first, by the second, neither
    for participant, trial, choice in votes:
        winner = 2 if choice == "same" else (first, second).index(trial[choice])
        counts[winner, participants.index(participant), items.index(trial["item"])] += 1
    wins, losses, ties = (int(total) for total in counts.sum((1, 2)))
    row = {"n": len(votes), "participants": len(participants), "items": len(items), "first_wins": wins, "second_wins": losses, "ties": ties}
    row |= {name: None if np.isnan(rate) else float(rate) for name, rate in zip(RATES, _rates(counts.sum((1, 2))))}
    resampled = {"participants": len(participants) >= ENOUGH, "items": len(items) >= ENOUGH}
    row["intervals"] = _intervals(counts, *resampled.values()) if any(resampled.values()) else dict.fromkeys(RATES)
    row["resampled"] = [name for name, enough in resampled.items() if enough]
    row["p"] = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else None
    return row


def _rates(counts: np.ndarray) -> np.ndarray:
    """RATES `[3, ...]` of counts `[3, ...]`; NaN where there are none to share."""
    with np.errstate(invalid="ignore"):
        return np.stack([counts[0] / counts.sum(0), counts[1] / counts.sum(0), counts[0] / counts[:2].sum(0)])


def _intervals(counts: np.ndarray, over_participants: bool, over_items: bool) -> dict[str, list[float] | None]:
    rng = np.random.default_rng(0)
    drawn = [rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) if many else np.ones((RESAMPLES, n)) for n, many in zip(counts.shape[1:], (over_participants, over_items))]
    rates = _rates(np.stack([(drawn[0] @ votes * drawn[1]).sum(1) for votes in counts]))
    rates = {name: values[~np.isnan(values)] for name, values in zip(RATES, rates)}
    return {name: np.percentile(values, [2.5, 97.5]).tolist() if len(set(values)) > 1 else None for name, values in rates.items()}


def _answers(path: str | Path, key: dict) -> Iterator[tuple[str, dict]]:
    """(participant, answer) of a file that the page saved, checked against the key."""
    remedy = "give files that the study's page saved"
    saved = _read(path, "answers", remedy, ("study", "participant", "answers"))
    if saved["study"] != key["study"]:
        raise InputError("answers", f"{path} is of study {saved['study']}, the key of {key['study']}", "give the files and the key of one study")
    if not isinstance(saved["answers"], list) or not isinstance(saved["participant"], str):
        raise InputError("answers", f"{path} has no list of answers by a participant", remedy)
    for answer in saved["answers"]:
        if lacking := [name for name in ("trial", "choice", "at") if not isinstance(answer, dict) or not isinstance(answer.get(name), str)]:
            raise InputError("answers", f"{path}: an answer lacks {', '.join(lacking)}", remedy)
        if answer["trial"] not in key["trials"]:
            raise InputError("answers", f"{path}: trial {answer['trial']!r} is not known", remedy)
        if answer["choice"] not in CHOICES:
            raise InputError("answers", f"{path}: trial {answer['trial']} is answered {answer['choice']!r}", f"{remedy}: a choice is one of {', '.join(CHOICES)}")
        yield saved["participant"], answer


def _read(path: str | Path, name: str, remedy: str, needed: Sequence[str]) -> dict:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(name, f"{path} cannot be read ({error.strerror})", remedy) from error
    except ValueError as error:
        raise InputError(name, f"{path} is not JSON ({error})", remedy) from error
    if lacking := [field for field in needed if not isinstance(content, dict) or field not in content]:
        raise InputError(name, f"{path} lacks {', '.join(lacking)}", remedy)
    return content


def study_table(results: dict) -> list[list[str]]:
    """What `tally` returns as rows of a table; NOTE says how to read it."""
    heading = ["question", "first", "second", "trials", "participants", "items", "first won", "second won", "no difference", "first, of the decided", "p"]
    rows = [heading]
    for row in results["pairs"]:
        won = [_share(row[name], row["intervals"][name]) for name in RATES]
        counts = [str(row[name]) for name in ("n", "participants", "items")]
        p = "" if row["p"] is None else "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
        rows.append([row["question"], row["first"], row["second"], *counts, *won[:2], _share(row["ties"] / row["n"], None), won[2], p])
    return rows


def _share(rate: float | None, interval: list[float] | None) -> str:
    if rate is None:
        return ""
    return f"{100 * rate:.1f} %" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")
