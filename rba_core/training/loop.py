"""One resumable optimisation loop for all legs, on one process or many."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
from datetime import timedelta
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError

FREE = ("save_every", "validate_every", "validation_items", "gradient_checkpointing")
"""Keys of a leg that may change between a stop and going on: the weights do not depend on them."""
SCHEDULES = ("cosine", "constant")
LOG_EVERY = 20


class Stopped(Exception):
    """SIGINT or SIGTERM ended the training at a step boundary, with a checkpoint of it written."""

    def __init__(self, checkpoint: Path, step: int, steps: int, signum: int):
        super().__init__(f"stopped after step {step} of {steps}, all of it is in {checkpoint}; the same command goes on from there")
        self.signum = signum


def make_accelerator(precision: str):
    """`accelerate.Accelerator` for "no", "bf16" or "fp16"; `accelerate launch` tells it of other processes."""
    try:
        from accelerate import Accelerator, DistributedType
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise InputError("training", "needs accelerate, which is not installed", 'pip install "refine-by-align[train]"') from error
    AcceleratorState._reset_state()  # else a second training in one process could not have another precision
    parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # else the gradients are held twice
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # while the main process validates and writes
    try:
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[parallel, patience])
    except ValueError as error:
        raise InputError("precision", f"{precision!r} does not run here ({' '.join(str(error).split())[:120]})", 'use "no"') from error
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("precision", "'fp16' needs a GPU", 'use "bf16" or "no"')
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise InputError("accelerate", f"is set up for {accelerator.distributed_type.value}, which splits the weights", "run `accelerate config` again and choose plain data parallelism")
    return accelerator


def optimise(
    accelerator,
    module: nn.Module,
    inputs: Callable[[int, int], tuple],
    *,
    steps: int,
    batch: int,
    groups: list[dict],
    checkpoint: Path,
    plan: dict,
    micro_batch: int | None = None,
    schedule: str = "cosine",
    warmup: int = 200,
    weight_decay: float = 0.02,
    ema: float = 0.0,
    save_every: int = 250,
    validate_every: int = 0,
    validate: Callable[[int], dict] | None = None,
) -> None:
    """Minimise the sum of the terms that `module(*inputs(step, index))` gives; AdamW, resumed from `checkpoint`.

    inputs          the arguments for micro-batch `index` of `step`. Nothing but these two may decide them: process
                    r of w asks for the indices with `index % w == r`, and a resumed training for the later steps alone
    batch           samples a step, over all processes, in micro-batches of `micro_batch` (default: one of all)
    groups          of parameters, each with its learning rate `lr`
    schedule        "cosine" (down to 2% at `steps`) or "constant", after a linear rise over `warmup` steps. A
                    function of step and `steps` alone: where `steps` is raised later, the rate goes on where the
                    longer cosine has it
    ema             decay of the average of the weights, 0 = none; held by the main process
    plan            all that the weights depend on; a checkpoint that was begun with another plan is refused
    validate        called on the main process every `validate_every` steps (0 = never) and after the last, while
                    `module` carries its average; gives figures for the log

    The checkpoint holds the trained weights, their average, the optimiser's state, the step and the plan. Beside
    it stand the log, `<leg>.jsonl`, and with validation its plot, `<leg>.png`. When done, `module` carries the
    average. Raises `Stopped` on SIGINT and SIGTERM.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    mine = range(rank, batch // (micro_batch or batch), world)
    state = read_checkpoint(checkpoint, plan, steps) if checkpoint.exists() else None
    start = state["step"] if state else 0
    if len(set(accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist())) > 1:
        raise InputError("output", f"{checkpoint.parent} is not the same folder for all processes", "put it on a file system that all nodes share")
    if start == steps:
        load_trained(module, state["average"] or state["module"])
        return

    if state:
        load_trained(module, state["module"])
    rates = [group["lr"] for group in groups]
    wrapped, optimiser = accelerator.prepare(module, torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=weight_decay))
    trained = trained_state(module)
    average = {name: value.clone() for name, value in trained.items()} if ema and accelerator.is_main_process else {}
    if state:
        optimiser.load_state_dict(state["optimiser"])
        for name in average:
            average[name].copy_(state["average"][name])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        state = None  # an SD 1.x one is 13 GB

    def save(step: int) -> None:
        partial = checkpoint.with_suffix(".partial")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        torch.save({"module": trained, "average": average, "optimiser": optimiser.state_dict(), "scaler": scaler, "step": step, "plan": plan}, partial)
        os.replace(partial, checkpoint)

    main = accelerator.is_main_process
    if main:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        log = Log(checkpoint.with_suffix(".jsonl"), start)
    sums: dict[str, Tensor] = {}
    logged = start
    with StopSignal() as stop, tqdm(initial=start * batch, total=steps * batch, desc=checkpoint.stem, unit="sample", mininterval=2, disable=not main) as bar:
        for step in range(start, steps):
            for group, rate in zip(optimiser.param_groups, rates):
                group["lr"] = rate * share_of_rate(step, steps, warmup, schedule)
            for index in mine:
                arguments = inputs(step, index)
                # gradients are exchanged once a step, with the last micro-batch's
                with contextlib.nullcontext() if index == mine[-1] else accelerator.no_sync(wrapped):
                    terms = wrapped(*arguments)
                    accelerator.backward(sum(terms.values()) / len(mine))
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0) + term.detach().float() / len(mine)
            accelerator.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if average:
                torch._foreach_lerp_(list(average.values()), list(trained.values()), 1 - min(ema, (1 + step) / (10 + step)))

            done = step + 1
            bar.update(batch)
            validates = validate is not None and validate_every > 0 and (done % validate_every == 0 or done == steps)
            if done % LOG_EVERY == 0 or validates or done == steps:
                means = accelerator.reduce(torch.stack(list(sums.values())) / (done - logged), "mean").tolist()
                entry = {"step": done, "loss": sum(means), **dict(zip(sums, means))}
                sums, logged = {}, done
                if main:
                    bar.set_postfix({name: f"{value:.4f}" for name, value in entry.items() if name != "step"}, refresh=False)
                    log.write(entry)
            if validates:
                if main:
                    log.write({"step": done, "held-out": validated(module, trained, average, lambda: validate(done))})
                    log.plot()
                accelerator.wait_for_everyone()
            signum = stop.agreed(accelerator)
            if main and (done == steps or done % save_every == 0 or signum):
                save(done)
            if signum:
                accelerator.wait_for_everyone()  # the launcher ends all processes as soon as one has left
                raise Stopped(checkpoint, done, steps, signum)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if ema:
        load_trained(module, average or torch.load(str(checkpoint), map_location="cpu", weights_only=True, mmap=True)["average"])


