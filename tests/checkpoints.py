"""Names and shapes of published checkpoints, as their own repositories build their networks: LDM's U-Net and autoencoder, DINOv2's
transformer; and DINOv2's forward pass over such tensors. Nothing here knows of diffusers or transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SD15 = dict(width=320, multiples=(1, 2, 4, 4), context=768)
SMALL = dict(width=32, multiples=(1, 2, 2, 2), context=64)
"""The same topology: group norms want widths that 32 divides."""
SD21 = dict(width=320, multiples=(1, 2, 4, 4), context=1024, linear=True)
SMALL21 = dict(width=64, multiples=(1, 1, 1, 2), context=64, linear=True)
"""Heads of 64 channels want widths that 64 divides."""


class Shapes(dict):
    def add(self, name: str, *shape: int, bias: bool = True) -> None:
        self[f"{name}.weight"] = shape
        if bias:
            self[f"{name}.bias"] = shape[:1]

    def resnet(self, name: str, given: int, width: int, emb: int) -> None:
        self.add(f"{name}.in_layers.0", given)
        self.add(f"{name}.in_layers.2", width, given, 3, 3)
        self.add(f"{name}.emb_layers.1", width, emb)
        self.add(f"{name}.out_layers.0", width)
        self.add(f"{name}.out_layers.3", width, width, 3, 3)
        if given != width:
            self.add(f"{name}.skip_connection", width, given, 1, 1)

    def transformer(self, name: str, width: int, context: int, linear: bool) -> None:
        self.add(f"{name}.norm", width)
        for projection in ("proj_in", "proj_out"):
            self.add(f"{name}.{projection}", width, width, *(() if linear else (1, 1)))
        block = f"{name}.transformer_blocks.0"
        for attention, keys in (("attn1", width), ("attn2", context)):
            self.add(f"{block}.{attention}.to_q", width, width, bias=False)
            self.add(f"{block}.{attention}.to_k", width, keys, bias=False)
            self.add(f"{block}.{attention}.to_v", width, keys, bias=False)
            self.add(f"{block}.{attention}.to_out.0", width, width)
        self.add(f"{block}.ff.net.0.proj", 8 * width, width)
        self.add(f"{block}.ff.net.2", width, 4 * width)
        for number in (1, 2, 3):
            self.add(f"{block}.norm{number}", width)

    def vae_resnet(self, name: str, given: int, width: int) -> None:
        self.add(f"{name}.norm1", given)
        self.add(f"{name}.conv1", width, given, 3, 3)
        self.add(f"{name}.norm2", width)
        self.add(f"{name}.conv2", width, width, 3, 3)
        if given != width:
            self.add(f"{name}.nin_shortcut", width, given, 1, 1)

    def vae_middle(self, name: str, width: int) -> None:
        self.vae_resnet(f"{name}.block_1", width, width)
        self.add(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self.add(f"{name}.attn_1.{part}", width, width, 1, 1)
        self.vae_resnet(f"{name}.block_2", width, width)


def ldm_encoder(shapes: Shapes, in_channels: int, width: int, multiples: tuple[int, ...], context: int, linear: bool) -> list[int]:
    """The first half of a U-Net, and its middle; how many channels each of its blocks gives."""
    emb, last = 4 * width, len(multiples) - 1
    shapes.add("time_embed.0", emb, width)
    shapes.add("time_embed.2", emb, emb)
    shapes.add("input_blocks.0.0", width, in_channels, 3, 3)
    kept, now, block = [width], width, 1
    for level, multiple in enumerate(multiples):
        for _ in range(2):
            shapes.resnet(f"input_blocks.{block}.0", now, width * multiple, emb)
            now = width * multiple
            if level < last:
                shapes.transformer(f"input_blocks.{block}.1", now, context, linear)
            kept.append(now)
            block += 1
        if level < last:
            shapes.add(f"input_blocks.{block}.0.op", now, now, 3, 3)
            kept.append(now)
            block += 1
    shapes.resnet("middle_block.0", now, now, emb)
    shapes.transformer("middle_block.1", now, context, linear)
    shapes.resnet("middle_block.2", now, now, emb)
    return kept


def ldm_unet(in_channels: int, width: int, multiples: tuple[int, ...], context: int, linear: bool = False) -> dict[str, tuple[int, ...]]:
    shapes = Shapes()
    kept, emb, last = ldm_encoder(shapes, in_channels, width, multiples, context, linear), 4 * width, len(multiples) - 1
    block, now = 0, kept[-1]
    for level, multiple in reversed([*enumerate(multiples)]):
        for index in range(3):
            shapes.resnet(f"output_blocks.{block}.0", now + kept.pop(), width * multiple, emb)
            now, step = width * multiple, 1
            if level < last:
                shapes.transformer(f"output_blocks.{block}.1", now, context, linear)
                step = 2
            if level and index == 2:
                shapes.add(f"output_blocks.{block}.{step}.conv", now, now, 3, 3)
            block += 1
    shapes.add("out.0", width)
    shapes.add("out.2", 4, width, 3, 3)
    return {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}


HINT = ((4, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2))
"""Channels in and out and stride of the convolutions that take AnyDoor's hint to the latents' grid; one more leads to the U-Net's width."""


