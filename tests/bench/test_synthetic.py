import json
import math

import pytest
import torch
import torch.nn.functional as F

from rba_core.bench import synthetic
from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.metrics import iou, masked_psnr
from rba_core.bench.synthetic import HELD_OUT, MASK_SHARE, TASKS, PairSampler, Sheet, SheetSampler, SolidPairSampler, make_set
from rba_core.data.artifacts import ARTIFACTS
from rba_core.data.scenes import grid, rotation
from rba_core.data.solids import SolidSampler
from rba_core.errors import InputError


def pairs(task, count, light, size=256):
    kind = SheetSampler if task in ("customization", "try_on") else SolidPairSampler
    found, seed = [], HELD_OUT
    while len(found) < count:
        seed += 1
        pair = kind(seed, size, task, "medium", light).draw()
        if pair is not None:
            found.append(pair)
    return found


@pytest.fixture(scope="module", params=TASKS)
def unlit(request):
    """Pairs without difference in light, so that the views can be compared by colour."""
    return pairs(request.param, 2, light=0.0)


def warped(pair, flow):
    return F.grid_sample(pair.reference[None], flow[None], align_corners=False)[0]


def test_the_flow_carries_the_reference_onto_the_truth(unlit):
    for pair in unlit:
        exact = masked_psnr(warped(pair, pair.flow), pair.truth, pair.mask)
        assert exact > 20
        for shift in ((4, 0), (-4, 0), (0, 4), (0, -4)):  # two pixels
            moved = pair.flow + torch.tensor(shift) / 256
            assert masked_psnr(warped(pair, moved), pair.truth, pair.mask) < exact - 1


def test_correspondence_is_the_mask_carried_by_the_flow(unlit):
    for pair in unlit:
        back = F.grid_sample(pair.correspondence[None, None], pair.flow[None], align_corners=False)[0, 0]
        assert iou((back > 0.5).float(), pair.mask) > 0.93  # a mask of 200 pixels has 50 on its border
        assert (pair.correspondence <= pair.reference_mask).all()


def test_masks_are_small_and_lie_on_the_object(unlit):
    for pair in unlit:
        assert MASK_SHARE[0] <= pair.mask.mean() <= MASK_SHARE[1]
        on_object = F.grid_sample(pair.reference_mask[None, None], pair.flow[None], align_corners=False)[0, 0]
        assert on_object[pair.mask > 0.5].mean() > 0.95
        rows, columns = pair.reference_mask.any(1).sum(), pair.reference_mask.any(0).sum()
        assert 0.4 < max(rows, columns) / 256 <= 0.96


def test_light_differs_between_the_views():
    for task in ("customization", "compositing"):
        for same, lit in zip(pairs(task, 2, light=0.0), pairs(task, 2, light=1.0)):
            same, lit = (masked_psnr(warped(pair, pair.flow), pair.truth, pair.mask) for pair in (same, lit))
            assert lit < same - 1


def test_sheets_are_inverted_exactly_even_in_folds():
    waves = torch.tensor([[0.05, 8.0, 1.0, 0.9, 0.3, 2.0], [0.07, 5.0, 4.0, 0.9, 2.5, 0.1]])
    sheet = Sheet(rotation(torch.tensor([0.4]))[0] * 1.2, torch.tensor([0.1, -0.15]), waves, 0.6, torch.tensor([0.2, -0.1]))
    points = grid(24, 1)[0]
    uv = sheet.to_uv(points)
    assert torch.allclose(sheet.from_uv(uv), points, atol=1e-4)
    straight = Sheet(sheet.linear, sheet.tilt, waves[:0], sheet.scale, sheet.place)
    assert (straight.to_uv(points) - uv).norm(dim=-1).mean() > 0.03
    assert torch.equal(straight.shading(uv), torch.ones(24, 24)) and sheet.shading(uv).std() > 0.1


def test_a_turned_solid_hides_what_the_other_view_does_not_show():
    sampler = SolidPairSampler(HELD_OUT + 4, 192, "view_synthesis", "hard", light=0.0)
    sampler.templates = ("box",)
    sight, _ = sampler.views()
    on_object = sight.alpha > 0.99
    hidden = (sight.elsewhere > 1).any(-1) & on_object
    assert 0.02 < hidden.sum() / on_object.sum() < 0.8


def test_views_turn_as_far_as_the_difficulty_says():
    for difficulty, (low, high) in synthetic.TURNS.items():
        image, reference = SolidPairSampler(HELD_OUT + 1, 128, "view_synthesis", difficulty)._turned_views()
        between = (image.turn[0] @ reference.turn[0].T).trace()
        assert low - 8 <= math.degrees(math.acos((float(between) - 1) / 2)) <= high + 15  # they also roll and nod a little


