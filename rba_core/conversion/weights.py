"""Files of weights: their tensors by name, and whether they are those that are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import InputError

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


def open_weights(name: str, *files: Path) -> dict[str, Tensor]:
    """The tensors of the files, mapped, not read: none takes memory before it is used.

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
                state = torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)  # a str: torch 2.2 maps no Path
                tensors |= {key: value for key, value in state.get("state_dict", state).items() if isinstance(value, Tensor)}
        except Exception as error:  # torch.load raises what the zip reader and the unpickler happen to raise
            reason = "holds more than weights, or is of an old format" if file.exists() and file.suffix != ".safetensors" else type(error).__name__
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
