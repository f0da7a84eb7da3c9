from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from rba_core.bench.methods.cross_image_attention import CONTRAST, CrossImageAttention, CrossImageProcessor, adain


@pytest.fixture(scope="module")
def method(sd_folder):
    return CrossImageAttention(sd_folder, "cpu", torch.float32)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return Attention(query_dim=16, heads=2, dim_head=8).eval().requires_grad_(False)


def test_without_a_step_it_is_plain_self_attention(attention):
    states = torch.randn(3, 64, 16)
    plain = AttnProcessor2_0()(attention, states)
    processor = CrossImageProcessor(8)
    assert torch.allclose(processor(attention, states), plain, atol=1e-6)
    processor.step = 12
    assert torch.allclose(processor(attention, states[:, :49]), AttnProcessor2_0()(attention, states[:, :49]), atol=1e-6)  # another resolution
    processor.step = 5
    assert torch.allclose(processor(attention, states), plain, atol=1e-6)  # not begun


@pytest.mark.parametrize("step, cells, other", [(12, 64, 1), (12, 16, 1), (15, 64, 2), (40, 64, 1), (80, 64, 1)])
def test_the_output_reads_the_other_pictures_keys_and_values(attention, step, cells, other):
    states = torch.randn(3, cells, 16)
    processor = CrossImageProcessor(8)
    processor.step = step
    mixed = processor(attention, states)
    assert torch.allclose(mixed[1:], AttnProcessor2_0()(attention, states)[1:], atol=1e-6)
    heads = []
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        query, key, value = (states[index] @ project.weight[rows].T for index, project in ((0, attention.to_q), (other, attention.to_k), (other, attention.to_v)))
        weights = (query @ key.T / 8**0.5).softmax(-1)
        weights = ((weights - weights.mean(-1, keepdim=True)) * CONTRAST + weights.mean(-1, keepdim=True)).clamp(0, 1)
        heads.append(weights @ value)
    assert torch.allclose(mixed[0], torch.cat(heads, -1) @ attention.to_out[0].weight.T + attention.to_out[0].bias, atol=1e-5)


def test_the_coarse_layer_ends_before_the_fine_one(attention):
    states = torch.randn(3, 16, 16)
    processor = CrossImageProcessor(8)
    processor.step = 75
    assert torch.allclose(processor(attention, states), AttnProcessor2_0()(attention, states), atol=1e-6)


def test_inversion_leads_back(method, monkeypatch):
    """The sampler's means, with the predictions of the inversion and what it kept, end where its last step's mean is."""
    monkeypatch.setattr(method, "steps", 20)
    monkeypatch.setattr(method, "skipped", 6)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    predictions = {}
    monkeypatch.setattr(method, "diffusion", SimpleNamespace(scheduler=method.diffusion.scheduler, predict=lambda x, t, text: predictions.setdefault(int(t), torch.sin(7 * x))))
    plain = torch.zeros(1, 77, 32)
    noisy, residuals, timesteps = method.invert(latents, plain, plain, torch.Generator().manual_seed(1))
    assert len(timesteps) == len(residuals) == 14 and not residuals[-1].any()
    assert noisy.std() > 0.5
    for timestep, residual in zip(timesteps, residuals):
        last = method.mean(predictions[int(timestep)][:2], timestep, noisy)
        noisy = last + residual
    predicted = method.diffusion.scheduler.step(predictions[int(timesteps[-1])][:2], timesteps[-1], noisy, eta=0).pred_original_sample
    assert (noisy - latents).std() < 0.1 and predicted.isfinite().all()


def test_adain_gives_the_statistics_of_the_style():
    content, style = torch.randn(4, 8, 8), 3 * torch.randn(4, 20) + 2
    given = adain(content, style)
    assert torch.allclose(given.mean((1, 2)), style.mean(1), atol=1e-5)
    assert torch.allclose(given.std((1, 2)), style.std(1, correction=0), atol=1e-5)


def test_freeu_is_on_and_only_the_decoder_looks_across(method):
    unet = method.diffusion.unet
    assert unet.up_blocks[1].b1 == 1.2 and unet.up_blocks[1].s2 == 0.2
    processors = {name: processor for name, processor in unet.attn_processors.items() if isinstance(processor, CrossImageProcessor)}
    assert processors and all(name.startswith("up_blocks") and "attn1" in name for name in processors)
