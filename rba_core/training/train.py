"""`rba train`: the legs that a plan asks for one after the other, each resumable, then the model folder."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import Dinov2Config, Dinov2Model

from .. import model as models
from ..autoencoder import BlockAutoencoder
from ..data.mixture import build_sampler
from ..data.scenes import REFERENCE_FILL, Scenes
from ..errors import InputError
from ..model import AUTOENCODERS, ModelConfig, RefineByAlign, read_part
from .autoencoder import AutoencoderObjective
from .encoder import EncoderObjective, damage, place_tokens
from .loop import FREE, SCHEDULES, make_accelerator, optimise, read_checkpoint
from .refiner import RefinerObjective, RefinerSettings
from .validation import validate_encoder, validate_refiner

LEGS = ("encoder", "autoencoder", "refiner")
FROM_INIT = {"encoder": ("encoder", "model"), "autoencoder": ("vae", "model"), "refiner": ("model",)}
"""Which of [init]'s keys make a leg unnecessary."""
REQUIRED = {
    "data": ("textures", "texture_size", "redrawn_per_step"),
    "encoder": ("steps", "batch", "learning_rate", "ema"),
    "autoencoder": ("steps", "batch", "crop", "learning_rate", "ema"),
    "refiner": ("steps", "batch", "learning_rate", "mlp_learning_rate", "ema"),
}
LOOP = ("micro_batch", "schedule", "warmup", "weight_decay", "save_every")
OPTIONAL = {
    "data": ("solids", "photos", "folders", "folders_share"),
    "encoder": (*LOOP, "validate_every", "validation_items"),
    "autoencoder": LOOP,
    "refiner": (*LOOP, "validate_every", "validation_items", "gradient_checkpointing", "drop", "mask_weight", "attention_weight", "layers"),
}


def _whole(low: int) -> tuple[Callable, str]:
    return lambda value: type(value) is int and value >= low, f"use a whole number, {low} or more"


def _number(low: float, high: float, words: str) -> tuple[Callable, str]:
    return lambda value: type(value) in (int, float) and low <= value < high, f"use a number, {words}"


VALUES = {
    **dict.fromkeys(("steps", "batch", "micro_batch", "crop", "save_every", "validation_items", "textures"), _whole(1)),
    "texture_size": _whole(16),
    **dict.fromkeys(("warmup", "validate_every", "redrawn_per_step"), _whole(0)),
    **dict.fromkeys(("learning_rate", "mlp_learning_rate"), _number(1e-12, 1, "above 0 and below 1")),
    **dict.fromkeys(("ema", "drop"), _number(0, 1, "0 or more and below 1")),
    **dict.fromkeys(("mask_weight", "attention_weight", "weight_decay"), _number(0, float("inf"), "0 or more")),
    **dict.fromkeys(("solids", "folders_share"), (lambda value: type(value) in (int, float) and 0 <= value <= 1, "use a share from 0 to 1")),
    **dict.fromkeys(("photos", "folders"), (lambda value: type(value) is list and all(type(v) is str for v in value), "use a list of folders")),
    "schedule": (lambda value: value in SCHEDULES, f"use one of {', '.join(SCHEDULES)}"),
    "gradient_checkpointing": (lambda value: type(value) is bool, "use true or false"),
    "layers": (lambda value: type(value) is list and all(type(v) is int and 0 <= v < 16 for v in value), "use a list of layers, 0 to 15"),
}


