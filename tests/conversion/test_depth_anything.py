import pytest
import torch
import torch.nn.functional as F
from checkpoints import depth_anything, randomly

from rba_core.conversion.depth_anything import read_depth_anything
from rba_core.errors import InputError


def encoded(state, picture):
    """The normalised tokens after each of four blocks, without the class token; an image of the size that the positions are for."""
    x = F.conv2d(picture, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14).flatten(2).mT
    x = torch.cat([state["cls_token"], x], 1) + state["pos_embed"]
    for number in range(4):
        own = {name.removeprefix(f"blocks.{number}."): value for name, value in state.items() if name.startswith(f"blocks.{number}.")}
        layer = lambda x, name: F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])  # noqa: E731
        norm = lambda x, name: F.layer_norm(x, (64,), own[f"{name}.weight"], own[f"{name}.bias"], 1e-6)  # noqa: E731
        q, k, v = layer(norm(x, "norm1"), "attn.qkv").chunk(3, -1)
        x = x + own["ls1.gamma"] * layer((q @ k.mT / 8).softmax(-1) @ v, "attn.proj")
        x = x + own["ls2.gamma"] * layer(F.gelu(layer(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
        yield F.layer_norm(x, (64,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 1:]


def depth(state, picture, cells):
    """As the original repository computes it."""
    backbone = {name.removeprefix("pretrained."): value for name, value in state.items() if name.startswith("pretrained.")}

    def conv(x, name, how=F.conv2d, **options):
        return how(x, state[f"depth_head.{name}.weight"], state.get(f"depth_head.{name}.bias"), **options)

    def residual(x, name):
        return x + conv(F.relu(conv(F.relu(x), f"{name}.conv1", padding=1)), f"{name}.conv2", padding=1)

    resized = [dict(how=F.conv_transpose2d, stride=4), dict(how=F.conv_transpose2d, stride=2), None, dict(stride=2, padding=1)]
    levels = []
    for number, tokens in enumerate(encoded(backbone, picture)):
        x = conv(tokens.mT.unflatten(-1, (cells, cells)), f"projects.{number}")
        x = conv(x, f"resize_layers.{number}", **resized[number]) if resized[number] else x
        levels.append(conv(x, f"scratch.layer{number + 1}_rn", padding=1))
    path = None
    for number in (4, 3, 2, 1):
        name, level = f"scratch.refinenet{number}", levels[number - 1]
        path = residual(level if path is None else path + residual(level, f"{name}.resConfUnit1"), f"{name}.resConfUnit2")
        size = levels[number - 2].shape[-2:] if number > 1 else [2 * side for side in path.shape[-2:]]
        path = conv(F.interpolate(path, size, mode="bilinear", align_corners=True), f"{name}.out_conv")
    x = F.interpolate(conv(path, "scratch.output_conv1", padding=1), (14 * cells, 14 * cells), mode="bilinear", align_corners=True)
    return F.relu(conv(F.relu(conv(x, "scratch.output_conv2.0", padding=1)), "scratch.output_conv2.2"))[:, 0]


@pytest.fixture
def file(tmp_path):
    state = randomly(depth_anything())
    state["depth_head.scratch.output_conv2.2.bias"] += 3  # above zero, where the last ReLU cuts nothing
    torch.save(state, tmp_path / "depth_anything_vits14.pth")
    return tmp_path / "depth_anything_vits14.pth"


@pytest.mark.parametrize("blank", [False, True])
def test_its_depth_is_the_original_repositorys(file, blank):
    picture = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(1)) * (not blank)
    with torch.no_grad():
        wanted, given = depth(torch.load(file), picture, 37), read_depth_anything(file)(pixel_values=picture).predicted_depth
    assert wanted.std() > 1e-3 and torch.allclose(given, wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["pretrained.blocks.2.mlp.fc1.bias", "depth_head.scratch.layer2_rn.weight", "depth_head.projects.3.bias", "pretrained.cls_token"])
def test_a_file_that_is_not_whole(file, name):
    state = torch.load(file)
    del state[name]
    torch.save(state, file)
    with pytest.raises(InputError, match="depth anything|missing|does not fit|no head"):
        read_depth_anything(file)


def test_a_file_of_something_else(file):
    torch.save({"weight": torch.ones(3)}, file)
    with pytest.raises(InputError):
        read_depth_anything(file)
