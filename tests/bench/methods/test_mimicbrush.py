import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.methods.mimicbrush import DepthGuider, JoinedProcessor, MimicBrush, self_attentions
from rba_core.errors import InputError
from rba_core.zoom_crop import zoom_crop


@pytest.fixture
def method(mimicbrush_folder, small_mimicbrush, monkeypatch):
    monkeypatch.setattr(MimicBrush, "steps", 2)
    return MimicBrush(mimicbrush_folder, "cpu", torch.float32)


def test_the_guided_half_reads_the_reference_and_itself_by_half(method):
    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8).eval().requires_grad_(False)
    states, reference = torch.randn(2, 64, 16), torch.randn(1, 25, 16)
    given = JoinedProcessor({"layer": reference}, "layer")(attention, states)
    assert torch.equal(given[0], AttnProcessor2_0()(attention, states)[0])
    halves = []
    for context in (states[1], torch.cat([states[1], reference[0]])):
        heads = []
        for rows in (slice(0, 8), slice(8, 16)):
            query, key, value = (tokens @ project.weight[rows].T for tokens, project in ((states[1], attention.to_q), (context, attention.to_k), (context, attention.to_v)))
            heads.append((query @ key.T / 8**0.5).softmax(-1) @ value)
        halves.append(torch.cat(heads, -1) @ attention.to_out[0].weight.T + attention.to_out[0].bias)
    assert torch.allclose(given[1], sum(halves) / 2, atol=1e-5)


def test_each_layer_reads_what_the_same_layer_of_the_reference_was_given(method):
    """The pass itself: the U-Nets as diffusers has them, the join by a hook on what follows the first norm."""
    torch.manual_seed(0)
    sample, shown, context, timestep = torch.randn(2, 13, 8, 8), torch.randn(1, 4, 8, 8), torch.randn(2, 5, 32), torch.tensor(401)
    with torch.no_grad():
        method.reference_unet(shown, timestep, context[1:])
        given = method.unet(sample, timestep, context).sample
        plain, kept = UNet2DConditionModel(**method.network), {}
        plain.load_state_dict(method.unet.state_dict())
        blocks = {name: block for name, block in method.reference_unet.named_modules() if name.endswith("transformer_blocks.0") and not name.startswith("down")}
        for name, block in blocks.items():
            block.norm1.register_forward_hook(lambda norm, args, out, name=name: kept.__setitem__(name, out))
        method.reference_unet(shown, timestep, context[1:])
        own = dict(plain.named_modules())
        joining = []

        def join(attn, args, out, name):
            if joining:
                return None
            joining.append(name)
            together = torch.cat([args[0][1:], kept[name]], 1)
            out = torch.stack([out[0], 0.5 * out[1] + 0.5 * attn(together)[0, : args[0].shape[1]]])
            joining.clear()
            return out

        for name in blocks:
            own[name].attn1.register_forward_hook(lambda attn, args, out, name=name: join(attn, args, out, name))
        assert len(kept) == 7 and torch.allclose(given, plain(sample, timestep, context).sample, atol=1e-4)


def test_what_each_network_is_given(method, small_set, monkeypatch):
    """Channels in their order, the hole black, the reference free of noise at every step, the blank beside it without guidance."""
    crop = zoom_crop(BenchmarkSet(small_set)[0].image, BenchmarkSet(small_set)[0].mask, 64)
    seen, encoded = [], []
    encode = method.encode
    monkeypatch.setattr(method, "encode", lambda pictures, generator: encoded.append(pictures) or encode(pictures, generator))
    for unet in (method.unet, method.reference_unet):
        unet.register_forward_pre_hook(lambda unet, args: seen.append(args))
    reference = torch.rand(3, 64, 64)
    with torch.no_grad():
        context = method.tokens(reference)
        method.draw(crop, reference, context, torch.Generator().manual_seed(0))
    (first, _, guide), (sample, timestep, both), (second, later, _), _ = seen
    assert torch.equal(first, second) and timestep > later and torch.equal(guide, both[1:]) and torch.equal(both, context)
    assert torch.equal(encoded[0][0], reference) and not encoded[1][0, :, crop.mask > 0.5].any()
    assert torch.equal(encoded[1][0, :, crop.mask <= 0.5], crop.image[:, crop.mask <= 0.5])
    assert sample.shape == (2, 13, 8, 8) and torch.equal(sample[0], sample[1])
    assert set(sample[0, 4].unique().tolist()) == {0, 1} and torch.equal(sample[:1, 9:], method.depth)
    assert abs(sample[0, :4].std() - 1) < 0.2


def test_the_reference_guides_both_ways(method, small_set):
    item = BenchmarkSet(small_set)[0]
    crop, reference, other = zoom_crop(item.image, item.mask, 64), torch.rand(3, 64, 64), torch.rand(3, 64, 64)
    with torch.no_grad():
        tokens = [method.tokens(picture) for picture in (reference, other)]
        assert torch.equal(tokens[0][0], tokens[1][0]) and not torch.equal(tokens[0][1], tokens[1][1])
        drawn = [method.draw(crop, picture, context, torch.Generator().manual_seed(0)) for picture, context in [(reference, tokens[0]), (other, tokens[0]), (reference, tokens[1])]]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_published_sizes():
    """SD 1.5's U-Net, 13 channels, 10 layers of the middle and the decoder; a guider that shrinks by eight."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**MimicBrush.network)
    assert unet.conv_in.weight.shape == (320, 13, 3, 3) and unet.config.cross_attention_dim == 768
    assert len(self_attentions(unet)) == 10 and sum(p.numel() for p in unet.parameters()) == 859_520_964 + 9 * 320 * 9
    assert DepthGuider()(torch.zeros(1, 1, 64, 64)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("part, key, problem", [("referencenet", "mid_block.attentions.0.norm.weight", "referencenet: mid_block"), ("unet", "conv_in.bias", "conv_in.bias"), ("depth_guider", None, "depth_guider")])
def test_weights_that_are_not_whole(mimicbrush_folder, small_mimicbrush, tmp_path, part, key, problem):
    folder = shutil.copytree(mimicbrush_folder, tmp_path / "mimicbrush")
    state = torch.load(folder / "mimicbrush" / "mimicbrush.bin", weights_only=True)
    state[part].pop(key) if key else state.pop(part)
    torch.save(state, folder / "mimicbrush" / "mimicbrush.bin")
    with pytest.raises(InputError, match=problem):
        MimicBrush(folder, "cpu", torch.float32)
    shutil.rmtree(folder / "depth_model")
    with pytest.raises(InputError, match="no depth_model"):
        MimicBrush(folder, "cpu", torch.float32)
