"""How long the parts of the method take, in what memory, beside what their arithmetic takes at least."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionInpaintPipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..alignment import attend, attention_at, cross_attentions, noised
from ..collage import Collage, lay_over, transfer_detail
from ..editing import find_match
from ..errors import InputError
from ..model import RefineByAlign, read_config
from ..pipeline import Match, Settings, find_region, grow
from ..postprocessing import MatchedRegion
from ..reference_encoding import EncodedReference, encode_reference
from ..refinement import Progress, default_strength, make_scheduler, refine
from ..shipped import read_sample
from ..stitch import stitch
from ..zoom_crop import ZoomCrop, crop_for

SIZES = {
    "tiny": None, "sd15": {}, "sd21": {"unet": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}},
    "anydoor": read_config("anydoor"),
}  # fmt: skip
"""What the parts of a size have that `configs/sd1x.json` has not, its weights are random; tiny is the shipped model."""
SHARPNESS = 30.0
"""By what the keys of a random alignment layer are scaled: else its attention is flat, and alignment ends at that."""
PEAKS = {"NVIDIA H100 80GB HBM3": (989e12, 3.35e12), "NVIDIA H200": (989e12, 4.8e12)}
"""Dense FLOP/s in half precision and bytes/s, from NVIDIA's data sheets of the SXM modules."""
PARTS = {"U-Net": "unet", "VAE encode": "encode_image", "VAE decode": "decode_latents", "encoder": "tokens"}
"""The networks, and what of a `RefineByAlign` runs them."""
ROUND = ("align", *("alignment pass", "U-Net forward") * 3, "refine", "denoising loop", "diffusers pipeline", "register", "detail transfer", "stitch")
"""What a round of measuring runs, so that what is compared runs in turn."""
INPAINTING_CHANNELS = 9
"""Of the U-Nets that diffusers' inpainting pipeline takes: those of Stable Diffusion's sizes; the shipped model's has more."""
ALIGNMENT, NO_NETWORK = ("align", "alignment pass"), ("register", "detail transfer", "stitch")
MEANINGS = {
    "align": "all that finds M* by default: two looks, each two VAE passes and an alignment pass; a close-up encoded in between",
    "alignment pass": "the U-Net up to the alignment layer",
    "U-Net forward": "the whole U-Net on the same input, batch 1",
    "refine": "`refine` of one crop, departing from a registered reference",
    "denoising loop": "the U-Net's forwards of that refinement, on the inputs they had there, and the sampler's steps",
    "diffusers pipeline": "`StableDiffusionInpaintPipeline` on the same crop, with the same U-Net, VAE, sampler, steps, guidance and context",
    "VAE encode": "one pass of those in align and refine",
    "VAE decode": "the pass in refine",
    "encoder": "DINOv2, one pass of those in align and refine",
    "register": "the reference laid over the crop, on the CPU",
    "detail transfer": "its fine detail carried over into the redrawn crop, on the CPU",
    "stitch": "the redrawn crop put back, on the CPU",
}


@dataclass(frozen=True)
class Scene:
    """The sample of the package, and what the shipped model matches in it: that is there also where weights are random."""

    image: Tensor
    mask: Tensor
    reference: Tensor
    reference_mask: Tensor
    match: Match


@cache
def sample_scene() -> Scene:
    sample = read_sample()
    return Scene(*sample, find_match(RefineByAlign.load("rba-tiny"), *sample))


