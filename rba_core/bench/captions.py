"""Captions of a set's items by BLIP-2 (Li et al. 2023), for CLIP-T, with weights of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, Blip2ForConditionalGeneration

from ..errors import InputError
from ..model import read_part
from ..refinement import Progress
from .dataset import BenchmarkSet
from .judges import Pixels, reading
from .run import write_whole

TOKENS = 30
"""Of a caption at most."""


class Captioner:
    """Blip2ForConditionalGeneration without a prompt, greedy, so that a picture always has the same caption.

    source   its folder with tokenizer and preprocessor_config.json, or a repository in the hub's cache
    """

    def __init__(self, source: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        with reading("blip2", source, "a Blip2ForConditionalGeneration's folder with its tokenizer"):
            self.pixels = Pixels(source, device)
            self.tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
            self.network = read_part(Blip2ForConditionalGeneration, source).to(device, dtype).eval()

    @torch.no_grad()
    def __call__(self, picture: Tensor) -> str:
        """Of `[3, H, W]` in [0, 1], squeezed to a square as BLIP-2 is used."""
        tokens = self.network.generate(pixel_values=self.pixels.whole(picture)[None].to(self.network.dtype), max_new_tokens=TOKENS, do_sample=False, num_beams=1)
        return " ".join(self.tokenizer.decode(tokens[0], skip_special_tokens=True).split())


def caption_set(folder: str | Path, captioner: Captioner, limit: int | None = None, progress: Progress | None = None) -> int:
    """Write a caption into `index.jsonl` for each of the first `limit` items (default: all) that has none: of its truth, else of the image
    with its artifact. The index is kept after each, so that a run that was stopped goes on. Returns how many were written."""
    if limit is not None and limit < 1:
        raise InputError("limit", f"is {limit}", "use 1 or more")
    items = BenchmarkSet(folder)
    lacking = [position for position in range(len(items))[:limit] if items.lines[position].get("caption") is None]
    for done, position in enumerate(lacking, 1):
        item = items[position]
        items.lines[position]["caption"] = captioner(item.image if item.truth is None else item.truth)
        write_whole(items.folder / "index.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in items.lines))
        if progress:
            progress(done, len(lacking))
    return len(lacking)
