"""One resumable optimisation loop for all legs."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm


def optimise(
    module: nn.Module,
    loss: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    groups: list[dict],
    checkpoint: Path,
    precision: torch.dtype = torch.bfloat16,
    warmup: int = 200,
    ema_decay: float = 0.0,
    save_every: int = 250,
    label: str = "",
) -> None:
    """Minimise the sum of `loss(step)`'s terms; AdamW, warm-up and cosine decay, EMA, resumed from `checkpoint`.

    The checkpoint holds the weights, their EMA, the optimiser's state and the step. When done, `module`
    carries the EMA weights if `ema_decay` is above 0.
    """
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
    )
    average = {name: value.clone() for name, value in module.state_dict().items()} if ema_decay else {}
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        average, start = state["average"], state["step"]

    def save(step: int) -> None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {"module": module.state_dict(), "average": average, "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict(), "step": step},
            partial,
        )
        os.replace(partial, checkpoint)

    running: dict[str, float] = {}
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=label, mininterval=5)
    for step in bar:
        with torch.autocast(next(module.parameters()).device.type, precision, enabled=precision != torch.float32):
            terms = loss(step)
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        if ema_decay:
            decay = min(ema_decay, (1 + step) / (10 + step))
            for name, value in module.state_dict().items():
                if value.is_floating_point():
                    average[name].lerp_(value, 1 - decay)
                else:
                    average[name].copy_(value)
        for name, term in terms.items():
            running[name] = 0.98 * running.get(name, float(term)) + 0.02 * float(term)
        if step % 20 == 0:
            bar.set_postfix({name: f"{value:.4f}" for name, value in running.items()})
        if (step + 1) % save_every == 0:
            save(step + 1)
    save(steps)
    if ema_decay:
        module.load_state_dict(average)
