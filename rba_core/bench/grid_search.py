"""Which timestep and layer to align with (Algorithm 1): Γ, the mean IoU of M* with M_gt over t and l."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..alignment import SAMPLER_STEPS, correspondence, cross_attentions, noised, over_patches, probabilities
from ..dense_correspondence import place
from ..errors import InputError
from ..model import PRETRAINED, RefineByAlign
from ..pipeline import carried
from ..postprocessing import clean
from ..reference_encoding import EncodedReference, encode_reference
from ..refinement import Progress
from ..zoom_crop import ZoomCrop, crop_for
from . import metrics
from .dataset import BenchmarkSet
from .run import write_whole

STEPS_OF_T = (0, 6, 12, 18, 24, 30, 36, 42, 48)
HEAT_MAP, CURVES = "heat_map.png", "curves.png"


def grid_search(
    set_folder: str | Path, model: RefineByAlign, steps_of_t: Sequence[int] = STEPS_OF_T, limit: int | None = None, seed: int = 0, progress: Progress | None = None
) -> dict:
    """Γ over the first `limit` items of a set (default: all) that have M_gt.

    steps_of_t   values of t, steps of the 50-step sampler, 0 = the noisiest
    progress     called with (U-Net passes done, passes in all)
    returns      {"set", "n", "timesteps", "gamma": [T][L], "dense": [T][L], "best": {"timestep", "layer", "miou"}}, ready
                 for JSON. gamma is of Eq. 5, an item of which the map is empty or flat counts 0; dense is of the first
                 level of `find_region`, which falls back on Eq. 5. best is dense's, as that is what the pipeline does

    Raises `InputError` for a t that there is not, and a set without M_gt.
    """
    if not steps_of_t:
        raise InputError("timesteps", "are none", f"name some of 0 to {SAMPLER_STEPS - 1}")
    items = BenchmarkSet(set_folder)
    chosen = items.having("correspondence", limit)
    gamma, dense = np.zeros((2, len(steps_of_t), len(cross_attentions(model.unet))))
    done = 0
    for position in chosen:
        item = items[position]
        whole = encode_reference(model, item.reference, item.object_mask)
        crop = crop_for(model, item.image, item.mask, model.config.alignment_context)
        for row, timestep in enumerate(steps_of_t):
            for layer, attention in enumerate(attend_everywhere(model, crop, whole, timestep, seed)):
                paper = _iou(correspondence(attention, crop.mask), whole, item.correspondence)
                found = carried(crop.mask, place(attention, crop, whole.box), whole.mask)
                gamma[row, layer] += paper / len(chosen)
                dense[row, layer] += (metrics.iou(found.mask, item.correspondence) if found else paper) / len(chosen)
            done += 1
            if progress:
                progress(done, len(chosen) * len(steps_of_t))
    row, layer = divmod(int(dense.argmax()), dense.shape[1])
    best = {"timestep": steps_of_t[row], "layer": layer, "miou": float(dense[row, layer])}
    return {"set": Path(set_folder).resolve().name, "n": len(chosen), "timesteps": list(steps_of_t), "gamma": gamma.tolist(), "dense": dense.tolist(), "best": best}


@torch.no_grad()
def attend_everywhere(model: RefineByAlign, crop: ZoomCrop, reference: EncodedReference, timestep: int, seed: int = 0) -> list[Tensor]:
    """What `attend` gives at every cross-attention layer, `[d², N²]` each, from one pass of the U-Net."""
    step = model.noise_step(timestep)
    sample = noised(model, crop, step, seed)
    attentions = []

    def read(attn, args: tuple, kwargs: dict) -> None:
        attentions.append(over_patches(probabilities(attn, args, kwargs)).cpu())

    hooks = [layer.register_forward_pre_hook(read, with_kwargs=True) for layer in cross_attentions(model.unet)]
    try:
        model.unet(sample, step.to(sample.device), reference.embedding, **model.context_residuals(sample))
    finally:
        for hook in hooks:
            hook.remove()
    return attentions


def write_choice(model: str | Path, best: dict) -> Path:
    """Make t* and l* the defaults of a model folder, or of a shipped model by its name; returns its config file."""
    path = (PRETRAINED / model if (PRETRAINED / model).is_dir() else Path(model)) / "config.json"
    config = json.loads(path.read_text()) | {"alignment_layer": best["layer"], "alignment_timestep": best["timestep"]}
    write_whole(path, json.dumps(config, indent=2) + "\n")
    return path


def draw(results: dict, folder: Path) -> None:
    """Γ as a heat map and the two curves of the paper's Fig. 4, as PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures", "are drawn by matplotlib, which is not installed", 'pip install "refine-by-align[bench]"') from error
    gammas = {"Eq. 5": np.array(results["gamma"]), "all cells": np.array(results["dense"])}
    timesteps, best = results["timesteps"], results["best"]
    layers = range(len(results["gamma"][0]))

    ticks = range(0, len(timesteps), -(-len(timesteps) // 10))
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (name, gamma) in zip(panels, gammas.items()):
        shown = axes.imshow(gamma, aspect="auto", cmap="viridis", vmin=0, vmax=max(float(g.max()) for g in gammas.values()))
        row, layer = divmod(int(gamma.argmax()), gamma.shape[1])
        axes.plot(layer, row, "s", markersize=14, markerfacecolor="none", markeredgecolor="red")
        axes.set(ylabel="timestep t", xticks=layers, yticks=ticks, yticklabels=[timesteps[tick] for tick in ticks])
        axes.set_title(f"{name}: best t = {timesteps[row]}, l = {layer} ({gamma[row, layer]:.3f})")
    panels[1].set(xlabel="cross-attention layer l")
    figure.colorbar(shown, ax=panels, label="mean IoU")
    figure.suptitle(f"{results['set']}, {results['n']} items")
    figure.savefig(folder / HEAT_MAP, dpi=110)

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for offset, (name, gamma) in enumerate(gammas.items()):
        left.bar(np.array(layers) + 0.4 * offset - 0.2, gamma.mean(0), width=0.4, label=name)
        right.plot(timesteps, gamma[:, best["layer"]], "o-", markersize=3, label=f"{name}, layer {best['layer']}")
    left.set(xlabel="cross-attention layer l", ylabel="mean IoU, mean over t", xticks=layers)
    left.tick_params(axis="x", labelsize=8)
    right.set(xlabel="timestep t", ylabel="mean IoU", ylim=(0, None))
    right.legend()
    left.legend()
    figure.savefig(folder / CURVES, dpi=110)


def _iou(raw: Tensor, reference: EncodedReference, wanted: Tensor) -> float:
    try:
        return metrics.iou(clean(raw, reference).mask, wanted)
    except InputError:
        return 0.0
