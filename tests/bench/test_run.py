import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import two_processes
from torch import nn

from rba_core import cli
from rba_core.bench import run as bench
from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.methods import METHODS, Outcome
from rba_core.errors import InputError
from rba_core.geometry import Box
from rba_core.postprocessing import MatchedRegion

ROOT = Path(__file__).parents[2]


class Model(nn.Linear):
    """Stands in where only its weights matter."""

    config = "tiny"


def oracle(item, model, seed):
    found = item.correspondence
    return Outcome(item.truth, MatchedRegion(found, Box.around(found), found))


def lost(item, model, seed):
    return Outcome(item.image, None, fell_back=True)


@pytest.fixture(scope="module")
def model():
    return Model(2, 2)


NONE = {"none": METHODS["none"]}
BOTH = NONE | {"detail": oracle}


def figures(results: dict) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in results["items"]]


def test_results(small_set, model, tmp_path):
    steps = []
    results = bench.run(small_set, BOTH, model, tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert results["set"] == "small" and results["n"] == 2 and results["failed"] == []
    assert json.loads(json.dumps(results)) == results
    none, refined = results["methods"]["none"], results["methods"]["detail"]
    assert refined["iou"] == refined["box_iou"] == refined["soft_iou"] == refined["hp_ssim"] == 1
    assert refined["masked_psnr"] == 100 > none["masked_psnr"]
    assert 0 < refined["token_rounding_iou"] < refined["token_bound_iou"] < 1 and refined["token_bound_iou"] > 0.5
    assert none["outside_changed_pixels"] == refined["outside_changed_pixels"] == 0
    assert not {"iou", "box_iou", "soft_iou", "token_rounding_iou", "token_bound_iou", "region_tokens", "fell_back"} & set(none)
    assert [(row["id"], row["method"]) for row in results["items"]] == [("00000", "none"), ("00000", "detail"), ("00001", "none"), ("00001", "detail")]
    assert results["items"][3]["artifact"] == "smear"
    mean = (results["items"][0]["hp_ssim"] + results["items"][2]["hp_ssim"]) / 2
    assert none["hp_ssim"] == pytest.approx(mean)
    assert results["groups"]["artifact"]["smear"]["none"]["hp_ssim"] == results["items"][2]["hp_ssim"]
    assert steps == [(1, 2), (2, 2)]
    assert set(results["made"]) >= {"seed", "set", "code", "model", "machine", "torch", "diffusers"}


def test_an_item_that_fell_back_counts_as_missed(small_set, model, tmp_path):
    results = bench.run(small_set, {"single-stage": lost}, model, tmp_path)
    assert results["methods"]["single-stage"]["fell_back"] == 1
    assert results["items"][0]["iou"] == results["items"][0]["box_iou"] == results["items"][0]["soft_iou"] == 0
    assert results["items"][0]["fell_back"] is True


def test_metrics_need_what_they_compare_with(small_set):
    item = BenchmarkSet(small_set)[0]
    bare = bench.Item(item.id, item.task, {}, item.image, item.mask, item.reference)
    assert bench.measure(bare, oracle(item, None, 0)) == {"fell_back": False, "outside_changed_pixels": 0}
    spoilt = Outcome(torch.where(item.mask > 0.5, item.image, 1 - item.image))
    assert bench.measure(bare, spoilt)["outside_changed_pixels"] > 0.9 * 192 * 192


class Counted:
    """A method that counts its items."""

    def __init__(self):
        self.seen = []

    def __call__(self, item, model, seed):
        self.seen.append((item.id, seed))
        return Outcome(item.image)


class Judge:
    about = "counts red pixels"

    def __call__(self, item, outcome):
        return {"kgain": float((outcome.image[0] > 0.5).sum())}


def test_the_model_is_warmed_up_before_timing(small_set, model, tmp_path):
    detail = Counted()
    results = bench.run(small_set, {"detail": detail}, model, tmp_path, limit=1, seed=5)
    assert detail.seen == [("00000", 5)] * 2
    assert results["n"] == 1 and len(results["items"]) == 1


def test_what_is_done_is_not_done_again(small_set, model, tmp_path):
    detail = Counted()
    first = bench.run(small_set, {"detail": detail}, model, tmp_path, limit=1)
    detail.seen.clear()
    assert bench.run(small_set, {"detail": detail}, model, tmp_path, limit=1)["items"] == first["items"] and not detail.seen
    both = bench.run(small_set, NONE | {"detail": detail}, model, tmp_path)
    assert {id for id, _ in detail.seen} == {"00001"}
    assert [(row["id"], row["method"]) for row in both["items"]] == [("00000", "none"), ("00000", "detail"), ("00001", "none"), ("00001", "detail")]


def test_a_judge_that_comes_later_sees_all_items(small_set, model, tmp_path):
    first = bench.run(small_set, NONE, model, tmp_path, limit=1)
    judged = bench.run(small_set, NONE, model, tmp_path, {"kgain": Judge()})
    assert judged["judges"] == {"kgain": "counts red pixels"} and first["judges"] == {}
    assert [row["kgain"] for row in judged["items"]] == [float((item.image[0] > 0.5).sum()) for item in BenchmarkSet(small_set)]
    assert judged["items"][0] | {"seconds": 0} == first["items"][0] | {"kgain": judged["items"][0]["kgain"], "seconds": 0}
    unjudged = bench.run(small_set, NONE, model, tmp_path)  # what one judge saw of some items only is no mean of all
    assert [row | {"kgain": other["kgain"]} for row, other in zip(unjudged["items"], judged["items"])] == judged["items"] and "kgain" not in unjudged["items"][0]


@pytest.mark.parametrize("change", ["seed", "model", "weights of none"])
def test_a_folder_of_another_run_is_refused(small_set, model, tmp_path, change):
    bench.run(small_set, NONE, model, tmp_path, weights={"none": "a"}, limit=1)
    with pytest.raises(InputError, match=f"holds a run with another {change}"):
        bench.run(small_set, NONE, Model(2, 2) if change == "model" else model, tmp_path, weights={"none": "b"} if "weights" in change else None, seed=change == "seed")


def test_a_method_that_fails_on_an_item_does_not_end_the_run(small_set, model, tmp_path):
    def moody(item, model, seed):
        if item.id == "00000":
            raise RuntimeError("no")
        return Outcome(item.truth)

    results = bench.run(small_set, NONE | {"detail": moody}, model, tmp_path)
    assert results["failed"] == [{"id": "00000", "method": "detail", "problem": "RuntimeError: no"}]
    assert results["n"] == 2 and results["methods"]["detail"]["hp_ssim"] == 1 and len(results["items"]) == 3
    assert bench.run(small_set, BOTH, model, tmp_path)["failed"] == []  # mended: what failed is tried again


def test_an_item_that_cannot_be_read_does_not_end_the_run(tmp_path, model):
    from rba_core.bench.synthetic import make_set

    make_set(tmp_path / "set", 2, seed=0, size=192)
    (tmp_path / "set" / "00000" / "mask.png").write_bytes(b"no picture")
    results = bench.run(tmp_path / "set", NONE, model, tmp_path / "out")
    assert [failure["id"] for failure in results["failed"]] == ["00000"] and "mask.png" in results["failed"][0]["problem"]
    assert [row["id"] for row in results["items"]] == ["00001"]


def test_two_processes_give_the_same_as_one(small_set, model, tmp_path):
    alone = bench.run(small_set, BOTH, model, tmp_path / "one")

    class Share(bench.Share):
        wait = lambda self: None

    assert bench.run(small_set, BOTH, model, tmp_path / "two", share=Share(1, 2)) is None
    shared = bench.run(small_set, BOTH, model, tmp_path / "two", share=Share(0, 2))
    assert figures(shared) == figures(alone)


@pytest.fixture
def options(small_set, tmp_path):
    return lambda out: ["bench", "run", str(small_set), "--methods", "none,telea,sift-warp", "-o", str(tmp_path / out)]


@pytest.fixture
def command(options):
    """`command(out)` runs it here."""
    return lambda out: cli.main(options(out))


@pytest.fixture
def launched(options):
    """`launched(out, *prefix)` starts it in a process of its own."""

    def start(out: str, *prefix: str) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        return subprocess.Popen([sys.executable, "-m", *prefix, "rba_core.cli", *options(out)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    return start


def test_accelerate_starts_processes_with_shares_of_their_own(tmp_path):
    pytest.importorskip("accelerate")
    script = tmp_path / "share.py"
    script.write_text("from rba_core.bench.run import Share\nshare = Share.of_this_process()\nshare.wait()\nopen(f'{__file__}.{share.rank}', 'w').write(str(share))\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", *two_processes(), str(script)], env=environment, check=True, capture_output=True)
    assert [(tmp_path / f"share.py.{rank}").read_text() for rank in (0, 1)] == [str(bench.Share(rank, 2)) for rank in (0, 1)]
    assert bench.Share.of_this_process() == bench.Share(0, 1)


def test_a_killed_run_goes_on_and_accelerate_shares_it(command, launched, tmp_path):
    """Real processes: one killed after its first item and started anew, and two under accelerate, against one left alone."""
    pytest.importorskip("accelerate")
    killed = launched("killed")
    deadline = time.time() + 120
    while not (tmp_path / "killed" / "small" / "000000.json").exists() and time.time() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "small.json").exists()
    assert command("alone") == command("killed") == 0 and launched("two", *two_processes(), "-m").wait() == 0
    alone, resumed, two = (json.loads((tmp_path / name / "small.json").read_text()) for name in ("alone", "killed", "two"))
    assert figures(resumed) == figures(alone) == figures(two) and len(alone["items"]) == 6
    assert (tmp_path / "two" / "report.html").exists() and (tmp_path / "two" / "small.jpg").exists()


@pytest.mark.parametrize(
    "methods, model, limit, problem",
    [({"detail": oracle}, None, None, "missing for detail"), (NONE, None, 0, "limit: is 0")],
)
def test_bad_arguments(small_set, methods, model, limit, problem, tmp_path):
    with pytest.raises(InputError, match=problem):
        bench.run(small_set, methods, model, tmp_path, limit=limit)


def test_table(small_set, model, tmp_path):
    table = bench.format_table(bench.run(small_set, BOTH, model, tmp_path))
    lines = [line.split() for line in table.splitlines()]
    assert lines[0][:4] == ["items", "n", "method", "PSNR"]
    assert lines[2][:4] == ["all", "2", "none", lines[2][3]]
    assert lines[3][:2] == ["detail", "100.00"]
    assert any(line[:3] == ["difficulty", "easy", "2"] for line in lines if line)


def test_the_interval_of_a_mean():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator).tolist()
    low, high = bench.interval(values)
    mean, error = sum(values) / 400, 1.96 / 20
    assert low == pytest.approx(mean - error, abs=0.02) and high == pytest.approx(mean + error, abs=0.02)
    assert bench.interval([0.5, 0.5]) == (0.5, 0.5) and bench.interval(values) == (low, high)


