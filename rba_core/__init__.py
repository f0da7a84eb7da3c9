"""Refine-by-Align: put right what an image generator got wrong, from a reference photo."""

from .errors import InputError
from .pipeline import Refined, Settings, refine_by_align
from .postprocessing import CleaningSettings, MatchedRegion

__version__ = "0.1.0"
__all__ = ["CleaningSettings", "InputError", "MatchedRegion", "ModelConfig", "RefineByAlign", "Refined", "Settings", "refine_by_align"]


def __getattr__(name: str):
    # with diffusers and transformers, which take seconds: when asked for, not when ComfyUI starts
    if name in ("ModelConfig", "RefineByAlign"):
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
