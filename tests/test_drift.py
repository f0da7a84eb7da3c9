from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import texture
from scipy import ndimage

from rba_core.drift import Drift, estimate_drift, undo_drift
from rba_core.geometry import resize

SIZE = 256
ORIGINAL = 0.1 + 0.8 * texture(SIZE, SIZE)
MASK = torch.zeros(SIZE, SIZE)
MASK[70:180, 80:200] = 1
REDRAWN = torch.where(MASK > 0.5, texture(SIZE, SIZE, seed=1), ORIGINAL)


def edited(picture: torch.Tensor, shift=(0.0, 0.0), zoom=1.0, gain=(1.0, 1.0, 1.0), offset=(0.0, 0.0, 0.0), gamma=(1.0, 1.0, 1.0)) -> torch.Tensor:
    """A picture `[3, S, S]` as an editor gives it back."""
    middle = (picture.shape[-1] - 1) / 2
    start = middle - (np.array(shift[::-1]) + middle) / zoom
    moved = np.stack([ndimage.affine_transform(channel, [1 / zoom] * 2, start, order=5, mode="mirror") for channel in picture.double().numpy()])
    gain, offset, gamma = (torch.tensor(values)[:, None, None] for values in (gain, offset, gamma))
    return (gain * torch.from_numpy(moved).float().clamp(0, 1) ** gamma + offset).clamp(0, 1)


def off_by(drift: Drift, shift: tuple[float, float], zoom: float, side: int = SIZE) -> float:
    """The farthest that any corner of the crop is put beside where it belongs, pixels."""
    return (np.abs(np.subtract(drift.shift, shift)) + abs(drift.zoom - zoom) * side / 2).max()


def around(margin: int = 16) -> torch.Tensor:
    """The ring beside the mask, and not what came in over the border."""
    ring = torch.from_numpy(~ndimage.binary_dilation(MASK.numpy() > 0.5, iterations=3))
    ring[:margin], ring[-margin:], ring[:, :margin], ring[:, -margin:] = False, False, False, False
    return ring


@pytest.mark.parametrize("shift", [(0.0, 0.0), (4.0, -4.0), (-1.3, 2.6), (0.4, 0.0)], ids=str)
@pytest.mark.parametrize("zoom", [1.0, 0.97, 1.03])
def test_a_known_drift_is_found_and_undone(shift, zoom):
    given = edited(REDRAWN, shift, zoom, (1.05, 1.0, 0.92), (0.02, 0.0, -0.02))
    drift = estimate_drift(given, ORIGINAL, MASK)
    assert off_by(drift, shift, zoom) < 0.25  # 0.5 px of a crop of 512
    undone = undo_drift(given, drift)
    assert (undone - ORIGINAL)[:, around()].abs().mean() < 1 / 255
    inside = ndimage.binary_erosion(MASK.numpy() > 0.5, iterations=4)
    assert (undone - REDRAWN)[:, inside].abs().mean() < 1.5 / 255


def test_gain_offset_and_gamma_are_the_editor_s():
    gain, offset, gamma = (1.05, 1.0, 0.92), (0.01, 0.0, -0.02), (1.1, 0.9, 1.0)
    drift = estimate_drift(edited(REDRAWN, (3.0, 1.0), 1.01, gain, offset, gamma), ORIGINAL, MASK)
    assert drift.gain == pytest.approx(gain, abs=0.015) and drift.offset == pytest.approx(offset, abs=0.01) and drift.gamma == pytest.approx(gamma, abs=0.03)
    assert drift.agreement[1] > 0.97 > 0.9 > drift.agreement[0]


def test_a_crop_around_which_nothing_changed_comes_back_bit_for_bit():
    drift = estimate_drift(REDRAWN, ORIGINAL, MASK)
    assert not drift.moved and not drift.tinted
    assert undo_drift(REDRAWN, drift) is REDRAWN


def test_where_only_the_colour_drifted_nothing_is_resampled():
    given = edited(REDRAWN, gain=(1.05, 1.0, 0.95))
    drift = estimate_drift(given, ORIGINAL, MASK)
    assert drift.tinted and not drift.moved
    assert (undo_drift(given, drift) - ORIGINAL)[:, around(1)].abs().mean() < 0.5 / 255


