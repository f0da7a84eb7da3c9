"""Files of weights: their tensors by name, whether they are those that are wanted, and folders of them, written part by part."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..model import RefineByAlign, written_whole

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
LARGEST_FILE = 2**30
"""Bytes of a file that is written; of one in another precision than its source's, each is made in memory."""
FILES = {
    "unet": "unet/diffusion_pytorch_model", "vae": "vae/diffusion_pytorch_model", "detail_encoder": "detail_encoder/diffusion_pytorch_model",
    "encoder": "encoder/model", "projector": "projector",
}  # fmt: skip
"""Of each part of a model folder."""


def open_weights(name: str, *files: Path) -> dict[str, Tensor]:
    """The tensors of the files, mapped, not read: none takes memory before it is used. But a pickle as PyTorch wrote it before 1.6
    can't be mapped, and lies in memory, whole, as long as any tensor of it is held.

    A pickle is read as tensors and plain values alone; what is in a `state_dict` of it counts.
    """
    tensors = {}
    for file in files:
        if file.suffix not in SUFFIXES:
            raise InputError(name, f"{file.name} is no file of weights", f"give one of {', '.join(SUFFIXES)}")
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    tensors |= {key: opened.get_tensor(key) for key in opened.keys()}
            else:
                mapped = zipfile.is_zipfile(file)
                state = torch.load(str(file), map_location="cpu", weights_only=True, mmap=mapped)  # a str: torch 2.2 maps no Path
                tensors |= {key: value for key, value in state.get("state_dict", state).items() if isinstance(value, Tensor)}
        except Exception as error:  # torch.load raises what the zip reader and the unpickler happen to raise
            reason = "is cut short, or holds more than weights" if file.exists() and file.suffix != ".safetensors" else type(error).__name__
            raise InputError(name, f"{file} cannot be read ({reason})", "give the whole file; of a pickle with code in it, its safetensors version") from error
    return tensors


def check_layout(name: str, source: str | Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], aside: tuple[str, ...] = ()) -> list[str]:
    """The names of tensors that begin with one of `aside`; all others must be those of `wanted`, each in its shape (InputError)."""
    left = [key for key in tensors if key not in wanted]
    wrong = [f"{key} is missing" for key in wanted if key not in tensors]
    wrong += [f"{key} is {_sides(tensors[key].shape)}, not {_sides(shape)}" for key, shape in wanted.items() if key in tensors and tuple(tensors[key].shape) != tuple(shape)]
    wrong += [f"{key} is of no known use" for key in left if not key.startswith(aside)]
    if wrong:
        more = f", and {len(wrong) - 1} more such" if len(wrong) > 1 else ""
        raise InputError(name, f"in {Path(source).name} {wrong[0]}{more}", "give the weights of a model of that kind and size, whole and under their first names")
    return left


def _sides(shape) -> str:
    return "x".join(map(str, shape)) or "a number"


def write_model(model: RefineByAlign, folder: Path, parts: Mapping[str, Callable[[], Mapping[str, Tensor]]], dtype: torch.dtype | None = None) -> None:
    """Write a folder that `RefineByAlign.load` reads, whole or not at all. The model's own weights do not count, it may be on "meta":
    `parts` opens those of each part when its turn has come, and they are let go before the next's.

    dtype   that all get; default: as they are
    """
    try:
        with written_whole(folder) as partial:
            model.config.write(partial)
            model.scheduler.save_pretrained(partial / "scheduler")
            model.encoder.config.save_pretrained(partial / "encoder")
            for part in parts:
                if part not in ("encoder", "projector"):
                    getattr(model, part).save_config(partial / part)
            for part, opened in parts.items():
                write_files(partial / FILES[part], opened(), dtype)
    except OSError as error:
        raise InputError("output", f"{folder} cannot be written ({error.strerror or error})", "make room there, or give another folder") from error


def write_files(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Tensors as `path.safetensors`, or above `LARGEST_FILE` as several files with an index, as diffusers and transformers read them."""
    sizes = {key: tensor.numel() * (dtype or tensor.dtype).itemsize for key, tensor in tensors.items()}
    groups, held = [[]], 0
    for key, size in sizes.items():
        if held and held + size > LARGEST_FILE:
            groups.append([])
            held = 0
        groups[-1].append(key)
        held += size
    several = [f"{path.name}-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    names = several if len(groups) > 1 else [f"{path.name}.safetensors"]
    for name, group in zip(names, groups):
        save_file({key: tensors[key].to(dtype or tensors[key].dtype).contiguous() for key in group}, path.with_name(name), {"format": "pt"})
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": {key: name for name, group in zip(names, groups) for key in group}}
        path.with_name(f"{path.name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