def train(config: str | Path, output: Path, *, photos: str | None = None, legs: list[str] | None = None, steps: int | None = None) -> None:
    """Train the model that `config` describes, a TOML file or the name of a shipped one. Writes `output`/<leg>.pt,
    .jsonl and .png as it goes, and `output`/<model>/ at the end; prints where that is.

    photos   folder of pictures, added to the plan's photos, and to its folders where it has a `folders_share`
    legs     some of `LEGS`; the ones before must have been trained or come from [init]
    steps    of each leg, instead of the plan's

    Raises `InputError`, and `Stopped` on SIGINT and SIGTERM.
    """
    plan = read_plan(config)
    if unknown := set(legs or ()) - set(LEGS):
        raise InputError("legs", f"{sorted(unknown)[0]!r} is not known", f"use some of {', '.join(LEGS)}")
    if absent := set(legs or ()) - set(plan):
        raise InputError("legs", f"{config} has no [{sorted(absent)[0]}]", "add that section")
    if photos and not Path(photos).is_dir():
        raise InputError("photos", f"{photos} is not a folder", "give a folder of pictures")
    if photos:
        for key in ("photos", "folders") if "folders_share" in plan["data"] else ("photos",):
            plan["data"][key] = [*plan["data"].get(key, []), str(photos)]
    planned = [leg for leg in LEGS if leg in plan]
    for leg in planned:
        plan[leg]["steps"] = steps or plan[leg]["steps"]
        if (output / f"{leg}.pt").exists():
            read_checkpoint(output / f"{leg}.pt", decisive(plan, leg), plan[leg]["steps"], mmap=True)
    if any(plan[leg].get("validate_every") for leg in planned) and importlib.util.find_spec("matplotlib") is None:
        raise InputError("training", "needs matplotlib for its plots, which is not installed", 'pip install "refine-by-align[train]", or set validate_every = 0')

    accelerator = make_accelerator(plan.get("precision", "bf16"))
    for leg in planned:
        batches = plan[leg]["batch"] // plan[leg].get("micro_batch", plan[leg]["batch"])
        if batches % accelerator.num_processes:
            raise InputError("config", f"[{leg}] has {batches} micro-batches a step for {accelerator.num_processes} processes", "set micro_batch so that batch / micro_batch is a multiple of the processes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.get("seed", 0))
        model = build(plan).float().train().to(accelerator.device)
    chosen = legs or planned
    for leg in planned:
        if leg not in chosen and not (output / f"{leg}.pt").exists():
            if any(planned.index(other) > planned.index(leg) for other in chosen):
                raise InputError("legs", f"{leg!r} has not been trained in {output}", "train the legs in order")
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.get("seed", 0))
            TRAINERS[leg](Leg(leg, plan, output, model, accelerator))
    if accelerator.is_main_process:
        model.eval().save(output / plan["model"])
        print(json.dumps({"model": str(output / plan["model"])}))
    accelerator.wait_for_everyone()


def read_plan(config: str | Path) -> dict:
    """The TOML as a dict, every key known and every value in its range."""
    path = Path(config)
    if not path.is_file() and (models.CONFIGS / f"train-{config}.toml").is_file():
        path = models.CONFIGS / f"train-{config}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem.removeprefix("train-") for p in models.CONFIGS.glob("train-*.toml")))
        raise InputError("config", f"{config} does not exist", f"give a TOML file, or one of {known}")
    try:
        plan = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError("config", f"{path} is not TOML ({error})", "correct that line") from error
    remedy = f"see {models.CONFIGS / 'train-rba-tiny.toml'} and docs/training.md"
    if unknown := set(plan) - {"model", "seed", "precision", "init", "data", *LEGS}:
        raise InputError("config", f"{path} has an unknown {sorted(unknown)[0]!r}", remedy)
    for section in ("init", "data", *LEGS):
        if not isinstance(plan.get(section, {}), dict):
            raise InputError("config", f"{path} has {section} = …, not a section [{section}]", remedy)
    init = plan.get("init", {})
    needed = ["model", "data", *(leg for leg in LEGS if not set(FROM_INIT[leg]) & set(init))]
    if missing := [name for name in needed if name not in plan]:
        raise InputError("config", f"{path} has no {missing[0]!r}", remedy)
    if not isinstance(plan["model"], str) or not plan["model"] or Path(plan["model"]).name != plan["model"]:
        raise InputError("config", f"{path} has model = {plan['model']!r}", "use a plain name")
    if type(plan.get("seed", 0)) is not int or plan.get("seed", 0) < 0:
        raise InputError("config", f"{path} has seed = {plan['seed']!r}", "use a whole number, 0 or more")
    if plan.get("precision", "no") not in ("no", "bf16", "fp16"):
        raise InputError("config", f"{path} has precision = {plan['precision']!r}", 'use "bf16", "fp16" or "no"')
    if unknown := set(init) - {"unet", "vae", "encoder", "model"}:
        raise InputError("config", f"{path} has an unknown {sorted(unknown)[0]!r} in [init]", "use unet, vae, encoder or model")
    if "model" in init and len(init) > 1:
        raise InputError("config", f"{path} has 'model' and more in [init]", "give a whole model or its parts")
    for section in ("data", *LEGS):
        if section not in plan:
            continue
        if absent := set(REQUIRED[section]) - set(plan[section]):
            raise InputError("config", f"{path} lacks {sorted(absent)[0]!r} in [{section}]", remedy)
        for key, value in plan[section].items():
            if key not in REQUIRED[section] + OPTIONAL[section]:
                raise InputError("config", f"{path} has an unknown {key!r} in [{section}]", remedy)
            allowed, words = VALUES[key]
            if not allowed(value):
                raise InputError("config", f"{path} has {key} = {value!r} in [{section}]", words)
    for leg in (leg for leg in LEGS if leg in plan):
        if plan[leg]["batch"] % plan[leg].get("micro_batch", 1):
            raise InputError("config", f"{path} has batch = {plan[leg]['batch']} and micro_batch = {plan[leg]['micro_batch']} in [{leg}]", "make batch a multiple of micro_batch")
    return plan