@dataclass
class Case:
    """A model and what it has to do, each piece of work a method; `inputs` are the U-Net's in the last refinement seen."""

    model: RefineByAlign
    scene: Scene
    steps: int
    crop: ZoomCrop
    whole: EncodedReference
    guide: EncodedReference
    collage: Collage
    strength: float
    sample: Tensor
    inputs: list[tuple]

    @classmethod
    def of(cls, model: RefineByAlign, scene: Scene, steps: int) -> Case:
        crop, match = crop_for(model, scene.image, scene.mask), scene.match
        whole = encode_reference(model, scene.reference, scene.reference_mask)
        guide = encode_reference(model, scene.reference, grow(match.region, Settings().region_margin) * scene.reference_mask)
        with torch.no_grad():
            sample = noised(model, crop, model.noise_step(model.config.alignment_timestep), 0)
        return cls(model, scene, steps, crop, whole, guide, match.collage, default_strength(model, match.collage.confidence), sample, [])

    def align(self) -> MatchedRegion:
        scene = self.scene
        return find_region(self.model, scene.image, scene.mask, self.crop, scene.reference, self.whole, Settings(), 0)

    @torch.no_grad()
    def alignment_pass(self) -> Tensor:
        model = self.model
        step = model.noise_step(model.config.alignment_timestep).to(self.sample.device)
        return attention_at(model.unet, model.config.alignment_layer, self.sample, step, self.whole.embedding, **model.context_residuals(self.sample))

    @torch.no_grad()
    def unet_forward(self) -> Tensor:
        model = self.model
        step = model.noise_step(model.config.alignment_timestep).to(self.sample.device)
        return model.unet(self.sample, step, self.whole.embedding, **model.context_residuals(self.sample)).sample

    def refine(self) -> Tensor:
        return refine(self.model, self.crop, self.guide, collage=self.collage, strength=self.strength, steps=self.steps)

    @torch.no_grad()
    def denoising_loop(self) -> Tensor:
        model, guidance = self.model, self.model.config.guidance
        sampler = make_scheduler(model, model.config.scheduler)
        sampler.set_timesteps(self.steps)
        latents = self.inputs[0][0][:1, : model.vae.config.latent_channels]
        for (sample, step, embedding), timestep in zip(self.inputs, sampler.timesteps, strict=True):
            prediction = model.unet(sample, step, embedding, **model.context_residuals(sample)).sample
            if guidance != 1:
                dropped, guided = prediction.chunk(2)
                prediction = dropped + guidance * (guided - dropped)
            latents = sampler.step(prediction, timestep, latents, return_dict=False)[0]
        return latents

    @cached_property
    def pipeline(self) -> StableDiffusionInpaintPipeline:
        model = self.model
        pipeline = StableDiffusionInpaintPipeline(
            model.vae, None, None, model.unet, make_scheduler(model, model.config.scheduler), safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def diffusers_pipeline(self) -> Tensor:
        model, crop, context = self.model, self.crop, self.guide.embedding
        self.pipeline.unet = model.unet  # the variant's
        return self.pipeline(
            prompt_embeds=context, negative_prompt_embeds=torch.zeros_like(context), image=crop.image[None], mask_image=crop.mask[None, None], height=model.config.image_size,
            width=model.config.image_size, num_inference_steps=self.steps, guidance_scale=model.config.guidance, generator=torch.Generator().manual_seed(0), output_type="pt",
        ).images[0]  # fmt: skip

    def register(self) -> Collage:
        return lay_over(self.crop, self.scene.reference, self.scene.reference_mask, self.scene.match.region, self.scene.image)

    def detail_transfer(self) -> Tensor:
        return transfer_detail(self.crop.image, self.collage, self.crop.mask, 1.0)

    def stitch(self) -> Tensor:
        return stitch(self.scene.image, self.scene.mask, self.collage.picture, self.crop.box)

    def work(self, name: str) -> Callable:
        return getattr(self, name.replace(" ", "_").replace("-", "").lower())


def build(size: str, device: str | torch.device, dtype: torch.dtype) -> RefineByAlign:
    """The model of a size of `SIZES`, made on its device. Raises `InputError` for another."""
    if size not in SIZES:
        raise InputError("size", f"{size!r} is not known", f"use one of {', '.join(SIZES)}")
    if SIZES[size] is None:
        return RefineByAlign.load("rba-tiny", device=device, dtype=dtype)
    torch.manual_seed(0)
    parts = read_config("sd1x")
    model = RefineByAlign.from_config({part: parts.get(part, {}) | SIZES[size].get(part, {}) for part in {**parts, **SIZES[size]}}, device=device, dtype=dtype)
    with torch.no_grad():
        cross_attentions(model.unet)[model.config.alignment_layer].to_k.weight.mul_(SHARPNESS)
    return model


def measure_speed(
    size: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, steps: int | None = None, repeats: int = 5, warm_up: int = 1,
    compile: bool = False, channels_last: bool = False, progress: Progress | None = None,
) -> dict:  # fmt: skip
    """Time the work of `MEANINGS`, as it is and in the variants asked for, in turn in each round.

    size            of `SIZES`
    steps           of the refinement; default: the model's
    repeats         rounds; before them as many as `warm_up` that do not count
    compile         also with `torch.compile` of the U-Net. Alignment leaves the U-Net half way, by a hook, so it runs as it is
    channels_last   also with the model in that memory format
    progress        called with (pieces of work done, in all)
    returns         ready for JSON: {"speed": size, "random_weights", "machine", "versions", "device", "dtype", "image_size", "denoising_steps", "default_steps",
                    "scheduler", "guidance", "repeats", "parameters": {part: number}, "costs": {work: {"flops", "weight_bytes", "floor"}},
                    "variants": {name: see `summary`}, "peak_process_bytes"}; seconds, bytes, FLOPs throughout

    Raises `InputError` for an unknown size, and less than one step or repeat.
    """
    if repeats < 1:
        raise InputError("repeats", f"is {repeats}", "use 1 or more")
    if warm_up < 0:
        raise InputError("warm-up", f"is {warm_up}", "use 0 or more")
    scene = sample_scene()
    twin = build(size, "meta", dtype)
    steps = twin.config.steps if steps is None else steps
    costs = work_costs(twin, scene, steps)
    model = build(size, device, dtype)
    case, clock = Case.of(model, scene, steps), Clock(model.device)

    variants = dict.fromkeys((compiled, last) for last in (False, channels_last) for compiled in (False, compile))
    names = [", ".join(filter(None, ("compile" * compiled, "channels-last" * last))) or "eager" for compiled, last in variants]
    unet = torch.compile(model.unet, dynamic=False) if compile else None
    runs = {name: defaultdict(list) for name in names}
    rounds = range(-max(warm_up, compile), repeats)  # the first call of a compiled network compiles it
    todo = [work for work in ROUND if work != "diffusers pipeline" or model.unet.config.in_channels == INPAINTING_CHANNELS]
    own_work = {name: [work for work in todo if not (name != "eager" and work in NO_NETWORK or compiled and work in ALIGNMENT)] for name, (compiled, _) in zip(names, variants)}
    done, total = 0, len(rounds) * sum(map(len, own_work.values()))
    for number in rounds:
        for name, (compiled, last) in zip(names, variants):
            model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
            with shadowed(model, **({"unet": unet} if compiled else {})):
                for work in own_work[name]:
                    run = timed(model, case.work(work), clock)
                    if work == "refine":
                        case.inputs = [call.arguments for call in run.calls["U-Net"]]
                    if number >= 0:
                        runs[name][work].append(run)
                    done += 1
                    if progress:
                        progress(done, total)
    peak = PEAKS.get(clock.gpu) if dtype != torch.float32 else None
    for cost in costs.values():
        cost["floor"] = max(cost["flops"] / peak[0], cost["weight_bytes"] / peak[1]) if peak else None
    return {
        "speed": size, "random_weights": SIZES[size] is not None,
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "gpu": clock.gpu},
        "versions": versions(),
        "device": model.device.type, "dtype": str(dtype).removeprefix("torch."), "image_size": model.config.image_size,
        "denoising_steps": steps, "default_steps": model.config.steps, "scheduler": model.config.scheduler, "guidance": model.config.guidance, "repeats": repeats,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in (("U-Net", model.unet), ("VAE", model.vae), ("encoder", model.encoder), ("all", model))},
        "costs": costs, "variants": {name: summary(own, steps, model.config.steps) for name, own in runs.items()}, "peak_process_bytes": peak_process_bytes(),
    }  # fmt: skip


