import json
import re
import shutil
import time
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from chromium import Chromium, find_chromium
from scipy import stats

from rba_core import cli
from rba_core.bench import study
from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.methods import METHODS, Outcome
from rba_core.bench.report import markdown_table, write_report
from rba_core.errors import InputError
from rba_core.imageio import read_image, to_bytes

NAMES = ("zebra", "okapi", "lemur")


def results(items):
    for item in items:
        yield item, dict(zip(NAMES, (Outcome(item.truth), Outcome(item.image), Outcome((item.image + item.truth) / 2))))


@pytest.fixture
def folder(small_set, tmp_path):
    study.write_study(tmp_path / "study", results(BenchmarkSet(small_set)), seed=1, set="small", model="rba-tiny")
    return tmp_path / "study"


def the_key(folder):
    return json.loads((folder / "key.json").read_text())


def on_the_page(folder):
    return json.loads(re.search(r'<script id="study" type="application/json">(.*?)</script>', (folder / "page" / "index.html").read_text(), re.DOTALL)[1])


def test_a_trial_for_every_item_pair_and_question(folder):
    key = the_key(folder)
    trials = [(trial["question"], trial["item"], frozenset((trial["left"], trial["right"]))) for trial in key["trials"].values()]
    assert set(trials) == {(question, item, frozenset(pair)) for question in study.QUESTIONS for item in ("00000", "00001") for pair in combinations(NAMES, 2)}
    assert len(trials) == 12 and [question for question, *_ in trials] == ["realism"] * 6 + ["identity"] * 6
    assert key["methods"] == list(NAMES) and key["set"] == "small" and key["model"] == "rba-tiny"


def test_the_page_shows_what_the_key_says(folder, small_set):
    items = {item.id: item for item in BenchmarkSet(small_set)}
    key, page = the_key(folder), on_the_page(folder)
    assert page["id"] == key["study"] and [trial["id"] for trial in page["trials"]] == list(key["trials"])

    def pixels(name):
        return to_bytes(read_image(folder / "page" / "pictures" / name).rgb)

    for trial in page["trials"]:
        meant = key["trials"][trial["id"]]
        item = items[meant["item"]]
        (_, outcomes), = results([item])
        for side in ("left", "right"):
            assert np.array_equal(pixels(trial[side]), to_bytes(outcomes[meant[side]].image))
        x, y, width, height = trial["zoom"]
        assert trial["size"] == [192, 192] and item.mask[y : y + height, x : x + width].sum() == item.mask.sum() and width == height < 192
        assert trial["question"] == meant["question"] and ("reference" in trial) == (meant["question"] == "identity")
        if "reference" in trial:
            x, y, width, height = trial["reference"]["zoom"]
            assert np.array_equal(pixels(trial["reference"]["picture"]), to_bytes(item.reference))
            assert item.correspondence[y : y + height, x : x + width].sum() == item.correspondence.sum()


def test_the_page_names_no_method_and_loads_nothing_from_elsewhere(folder):
    html = (folder / "page" / "index.html").read_text()
    files = [str(path.relative_to(folder)) for path in (folder / "page").rglob("*.*")]
    assert len(files) == 1 + 2 * 4  # three results and a reference an item
    for name in (*NAMES, *METHODS, "00000", "key"):
        assert not re.search(rf"(?<![\w-]){name}(?![\w-])", html.partition("<script>")[0]) and not any(name in file for file in files)
    assert not any(name in html for name in (*NAMES, "key.json", "http:", "https:", "//cdn", "import ", "fetch("))


def many(item, count):
    small = replace(item, image=item.image[:, :32, :32], truth=item.truth[:, :32, :32], mask=torch.eye(32), reference=item.reference[:, :32, :32], correspondence=None)
    return [replace(small, id=f"item {number}") for number in range(count)]


