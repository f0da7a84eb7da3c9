"""DINOv2 and the MLP as `export_ldm` writes them beside a checkpoint: what reads references for a U-Net that runs elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import nn
from transformers import Dinov2Model

from ..errors import InputError
from ..model import ModelConfig, RefineByAlign, positioned, token_mlp
from ..native import DINOV2, MLP
from .dinov2 import read_dinov2
from .stable_diffusion import read_mlp
from .weights import check_layout


class ReferenceEncoder(RefineByAlign):
    """A model without U-Net and autoencoder: encodes references, and knows the sizes of crops."""

    stride = 8
    """Of Stable Diffusion's autoencoder, as LDM's layout has no other."""

    def __init__(self, config: ModelConfig, encoder: Dinov2Model, projector: nn.Module, scheduler: DDIMScheduler):
        nn.Module.__init__(self)
        self.config, self.encoder, self.projector, self.scheduler = config, positioned(encoder), projector, scheduler
        self.stem = self.context_projector = self.context_adapter = self.detail_encoder = self.known_latents = None

    @property
    def dtype(self) -> torch.dtype:
        return self.projector[1].weight.dtype

    @property
    def unet(self):
        raise InputError("model", "is a reference encoder alone, without a U-Net", "load the whole model, or use the nodes for native models")

    vae = unet

    def spare_memory(self, spare: bool = True) -> None:
        """It neither guides nor decodes, and has nothing to spare."""

    @classmethod
    def load(cls, mlp: str | Path, dinov2: str | Path | None = None) -> ReferenceEncoder:
        """Read `NAME.mlp.safetensors`, and DINOv2 as `read_dinov2` takes it; default: `NAME.dinov2.safetensors` beside it. In float32."""
        mlp = Path(mlp)
        config, scheduler, tensors = read_mlp(mlp)
        encoder = read_dinov2(dinov2 or mlp.with_name(mlp.name.removesuffix(MLP) + DINOV2))
        if "projector.1.weight" not in tensors or tensors["projector.1.weight"].ndim != 2:
            raise InputError("mlp", f"in {mlp.name} projector.1.weight is missing or of no such shape", "give the .mlp.safetensors that `rba convert to-ldm` wrote")
        width, context = encoder.config.hidden_size, len(tensors["projector.1.weight"])
        projector = token_mlp(width, context)
        check_layout("mlp", mlp, tensors, {key: value.shape for key, value in projector.state_dict(prefix="projector.").items()})
        projector.load_state_dict({key.removeprefix("projector."): value.float() for key, value in tensors.items()})
        return cls(config, encoder, projector, scheduler).eval()
