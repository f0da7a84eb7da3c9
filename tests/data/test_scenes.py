import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rba_core.data.scenes import REFERENCE_FILL, Scenes, SceneSampler, TextureBank, fit_to_frame, grid, rotation, transform

MODES = ["alignment", "refinement"]


@pytest.fixture(scope="module")
def bank() -> TextureBank:
    return TextureBank(12, 96, seed=3)


def ramps(bank: TextureBank, shape: str = "square") -> TextureBank:
    """Products whose colour says where one is on them: red from left to right, green from top to bottom."""
    plain = TextureBank(1, bank.size, seed=0)
    size = bank.size
    across = ((torch.arange(size) + 0.5) / size * 255).expand(size, size)
    alpha = torch.full((size, size), 255.0)
    if shape == "disc":
        alpha = 255.0 * (grid(size, 1)[0].norm(dim=-1) < 0.8)
    plain.put(0, torch.stack([across, across.T, torch.zeros(size, size), alpha]).round().byte())
    return plain


@pytest.fixture
def plain_light(monkeypatch):
    """Geometry alone: no change of colour, no blur, no noise."""
    monkeypatch.setattr(SceneSampler, "_photometric", lambda self, picture: picture)
    monkeypatch.setattr(SceneSampler, "_soften", lambda self, picture: picture)


def mismatch(scenes: Scenes, shift: float = 0.0) -> Tensor:
    """Difference of image and reference at corresponding points, red and green, where visible."""
    image = F.interpolate(scenes.image, scenes.flow.shape[1:3], mode="area")
    found = F.grid_sample(scenes.reference, scenes.flow + shift, mode="bilinear", align_corners=False)
    difference = (image - found)[:, :2].abs().amax(1)
    return difference[scenes.visible[:, 0] > 0.5]


@pytest.mark.parametrize("shape", ["square", "disc"])
@pytest.mark.parametrize("mode", MODES)
def test_the_flow_leads_to_the_same_point_of_the_product(bank, plain_light, mode, shape):
    scenes = SceneSampler(ramps(bank, shape), seed=0, image_size=128, reference_size=224).sample(24, mode)
    right = mismatch(scenes)
    assert len(right) > 1000
    assert float(right.median()) < 0.006  # of a colour that runs from 0 to 1 over the product
    assert float((right > 0.03).float().mean()) < 0.05  # edges of the segment blend into the fill
    assert float(mismatch(scenes, shift=0.15).median()) > 3 * float(right.median())


@pytest.mark.parametrize("mode", MODES)
def test_on_real_textures_the_warped_reference_looks_like_the_image(bank, plain_light, mode):
    scenes = SceneSampler(bank, seed=0, image_size=128, reference_size=224).sample(24, mode)
    assert float(mismatch(scenes).mean()) < 0.06
    assert float(mismatch(scenes, shift=0.3).mean()) > 2 * float(mismatch(scenes).mean())


@pytest.mark.parametrize("mode", MODES)
def test_shapes_and_ranges(bank, mode):
    scenes = SceneSampler(bank, seed=0, image_size=64, reference_size=112).sample(5, mode)
    assert scenes.image.shape == (5, 3, 64, 64) and scenes.mask.shape == (5, 1, 64, 64)
    assert scenes.reference.shape == (5, 3, 112, 112)
    assert scenes.flow.shape == (5, 16, 16, 2) and scenes.visible.shape == (5, 1, 16, 16)
    for picture in (scenes.image, scenes.reference):
        assert torch.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1
    for selection in (scenes.mask, scenes.visible):
        assert set(selection.unique().tolist()) <= {0.0, 1.0}
    assert torch.isfinite(scenes.flow).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_gives_the_same_scenes_and_another_seed_others(mode):
    def sample(seed: int) -> Scenes:
        return SceneSampler(TextureBank(4, 64, seed), seed, image_size=64, reference_size=64).sample(3, mode)

    first, again, other = sample(0), sample(0), sample(1)
    for name in ("image", "mask", "reference", "flow", "visible"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.image, other.image)


def test_the_global_random_state_is_neither_read_nor_moved():
    def sample() -> Tensor:
        return SceneSampler(TextureBank(4, 64, 0), 0, image_size=64, reference_size=64).sample(2, "refinement").image

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, sample())


