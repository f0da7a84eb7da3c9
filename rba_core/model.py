"""The refinement network R: autoencoder, U-Net, DINOv2, MLP and noise schedule, for every size of model."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.utils import logging as transformers_logging

from .alignment import SAMPLER_STEPS, check_noise
from .autoencoder import BlockAutoencoder
from .detail_encoder import DetailEncoder
from .detail_map import make_hint
from .errors import InputError
from .shipped import PRETRAINED
from .zoom_crop import blanked

AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "BlockAutoencoder": BlockAutoencoder}
ENCODERS = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
CONFIGS = Path(__file__).parent / "configs"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelConfig:
    """What a model needs to know beyond the configs of its parts.

    image_size          side of the zoom-in crop, pixels
    encoder_stem        channels of a strided convolution in front of the encoder, 0 = DINOv2 as it is. A transformer
                        trained briefly learns much faster behind one (Xiao et al. 2021); its config then has
                        these as `num_channels`, and half the patch size
    context_features    channels that the U-Net sees of the crop's own encoder tokens, 0 = the paper's input.
                        A small U-Net finds its place in the reference faster with them. The masked part is
                        blank for them in refinement; in alignment they see the artifact, as z_t does: colours
                        and layout often survive in it
    collage             the U-Net sees the registered reference inside the mask (latents, and where they are
                        valid), as AnyDoor's sees its detail map; False = tokens alone
    class_token         the U-Net reads the class token, too, before the patches', all through one linear layer, and guidance
                        holds them against those of a black picture, not against zeros: AnyDoor
    detail_encoder      the U-Net takes latents alone, and a `DetailEncoder` shows it the crop: AnyDoor
    collage_strength    how far from the collage the refinement departs by default, where registration is least sure
    reference_fill      grey level around a segmented reference, 0 to 1
    reference_margin    side of the square around it, in its own longer sides
    alignment_*         layer l and timestep t of Eq. 5, and the crop's side in sides of the mask
    context             the same for the refinement's crop
    steps, guidance, scheduler    the sampler's defaults
    """

    image_size: int = 512
    encoder_stem: int = 0
    context_features: int = 0
    collage: bool = False
    collage_strength: float = 0.5
    class_token: bool = False
    detail_encoder: bool = False
    reference_fill: float = 0.5
    reference_margin: float = 1.0
    alignment_layer: int = 9
    alignment_timestep: int = 0
    alignment_context: float = 3.0
    context: float = 2.0
    steps: int = 8
    guidance: float = 2.0
    scheduler: str = "ddim"

    def write(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


def imagenet_normalised(pictures: Tensor) -> Tensor:
    """`[B, 3, H, W]` in [0, 1] -> zero mean, unit variance over ImageNet, as DINOv2 expects."""
    mean, std = (pictures.new_tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (pictures - mean) / std


def token_mlp(width: int, context: int) -> nn.Sequential:
    """The MLP of Eq. 3: tokens `[..., width]` -> context of the U-Net `[..., context]`."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, context), nn.GELU(), nn.Linear(context, context))


