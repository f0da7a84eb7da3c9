"""Alignment by the likeness of the encoder's tokens."""

from __future__ import annotations

from ...model import RefineByAlign
from ..dataset import Item
from .ours import detail
from .outcome import Outcome


def features(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """As `detail`, but the encoder alone aligns, by the likeness of its tokens of the crop and of the reference."""
    return detail(item, model, seed, aligner="features")
