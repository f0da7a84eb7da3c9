import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rba_core.data.folders import FolderSampler
from rba_core.data.mixture import Mixture, build_sampler
from rba_core.data.scenes import SceneSampler, TextureBank
from rba_core.data.solids import SolidSampler
from rba_core.errors import InputError

PLAN = {"textures": 8, "texture_size": 48, "redrawn_per_step": 3}


def pools(sampler: Mixture) -> list[torch.Tensor]:
    bank = sampler.samplers[0].bank
    return [bank.products, bank.texels, bank.backgrounds]


def test_a_step_s_textures_do_not_depend_on_the_way_there():
    walked, jumped, other = (build_sampler(PLAN, 1, 32, 32) for _ in range(3))
    for step in (0, 1, 2, 5, 9):
        walked.at(step)
    jumped.at(9)
    other.at(8)
    assert all(torch.equal(a, b) for a, b in zip(pools(walked), pools(jumped)))
    assert not torch.equal(pools(walked)[0], pools(other)[0])


def test_each_step_draws_as_many_products_anew_as_planned():
    sampler = build_sampler(PLAN, 1, 32, 32)
    before = pools(sampler)[0].clone()
    sampler.at(1)
    assert (pools(sampler)[0] != before).flatten(1).any(1).tolist() == [True] * 3 + [False] * 5


def test_the_same_seed_draws_the_same_batch_whatever_was_drawn_before():
    one, other = build_sampler(PLAN, 1, 32, 32), build_sampler(PLAN, 1, 32, 32)
    other.sample(5, "refinement")
    for sampler in (one, other):
        sampler.seed(7)
    batches = [sampler.sample(6, "alignment") for sampler in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*(vars(batch).values() for batch in batches)))
    assert len(batches[0].image) == 6


@pytest.mark.parametrize("solids, kind", [(0.0, SceneSampler), (1.0, SolidSampler)])
def test_the_share_of_solids_is_kept(solids, kind, monkeypatch):
    drawn = []
    for sampler in (SceneSampler, SolidSampler):
        usual = sampler._sample
        monkeypatch.setattr(sampler, "_sample", lambda self, batch, mode, usual=usual: drawn.append(type(self)) or usual(self, batch, mode))
    build_sampler(PLAN | {"solids": solids}, 1, 32, 32).sample(8, "alignment")
    assert set(drawn) == {kind}


def test_what_is_held_out_has_other_seeds_typefaces_and_patterns():
    trained, held_out = (build_sampler(PLAN, 1, 32, 32, held_out=value).samplers[0].bank for value in (False, True))
    assert trained.seed != held_out.seed
    assert not set(trained.style.typefaces) & set(held_out.style.typefaces)
    assert {"weave", "cells", "rings"} <= set(held_out.style.surfaces) - set(trained.style.surfaces)
    held_out.at(5)
    assert held_out.redrawn == 0


def test_photos_become_textures_and_never_held_out_ones(tmp_path):
    Image.fromarray(np.full((80, 90, 3), (253, 1, 127), np.uint8)).save(tmp_path / "a.png")
    plan = PLAN | {"textures": 24, "photos": [str(tmp_path)]}

    def pink(sampler: Mixture) -> bool:
        return bool((sampler.samplers[0].bank.products[:, :3] == torch.tensor([253, 1, 127])[:, None, None].byte()).all(1).any())

    assert pink(build_sampler(plan, 1, 32, 32)) and not pink(build_sampler(plan, 1, 32, 32, held_out=True))


@pytest.mark.parametrize("key", ["photos", "folders"])
def test_a_folder_that_is_not_there_is_told(key):
    with pytest.raises(InputError, match=f"{key}: nowhere is not a folder"):
        build_sampler(PLAN | {key: ["nowhere"]}, 1, 32, 32)


@pytest.mark.parametrize("share", [None, 0.0, 1.0])
def test_the_share_of_folders_is_kept_and_none_is_held_out(share, tmp_path, monkeypatch):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    drawn = []
    for sampler in (SceneSampler, SolidSampler, FolderSampler):
        usual = sampler._sample
        monkeypatch.setattr(sampler, "_sample", lambda self, batch, mode, usual=usual: drawn.extend([type(self)] * batch) or usual(self, batch, mode))
    plan = PLAN | {"folders": [str(tmp_path)]} | ({} if share is None else {"folders_share": share})
    sampler = build_sampler(plan, 1, 32, 32)
    sampler.sample(40, "alignment")
    assert drawn.count(FolderSampler) / 40 == pytest.approx(0.5 if share is None else share, abs=0.25 if share is None else 0)
    assert [type(part) for part in build_sampler(plan, 1, 32, 32, held_out=True).samplers] == [SceneSampler, SolidSampler]
    flat, solid, _ = sampler.shares.tolist()
    assert solid == pytest.approx(1.5 * flat)  # as without


def test_looking_up_a_texture_is_bilinear_and_halved_by_level():
    bank = TextureBank(2, 32, seed=0)
    centres = (torch.arange(32) + 0.5) / 16 - 1
    uv = torch.stack(torch.meshgrid(centres, centres, indexing="ij")[::-1]).flatten(1)
    products, levels = torch.tensor([0, 1, 1]), torch.tensor([0.0, 0.0, 9.0])
    found = bank.look_up(products, levels, torch.ones(1024, dtype=torch.long), uv)
    assert torch.allclose(found.view(3, 32, 32), bank.products[1, :3].float() / 255, atol=1e-5)
    coarse = bank.look_up(products, levels, torch.tensor([2]), torch.tensor([[-0.75], [-0.75]]))
    assert torch.allclose(coarse[:, 0], bank.products[1, :3, :8, :8].float().mean((1, 2)) / 255, atol=2 / 255)


def test_between_texels_and_beyond_the_border_it_is_as_grid_sample_has_it():
    bank = TextureBank(2, 32, seed=0)
    uv = torch.rand(2, 500, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    for level in range(4):
        found = bank.look_up(torch.tensor([1]), torch.tensor([level]), torch.zeros(500, dtype=torch.long), uv)
        expected = F.grid_sample(bank.picture(1, level), uv.mT[None, None], padding_mode="border", align_corners=False)
        assert torch.allclose(found, expected[0, :, 0], atol=1e-5)
        assert bank.picture(1, level).shape == (1, 3, 32 >> level, 32 >> level)
