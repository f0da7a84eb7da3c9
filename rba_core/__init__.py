"""Refine-by-Align: put right what an image generator got wrong, from a reference photo."""

from .errors import InputError
from .model import ModelConfig, RefineByAlign
from .pipeline import Refined, Settings, refine_by_align
from .postprocessing import CleaningSettings, MatchedRegion

__version__ = "0.1.0"
__all__ = ["CleaningSettings", "InputError", "MatchedRegion", "ModelConfig", "RefineByAlign", "Refined", "Settings", "refine_by_align"]