def decisive(plan: dict, leg: str) -> dict:
    """What the weights after any one step of `leg` depend on: its settings, the legs before it, and all that they share."""
    kept = {key: plan[key] for key in ("model", "data", "init") if key in plan}
    kept |= {"seed": plan.get("seed", 0), "precision": plan.get("precision", "bf16")}
    for other in LEGS[: LEGS.index(leg) + 1]:
        if other in plan:
            kept[other] = {key: value for key, value in plan[other].items() if key not in FREE and (other, key) != (leg, "steps")}
    return kept


def build(plan: dict) -> RefineByAlign:
    """The untrained model: parts from [init], the others with random weights by the config that `model` names."""
    init = plan.get("init", {})
    if "model" in init:
        model = RefineByAlign.load(init["model"])
        if model.config.detail_encoder:
            raise InputError("model", f"{init['model']} has a detail encoder, which no leg trains", "use it as it is, or train a model of the config sd1x")
        model.config = replace(model.config, reference_fill=REFERENCE_FILL)  # what the scenes' references are filled with
        return model
    path = models.CONFIGS / f"{plan['model']}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in models.CONFIGS.glob("*.json")))
        raise InputError("model config", f"{plan['model']!r} is not known", f"use one of {known}, or give a model folder in [init]")
    parts = json.loads(path.read_text())
    if "detail_encoder" in parts:
        raise InputError("model config", f"{plan['model']} has a detail encoder, which no leg trains", "train a model of the config sd1x")
    autoencoder = AUTOENCODERS[parts["vae"].pop("_class_name")]
    kinds = {"vae": autoencoder, "unet": UNet2DConditionModel, "encoder": lambda **config: Dinov2Model(Dinov2Config(**config))}
    built = {}
    for name, kind in kinds.items():
        if name not in init:
            built[name] = kind(**parts[name])
            continue
        folder = Path(init[name])
        if not (folder / "config.json").is_file():
            raise InputError("init", f"{folder} is no {name} folder: it has no config.json", "give the folder in the layout of diffusers or transformers")
        try:
            built[name] = read_part(Dinov2Model if name == "encoder" else kind, folder)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise InputError("init", f"{folder} cannot be read as {name} ({' '.join(str(error).split())[:160]})", "give a whole folder of that part") from error
    config = replace(ModelConfig(**parts["model"]), reference_fill=REFERENCE_FILL)
    return RefineByAlign(config, built["vae"], built["unet"], built["encoder"], DDIMScheduler(**parts["scheduler"]))


class Leg:
    """One leg of a plan: its settings, and its scenes, which follow from the seed, the step and the micro-batch alone."""

    def __init__(self, name: str, plan: dict, output: Path, model: RefineByAlign, accelerator):
        self.name, self.model, self.accelerator = name, model, accelerator
        self.settings, self.data = plan[name], plan["data"]
        self.init = {key for key in FROM_INIT[name] if key in plan.get("init", {})}
        self.number, self.seed = LEGS.index(name), plan.get("seed", 0)
        self.checkpoint, self.plan = output / f"{name}.pt", decisive(plan, name)
        self.micro_batch = self.settings.get("micro_batch", self.settings["batch"])
        self.micro_batches = self.settings["batch"] // self.micro_batch
        self.image_size = model.encoder_size if name == "encoder" else model.config.image_size
        self.reference_size = 16 if name == "autoencoder" else model.encoder_size
        self.sampler, self.held_out = cache(self._sampler), cache(self._held_out)

    def _sampler(self, held_out: bool = False):
        def bar(items):
            return tqdm(items, desc="textures", delay=2, disable=not self.accelerator.is_main_process)

        device = self.accelerator.device if self.accelerator.device.type == "cuda" and not held_out else "cpu"
        return build_sampler(self.data, self.seed, self.image_size, self.reference_size, device=device, held_out=held_out, progress=bar)

    def scenes(self, step: int, index: int, mode: str) -> tuple[Scenes, torch.Generator]:
        """Micro-batch `index` of `step`, and a generator for what else is random about it."""
        first, second = (int(word) >> 1 for word in np.random.SeedSequence([self.seed, self.number, step, index]).generate_state(2, np.uint64))
        sampler = self.sampler()
        sampler.at(step)
        sampler.seed(first)
        return sampler.sample(self.micro_batch, mode), torch.Generator().manual_seed(second)

    def _held_out(self, mode: str) -> Scenes:
        sampler = self.sampler(held_out=True)
        sampler.at(0)
        sampler.seed(self.number)
        return sampler.sample(self.settings.get("validation_items", 8), mode)

    def optimise(self, objective, inputs, groups: list[dict], validate=None) -> None:
        keys = ("steps", "batch", "micro_batch", "schedule", "warmup", "weight_decay", "ema", "save_every", "validate_every")
        options = {key: self.settings[key] for key in keys if key in self.settings}
        optimise(self.accelerator, objective, inputs, groups=groups, checkpoint=self.checkpoint, plan=self.plan, validate=validate, **options)

    def sheet(self, step: int) -> Path:
        return self.checkpoint.with_name(f"{self.name}-{step}.png")


