import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rba_core.data import solids
from rba_core.data.scenes import REFERENCE_FILL, Scenes, SceneSampler, TextureBank
from rba_core.data.solids import BOX, ELLIPSOID, FRUSTUM, Part, SolidSampler, View, first, lattice, turned

MODES = ["alignment", "refinement"]


@pytest.fixture(scope="module")
def bank() -> TextureBank:
    return TextureBank(12, 96, seed=3)


@pytest.fixture
def plain_light(monkeypatch):
    """Geometry alone: no change of colour, no shading, no blur, no noise."""
    monkeypatch.setattr(SceneSampler, "_photometric", lambda self, picture: picture)
    monkeypatch.setattr(SceneSampler, "_soften", lambda self, picture: picture)
    usual = SolidSampler._views

    def evenly_lit(self, count):
        views = usual(self, count)
        for view in views:
            view.ambient.fill_(1.0)
        return views

    monkeypatch.setattr(SolidSampler, "_views", evenly_lit)


def mismatch(scenes: Scenes, shift: float = 0.0) -> torch.Tensor:
    image = F.interpolate(scenes.image, scenes.flow.shape[1:3], mode="area")
    found = F.grid_sample(scenes.reference, scenes.flow + shift, mode="bilinear", align_corners=False)
    return (image - found).abs().amax(1)[scenes.visible[:, 0] > 0.5]


@pytest.mark.parametrize("template", SolidSampler.templates)
@pytest.mark.parametrize("mode", MODES)
def test_the_flow_leads_to_the_same_point_of_the_product(bank, plain_light, monkeypatch, template, mode):
    """The colour of a smooth texture is the same at corresponding points of the two views."""
    smooth = F.interpolate(bank.products[:, :3].float(), (6, 6), mode="area")
    smooth = F.interpolate(smooth, (96, 96), mode="bicubic").clamp(0, 255)
    blurred = TextureBank(12, 96, seed=3)
    for level, side in enumerate(blurred.sides):
        shrunk = F.interpolate(smooth, (side, side), mode="area").flatten(2).mT
        blurred.texels[:, blurred.starts[level] : blurred.starts[level + 1], :3] = shrunk.round().byte()
    monkeypatch.setattr(SolidSampler, "templates", (template,))
    scenes = SolidSampler(blurred, seed=0, image_size=128, reference_size=224).sample(12, mode)
    right, shifted = mismatch(scenes), mismatch(scenes, shift=0.2)
    assert len(right) > 300
    assert float(right.median()) < 0.015
    assert float(shifted.mean()) > 1.5 * float(right.mean())


