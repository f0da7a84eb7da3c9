"""`rba train`: the three legs one after the other, each resumable, then the model folder."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from tqdm import tqdm

from ..data.scenes import SceneSampler, TextureBank
from ..data.textures import load_photos
from ..errors import InputError
from ..model import RefineByAlign
from .autoencoder import AutoencoderObjective
from .encoder import EncoderObjective, damage, place_tokens
from .loop import optimise
from .refiner import RefinerObjective

LEGS = ("encoder", "autoencoder", "refiner")
REQUIRED = {
    "data": ("textures", "texture_size", "redrawn_per_step"),
    "encoder": ("steps", "batch", "learning_rate", "ema"),
    "autoencoder": ("steps", "batch", "crop", "learning_rate", "ema"),
    "refiner": ("steps", "batch", "learning_rate", "mlp_learning_rate", "ema"),
}


def train(config: Path, output: Path, *, photos: str | None = None, legs: list[str] | None = None) -> None:
    """Train the model that `config` (TOML) names. Writes `output`/<leg>.pt as it goes and `output`/<model>/ at the end.

    photos   folder of pictures used as textures beside the procedural ones
    legs     some of `LEGS`; the ones before must have been trained
    """
    if not config.is_file():
        raise InputError("config", f"{config} does not exist", "give a TOML file like configs/train-rba-tiny.toml")
    try:
        plan = tomllib.loads(config.read_text())
    except tomllib.TOMLDecodeError as error:
        raise InputError("config", f"{config} is not TOML ({error})", "correct that line") from error
    if missing := {"model", "data", *LEGS} - set(plan):
        raise InputError("config", f"{config} has no {sorted(missing)[0]!r}", "see configs/train-rba-tiny.toml")
    for section, keys in REQUIRED.items():
        if absent := set(keys) - set(plan[section]):
            raise InputError("config", f"{config} lacks {sorted(absent)[0]!r} in [{section}]", "see configs/train-rba-tiny.toml")
    if unknown := set(legs or ()) - set(LEGS):
        raise InputError("legs", f"{sorted(unknown)[0]!r} is not known", f"use some of {', '.join(LEGS)}")
    if photos and not Path(photos).is_dir():
        raise InputError("photos", f"{photos} is not a folder", "give a folder of pictures")

    seed = plan.get("seed", 0)
    torch.manual_seed(seed)
    model = RefineByAlign.from_config(plan["model"]).train()
    pictures = load_photos(photos) if photos else []
    data = plan["data"]
    bank = TextureBank(data["textures"], data["texture_size"], seed, pictures, progress=lambda items: tqdm(items, desc="textures", delay=2))
    chosen = legs or LEGS
    for number, leg in enumerate(LEGS):
        checkpoint = output / f"{leg}.pt"
        if leg not in chosen and not checkpoint.exists():
            if any(LEGS.index(other) > number for other in chosen):
                raise InputError("legs", f"{leg!r} has not been trained in {output}", "train the legs in order")
            return
        TRAINERS[leg](model, bank, plan[leg], checkpoint, data["redrawn_per_step"], (seed * len(LEGS) + number + 1) * 10**6)
    model.eval().save(output / plan["model"])
    print(json.dumps({"model": str(output / plan["model"])}))


def train_encoder(model: RefineByAlign, bank: TextureBank, plan: dict, checkpoint: Path, redrawn: int, seed: int) -> None:
    place_tokens(model.encoder)
    objective = EncoderObjective(model)
    sampler = SceneSampler(bank, seed, image_size=model.encoder_size, reference_size=model.encoder_size)

    def loss(step: int) -> dict:
        sampler.generator.manual_seed(seed + step)
        bank.refresh(redrawn)
        scenes = sampler.sample(plan["batch"], "refinement" if step % 4 == 3 else "alignment")
        return objective(scenes, damage(scenes, sampler.generator, shares=(0.6, 0.2, 0.2, 0.0)))

    groups = [{"params": list(objective.parameters()), "lr": plan["learning_rate"]}]
    optimise(objective, loss, steps=plan["steps"], groups=groups, checkpoint=checkpoint, ema_decay=plan["ema"], label="encoder")


def train_autoencoder(model: RefineByAlign, bank: TextureBank, plan: dict, checkpoint: Path, redrawn: int, seed: int) -> None:
    objective = AutoencoderObjective(model.vae)
    sampler = SceneSampler(bank, seed, image_size=model.config.image_size, reference_size=16)

    def pictures() -> torch.Tensor:
        image = sampler.sample(plan["batch"], "refinement").image
        y, x = torch.randint(image.shape[-1] - plan["crop"] + 1, (2,), generator=sampler.generator).tolist()
        return image[..., y : y + plan["crop"], x : x + plan["crop"]]

    model.vae.fit_scale(torch.cat([pictures() for _ in range(8)]) * 2 - 1)

    def loss(step: int) -> dict:
        sampler.generator.manual_seed(seed + step)
        bank.refresh(redrawn)
        return objective(pictures())

    groups = [{"params": list(objective.parameters()), "lr": plan["learning_rate"]}]
    optimise(objective, loss, steps=plan["steps"], groups=groups, checkpoint=checkpoint, ema_decay=plan["ema"], label="autoencoder")


def train_refiner(model: RefineByAlign, bank: TextureBank, plan: dict, checkpoint: Path, redrawn: int, seed: int) -> None:
    objective = RefinerObjective(model)
    model.unet.set_attn_processor(AttnProcessor())  # on a CPU, the fused kernel's backward takes a third of a step
    sampler = SceneSampler(bank, seed, image_size=model.config.image_size, reference_size=model.encoder_size)

    def loss(step: int) -> dict:
        sampler.generator.manual_seed(seed + step)
        bank.refresh(redrawn)
        mode = "refinement" if step % 2 else "alignment"
        return objective(sampler.sample(plan["batch"], mode), mode, sampler.generator)

    mlp = [p for part in (model.projector, model.context_projector, model.context_adapter) if part is not None for p in part.parameters()]
    groups = [
        {"params": list(model.unet.parameters()), "lr": plan["learning_rate"]},
        {"params": mlp, "lr": plan["mlp_learning_rate"]},
    ]
    optimise(objective, loss, steps=plan["steps"], groups=groups, checkpoint=checkpoint, ema_decay=plan["ema"], label="refiner")


TRAINERS = {"encoder": train_encoder, "autoencoder": train_autoencoder, "refiner": train_refiner}