def detail_encoder(width: int, multiples: tuple[int, ...], context: int, linear: bool) -> dict[str, tuple[int, ...]]:
    shapes = Shapes()
    kept = ldm_encoder(shapes, 4, width, multiples, context, linear)
    for number, (given, made, _) in enumerate((*HINT, (256, width, 1))):
        shapes.add(f"input_hint_block.{2 * number}", made, given, 3, 3)
    for number, channels in enumerate(kept):
        shapes.add(f"zero_convs.{number}.0", channels, channels, 1, 1)
    shapes.add("middle_block_out.0", kept[-1], kept[-1], 1, 1)
    return {f"control_model.{name}": shape for name, shape in shapes.items()}


def anydoor(unet: dict, vae: tuple[int, tuple[int, ...]] = (128, (1, 2, 4, 4)), encoder: tuple[int, int] = (1536, 40)) -> dict[str, tuple[int, ...]]:
    """All of AnyDoor: `unet` as of `ldm_unet`; width and multiples of the autoencoder, width and depth of DINOv2."""
    shapes = ldm_unet(4, **unet) | ldm_vae(*vae) | detail_encoder(**unet)
    shapes |= {f"cond_stage_model.model.{name}": shape for name, shape in dinov2(*encoder, swiglu=True).items()}
    return shapes | {"cond_stage_model.projector.weight": (unet["context"], encoder[0]), "cond_stage_model.projector.bias": (unet["context"],)}


def ldm_vae(width: int = 128, multiples: tuple[int, ...] = (1, 2, 4, 4)) -> dict[str, tuple[int, ...]]:
    shapes, last = Shapes(), len(multiples) - 1
    shapes.add("encoder.conv_in", width, 3, 3, 3)
    now = width
    for level, multiple in enumerate(multiples):
        for index in range(2):
            shapes.vae_resnet(f"encoder.down.{level}.block.{index}", now, width * multiple)
            now = width * multiple
        if level < last:
            shapes.add(f"encoder.down.{level}.downsample.conv", now, now, 3, 3)
    shapes.vae_middle("encoder.mid", now)
    shapes.add("encoder.norm_out", now)
    shapes.add("encoder.conv_out", 8, now, 3, 3)
    shapes.add("quant_conv", 8, 8, 1, 1)
    shapes.add("post_quant_conv", 4, 4, 1, 1)
    shapes.add("decoder.conv_in", now, 4, 3, 3)
    shapes.vae_middle("decoder.mid", now)
    for level, multiple in reversed([*enumerate(multiples)]):
        for index in range(3):
            shapes.vae_resnet(f"decoder.up.{level}.block.{index}", now, width * multiple)
            now = width * multiple
        if level:
            shapes.add(f"decoder.up.{level}.upsample.conv", now, now, 3, 3)
    shapes.add("decoder.norm_out", width)
    shapes.add("decoder.conv_out", 3, width, 3, 3)
    return {f"first_stage_model.{name}": shape for name, shape in shapes.items()}


