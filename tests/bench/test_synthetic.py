import json

import pytest
import torch
import torch.nn.functional as F

from rba_core.bench import synthetic
from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.metrics import iou, masked_psnr
from rba_core.bench.synthetic import HELD_OUT, MASK_SHARE, PairSampler, make_set
from rba_core.data.scenes import grid, rotation
from rba_core.errors import InputError


def pairs(count, light, size=256):
    found, seed = [], HELD_OUT
    while len(found) < count:
        seed += 1
        pair = PairSampler(seed, size).draw(light)
        if pair is not None:
            found.append(pair)
    return found


@pytest.fixture(scope="module")
def unlit():
    """Pairs without difference in light, so that the views can be compared by colour."""
    return pairs(4, light=0.0)


def warped(pair, flow):
    return F.grid_sample(pair.reference[None], flow[None], align_corners=False)[0]


def test_the_flow_carries_the_reference_onto_the_truth(unlit):
    for pair in unlit:
        exact = masked_psnr(warped(pair, pair.flow), pair.truth, pair.mask)
        assert exact > 24
        for shift in ((4, 0), (-4, 0), (0, 4), (0, -4)):  # two pixels
            moved = pair.flow + torch.tensor(shift) / 256
            assert masked_psnr(warped(pair, moved), pair.truth, pair.mask) < exact - 1


def test_correspondence_is_the_mask_carried_by_the_flow(unlit):
    for pair in unlit:
        back = F.grid_sample(pair.correspondence[None, None], pair.flow[None], align_corners=False)[0, 0]
        assert iou(back, pair.mask) > 0.97  # a mask of 200 pixels has 50 on its border
        assert (pair.correspondence <= pair.reference_mask).all()


def test_masks_are_small_and_lie_on_the_object(unlit):
    for pair in unlit:
        assert MASK_SHARE[0] <= pair.mask.mean() <= MASK_SHARE[1]
        on_object = F.grid_sample(pair.reference_mask[None, None], pair.flow[None], align_corners=False)[0, 0]
        assert on_object[pair.mask > 0.5].mean() > 0.98
        rows, columns = pair.reference_mask.any(1).sum(), pair.reference_mask.any(0).sum()
        assert 0.4 < max(rows, columns) / 256 <= 0.92


def test_light_differs_between_the_views(unlit):
    for same, lit in zip(unlit, pairs(4, light=1.0)):
        assert torch.equal(same.mask, lit.mask)
        assert masked_psnr(warped(lit, lit.flow), lit.truth, lit.mask) < masked_psnr(warped(same, same.flow), same.truth, same.mask) - 1


def test_disparity_of_a_turn():
    mask = torch.zeros(64, 64)
    mask[20:40, 25:50] = 1
    angle = torch.deg2rad(torch.tensor([20.0]))
    points = grid(64, 1)[0]
    assert synthetic._disparity(3 * points @ rotation(angle)[0].T, mask) == pytest.approx(0.491, abs=1e-3)
    assert synthetic._disparity(0.5 * points + 0.2, mask) == pytest.approx(0, abs=1e-4)


def test_a_set(small_set):
    lines = [json.loads(line) for line in (small_set / "index.jsonl").read_text().splitlines()]
    assert [line["artifact"] for line in lines] == ["garble", "smear"]
    assert all(line["disparity"] < 0.25 and line["difficulty"] == "easy" for line in lines)
    for item in BenchmarkSet(small_set):
        inside = item.mask > 0.5
        assert torch.equal(item.image[:, ~inside], item.truth[:, ~inside])
        assert (item.image - item.truth)[:, inside].abs().mean() > 0.03


def test_the_same_seed_gives_the_same_set(small_set, tmp_path):
    make_set(tmp_path / "again", 1, seed=0, size=192)
    make_set(tmp_path / "other", 1, seed=1, size=192)
    for name in ("image", "mask", "reference", "correspondence"):
        first, again, other = ((folder / "00000" / f"{name}.png").read_bytes() for folder in (small_set, tmp_path / "again", tmp_path / "other"))
        assert first == again != other


def test_seeds_are_held_out(tmp_path, monkeypatch):
    seeds = []
    real = PairSampler.__init__
    monkeypatch.setattr(PairSampler, "__init__", lambda self, seed, *rest: seeds.append(seed) or real(self, seed, *rest))
    make_set(tmp_path / "set", 1, seed=0, size=192)
    assert seeds and all(2**31 <= seed < 2**32 for seed in seeds)


def test_whole_or_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "write_mask", fail)
    with pytest.raises(OSError):
        make_set(tmp_path / "set", 1, seed=0, size=192)
    assert not list(tmp_path.iterdir())


def test_bad_arguments(small_set, tmp_path):
    with pytest.raises(InputError, match="exists"):
        make_set(small_set, 1, seed=0)
    with pytest.raises(InputError, match="count: is 0"):
        make_set(tmp_path / "set", 0, seed=0)
    with pytest.raises(InputError, match="size: is 64"):
        make_set(tmp_path / "set", 1, seed=0, size=64)
