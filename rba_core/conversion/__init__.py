"""Weights of others as ours, and ours as others read them: Stable Diffusion 1.x, AnyDoor and DINOv2."""

from .anydoor import import_anydoor
from .reference_encoder import ReferenceEncoder
from .stable_diffusion import export_ldm, import_sd15

__all__ = ["ReferenceEncoder", "export_ldm", "import_anydoor", "import_sd15"]