def share_of_rate(step: int, steps: int, warmup: int, schedule: str) -> float:
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) if schedule == "cosine" else 1.0)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without its frozen parameters: those are files of their own, and large."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def load_trained(module: nn.Module, state: dict[str, Tensor]) -> None:
    if absent := set(trained_state(module)) - set(state):
        raise InputError("checkpoint", f"lacks {len(absent)} weights ({sorted(absent)[0]} …)", "it belongs to another model; use another output folder")
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError("checkpoint", f"is of another model ({' '.join(str(error).split())[:120]})", "use another output folder") from error


def read_checkpoint(checkpoint: Path, plan: dict, steps: int, mmap: bool = False) -> dict:
    """The checkpoint, if `plan` and `steps` can go on from it."""
    try:
        state = torch.load(str(checkpoint), map_location="cpu", weights_only=True, mmap=mmap)
        before, done = dict(_flat(state["plan"])), state["step"]
    except Exception as error:  # torch.load raises what the zip reader and the unpickler happen to raise
        raise InputError("checkpoint", f"{checkpoint} cannot be read ({type(error).__name__})", "delete it to train this leg anew") from error
    now = dict(_flat(plan))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            told = [repr(side[key]) if key in side else "absent" for side in (before, now)]
            raise InputError("config", f"{checkpoint} was begun with {key} {told[0]}, now it is {told[1]}", "set it back, or delete the file to train this leg anew")
    if done > steps:
        raise InputError("config", f"{checkpoint} has {done} steps, more than the {steps} asked for", "raise steps, or delete the file to train this leg anew")
    return state


def _flat(plan: dict, prefix: str = ""):
    for key, value in plan.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def validated(module: nn.Module, trained: dict[str, Tensor], average: dict[str, Tensor], validate: Callable[[], dict]) -> dict:
    """What `validate` says of the average of the weights; the weights themselves are the same bits after as before."""
    kept = {name: value.to("cpu", copy=True) for name, value in trained.items()} if average else {}
    module.eval()
    try:
        with torch.no_grad():
            for name, value in average.items():
                trained[name].copy_(value)
            return validate()
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                trained[name].copy_(value)
        module.train()


class StopSignal:
    """Notes SIGINT and SIGTERM instead of dying of them. Under a launcher the terminal's comes twice; a third is obeyed at once."""

    def __enter__(self) -> StopSignal:
        self.signum, self.times, self.former = 0, 0, {}
        if threading.current_thread() is threading.main_thread():
            self.former = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, signum, frame) -> None:
        self.signum, self.times = signum, self.times + 1
        if self.times == 2:
            self.__exit__()

    def __exit__(self, *exception) -> None:
        for signum, handler in self.former.items():
            signal.signal(signum, handler)

    def agreed(self, accelerator) -> int:
        """The signal that any of the processes got, 0 = none: all must leave at the same step."""
        if accelerator.num_processes == 1:
            return self.signum
        return int(accelerator.gather(torch.tensor([self.signum], device=accelerator.device)).max())


class Log:
    """A line of JSON for every entry. What lies beyond `start`, from a training that was killed, is dropped."""

    def __init__(self, path: Path, start: int):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() and start else []
        self.entries = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed training
                if (entry := json.loads(line))["step"] <= start:
                    self.entries.append(entry)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))

    def write(self, entry: dict) -> None:
        self.entries.append(entry)
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def plot(self) -> None:
        """`<leg>.png`: the loss in training and held out, and whatever else validation measures, over the steps."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        seen = [entry for entry in self.entries if "held-out" in entry]
        others = [name for name in ("miou", "psnr") if any(name in entry["held-out"] for entry in seen)]
        figure = Figure(figsize=(5 * (1 + len(others)), 4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 1 + len(others), squeeze=False)[0]
        training = [(entry["step"], entry["loss"]) for entry in self.entries if "loss" in entry]
        panels[0].plot(*zip(*training), label="training", linewidth=1)
        steps = [entry["step"] for entry in seen]
        panels[0].plot(steps, [entry["held-out"]["loss"] for entry in seen], label="held out", marker=".")
        panels[0].legend()
        for panel, name in zip(panels, ["loss", *others]):
            if name != "loss":
                panel.plot(steps, [entry["held-out"][name] for entry in seen], marker=".")
            panel.set(xlabel="step", title={"loss": "loss", "miou": "mIoU of the matched region", "psnr": "PSNR under the mask, dB"}[name])
            panel.grid(alpha=0.3)
        figure.savefig(self.path.with_suffix(".png"), dpi=90)