def test_the_seed_decides_order_and_sides_and_sides_are_even(small_set, tmp_path):
    items = many(BenchmarkSet(small_set)[0], 9)
    keys = [study.write_study(tmp_path / name, results(items), seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert keys[0] == keys[1] and keys[0]["study"] != keys[2]["study"]
    assert list(keys[0]["trials"].values()) != list(keys[2]["trials"].values())
    for question in study.QUESTIONS:
        for pair in combinations(NAMES, 2):
            own = [trial for trial in keys[0]["trials"].values() if trial["question"] == question and {trial["left"], trial["right"]} == set(pair)]
            lefts = [trial["left"] for trial in sorted(own, key=lambda trial: trial["item"])]
            assert sorted(map(lefts.count, pair)) == [4, 5]
            assert set(lefts[::2]) == set(pair)  # the tasks of a set take turns, too
        order = [(frozenset((trial["left"], trial["right"])), trial["item"]) for trial in keys[0]["trials"].values() if trial["question"] == question]
        assert sum(a != b for (a, _), (b, _) in zip(order, order[1:])) > 8  # pairs take turns
        assert [item for pair, item in order if pair == order[0][0]] != [item.id for item in items]
    assert all(trial["reference"]["zoom"] is None for trial in on_the_page(tmp_path / "a")["trials"] if "reference" in trial)  # no M_gt


def test_a_single_item_does_not_decide_who_stands_left(small_set, tmp_path):
    items = many(BenchmarkSet(small_set)[0], 1)
    firsts = [list(study.write_study(tmp_path / str(seed), results(items), seed)["trials"].values())[0]["left"] for seed in range(8)]
    assert len(set(firsts)) == 3


def test_a_study_is_whole_or_not_there(small_set, tmp_path):
    items = BenchmarkSet(small_set)

    def broken():
        yield from results([items[0]])
        raise InputError("method", "fails", "mend it")

    with pytest.raises(InputError, match="method: fails"):
        study.write_study(tmp_path / "study", broken())
    with pytest.raises(InputError, match="methods: are zebra alone"):
        study.write_study(tmp_path / "study", [(items[0], {"zebra": Outcome(items[0].image)})])
    assert list(tmp_path.iterdir()) == []
    study.write_study(tmp_path / "study", results(items))
    before = the_key(tmp_path / "study")
    with pytest.raises(InputError, match="output: .*study exists"):
        study.write_study(tmp_path / "study", results(items), seed=5)
    assert the_key(tmp_path / "study") == before


def test_outcomes_runs_the_benchmarks_methods(small_set):
    methods = {"detail": lambda item, model, seed: Outcome(item.image * 0 + seed / 10), "none": METHODS["none"]}
    told = []
    rows = list(study.outcomes(small_set, methods, "model", limit=1, seed=3, progress=lambda *done: told.append(done)))
    assert [(item.id, list(by_method)) for item, by_method in rows] == [("00000", ["detail", "none"])] and told == [(1, 1)]
    assert (rows[0][1]["detail"].image == 0.3).all() and torch.equal(rows[0][1]["none"].image, rows[0][0].image)


# the table


def a_key(items, methods=("zebra", "okapi")):
    trials = [{"item": f"i{item}", "question": question, "left": left, "right": right} for question in study.QUESTIONS for left, right in combinations(methods, 2) for item in range(items)]
    for trial in trials[::2]:
        trial["left"], trial["right"] = trial["right"], trial["left"]
    return {"study": "abc", "set": "small", "model": "rba-tiny", "seed": 0, "methods": list(methods), "trials": {f"{place:04d}": trial for place, trial in enumerate(trials)}}


def answered(key, participant, choose, at="2025-01-01T00:00:00.000Z"):
    """choose(item number, trial) -> the preferred method, "same", or None for no answer."""
    preferred = {trial: choose(int(meant["item"][1:]), meant) for trial, meant in key["trials"].items()}
    sides = {trial: next((side for side in ("left", "right") if key["trials"][trial][side] == method), "same") for trial, method in preferred.items() if method}
    return {"study": "abc", "participant": participant, "answers": [{"trial": trial, "question": "", "choice": side, "seconds": 1, "at": at} for trial, side in sides.items()]}


@pytest.fixture
def tally(tmp_path):
    def call(key, *answers):
        (tmp_path / "key.json").write_text(json.dumps(key))
        for number, content in enumerate(answers):
            (tmp_path / f"{number}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return study.tally(tmp_path / "key.json", [tmp_path / f"{number}.json" for number in range(len(answers))])

    return call


def test_rates_and_p_by_hand(tally):
    key = a_key(4)
    table = [["zebra", "zebra", "same", "okapi"], ["zebra", "same", "zebra", None]]
    results = tally(key, *(answered(key, f"p{number}", lambda item, meant: row[item] if meant["question"] == "identity" else None) for number, row in enumerate(table)))
    assert results["n"] == 4 and results["participants"] == 2 and results["study"] == "abc" and results["model"] == "rba-tiny"
    (row,) = results["pairs"]
    assert (row["question"], row["first"], row["second"]) == ("identity", "zebra", "okapi")
    assert (row["n"], row["participants"], row["items"], row["first_wins"], row["second_wins"], row["ties"]) == (7, 2, 4, 4, 1, 2)
    assert row["first_won"] == pytest.approx(4 / 7) and row["second_won"] == pytest.approx(1 / 7) and row["first_of_decided"] == 0.8
    assert row["p"] == pytest.approx(2 * (1 + 5) / 2**5)  # 4 or 5 of 5, both ends
    assert row["resampled"] == [] and row["intervals"] == dict.fromkeys(study.RATES)
    assert "| identity | zebra | okapi | 7 | 2 | 4 | 57.1 % | 14.3 % | 28.6 % | 80.0 % | 0.375 |" in markdown_table(study.study_table(results))


def test_every_pair_has_its_own_rows(tally):
    key = a_key(3, NAMES)
    order = ["lemur", "zebra", "okapi"]
    results = tally(key, answered(key, "p", lambda item, meant: min((meant["left"], meant["right"]), key=order.index)))
    assert [(row["question"], row["first"], row["second"], row["first_won"]) for row in results["pairs"]] == [
        (question, *pair, won) for question in study.QUESTIONS for pair, won in ((("zebra", "okapi"), 1), (("zebra", "lemur"), 0), (("okapi", "lemur"), 0))
    ]  # fmt: skip


def test_the_last_answer_to_a_trial_counts_whatever_the_files(tally):
    key = a_key(1)
    early, late = (answered(key, "p", lambda item, meant: method, at) for method, at in (("zebra", "2025-01-01T10:00:00.000Z"), ("okapi", "2025-01-01T11:00:00.000Z")))
    both = late | {"answers": early["answers"] + [answer | {"at": early["answers"][0]["at"]} for answer in late["answers"]]}
    for files in ([early, late], [late, early], [both], [late, late]):
        for row in tally(key, *files)["pairs"]:
            assert (row["n"], row["first_wins"], row["second_wins"]) == (1, 0, 1)


def test_all_ties(tally):
    key = a_key(6)
    results = tally(key, answered(key, "p", lambda item, meant: "same"))
    row = results["pairs"][0]
    assert row["ties"] == 6 and row["first_won"] == 0 and row["first_of_decided"] is row["p"] is None and row["intervals"] == dict.fromkeys(study.RATES)
    assert "| realism | zebra | okapi | 6 | 1 | 6 | 0.0 % | 0.0 % | 100.0 % |  |  |" in markdown_table(study.study_table(results))
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize("participants, items, prefers_first, spread, resampled", [
    (1, 64, lambda participant, item: item % 2, 64, ["items"]),
    (40, 3, lambda participant, item: participant % 2, 40, ["participants"]),
    (30, 30, lambda participant, item: participant % 2, 30, ["participants", "items"]),  # 900 votes, but 30 minds
    (30, 30, lambda participant, item: item % 2, 30, ["participants", "items"]),
])  # fmt: skip
def test_the_interval_is_as_wide_as_what_varies(tally, participants, items, prefers_first, spread, resampled):
    key = a_key(items)
    results = tally(key, *(answered(key, f"p{p}", lambda item, meant: ("okapi", "zebra")[prefers_first(p, item)]) for p in range(participants)))
    row = results["pairs"][0]
    low, high = row["intervals"]["first_won"]
    assert row["resampled"] == resampled and row["first_won"] == pytest.approx(0.5, abs=0.01)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / spread**0.5, rel=0.12)
    assert row["intervals"]["first_of_decided"] == row["intervals"]["first_won"]
    assert row["p"] == stats.binomtest(row["first_wins"], row["n"]).pvalue


@pytest.mark.parametrize("spoil, message", [
    (lambda good: "{cut short", "answers: .*0.json is not JSON"),
    (lambda good: [1, 2], "0.json lacks study, participant, answers"),
    (lambda good: good | {"study": "other"}, "0.json is of study other, the key of abc"),
    (lambda good: good | {"answers": 3}, "0.json has no list of answers"),
    (lambda good: good | {"answers": [{"trial": "0000", "choice": "left"}]}, "0.json: an answer lacks at"),
    (lambda good: good | {"answers": [good["answers"][0] | {"trial": "x1"}]}, "0.json: trial 'x1' is not known"),
    (lambda good: good | {"answers": [good["answers"][0] | {"choice": "zebra"}]}, "0.json: trial 0000 is answered 'zebra'"),
])  # fmt: skip
def test_what_the_page_did_not_save_is_told_of(tally, spoil, message):
    key = a_key(2)
    with pytest.raises(InputError, match=message):
        tally(key, spoil(answered(key, "p", lambda item, meant: "zebra")))


def test_missing_files_are_told_of(tmp_path):
    with pytest.raises(InputError, match="key: .*key.json cannot be read"):
        study.tally(tmp_path / "key.json", [])
    (tmp_path / "key.json").write_text(json.dumps(a_key(1)))
    with pytest.raises(InputError, match="answers: .*nowhere.json cannot be read"):
        study.tally(tmp_path / "key.json", [tmp_path / "nowhere.json"])


def test_the_commands(small_set, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "detail", lambda item, model, seed: Outcome(item.truth))
    folder = tmp_path / "study"
    command = ["bench", "study", str(small_set), "-o", str(folder), "--methods", "detail, none", "--model", str(model_folder)]
    assert cli.main(command) == 0
    assert f"{folder}  (4 trials; " in capsys.readouterr().out
    assert cli.main(command) == 2 and "exists" in capsys.readouterr().err
    key = the_key(folder)
    assert key["set"] == "small" and key["model"] == model_folder.name
    choices = {trial: "left" if meant["left"] == "detail" else "right" for trial, meant in key["trials"].items()}
    answers = [{"trial": trial, "choice": choice, "at": "2025-01-01T00:00:00.000Z"} for trial, choice in choices.items()]
    (tmp_path / "a.json").write_text(json.dumps({"study": key["study"], "participant": "p", "answers": answers}))
    (tmp_path / "results").mkdir()
    assert cli.main(["bench", "study-table", str(tmp_path / "a.json"), "--key", str(folder / "key.json"), "--json", str(tmp_path / "results" / "study.json")]) == 0
    row = "| identity | detail | none | 2 | 1 | 2 | 100.0 % | 0.0 % | 0.0 % | 100.0 % | 0.500 |"
    assert row in capsys.readouterr().out
    write_report([tmp_path / "results"], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert f"## User study: small, 2 items, 1 participants ({model_folder.name})" in page and row in page


# the page, in a browser


@pytest.fixture
def browse(tmp_path):
    program = find_chromium()
    if program is None:
        pytest.skip("the study's page is tried in a Chromium or Chrome, and there is none on the PATH")
    running = []

    def start(page):
        running.append(Chromium(program, tmp_path / "profile", tmp_path))
        running[-1].open(page.as_uri())
        return running[-1]

    yield start
    for browser in running:
        if browser.process.poll() is None:
            browser.process.terminate()
            browser.process.wait(20)


READY = "!byId('trial').hidden && shownAt !== null && performance.now() - shownAt > QUICKEST"


def test_answering_in_a_browser(folder, tmp_path, browse):
    key = the_key(folder)
    browser = browse(folder / "page" / "index.html")
    browser.ask("byId('code').value = 'P 1/a'")
    browser.click("#start button")
    browser.click("#part-realism button")
    browser.wait(READY)
    assert browser.ask("document.querySelectorAll('#pictures figure:not([hidden])').length") == 2  # no reference yet
    assert browser.ask("document.querySelector('#left img').naturalWidth") == 192
    browser.press("ArrowLeft")
    browser.wait(READY)
    assert browser.ask("shownAt = performance.now(), answer('left'), state.answers.length") == 1  # a double click
    browser.wait(READY)
    browser.press("ArrowRight")
    browser.wait(READY)
    browser.press("ArrowDown")
    browser.wait(READY)
    browser.click("#right img")
    browser.wait(READY)
    browser.press("Backspace")
    browser.wait(READY + " && position === 3")
    assert browser.ask("document.querySelector('[aria-pressed=true]').dataset.choice") == "right"
    browser.click("button[data-choice=left]")  # second thoughts
    browser.wait(READY + " && position === 4")
    browser.close()

    browser = browse(folder / "page" / "index.html")
    assert browser.ask("byId('told').textContent") == "Comparison 5 of 12"
    browser.click("#part-realism button")
    for _ in range(2):
        browser.wait(READY)
        browser.press("ArrowLeft")
    browser.wait("!byId('part-identity').hidden")
    browser.click("#part-identity button")
    for _ in range(6):
        browser.wait(READY)
        assert browser.ask("byId('reference').querySelectorAll('img').length") == 2
        assert browser.ask("document.documentElement.scrollHeight <= innerHeight && document.documentElement.scrollWidth <= innerWidth")
        browser.press("ArrowRight")
    browser.wait("!byId('done').hidden")
    browser.click("#save")
    saved = tmp_path / f"answers-{key['study']}-P_1_a.json"
    until = time.monotonic() + 20
    while not (saved.exists() and saved.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    answers = json.loads(saved.read_text())
    browser.close()

    sides = ["left", "right", "same", "right", "left", "left", "left"] + ["right"] * 6
    assert answers["participant"] == "P 1/a" and [answer["choice"] for answer in answers["answers"]] == sides
    assert [answer["trial"] for answer in answers["answers"]] == [f"{number:04d}" for number in (1, 2, 3, 4, 4, *range(5, 13))]
    assert all(answer["question"] == key["trials"][answer["trial"]]["question"] and 0.2 < answer["seconds"] < 30 for answer in answers["answers"])
    final = {answer["trial"]: answer["choice"] for answer in answers["answers"]}
    rows = study.tally(folder / "key.json", [saved])["pairs"]
    for row in rows:
        own = [(meant, final[trial]) for trial, meant in key["trials"].items() if meant["question"] == row["question"] and {meant["left"], meant["right"]} == {row["first"], row["second"]}]
        assert row["first_wins"] == sum(meant.get(choice) == row["first"] for meant, choice in own) and row["n"] == 2
    assert sum(row["ties"] for row in rows) == 1


def test_a_missing_picture_is_told_of_and_not_judged(folder, browse):
    shutil.rmtree(folder / "page" / "pictures")
    browser = browse(folder / "page" / "index.html")
    browser.click("#start button")
    browser.click("#part-realism button")
    browser.wait("!byId('missing').hidden")
    browser.press("ArrowLeft")
    assert browser.ask("state.answers.length") == 0 and browser.ask("/^[a-z2-9]{8}$/.test(state.participant)")
    browser.close()