@dataclass(frozen=True)
class Call:
    seconds: float
    arguments: tuple


@dataclass(frozen=True)
class Run:
    """One piece of work: how long, the calls of `PARTS` in it, and on a GPU the most memory allocated meanwhile."""

    seconds: float
    calls: dict[str, list[Call]]
    peak_bytes: int | None

    def inside(self, *parts: str) -> float:
        return sum(call.seconds for part in parts for call in self.calls[part])


class Clock:
    """Marks in the order of the device's own work, by CUDA's events where it has them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None

    def synchronize(self) -> None:
        if self.gpu is not None:
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def mark(self):
        if self.gpu is None:
            self.synchronize()
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start, end) -> float:
        return end - start if self.gpu is None else start.elapsed_time(end) / 1000


class Watched:
    """A part of a model of which each call goes through `seen(part, *arguments)`; all else of it is as it was."""

    def __init__(self, part, seen: Callable):
        self.part, self.seen = part, seen

    def __call__(self, *arguments, **named):
        return self.seen(self.part, *arguments, **named)

    def __getattr__(self, name: str):
        return getattr(self.part, name)


@contextmanager
def shadowed(model: RefineByAlign, **others) -> Iterator[None]:
    """The model with others in place of its parts or methods: what an instance has itself is found before what its modules are."""
    former = {name: vars(model)[name] for name in others if name in vars(model)}
    vars(model).update(others)
    try:
        yield
    finally:
        for name in others:
            del vars(model)[name]
        vars(model).update(former)


def timed(model: RefineByAlign, work: Callable, clock: Clock) -> Run:
    calls = defaultdict(list)

    def watch(name: str) -> Callable:
        def seen(part, *arguments, **named):
            start = clock.mark()
            try:
                return part(*arguments, **named)
            finally:  # alignment leaves the U-Net by an exception
                calls[name].append((start, clock.mark(), arguments))

        return seen

    if clock.gpu is not None:
        torch.cuda.reset_peak_memory_stats(clock.device)
    with shadowed(model, **{attribute: Watched(getattr(model, attribute), watch(name)) for name, attribute in PARTS.items()}):
        clock.synchronize()
        start = clock.mark()
        work()
        end = clock.mark()
        clock.synchronize()
    inside = {name: [Call(clock.between(before, after), arguments) for before, after, arguments in calls[name]] for name in PARTS}
    return Run(clock.between(start, end), inside, None if clock.gpu is None else torch.cuda.max_memory_allocated(clock.device))


def summary(runs: dict[str, list[Run]], steps: int, default_steps: int) -> dict:
    """The figures of one variant.

    seconds     {work: {"median", "least", "most", "n"}}, and of each single pass of VAE and encoder
    inside      {work: {part: {"seconds", "passes"}}} of align and refine, with what is no network as "rest"
    ratio       alignment pass over U-Net forward
    overhead    of refine: "whole", over its denoising loop as a share of that, the medians of the rounds; of it "networks", VAE and encoder,
                and "own", what remains; within one call, so that it holds on a busy machine too, "rest": what is no network, sampler
                included, as a share of its U-Net, and "default": that and VAE and encoder spread over the model's own number of steps
    over_pipeline   refine over diffusers' own pipeline, where that takes the U-Net
    peak_bytes  {work: the most memory allocated}, of a GPU
    """
    seconds = {work: [run.seconds for run in own] for work, own in runs.items()}
    for part in ("VAE encode", "VAE decode", "encoder"):
        if passes := [call.seconds for work in ("align", "refine") for run in runs[work] for call in run.calls[part]]:
            seconds[part] = passes
    inside = {}
    for work in ("align", "refine"):
        if runs[work]:
            inside[work] = {part: {"seconds": statistics.median(run.inside(part) for run in runs[work]), "passes": len(runs[work][0].calls[part])} for part in PARTS}
            inside[work]["rest"] = {"seconds": statistics.median(run.seconds - run.inside(*PARTS) for run in runs[work])}
    pairs = list(zip(runs["refine"], runs["denoising loop"]))
    besides = [part for part in PARTS if part != "U-Net"]
    shares = {
        "whole": [run.seconds / loop.seconds - 1 for run, loop in pairs],
        "networks": [run.inside(*besides) / loop.seconds for run, loop in pairs],
        "own": [(run.seconds - run.inside(*besides)) / loop.seconds - 1 for run, loop in pairs],
        "rest": [(run.seconds - run.inside(*PARTS)) / run.inside("U-Net") for run, _ in pairs],
        "default": [(run.seconds - run.inside(*PARTS) + run.inside(*besides) * steps / default_steps) / run.inside("U-Net") for run, _ in pairs],
    }
    to_pipeline = [run.seconds / other.seconds for run, other in zip(runs["refine"], runs["diffusers pipeline"])]
    ratios = [part.seconds / full.seconds for part, full in zip(runs["alignment pass"], runs["U-Net forward"])]
    return {
        "seconds": {work: {"median": statistics.median(own), "least": min(own), "most": max(own), "n": len(own)} for work, own in seconds.items() if own},
        "inside": inside,
        "ratio": statistics.median(ratios) if ratios else None,
        "overhead": {name: statistics.median(values) for name, values in shares.items()},
        "over_pipeline": statistics.median(to_pipeline) if to_pipeline else None,
        "peak_bytes": {work: max(run.peak_bytes for run in own) for work, own in runs.items() if own and own[0].peak_bytes is not None},
    }


def work_costs(twin: RefineByAlign, scene: Scene, steps: int) -> dict[str, dict]:
    """FLOPs and bytes of weights read, of each work that runs networks, counted on a model without storage."""
    case = Case.of(twin, scene, min(steps, 1))
    picture = case.crop.image[None]
    latents = twin.encode_image(picture)
    costs = {
        "alignment pass": cost(case.alignment_pass),
        "U-Net forward": cost(case.unet_forward),
        "VAE encode": cost(lambda: twin.encode_image(picture)),
        "VAE decode": cost(lambda: twin.decode_latents(latents)),
        "encoder": cost(lambda: twin.tokens(torch.zeros(1, 3, twin.encoder_size, twin.encoder_size))),
    }
    step = timed(twin, case.refine, Clock(torch.device("cpu")))
    case.inputs = [call.arguments for call in step.calls["U-Net"]]
    loop, one = cost(case.denoising_loop), cost(case.refine)
    look, close_up = cost(lambda: attend(twin, case.crop, case.whole)), cost(lambda: encode_reference(twin, scene.reference, scene.reference_mask))
    looks = Settings().levels
    costs["align"] = {key: looks * look[key] + (looks - 1) * close_up[key] for key in look}
    costs["denoising loop"] = {key: steps * loop[key] for key in loop}
    costs["refine"] = {key: one[key] + (steps - 1) * loop[key] for key in loop}
    return costs


def cost(work: Callable) -> dict[str, int]:
    read = 0

    def add(module: torch.nn.Module, arguments: tuple) -> None:
        nonlocal read
        read += sum(weight.nbytes for weight in module.parameters(recurse=False))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(add)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work()
    finally:
        handle.remove()
    return {"flops": counter.get_total_flops(), "weight_bytes": read}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}


def cpu_name() -> str:
    try:
        return next(line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_process_bytes() -> int | None:
    """The most main memory that this process has held, all of it; not told on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def speed_table(results: dict) -> list[list[str]]:
    """What `measure_speed` returns as rows of a table: medians, and of what from least to most."""
    variants, costs = results["variants"], results["costs"]
    floors = any(cost["floor"] for cost in costs.values())
    table = [["", *(f"{name}, s" for name in variants), "GFLOP", "weights read, MB", *(["floor, s"] if floors else [])]]
    for work in MEANINGS:
        cells = []
        for figures in variants.values():
            own = figures["seconds"].get(work)
            cells.append(f"{own['median']:.3g} ({own['least']:.3g} to {own['most']:.3g})" if own else "")
        cost = costs.get(work)
        cells += [f"{cost['flops'] / 1e9:,.1f}", f"{cost['weight_bytes'] / 1e6:,.1f}"] if cost else ["", ""]
        if floors:
            cells.append(f"{cost['floor']:.3g}" if cost else "")
        if any(cells[: len(variants)]):
            table.append([work, *cells])
    return table