@pytest.mark.parametrize("seed", range(2))
def test_casts_of_every_kind_are_undone_in_eight_bits(seed):
    """Gain, offset and gamma of each channel; shadows and lights that were clipped are lost, and do not mislead."""
    rng = np.random.default_rng(seed)
    contrasty = ((ORIGINAL - 0.5) * 1.4 + 0.5).clamp(0, 1)
    redrawn = torch.where(MASK > 0.5, REDRAWN, contrasty)
    gain, offset, gamma = (tuple(values.tolist()) for values in (1 + rng.uniform(-0.15, 0.15, 3), rng.uniform(-0.06, 0.06, 3), np.exp(rng.uniform(-0.3, 0.3, 3))))
    shift, zoom = tuple(rng.uniform(-4, 4, 2).tolist()), 1 + rng.uniform(-0.03, 0.03)
    given = (edited(redrawn, shift, zoom, gain, offset, gamma) * 255).round() / 255
    drift = estimate_drift(given, contrasty, MASK)
    assert off_by(drift, shift, zoom) < 0.25
    clipped = undo_drift(((given == 0) | (given == 1)).float(), replace(drift, gain=(1.0,) * 3, offset=(0.0,) * 3, gamma=(1.0,) * 3)).amax(0) > 0.01
    kept = around() & ~torch.from_numpy(ndimage.binary_dilation(clipped.numpy(), iterations=2))
    assert kept.sum() > 0.5 * around().sum()
    assert (undo_drift(given, drift) - contrasty)[:, kept].abs().mean() < 1 / 255


def test_a_white_background_that_was_clipped_is_white_again():
    original, redrawn = ORIGINAL.clone(), REDRAWN.clone()
    original[:, :, 210:], redrawn[:, :, 210:], redrawn[:, 100:140, 120:160] = 1, 1, 1
    given = edited(redrawn, gain=(1.03, 1.0, 0.98), offset=(0.05, 0.06, 0.04))
    assert (given[:, :, 210:] == 1).all()  # no gain and no offset makes that of it
    undone = undo_drift(given, estimate_drift(given, original, MASK))
    assert (undone - original)[:, around(1)].abs().mean() < 1 / 255
    assert (undone - 1)[:, 102:138, 122:158].abs().max() < 1 / 255


@pytest.mark.parametrize("kind", ["other", "flat", "flat and noisy", "blurred", "no surroundings"])
def test_what_cannot_be_told_is_left_alone(kind):
    noise = 0.01 * torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    original, mask, given = ORIGINAL, MASK, edited(REDRAWN, (3.0, 0.0), 1.0, (1.05, 1.0, 0.95))
    if kind == "other":
        given = texture(SIZE, SIZE, seed=9)
    elif kind.startswith("flat"):
        grain = noise if "noisy" in kind else 0 * noise
        original, given = torch.full_like(ORIGINAL, 0.6) + grain[0], torch.where(MASK > 0.5, given, 0.5) + grain[1]
    elif kind == "blurred":
        given = torch.from_numpy(ndimage.gaussian_filter(given.numpy(), (0, 25, 25)))
    else:
        mask = torch.ones(SIZE, SIZE)
        mask[:2] = 0
    drift = estimate_drift(given, original, mask)
    assert undo_drift(given, drift) is given


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_changes_in_the_surround_hardly_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    changed = REDRAWN.clone()
    changed[:, :60, 40 + 40 * seed : 160 + 40 * seed] = texture(60, 120, seed + 20)[:, :, : min(120, SIZE - 40 - 40 * seed)]
    given = edited(changed, (-2.5, 3.0), 0.98, (1.05, 1.0, 0.95))
    given = (given + 0.02 * torch.randn(given.shape, generator=generator)).clamp(0, 1)
    drift = estimate_drift(given, ORIGINAL, MASK)
    assert off_by(drift, (-2.5, 3.0), 0.98) < 0.25
    assert drift.gain == pytest.approx((1.05, 1.0, 0.95), abs=0.02)


def test_shift_is_in_pixels_of_the_redrawn_crop():
    """The editor's crop may be larger than the original, and need not be quite square."""
    given = resize(edited(REDRAWN, (3.0, -2.0), 1.01), 512, 520)
    drift = estimate_drift(given, ORIGINAL, MASK)
    assert drift.shift == pytest.approx((3.0 * 520 / 256, -4.0), abs=0.4) and drift.zoom == pytest.approx(1.01, abs=0.002)
    assert (resize(undo_drift(given, drift), SIZE, SIZE) - ORIGINAL)[:, around()].abs().mean() < 1.5 / 255