def dinov2(width: int, depth: int, swiglu: bool = False, positions: int = 37) -> dict[str, tuple[int, ...]]:
    shapes = Shapes(cls_token=(1, 1, width), pos_embed=(1, positions**2 + 1, width), mask_token=(1, width))
    shapes.add("patch_embed.proj", width, 3, 14, 14)
    for number in range(depth):
        block = f"blocks.{number}"
        shapes.add(f"{block}.norm1", width)
        shapes.add(f"{block}.attn.qkv", 3 * width, width)
        shapes.add(f"{block}.attn.proj", width, width)
        shapes[f"{block}.ls1.gamma"] = (width,)
        shapes.add(f"{block}.norm2", width)
        if swiglu:
            hidden = (8 * width // 3 + 7) // 8 * 8
            shapes.add(f"{block}.mlp.w12", 2 * hidden, width)
            shapes.add(f"{block}.mlp.w3", width, hidden)
        else:
            shapes.add(f"{block}.mlp.fc1", 4 * width, width)
            shapes.add(f"{block}.mlp.fc2", width, 4 * width)
        shapes[f"{block}.ls2.gamma"] = (width,)
    shapes.add("norm", width)
    return dict(shapes)


def depth_anything(width: int = 64, neck: tuple[int, ...] = (8, 8, 16, 16), fusion: int = 8) -> dict[str, tuple[int, ...]]:
    """A DINOv2 of four layers, and DPT's head."""
    shapes = Shapes({f"pretrained.{name}": shape for name, shape in dinov2(width, 4).items()})
    for level, (channels, side) in enumerate(zip(neck, (4, 2, None, 3))):
        shapes.add(f"depth_head.projects.{level}", channels, width, 1, 1)
        if side:
            shapes.add(f"depth_head.resize_layers.{level}", channels, channels, side, side)
        shapes.add(f"depth_head.scratch.layer{level + 1}_rn", fusion, channels, 3, 3, bias=False)
        shapes.add(f"depth_head.scratch.refinenet{level + 1}.out_conv", fusion, fusion, 1, 1)
        for unit in (1, 2):
            for conv in (1, 2):
                shapes.add(f"depth_head.scratch.refinenet{level + 1}.resConfUnit{unit}.conv{conv}", fusion, fusion, 3, 3)
    shapes.add("depth_head.scratch.output_conv1", fusion // 2, fusion, 3, 3)
    shapes.add("depth_head.scratch.output_conv2.0", 32, fusion // 2, 3, 3)
    shapes.add("depth_head.scratch.output_conv2.2", 1, 32, 1, 1)
    return dict(shapes)


def randomly(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Every tensor different, and of a size that a deep network bears."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * max(1, torch.Size(shape[1:]).numel()) ** -0.5 for name, shape in shapes.items()}


def dinov2_tokens(state: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """`[B, 3, H, W]`, normalised -> `[B, tokens, width]` with the class token, as the original repository computes them: positions are
    resampled by a factor, to a size 0.1 larger; with registers to the size itself, low-pass filtered when shrunk."""
    width = state["cls_token"].shape[-1]
    heads, side = width // 64, round((state["pos_embed"].shape[1] - 1) ** 0.5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    patches = F.conv2d(pictures, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    positions = state["pos_embed"][:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if "register_tokens" in state and patches.shape[-2:] != (side, side):
        positions = F.interpolate(positions, tuple(patches.shape[-2:]), mode="bicubic", antialias=True)
    elif patches.shape[-2:] != (side, side):
        positions = F.interpolate(positions, scale_factor=tuple((cells + 0.1) / side for cells in patches.shape[-2:]), mode="bicubic")
    patches = (patches + positions).flatten(2).mT
    before = torch.cat([state["cls_token"] + state["pos_embed"][:, :1], *([state["register_tokens"]] if "register_tokens" in state else [])], 1)
    x = torch.cat([before.expand(len(patches), -1, -1), patches], 1)
    for number in range(sum(name.endswith("ls1.gamma") for name in state)):
        block = f"blocks.{number}"
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, heads, 64)).permute(2, 0, 3, 1, 4)
        attended = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + state[f"{block}.ls1.gamma"] * linear(attended, f"{block}.attn.proj")
        inner = norm(x, f"{block}.norm2")
        if f"{block}.mlp.w12.weight" in state:
            gate, value = linear(inner, f"{block}.mlp.w12").chunk(2, -1)
            inner = linear(F.silu(gate) * value, f"{block}.mlp.w3")
        else:
            inner = linear(F.gelu(linear(inner, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + state[f"{block}.ls2.gamma"] * inner
    return norm(x, "norm")


class Published:
    """AnyDoor's U-Net and detail encoder, computed from the tensors of its checkpoint: attention heads of 64 channels, linear projections."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def time(self, prefix: str, timesteps: Tensor) -> Tensor:
        half = self.state[f"{prefix}time_embed.0.weight"].shape[1] // 2
        angles = timesteps[:, None] * torch.exp(torch.arange(half) / half * -torch.log(torch.tensor(10000.0)))
        return self.linear(f"{prefix}time_embed.2", F.silu(self.linear(f"{prefix}time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))))

    def resnet(self, name: str, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv(f"{name}.in_layers.2", F.silu(self.norm(f"{name}.in_layers.0", x)))
        hidden = hidden + self.linear(f"{name}.emb_layers.1", F.silu(time))[:, :, None, None]
        hidden = self.conv(f"{name}.out_layers.3", F.silu(self.norm(f"{name}.out_layers.0", hidden)))
        return hidden + (self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.state else x)

    def attention(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (self.linear(f"{name}.to_{part}", given).unflatten(-1, (-1, 64)).transpose(1, 2) for part, given in (("q", x), ("k", context), ("v", context)))
        return self.linear(f"{name}.to_out.0", ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def transformer(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        block = f"{name}.transformer_blocks.0"

        def normed(number: int) -> Tensor:
            return F.layer_norm(tokens, tokens.shape[-1:], self.state[f"{block}.norm{number}.weight"], self.state[f"{block}.norm{number}.bias"])

        tokens = self.linear(f"{name}.proj_in", self.norm(f"{name}.norm", x, 1e-6).flatten(2).mT)
        tokens = tokens + self.attention(f"{block}.attn1", normed(1), normed(1))
        tokens = tokens + self.attention(f"{block}.attn2", normed(2), context)
        value, gate = self.linear(f"{block}.ff.net.0.proj", normed(3)).chunk(2, -1)
        tokens = tokens + self.linear(f"{block}.ff.net.2", value * F.gelu(gate))
        return x + self.linear(f"{name}.proj_out", tokens).mT.unflatten(-1, x.shape[-2:])

    def block(self, name: str, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Whatever the block consists of, in order."""
        for step in range(3):
            part = f"{name}.{step}"
            if f"{part}.in_layers.0.weight" in self.state:
                x = self.resnet(part, x, time)
            elif f"{part}.norm.weight" in self.state:
                x = self.transformer(part, x, context)
            elif f"{part}.op.weight" in self.state:
                x = self.conv(f"{part}.op", x, 2)
            elif f"{part}.conv.weight" in self.state:
                x = self.conv(f"{part}.conv", F.interpolate(x, scale_factor=2))
            elif f"{part}.weight" in self.state:
                x = self.conv(part, x)
        return x

    def middle(self, prefix: str, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.block(f"{prefix}middle_block", x, time, context)

    def residuals(self, hint: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor]:
        """Of the detail encoder: of its twelve blocks, of which the hint replaces the first, and of its middle."""
        prefix = "control_model."
        time, x = self.time(prefix, timesteps), hint
        for number, (_, _, stride) in enumerate(HINT):
            x = F.silu(self.conv(f"{prefix}input_hint_block.{2 * number}", x, stride))
        x = self.conv(f"{prefix}input_hint_block.{2 * len(HINT)}", x)
        made = [self.conv(f"{prefix}zero_convs.0.0", x)]
        for number in range(1, 12):
            x = self.block(f"{prefix}input_blocks.{number}", x, time, context)
            made.append(self.conv(f"{prefix}zero_convs.{number}.0", x))
        return [*made, self.conv(f"{prefix}middle_block_out.0", self.middle(prefix, x, time, context))]

    def noise(self, latents: Tensor, timesteps: Tensor, context: Tensor, residuals: list[Tensor]) -> Tensor:
        """What the U-Net predicts, given those."""
        prefix = "model.diffusion_model."
        time, x, kept, residuals = self.time(prefix, timesteps), latents, [], [*residuals]
        for number in range(12):
            x = self.block(f"{prefix}input_blocks.{number}", x, time, context)
            kept.append(x)
        x = self.middle(prefix, x, time, context) + residuals.pop()
        for number in range(12):
            x = self.block(f"{prefix}output_blocks.{number}", torch.cat([x, kept.pop() + residuals.pop()], 1), time, context)
        return self.conv(f"{prefix}out.2", F.silu(self.norm(f"{prefix}out.0", x)))
