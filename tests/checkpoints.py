"""Names and shapes of published checkpoints, as their own repositories build their networks: LDM's U-Net and autoencoder, DINOv2's
transformer; and DINOv2's forward pass over such tensors. Nothing here knows of diffusers or transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SD15 = dict(width=320, multiples=(1, 2, 4, 4), context=768)
SMALL = dict(width=32, multiples=(1, 2, 2, 2), context=64)
"""The same topology: group norms want widths that 32 divides."""


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

    def transformer(self, name: str, width: int, context: int) -> None:
        self.add(f"{name}.norm", width)
        self.add(f"{name}.proj_in", width, width, 1, 1)
        self.add(f"{name}.proj_out", width, width, 1, 1)
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


def ldm_unet(in_channels: int, width: int, multiples: tuple[int, ...], context: int) -> dict[str, tuple[int, ...]]:
    shapes, emb, last = Shapes(), 4 * width, len(multiples) - 1
    shapes.add("time_embed.0", emb, width)
    shapes.add("time_embed.2", emb, emb)
    shapes.add("input_blocks.0.0", width, in_channels, 3, 3)
    kept, now, block = [width], width, 1
    for level, multiple in enumerate(multiples):
        for _ in range(2):
            shapes.resnet(f"input_blocks.{block}.0", now, width * multiple, emb)
            now = width * multiple
            if level < last:
                shapes.transformer(f"input_blocks.{block}.1", now, context)
            kept.append(now)
            block += 1
        if level < last:
            shapes.add(f"input_blocks.{block}.0.op", now, now, 3, 3)
            kept.append(now)
            block += 1
    shapes.resnet("middle_block.0", now, now, emb)
    shapes.transformer("middle_block.1", now, context)
    shapes.resnet("middle_block.2", now, now, emb)
    block = 0
    for level, multiple in reversed([*enumerate(multiples)]):
        for index in range(3):
            shapes.resnet(f"output_blocks.{block}.0", now + kept.pop(), width * multiple, emb)
            now, step = width * multiple, 1
            if level < last:
                shapes.transformer(f"output_blocks.{block}.1", now, context)
                step = 2
            if level and index == 2:
                shapes.add(f"output_blocks.{block}.{step}.conv", now, now, 3, 3)
            block += 1
    shapes.add("out.0", width)
    shapes.add("out.2", 4, width, 3, 3)
    return {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}


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
    resampled by a factor, to a size 0.1 larger."""
    width = state["cls_token"].shape[-1]
    heads, side = width // 64, round((state["pos_embed"].shape[1] - 1) ** 0.5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    patches = F.conv2d(pictures, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    positions = state["pos_embed"][:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if patches.shape[-1] != side:
        positions = F.interpolate(positions, scale_factor=tuple((cells + 0.1) / side for cells in patches.shape[-2:]), mode="bicubic")
    patches = (patches + positions).flatten(2).mT
    x = torch.cat([(state["cls_token"] + state["pos_embed"][:, :1]).expand(len(patches), -1, -1), patches], 1)
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
