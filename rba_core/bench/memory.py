"""What memory the method takes at most: the weights, and what is alive beside them, counted without computing anything."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..alignment import attend
from ..model import RefineByAlign
from ..reference_encoding import encode_reference
from ..zoom_crop import crop_for
from .speed import SIZES, Case, Clock, build, sample_scene, timed, versions

CARDS = (8, 12, 24)
"""Sizes of graphics cards, GiB."""
RESERVE = 1.0
"""GiB of a card that are left for the driver's context, the libraries' workspaces, a desktop and what the allocator can't use."""
WORK = {
    "encode reference": "DINOv2 and the MLP over one reference",
    "align": "one look: two VAE encodes and the U-Net up to the alignment layer",
    "refine, guidance in one batch": "the whole of `refine`, VAE decode included",
    "refine, guidance in two passes": "the same with `--low-memory`",
    "U-Net, batch of two": "one step of its denoising loop",
    "U-Net, batch of one": "the same with `--low-memory`",
    "VAE encode": "one crop",
    "VAE decode": "one crop",
    "VAE decode, 2 x the side": "what a model of twice the crop's side would need",
    "VAE decode, 2 x the side, in tiles": "the same with `--low-memory`",
}


class Fused(TorchFunctionMode):
    """Attention as GPUs do it, without a matrix of cells by cells; on a device without storage nothing is computed anyway."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.scaled_dot_product_attention:
            query, _, value = arguments[:3] if len(arguments) > 2 else (named[name] for name in ("query", "key", "value"))
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*arguments, **(named or {}))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages made within it on a device that are alive; `peak`, the most there were."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.live, self.peak, self.known = 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        for given in tree_leaves((arguments, named)):
            if isinstance(given, Tensor):
                self.known.setdefault(given.untyped_storage(), None)
        made = function(*arguments, **(named or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device and tensor.untyped_storage() not in self.known:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.known[storage] = None
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def peak_of(work: Callable, device: str = "meta") -> int:
    """Bytes alive at most on a device while `work` runs, beyond what was before."""
    with torch.no_grad(), Fused(), LiveBytes(device) as counter:
        work()
    return counter.peak


def measure_memory(size: str) -> dict:
    """Count the memory of a size of `SIZES` on a device without storage: whole size, no computation, seconds.

    returns   ready for JSON: {"memory": size, "random_weights", "image_size", "versions", "precisions": {"fp32", "half": {"weights": {part: bytes},
              "peaks": {work of `WORK`: bytes alive beside the weights}, "totals": {setting: bytes on the device, `RESERVE` not among them}}}}
    """
    precisions = {name: _counted(build(size, "meta", dtype)) for name, dtype in (("fp32", torch.float32), ("half", torch.bfloat16))}
    image_size = build(size, "meta", torch.bfloat16).config.image_size
    return {"memory": size, "random_weights": SIZES[size] is not None, "image_size": image_size, "versions": versions(), "precisions": precisions}


def _counted(model: RefineByAlign) -> dict:
    scene = sample_scene()
    case = Case.of(model, scene, 1)
    picture = case.crop.image[None]
    latents = model.encode_image(picture)
    larger = latents.new_zeros(*latents.shape[:2], *(2 * side for side in latents.shape[2:]))
    wide = crop_for(model, scene.image, scene.mask, model.config.alignment_context)
    peaks = {
        "encode reference": peak_of(lambda: encode_reference(model, scene.reference, scene.reference_mask)),
        "align": peak_of(lambda: attend(model, wide, case.whole)),
        "refine, guidance in one batch": peak_of(case.refine),
        "VAE encode": peak_of(lambda: model.encode_image(picture)),
        "VAE decode": peak_of(lambda: model.decode_latents(latents)),
        "VAE decode, 2 x the side": peak_of(lambda: model.decode_latents(larger)),
    }
    case.inputs = [call.arguments for call in timed(model, case.refine, Clock(torch.device("cpu"))).calls["U-Net"]]
    ((sample, step, tokens),) = case.inputs
    for name, count in (("U-Net, batch of two", 2), ("U-Net, batch of one", 1)):
        one = sample[:1].expand(count, -1, -1, -1), step, tokens[:1].expand(count, -1, -1)
        peaks[name] = peak_of(lambda one=one: model.unet(*one, **model.context_residuals(one[0])))
    model.spare_memory()
    peaks["refine, guidance in two passes"] = peak_of(case.refine)
    peaks["VAE decode, 2 x the side, in tiles"] = peak_of(lambda: model.decode_latents(larger))
    weights = {part: sum(value.nbytes for value in module.state_dict().values()) for part, module in (("U-Net", model.unet), ("encoder", model.encoder), ("VAE", model.vae))}
    whole = sum(value.nbytes for value in model.state_dict().values())
    rest = whole - weights["U-Net"] - weights["encoder"]
    totals = {
        "all on the GPU": whole + max(peaks[work] for work in ("encode reference", "align", "refine, guidance in one batch")),
        "--low-memory": rest + max(weights["encoder"] + peaks["encode reference"], weights["U-Net"] + max(peaks["align"], peaks["refine, guidance in two passes"])),
    }
    return {"weights": weights | {"all": whole}, "peaks": {work: peaks[work] for work in WORK}, "totals": totals}


def memory_tables(results: dict) -> tuple[list[list[str]], list[list[str]]]:
    """What `measure_memory` returns as rows of two tables: parts and work, then settings and cards."""
    precisions = results["precisions"]
    parts = [["MiB", *precisions]]
    parts += [[f"weights: {part}", *(f"{own['weights'][part] / 2**20:,.0f}" for own in precisions.values())] for part in precisions["half"]["weights"]]
    parts += [[work, *(f"{own['peaks'][work] / 2**20:,.0f}" for own in precisions.values())] for work in WORK]
    settings = [["setting", "GiB", *(f"{card} GB card" for card in CARDS)]]
    for precision, own in precisions.items():
        for setting, total in own["totals"].items():
            settings.append([f"{precision}, {setting}", f"{total / 2**30:.1f}", *("fits" if total / 2**30 + RESERVE <= card else "no" for card in CARDS)])
    return parts, settings


def memory_title(results: dict) -> str:
    return f"{results['memory']} ({'random weights' if results['random_weights'] else 'rba-tiny'}), crops of {results['image_size']} px"


def memory_setting(results: dict) -> str:
    return (
        "Bytes of storages alive at most beside the weights, counted over the very operations on a device without storage, attention as fused kernels take it. "
        f"A setting fits a card if {RESERVE:g} GiB are left over, for the driver, workspaces of kernels and what the allocator can't use; half is fp16 or bf16. "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + "."
    )  # fmt: skip