def train_encoder(leg: Leg) -> None:
    if not leg.init:
        place_tokens(leg.model.encoder)
    objective = EncoderObjective(leg.model).train()
    if leg.accelerator.device.type == "cpu":
        leg.model.encoder.config._attn_implementation = "eager"  # here the fused kernel's backward takes a third of a step; transformers 4.50 has no setter

    def inputs(step: int, index: int) -> tuple:
        refinement = (step * leg.micro_batches + index) % 4 == 3
        scenes, generator = leg.scenes(step, index, "refinement" if refinement else "alignment")
        damaged = damage(scenes, generator, shares=(0.25, 0.25, 0.2, 0.3))
        return scenes.to(leg.accelerator.device), damaged.to(leg.accelerator.device)

    def validate(step: int) -> dict:
        return validate_encoder(objective, leg.held_out("alignment").to(leg.accelerator.device), leg.sheet(step))

    groups = [{"params": [p for p in objective.parameters() if p.requires_grad], "lr": leg.settings["learning_rate"]}]
    leg.optimise(objective, inputs, groups, validate)


def train_autoencoder(leg: Leg) -> None:
    objective = AutoencoderObjective(leg.model.vae)
    crop, size = leg.settings["crop"], leg.model.config.image_size
    if crop > size or crop % leg.model.stride:
        raise InputError("config", f"has crop = {crop} in [autoencoder]", f"use a multiple of {leg.model.stride}, up to {size}")

    def pictures(step: int, index: int) -> Tensor:
        scenes, generator = leg.scenes(step, index, "refinement")
        y, x = torch.randint(scenes.image.shape[-1] - crop + 1, (2,), generator=generator).tolist()
        return scenes.image[..., y : y + crop, x : x + crop].to(leg.accelerator.device)

    if isinstance(leg.model.vae, BlockAutoencoder) and not leg.init and not leg.checkpoint.exists():  # later the checkpoint has the scale
        leg.model.vae.fit_scale(torch.cat([pictures(0, index) for index in range(8)]) * 2 - 1)
    groups = [{"params": list(objective.parameters()), "lr": leg.settings["learning_rate"]}]
    leg.optimise(objective, lambda step, index: (pictures(step, index),), groups)


def train_refiner(leg: Leg) -> None:
    model, settings = leg.model, leg.settings
    chosen = {key: settings[key] for key in ("drop", "mask_weight", "attention_weight") if key in settings}
    if "layers" in settings:
        chosen["layers"] = tuple(settings["layers"])
    objective = RefinerObjective(model, RefinerSettings(**chosen))
    if leg.accelerator.device.type == "cpu":
        model.unet.set_attn_processor(AttnProcessor())  # as above
    if settings.get("gradient_checkpointing"):
        model.unet.enable_gradient_checkpointing()

    def inputs(step: int, index: int) -> tuple:
        mode = "refinement" if (step * leg.micro_batches + index) % 2 else "alignment"
        scenes, generator = leg.scenes(step, index, mode)
        return scenes.to(leg.accelerator.device), mode, generator

    def validate(step: int) -> dict:
        return validate_refiner(objective, {mode: leg.held_out(mode) for mode in ("alignment", "refinement")}, leg.sheet(step))

    mlp = [p for part in (model.projector, model.context_projector, model.context_adapter) if part is not None for p in part.parameters()]
    groups = [
        {"params": list(model.unet.parameters()), "lr": settings["learning_rate"]},
        {"params": mlp, "lr": settings["mlp_learning_rate"]},
    ]
    leg.optimise(objective, inputs, groups, validate)


TRAINERS = {"encoder": train_encoder, "autoencoder": train_autoencoder, "refiner": train_refiner}