def test_disparity_of_a_turn():
    mask = torch.zeros(64, 64)
    mask[20:40, 25:50] = 1
    angle = torch.deg2rad(torch.tensor([20.0]))
    points = 0.4 * grid(64, 1)[0]
    assert synthetic._disparity(3 * points @ rotation(angle)[0].T, mask) == pytest.approx(0.491, abs=1e-3)
    assert synthetic._disparity(0.5 * points + 0.2, mask) == pytest.approx(0, abs=1e-4)


def test_one_stripe_among_many_is_not_worth_matching():
    x = torch.arange(128)
    stripes = ((x // 8) % 2).float().expand(3, 128, 128).clone()
    on_object, inside = torch.ones(128, 128, dtype=torch.bool), torch.zeros(128, 128, dtype=torch.bool)
    inside[50:75, 50:75] = True
    assert not synthetic._worth_matching(stripes, on_object, inside)
    assert not synthetic._worth_matching(torch.full((3, 128, 128), 0.5), on_object, inside)
    stripes[:, 55:70, 52:72] = torch.rand(15, 20, generator=torch.Generator().manual_seed(0))
    assert synthetic._worth_matching(stripes, on_object, inside)


def test_a_set(small_set):
    lines = [json.loads(line) for line in (small_set / "index.jsonl").read_text().splitlines()]
    assert [line["artifact"] for line in lines] == ["garble", "smear"]
    assert [line["task"] for line in lines] == ["customization", "view_synthesis"]
    assert lines[0]["disparity"] < 0.25 and all(line["difficulty"] == "easy" for line in lines)
    for item in BenchmarkSet(small_set):
        inside = item.mask > 0.5
        assert torch.equal(item.image[:, ~inside], item.truth[:, ~inside])
        assert (item.image - item.truth)[:, inside].abs().mean() > 0.03


def test_captions_say_what_it_is(small_set):
    for item in BenchmarkSet(small_set):
        assert item.labels["subject"] in (*SolidSampler.templates, "label", "cloth") and f"printed {item.labels['subject']}" in item.caption


def test_tasks_artifacts_and_difficulties_take_turns(tmp_path, monkeypatch):
    drawn = []

    def keep(index, seed, split, size, photos, light, *what):
        drawn.append(what)
        raise StopIteration

    monkeypatch.setattr(synthetic, "_draw", keep)
    for index in range(60):
        with pytest.raises(StopIteration):
            synthetic._write_item(tmp_path, index, seed=0, split="test", size=128, photos=(), light=1.0)
    assert len(set(drawn)) == 60 == len(TASKS) * len(ARTIFACTS) * 3


def test_the_same_seed_gives_the_same_set(small_set, tmp_path):
    make_set(tmp_path / "again", 1, seed=0, size=192)
    make_set(tmp_path / "other", 1, seed=1, size=192)
    make_set(tmp_path / "split", 1, seed=0, size=192, split="validation")
    for name in ("image", "mask", "reference", "correspondence"):
        first, again, *others = ((folder / "00000" / f"{name}.png").read_bytes() for folder in (small_set, *(tmp_path / n for n in ("again", "other", "split"))))
        assert first == again and first not in others


def test_the_same_set_whatever_the_workers(small_set, tmp_path):
    make_set(tmp_path / "set", 2, seed=0, size=192, workers=2)
    for path in small_set.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "set" / path.relative_to(small_set)).read_bytes()


def test_seeds_are_held_out_and_no_split_has_anothers(tmp_path, monkeypatch):
    seeds = {"test": [], "validation": []}
    real = PairSampler.__init__
    for split in seeds:
        monkeypatch.setattr(PairSampler, "__init__", lambda self, seed, *rest: seeds[split].append(seed) or real(self, seed, *rest))
        make_set(tmp_path / split, 2, seed=0, size=128, split=split)
    assert all(2**31 + 2**30 <= seed < 2**32 for seed in seeds["test"])
    assert all(2**31 <= seed < 2**31 + 2**30 for seed in seeds["validation"])


def test_whole_or_nothing(tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "write_picture", fail)
    with pytest.raises(OSError):
        make_set(tmp_path / "set", 1, seed=0, size=192)
    assert not list(tmp_path.iterdir())


def test_bad_arguments(small_set, tmp_path):
    with pytest.raises(InputError, match="exists"):
        make_set(small_set, 1, seed=0)
    for problem, arguments in {"count: is 0": {"count": 0}, "size: is 64": {"size": 64}, "split: is 'train'": {"split": "train"}, "workers: is 0": {"workers": 0}, "seed: is -1": {"seed": -1}}.items():
        with pytest.raises(InputError, match=problem):
            make_set(tmp_path / "set", **{"count": 1, "seed": 0} | arguments)
