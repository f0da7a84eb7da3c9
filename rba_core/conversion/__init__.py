"""Weights of others as ours, and ours as others read them: Stable Diffusion 1.x and DINOv2."""

from .stable_diffusion import export_ldm, import_sd15

__all__ = ["export_ldm", "import_sd15"]