@pytest.mark.parametrize("mode", MODES)
def test_shapes_and_ranges(bank, mode):
    scenes = SolidSampler(bank, seed=0, image_size=64, reference_size=112).sample(9, mode)
    assert scenes.image.shape == (9, 3, 64, 64) and scenes.mask.shape == (9, 1, 64, 64)
    assert scenes.reference.shape == (9, 3, 112, 112)
    assert scenes.flow.shape == (9, 16, 16, 2) and scenes.visible.shape == (9, 1, 16, 16)
    for picture in (scenes.image, scenes.reference):
        assert torch.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1
    assert torch.isfinite(scenes.flow).all()
    assert set(scenes.visible.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("mode", MODES)
def test_nearly_every_mask_is_seen_in_the_reference_too(bank, mode):
    scenes = SolidSampler(bank, seed=1, image_size=64, reference_size=64).sample(48, mode)
    under_mask = (scenes.visible * F.interpolate(scenes.mask, (16, 16), mode="area")).sum((1, 2, 3))
    assert (under_mask > 0.5).float().mean() > 0.9


def test_the_reference_is_the_whole_product_on_grey(bank):
    sampler = SolidSampler(bank, seed=2, image_size=64, reference_size=64)
    sampler.close_ups = 0.0
    reference = sampler.sample(16, "alignment").reference
    border = torch.cat([reference[..., 0, :], reference[..., -1, :], reference[..., 0], reference[..., -1]], -1)
    assert ((border - REFERENCE_FILL).abs() < 1e-6).all(1).float().mean() > 0.85
    assert ((reference - REFERENCE_FILL).abs().amax(1) > 0.02).float().mean() > 0.2


@pytest.mark.parametrize("kind", [SceneSampler, SolidSampler])
def test_close_ups_show_the_region_large_and_keep_the_correspondence(kind, bank):
    def region(close_ups: float) -> tuple[Tensor, Tensor]:
        sampler = kind(bank, seed=5, image_size=64, reference_size=64)
        sampler.close_ups = close_ups
        scenes = sampler.sample(24, "alignment")
        inside = F.interpolate(scenes.mask, scenes.visible.shape[-2:], mode="area")[:, 0] * scenes.visible[:, 0] > 0.5
        extents = [scenes.flow[i][inside[i]] for i in range(24) if inside[i].sum() > 4]
        return torch.stack([(places.amax(0) - places.amin(0)).amax() for places in extents]), torch.cat(extents)

    whole, close = region(0.0), region(1.0)
    assert close[0].mean() > 1.4 * whole[0].mean()
    assert close[1].abs().amax() <= 1  # none of it is cut off
    assert close[1].std() > 0.25  # nor always in the middle


def test_the_same_seed_gives_the_same_scenes_and_another_seed_others():
    def sample(seed: int) -> Scenes:
        return SolidSampler(TextureBank(4, 64, seed), seed, image_size=64, reference_size=64).sample(3, "alignment")

    first_time, again, other = sample(0), sample(0), sample(1)
    assert all(torch.equal(a, b) for a, b in zip(vars(first_time).values(), vars(again).values()))
    assert not torch.equal(first_time.image, other.image)


def test_half_precision_around_it_changes_nothing(bank):
    sampler = SolidSampler(bank, 5, image_size=64, reference_size=64)
    plain = sampler.sample(4, "alignment")
    sampler.seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        within = sampler.sample(4, "alignment")
    assert torch.equal(plain.flow, within.flow) and torch.equal(plain.image, within.image)


def part(kind: str, half, taper: float = 1.0) -> Part:
    return Part(kind, torch.zeros(1, 3), torch.tensor([half]), torch.eye(3)[None], torch.tensor([taper]), torch.zeros(1, 6, dtype=torch.long))


@pytest.mark.parametrize(
    "piece, at, depth",
    [
        (part(BOX, (1.0, 1.0, 0.5)), (0.3, -0.2), 0.5),
        (part(ELLIPSOID, (1.0, 1.0, 1.0)), (0.6, 0.0), 0.8),
        (part(ELLIPSOID, (1.0, 1.0, 2.0)), (0.0, 0.0), 2.0),
        (part(FRUSTUM, (1.0, 1.0, 1.0)), (0.6, 0.1), 0.8),
        (part(FRUSTUM, (1.0, 1.0, 1.0), taper=0.5), (0.0, 0.0), 0.75),
        (part(FRUSTUM, (1.0, 1.0, 1.0), taper=0.5), (0.0, -0.9), 0.525),
    ],
)
def test_rays_meet_the_surface_where_it_is(piece, at, depth):
    """From far in front, rays run along z."""
    origin = torch.tensor([[[at[0]], [at[1]], [-9.0]]])
    t, index = first([piece], origin, torch.tensor([[[0.0], [0.0], [1.0]]]))
    assert float(t) == pytest.approx(9 - depth, abs=1e-4) and index.item() == 0


def test_rays_that_miss_are_infinite():
    origin = torch.tensor([[[1.2], [0.0], [-9.0]]])
    pieces = [part(BOX, (1.0, 1.0, 1.0)), part(ELLIPSOID, (1.0, 1.0, 1.0)), part(FRUSTUM, (1.0, 1.0, 1.0), taper=0.6)]
    t, index = first(pieces, origin, torch.tensor([[[0.0], [0.0], [1.0]]]))
    assert torch.isinf(t).all() and index.item() == -1


def test_projecting_what_a_ray_meets_gives_its_pixel_back():
    view = View(turned(1, torch.tensor([0.4])) @ turned(0, torch.tensor([-0.3])), torch.tensor([4.0]), torch.zeros(1, 3), torch.ones(1))
    plane = lattice(5, torch.tensor([[0.1, -0.2]]), torch.tensor([0.7]))
    points = view.origin + 0.8 * view.rays(plane)
    assert torch.allclose(view.project(points), plane, atol=1e-5)


def test_turned_is_a_rotation():
    for axis in range(3):
        matrix = turned(axis, torch.tensor([0.7, -1.9]))
        assert torch.allclose(matrix @ matrix.mT, torch.eye(3).expand(2, 3, 3), atol=1e-6)
        assert torch.allclose(torch.linalg.det(matrix), torch.ones(2), atol=1e-6)
        assert torch.allclose(matrix[:, axis, axis], torch.ones(2))


def test_every_template_is_drawn(bank, monkeypatch):
    seen = []
    for name in SolidSampler.templates:
        usual = getattr(SolidSampler, f"_{name}")
        monkeypatch.setattr(SolidSampler, f"_{name}", lambda self, count, name=name, usual=usual: seen.append(name) or usual(self, count))
    SolidSampler(bank, 0, image_size=32, reference_size=32).sample(64, "alignment")
    assert set(seen) == set(solids.SolidSampler.templates)


def test_the_window_around_nothing_is_the_middle():
    centre, half = solids.around(torch.rand(1, 2, 9), torch.zeros(1, 9, dtype=torch.bool), torch.ones(1))
    assert torch.equal(centre, torch.zeros(1, 2)) and half.item() == 1