def speed_sentences(results: dict) -> list[str]:
    """What the table comes to."""
    costs, steps, default = results["costs"], results["denoising_steps"], results["default_steps"]
    by_flops = costs["alignment pass"]["flops"] / costs["U-Net forward"]["flops"]
    lines = []
    for name, figures in results["variants"].items():
        overhead, refined = figures["overhead"], figures["inside"]["refine"]
        passes = ", ".join(f"{own['passes']} {part} {own['seconds']:.3g} s" for part, own in refined.items() if part not in ("U-Net", "rest") and own["passes"])
        ratio = f"The alignment pass takes {figures['ratio']:.2f} of a U-Net forward (of its FLOPs {by_flops:.2f}). " if figures["ratio"] else ""
        lines.append(
            f"**{name}**: {ratio}`refine` takes {overhead['whole']:.1%} more than its bare loop of {steps} step{'s' * (steps != 1)}: VAE and encoder ({passes}) "
            f"{overhead['networks']:.1%}, the remainder {overhead['own']:.1%}. Within `refine`, what is no network, sampler included, is {overhead['rest']:.1%} of the U-Net."
            + (f" Were VAE and encoder spread over the model's {default} steps, it would take {overhead['default']:.1%} more than its U-Net." if default != steps else "")
        )
        if figures.get("over_pipeline"):
            lines[-1] += f" It takes {figures['over_pipeline']:.2f} times as long as diffusers' `StableDiffusionInpaintPipeline` with the same networks, sampler, steps and crop."
        if peaks := [f"{work} {figures['peak_bytes'][work] / 2**30:.2f} GiB" for work in ("align", "refine") if work in figures["peak_bytes"]]:
            lines[-1] += f" GPU memory at most: {', '.join(peaks)}."
    loop = costs["denoising loop"]["flops"] / steps * default
    lines.append(
        f"By FLOPs a VAE encode is {costs['VAE encode']['flops'] / loop:.1%} and the decode {costs['VAE decode']['flops'] / loop:.1%} of the bare loop of {default} step{'s' * (default != 1)}. "
        "Within a run of the whole method `refine` encodes one picture less than here, or two without a registered reference: the alignment has encoded them."
    )
    if results["peak_process_bytes"]:
        lines.append(f"Main memory of the process at most {results['peak_process_bytes'] / 2**30:.2f} GiB (ru_maxrss: libraries, the shipped model and, on a CPU, all weights).")
    return lines


def speed_title(results: dict) -> str:
    machine = results["machine"]
    weights = "random weights" if results["random_weights"] else "rba-tiny"
    return f"{results['speed']} ({weights}), {machine['gpu'] or machine['cpu'] + ', ' + str(machine['threads']) + ' threads'}, {results['dtype']}"


def speed_setting(results: dict) -> str:
    steps, rounds = results["denoising_steps"], results["repeats"]
    return (
        f"Crops of {results['image_size']} px, {steps} step{'s' * (steps != 1)} of {results['scheduler']}, guidance {results['guidance']:g}; medians (least to most) over "
        f"{rounds} round{'s' * (rounds != 1)} in which all of it runs in turn. " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + "."
    )


def speed_meanings(results: dict) -> list[str]:
    shown = {work for figures in results["variants"].values() for work in figures["seconds"]}
    return [f"**{work}**: {meaning}" for work, meaning in MEANINGS.items() if work in shown]