class ContextAdapter(nn.Module):
    """Brings the context features to every resolution of the U-Net, added to its skip connections and its middle
    as a T2I-Adapter's or ControlNet's output is: the shortest way to the layers that align."""

    def __init__(self, features: int, unet_config):
        super().__init__()
        widths, layers = unet_config["block_out_channels"], unet_config["layers_per_block"]
        entries = [(widths[0], 0)]  # of the skip connections: channels and halvings of the resolution
        for level, width in enumerate(widths):
            entries += [(width, level)] * layers
            if level + 1 < len(widths):
                entries.append((width, level + 1))
        entries.append((widths[-1], len(widths) - 1))
        self.halvings = [halvings for _, halvings in entries]
        self.project = nn.ModuleList(nn.Conv2d(features, width, 1) for width, _ in entries)
        for projection in self.project:
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, features: Tensor) -> dict:
        """`[B, f, h, w]` -> what `UNet2DConditionModel` takes as a ControlNet's output."""
        height, width = features.shape[-2:]
        residuals = [
            projection(F.adaptive_avg_pool2d(features, (-(-height // 2**halvings), -(-width // 2**halvings))))
            for projection, halvings in zip(self.project, self.halvings)
        ]
        return {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}


class PublishedEmbeddings(Dinov2Embeddings):
    """Positions for another grid than the stored one as DINOv2's repository and ComfyUI compute them: by a factor, to a grid 0.1 larger.
    transformers resamples to the grid itself, which is right for DINOv2 with registers only."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        table, patch = self.position_embeddings, self.config.patch_size
        side, rows, columns = self.config.image_size // patch, height // patch, width // patch
        if (rows, columns) == (side, side):
            return table
        patches = table[:, 1:].float().unflatten(1, (side, side)).movedim(-1, 1)
        patches = F.interpolate(patches, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
        return torch.cat([table[:, :1], patches.flatten(2).mT.to(table)], 1)


def positioned(encoder: Dinov2Model | Dinov2WithRegistersModel) -> Dinov2Model | Dinov2WithRegistersModel:
    if isinstance(encoder, Dinov2Model):
        encoder.embeddings.__class__ = PublishedEmbeddings
    return encoder


@contextmanager
def quiet():
    """Keep the libraries' bars and reports off stderr: what is wrong is raised, in one line."""
    bar = transformers_logging.is_progress_bar_enabled()
    verbosity = [library.get_verbosity() for library in (transformers_logging, diffusers_logging)]
    transformers_logging.disable_progress_bar()
    for library in (transformers_logging, diffusers_logging):
        library.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
        for library, level in zip((transformers_logging, diffusers_logging), verbosity):
            library.set_verbosity(level)


def read_part(kind: type, source: str | Path, unused: tuple[str, ...] = ()) -> nn.Module:
    """`kind.from_pretrained`, but weights that are absent are an error, not random, unless their names begin with one of `unused`."""
    with quiet():
        part, report = kind.from_pretrained(source, local_files_only=True, output_loading_info=True)
    if absent := [name for name in report["missing_keys"] if not name.startswith(unused)] + [*report["mismatched_keys"]]:
        raise ValueError(f"{Path(source).name} lacks {len(absent)} weights")
    return part


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` in the end, or is gone where anything fails. Where on this machine
    its parts were read from, which the libraries write into their configs, is left out."""
    folder = Path(folder)
    partial, former = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "former"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes 0600, unreadable for a server under another user
        for file in partial.rglob("config.json"):
            config = json.loads(file.read_text())
            if config.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(config, indent=2) + "\n")
        if folder.exists():
            os.replace(folder, former)
        try:
            os.replace(partial, folder)
        except OSError:
            if former.exists():
                os.replace(former, folder)
            raise
    finally:
        for leftover in (partial, former):
            shutil.rmtree(leftover, ignore_errors=True)


def read_config(name: str) -> dict:
    """`configs/NAME.json`: the configs of a model's parts, and under "model" its `ModelConfig`."""
    path = CONFIGS / f"{name}.json"
    if not path.exists():
        raise InputError("model config", f"{name!r} is not known", f"use one of {', '.join(sorted(p.stem for p in CONFIGS.glob('*.json')))}")
    return json.loads(path.read_text())


class RefineByAlign(nn.Module):
    """Holds the parts; the steps of the method are functions over it.

    vae         `AutoencoderKL`, or the small `BlockAutoencoder`
    unet        `UNet2DConditionModel` with 16 cross-attention layers in SD topology; input channels
                [z_t, M_a, masked latents, collage, context features], or z_t alone beside a detail encoder
    stem        convolution in front of it, where the config asks for one
    encoder     `Dinov2Model`, phi, or the one with registers, whose tokens are dropped
    projector   the MLP: tokens -> context of the U-Net
    scheduler   noise schedule
    detail_encoder    where the config asks for one; runs whenever the U-Net does, on the hint that `unet_input` puts behind the latents
    """

    def __init__(
        self, config: ModelConfig, vae: AutoencoderKL | BlockAutoencoder, unet: UNet2DConditionModel, encoder: Dinov2Model | Dinov2WithRegistersModel,
        scheduler: DDIMScheduler,
        detail_encoder: DetailEncoder | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config = config
        self.vae, self.unet, self.encoder, self.scheduler = vae, unet, positioned(encoder), scheduler
        self.known_latents: deque[tuple[Tensor, Tensor]] | None = None
        self.sparing = False
        self.stem = nn.Sequential(nn.Conv2d(3, config.encoder_stem, 7, stride=2, padding=3), nn.GELU()) if config.encoder_stem else None
        width, context = encoder.config.hidden_size, unet.config.cross_attention_dim
        self.projector = nn.Linear(width, context) if config.class_token else token_mlp(width, context)
        self.context_projector = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.context_features)) if config.context_features else None
        self.context_adapter = ContextAdapter(config.context_features, unet.config) if config.context_features else None
        self.detail_encoder = detail_encoder
        collage = vae.config.latent_channels + 1 if config.collage else 0
        expected = vae.config.latent_channels if config.detail_encoder else 2 * vae.config.latent_channels + 1 + collage + config.context_features
        if unet.config.in_channels != expected:
            raise InputError("unet config", f"has {unet.config.in_channels} input channels", f"this model's parts need {expected}")
        if detail_encoder is not None:
            unet.register_forward_pre_hook(self._show_detail, with_kwargs=True)

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device  # it stays there when `offload` sends others away

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def stride(self) -> int:
        """Pixels a latent cell covers along a side."""
        if "patch_size" in self.vae.config:
            return self.vae.config.patch_size
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def encoder_size(self) -> int:
        """Side of the encoder's input, pixels: 224, 16 x 16 patches of 14."""
        return 16 * self.patch_size

    @property
    def patch_size(self) -> int:
        """Side of what one token covers, pixels of the encoder's input."""
        return self.encoder.config.patch_size * (2 if self.stem is not None else 1)

    def spare_memory(self, spare: bool = True) -> None:
        """Guidance's two passes one after the other, and pictures larger than the autoencoder was trained on in tiles that
        overlap. The former changes results by no more than rounding; in tiles, norms and attention see a tile, not the whole."""
        self.sparing = spare
        if isinstance(self.vae, AutoencoderKL):
            self.vae.enable_tiling() if spare else self.vae.disable_tiling()

    def offload(self, device: str | torch.device) -> None:
        """Compute on `device`, where the U-Net and the encoder lie only while they run, one of them at a time."""
        large = (self.unet, self.encoder)

        def fetch(part: nn.Module, arguments: tuple) -> None:
            for other in large:
                if other is not part:
                    other.to("cpu")
            part.to(device)

        for part in large:
            part.to("cpu").register_forward_pre_hook(fetch)
        for name, part in self.named_children():
            if part not in large:
                part.to(device)

    def tokens(self, pictures: Tensor, *, class_token: bool = False) -> Tensor:
        """phi: `[B, 3, 224, 224]` in [0, 1] -> `[B, 256, hidden]`, class token dropped, or kept as the first of 257."""
        pictures = imagenet_normalised(pictures.to(self.device, self.dtype))
        if self.stem is not None:
            pictures = self.stem(pictures)
        hidden = self.encoder(pictures).last_hidden_state
        patches = hidden[:, 1 + getattr(self.encoder.config, "num_register_tokens", 0) :]
        return torch.cat([hidden[:, :1], patches], 1) if class_token else patches

    def embed(self, pictures: Tensor) -> Tensor:
        """Eq. 3, E = MLP(phi(I_r)): `[B, 3, 224, 224]` -> `[B, 256, C]`, or 257 with the class token."""
        return self.projector(self.tokens(pictures, class_token=self.config.class_token))

    @torch.no_grad()
    def unconditional(self, embedding: Tensor) -> Tensor:
        """What classifier-free guidance holds against an embedding: zeros, as in training, or a black picture's."""
        if not self.config.class_token:
            return torch.zeros_like(embedding)
        return self.embed(torch.zeros(1, 3, self.encoder_size, self.encoder_size)).expand_as(embedding)

    def encode_image(self, pictures: Tensor) -> Tensor:
        """`[B, 3, S, S]` in [0, 1] -> scaled latents `[B, c, S / stride, S / stride]` (the mode, no sampling)."""
        pictures = pictures.to(self.device, self.dtype) * 2 - 1
        if self.known_latents is None:
            return self._encoded(pictures)
        for known, latents in self.known_latents:
            if torch.equal(known, pictures):
                return latents
        self.known_latents.append((pictures, self._encoded(pictures)))
        return self.known_latents[-1][1]

    def _encoded(self, pictures: Tensor) -> Tensor:
        return self.vae.encode(pictures).latent_dist.mode() * self.vae.config.scaling_factor

    @contextmanager
    def reusing_latents(self) -> Iterator[None]:
        """Meanwhile the autoencoder runs once over a picture: alignment and refinement look at the same crops, with and
        without the masked part. It keeps four pictures, two crops' worth."""
        self.known_latents = deque(maxlen=4)
        try:
            yield
        finally:
            self.known_latents = None

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The way back: `[B, 3, S, S]` in [0, 1], float32."""
        return (self.vae.decode(latents / self.vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1)

    def inpainting_condition(
        self, pictures: Tensor, masks: Tensor, *, seen: Tensor | None = None, collage: tuple[Tensor, Tensor] | None = None, detail: Tensor | None = None
    ) -> Tensor:
        """What the U-Net knows of the crop, `[B, channels, h, w]`: M_a, latents of the picture without what M_a
        covers, the same with the collage in its place, and context features of the blanked picture, or of `seen`.

        collage   picture `[B, 3, S, S]` in [0, 1] and where it is valid `[B, 1, S, S]`
        detail    high-frequency map of the reference `[3, 256, 256]`

        Beside a detail encoder it is that one's hint, its pixels folded into channels of the latents' grid.
        """
        if self.detail_encoder is not None:
            hints = torch.stack([make_hint(picture, mask[0], detail) for picture, mask in zip(pictures, masks)])
            return F.pixel_unshuffle(hints, self.stride).to(self.device, self.dtype)
        pictures, masks = pictures.to(self.device, self.dtype), masks.to(self.device, self.dtype)
        blank = blanked(pictures, masks)
        latents = self.encode_image(blank)
        channels = [F.adaptive_max_pool2d(masks, latents.shape[-2:]), latents]
        if self.config.collage:
            if collage is None:
                channels += [torch.zeros_like(latents[:, :1]), latents]
            else:
                laid, valid = (value.to(latents) for value in collage)
                shown = masks * valid
                channels += [F.adaptive_avg_pool2d(shown, latents.shape[-2:]), self.encode_image(blank * (1 - shown) + laid * shown)]
        if self.context_projector is not None:
            view = blank if seen is None else seen.to(blank)
            view = F.interpolate(view.float(), (self.encoder_size,) * 2, mode="bilinear", antialias=True)  # no half on a CPU
            features = self.context_projector(self.tokens(view))
            side = round(features.shape[1] ** 0.5)
            features = features.mT.unflatten(-1, (side, side))
            channels.append(F.interpolate(features, latents.shape[-2:], mode="bilinear"))
        return torch.cat(channels, 1)

    def unet_input(self, noisy: Tensor, condition: Tensor) -> Tensor:
        """z_t `[B, c, h, w]` with what `inpainting_condition` gives behind it."""
        return torch.cat([noisy.to(condition), condition], 1)

    def context_residuals(self, sample: Tensor) -> dict:
        """Keyword arguments of the U-Net that carry the context features of its input; none for the paper's U-Net."""
        return self.context_adapter(sample[:, -self.config.context_features :]) if self.context_adapter is not None else {}

    def _show_detail(self, unet: UNet2DConditionModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        sample, timestep, context = args
        latents, hint = sample.split([unet.config.in_channels, sample.shape[1] - unet.config.in_channels], 1)
        return (latents, timestep, context), kwargs | self.detail_encoder(F.pixel_shuffle(hint, self.stride), timestep, context)

    def add_noise(self, latents: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, step)

    def noise_step(self, timestep: int, noise_level: float | None = None) -> Tensor:
        """The training step `[1]` of t (of 50 sampler steps, 0 = the noisiest), or nearest to a noise level
        sqrt(1 - alpha_bar) in 0 to 1."""
        check_noise(timestep, noise_level)
        if noise_level is not None:
            levels = (1 - self.scheduler.alphas_cumprod).sqrt()
            return (levels - noise_level).abs().argmin()[None]
        sampler = DDIMScheduler.from_config(self.scheduler.config)
        sampler.set_timesteps(SAMPLER_STEPS)
        return sampler.timesteps[timestep][None]

    @classmethod
    def from_config(cls, config: str | dict, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> RefineByAlign:
        """A model with random weights from a config of `configs/`, by its name, "rba-tiny" or "sd1x", or as `read_config`
        gives it; made where and as it is to be, so that it takes no more memory than it needs."""
        parts = read_config(config) if isinstance(config, str) else config
        vae, usual = dict(parts["vae"]), torch.get_default_dtype()
        scheduler = DDIMScheduler(**parts["scheduler"])
        try:
            with torch.device(device), quiet():
                autoencoder = AUTOENCODERS[vae.pop("_class_name")](**vae).to(dtype)
                torch.set_default_dtype(dtype)
                unet, encoder = UNet2DConditionModel(**parts["unet"]), Dinov2Model(Dinov2Config(**parts["encoder"]))
                detail_encoder = DetailEncoder(**parts["detail_encoder"]) if "detail_encoder" in parts else None
                return cls(ModelConfig(**parts["model"]), autoencoder, unet, encoder, scheduler, detail_encoder).eval()
        finally:
            torch.set_default_dtype(usual)

    def save(self, folder: str | Path) -> None:
        """Write a folder of safetensors and JSON, each part in its library's own layout; whole or not at all."""
        with written_whole(folder) as partial:
            self.config.write(partial)
            with quiet():
                for part in ("vae", "unet", "encoder", "scheduler", *(["detail_encoder"] if self.config.detail_encoder else [])):
                    getattr(self, part).save_pretrained(partial / part)
            save_file({k: v.contiguous() for k, v in self.own_state().items()}, partial / "projector.safetensors")

    def own_state(self) -> dict[str, Tensor]:
        """Of the parts that no library has: the MLP, and the stem and the context's where the config has them."""
        return {k: v for k, v in self.state_dict().items() if k.startswith(("projector.", "context_", "stem."))}

    @classmethod
    def load(
        cls, source: str | Path = "rba-tiny", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, low_memory: bool = False
    ) -> RefineByAlign:
        """Read a folder written by `save`, or a pretrained model by its name.

        low_memory   see `offload` and `spare_memory`: slower
        """
        part_device = "cpu" if low_memory else device  # each part goes there before the next is read
        folder = PRETRAINED / source if (PRETRAINED / source).is_dir() else Path(source)
        if not (folder / "config.json").is_file():
            known = ", ".join(sorted(p.parent.name for p in PRETRAINED.glob("*/config.json")))
            raise InputError("model", f"{str(source)!r} is neither a model folder nor a shipped model", f"give a folder with config.json, or one of: {known}")
        try:
            settings = json.loads((folder / "config.json").read_text())
            known = {f.name for f in fields(ModelConfig)}
            if unknown := set(settings) - known:
                raise InputError("model", f"{folder / 'config.json'} has unknown keys {sorted(unknown)}", "use a folder written by this version or a newer pack")
            config = ModelConfig(**settings)
            autoencoder = AUTOENCODERS[json.loads((folder / "vae" / "config.json").read_text())["_class_name"]]
            encoder = ENCODERS[json.loads((folder / "encoder" / "config.json").read_text())["model_type"]]
            kinds = {"vae": autoencoder, "unet": UNet2DConditionModel, "encoder": encoder} | ({"detail_encoder": DetailEncoder} if config.detail_encoder else {})
            with quiet():
                parts = {name: read_part(kind, folder / name).to(part_device, dtype) for name, kind in kinds.items()}
            model = cls(config, scheduler=DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True), **parts)
            own = load_file(folder / "projector.safetensors")
            if mismatch := set(own) ^ set(model.own_state()):
                raise InputError("model", f"{folder / 'projector.safetensors'} has other keys ({sorted(mismatch)[0]} …)", "use the projector saved with this model")
            model.load_state_dict(own, strict=False)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError("model", f"{folder} cannot be read ({reason})", "copy the folder again: a file is missing, cut short or of another model") from error
        model.to(part_device, dtype).eval()
        if low_memory:
            model.offload(device)
            model.spare_memory()
        return model