def test_the_sampler_repeats_itself_from_a_seed_set_again(bank):
    sampler = SceneSampler(bank, seed=0, image_size=64, reference_size=64)
    sampler.sample(2, "alignment")
    sampler.generator.manual_seed(7)
    first = sampler.sample(2, "alignment").image
    sampler.generator.manual_seed(7)
    assert torch.equal(sampler.sample(2, "alignment").image, first)


def test_masks_are_free_forms_inside_the_crop_of_the_artifacts_size(bank):
    for mode in MODES:
        mask = SceneSampler(bank, seed=0, image_size=96, reference_size=64).sample(64, mode).mask
        share = mask.mean((1, 2, 3))
        assert (share > 0).float().mean() > 0.95
        assert 0.01 < float(share.median()) < 0.5


def test_in_refinement_mode_the_reference_shows_the_region_and_in_alignment_mode_the_object(bank, plain_light):
    shares = {}
    for mode in MODES:
        sampler = SceneSampler(ramps(bank), seed=0, image_size=64, reference_size=96)
        sampler.close_ups = 0.0
        scenes = sampler.sample(32, mode)
        shown = (scenes.reference != REFERENCE_FILL).any(1).float()
        red = scenes.reference[:, 0]
        ranges = [float(red[i][shown[i] > 0].max() - red[i][shown[i] > 0].min()) for i in range(32) if shown[i].any()]
        shares[mode] = sum(ranges) / len(ranges)
    assert shares["alignment"] > 0.95  # the whole of it
    assert shares["refinement"] < 0.7


def test_outside_the_segment_the_reference_is_filled(bank, plain_light):
    sampler = SceneSampler(ramps(bank, "disc"), seed=0, image_size=64, reference_size=96)
    sampler.close_ups = 0.0
    scenes = sampler.sample(8, "alignment")
    corners = scenes.reference[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == REFERENCE_FILL).all()


def test_without_disparity_views_differ_by_place_and_size_alone(bank, plain_light):
    sampler = SceneSampler(ramps(bank), seed=0, image_size=64, reference_size=64)
    sampler.disparity = 0.0
    flow = sampler.sample(8, "alignment").flow
    steps = flow[:, :, 1:, 0] - flow[:, :, :-1, 0]
    assert (flow[:, :, 1:, 1] - flow[:, :, :-1, 1]).abs().max() < 1e-4  # rows stay rows
    assert (steps - steps[:, :1, :1]).abs().max() < 1e-4  # evenly spaced


def test_a_grid_holds_the_centres_of_pixels_x_first():
    points = grid(4, 2)
    assert points.shape == (2, 4, 4, 2)
    assert points[0, 0].tolist() == [[-0.75, -0.75], [-0.25, -0.75], [0.25, -0.75], [0.75, -0.75]]


def test_transform_applies_the_homography():
    shift = torch.eye(3)
    shift[:2, 2] = torch.tensor([0.5, -0.25])
    assert torch.allclose(transform(shift[None], grid(3, 1)), grid(3, 1) + torch.tensor([0.5, -0.25]))
    quarter = torch.eye(3)
    quarter[:2, :2] = rotation(torch.tensor(torch.pi / 2))
    assert torch.allclose(transform(quarter[None], torch.tensor([[[1.0, 0.0]]])), torch.tensor([[[0.0, 1.0]]]), atol=1e-6)


def test_fitting_fills_the_frame_with_the_points_used():
    points = grid(10, 1).flatten(1, 2)
    used = (points[..., 0] > 0) & (points[..., 1] > 0.5)
    fitted = transform(fit_to_frame(torch.eye(3)[None], points, used, torch.ones(1)), points)[used]
    assert float(fitted[:, 0].max()) == pytest.approx(1, abs=1e-5) and float(fitted[:, 0].min()) == pytest.approx(-1, abs=1e-5)
    assert float(fitted[:, 1].max()) == pytest.approx(-float(fitted[:, 1].min()), abs=1e-5)
    half = transform(fit_to_frame(torch.eye(3)[None], points, used, torch.full((1,), 2.0)), points)[used]
    assert float(half[:, 0].max()) == pytest.approx(0.5, abs=1e-5)
