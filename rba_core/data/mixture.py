"""The training data of one leg: cloth and signs, solid products, and a user's own photos, in turns."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import InputError
from .folders import FolderSampler, PhotoBank
from .scenes import Scenes, SceneSampler, TextureBank
from .solids import SolidSampler
from .textures import TESTING, load_photos

HELD_OUT = 2**31
"""Seeds from here on are for validation and benchmarks; training stays below."""


class Mixture:
    """Draws each batch from one of several samplers, by chance.

    samplers   with the interface of `SceneSampler`
    shares     how often each is drawn from, relative
    """

    def __init__(self, samplers: list, shares: list[float], seed: int):
        self.samplers, self.shares = samplers, torch.tensor(shares, dtype=torch.float32)
        self.device = samplers[0].device
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def at(self, step: int) -> None:
        for sampler in self.samplers:
            sampler.at(step)

    def seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def sample(self, batch: int, mode: str) -> Scenes:
        chosen = torch.multinomial(self.shares.to(self.device), batch, replacement=True, generator=self.generator)
        counts = torch.bincount(chosen, minlength=len(self.samplers)).tolist()
        drawn = []
        for sampler, count in zip(self.samplers, counts):
            if count:
                sampler.seed(int(torch.randint(2**31, (), generator=self.generator, device=self.device)))
                drawn.append(sampler.sample(count, mode))
        return Scenes(*(torch.cat(maps) for maps in zip(*(vars(scenes).values() for scenes in drawn))))


def build_sampler(plan: dict, seed: int, image_size: int, reference_size: int, device="cpu", held_out: bool = False, progress=lambda items: items) -> Mixture:
    """The sampler that a training plan's `[data]` describes.

    plan        textures, texture_size, redrawn_per_step; solids, the share of solid products (default 0.6);
                photos, folders whose pictures serve as textures; folders, photos of objects (`folders.py`), and
                folders_share, how many of the scenes show these (default 0.5)
    held_out    textures and scenes that training never sees: no photos, few textures, none redrawn
    """
    if held_out:
        bank = TextureBank(min(64, plan["textures"]), plan["texture_size"], HELD_OUT + seed, style=TESTING, device=device)
    else:
        photos = [picture for folder in plan.get("photos", ()) for picture in load_photos(existing(folder, "photos"))]
        bank = TextureBank(plan["textures"], plan["texture_size"], seed, photos, plan["redrawn_per_step"], device=device, progress=progress)
    solids, own = plan.get("solids", 0.6), plan.get("folders_share", 0.5)
    samplers, shares = [kind(bank, seed, image_size, reference_size) for kind in (SceneSampler, SolidSampler)], [1 - solids, solids]
    if plan.get("folders") and not held_out:
        photos = PhotoBank([existing(folder, "folders") for folder in plan["folders"]], device, progress)
        samplers.append(FolderSampler(photos, seed, image_size, reference_size))
        shares = [(1 - own) * share for share in shares] + [own]
    return Mixture(samplers, shares, seed)


def existing(folder: str | Path, name: str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(name, f"{folder} is not a folder", "give a folder of pictures")
    return folder
