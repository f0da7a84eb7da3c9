"""Weights of others as ours, and ours as others read them: Stable Diffusion 1.x and DINOv2."""

from .reference_encoder import ReferenceEncoder
from .stable_diffusion import export_ldm, import_sd15

__all__ = ["ReferenceEncoder", "export_ldm", "import_sd15"]