@pytest.mark.parametrize(
    "options, problem",
    [
        (["{set}", "{set}"], "sets: have one name twice"),
        (["{set}", "--methods", "magic"], "'magic' is not known"),
        (["{set}", "--weights", "dift"], "weights: are given as 'dift'; write NAME=PATH"),
        (["{set}", "-o", "{set}/index.jsonl"], "out: .*index.jsonl is a file"),
    ],
)
def test_what_the_command_refuses(small_set, tmp_path, monkeypatch, capsys, options, problem):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "run", *(option.format(set=small_set) for option in options)]) == 2
    assert re.search(problem, capsys.readouterr().err)


def test_a_cancelled_run_says_that_it_can_go_on(small_set, tmp_path, monkeypatch, capsys):
    def cancelled(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", cancelled)
    assert cli.main(["bench", "run", str(small_set), "-o", str(tmp_path)]) == 130
    assert "cancelled, the same command goes on from here" in capsys.readouterr().err


def test_sets_are_made_with_photos_and_light(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("rba_core.bench.synthetic.make_set", lambda folder, n, seed, split, size, photos, light, workers: seen.update(photos=photos, light=light))
    Image.new("RGB", (600, 500), "red").save(tmp_path / "photo.png")
    assert cli.main(["bench", "make", str(tmp_path / "set"), "--photos", str(tmp_path), "--light", "1.5"]) == 0
    assert seen["light"] == 1.5 and len(seen["photos"]) == 1 and seen["photos"][0].shape[2] == 3
    assert cli.main(["bench", "make", str(tmp_path / "set")]) == 0 and seen == {"photos": (), "light": 1.0}
