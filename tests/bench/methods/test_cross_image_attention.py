from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from rba_core.bench.methods.cross_image_attention import CONTRAST, INVERSION_GUIDANCE, CrossImageAttention, CrossImageProcessor, adain


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
    """The sampler's means under guidance, with what the inversion kept, pass through every picture that was noised on its own."""
    monkeypatch.setattr(method, "steps", 20)
    monkeypatch.setattr(method, "skipped", 6)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    predictions = {}

    def predict(x, t, text):
        return predictions.setdefault(int(t), torch.sin(7 * x)) + 0.1 * text[:, :1, :1, None]

    monkeypatch.setattr(method, "diffusion", SimpleNamespace(scheduler=method.diffusion.scheduler, predict=predict))
    noisy, residuals, timesteps = method.invert(latents, torch.zeros(1, 77, 32), torch.ones(1, 77, 32), torch.Generator().manual_seed(1))
    guided = {t: prediction[:2] + 0.1 * INVERSION_GUIDANCE for t, prediction in predictions.items()}
    assert len(timesteps) == len(residuals) == 14 and not residuals[-1].any()
    generator = torch.Generator().manual_seed(1)
    for timestep, residual in zip(timesteps, residuals):
        wanted = method.diffusion.scheduler.add_noise(latents, torch.randn(2, 4, 8, 8, generator=generator), timestep)
        assert torch.allclose(noisy, wanted, atol=1e-4)
        noisy = method.mean(guided[int(timestep)], timestep, noisy) + residual
    assert (noisy - latents).std() < 0.1


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


def transferred(method, monkeypatch, predict, steps, latents):
    """Of a stand-in for the networks: latents of the output; the method's own loop."""
    monkeypatch.setattr(method, "steps", steps)
    monkeypatch.setattr(method, "skipped", 4)
    text = lambda prompts: torch.zeros(len(prompts), 77, 32)  # noqa: E731
    monkeypatch.setattr(method, "diffusion", SimpleNamespace(scheduler=method.diffusion.scheduler, predict=predict, text=text, decode=lambda x: x))
    return method.transfer(latents, torch.ones(64, 64), "a can", torch.Generator().manual_seed(1))


def test_the_output_starts_as_the_structure(method, monkeypatch):
    """Before the tenth step nothing looks across: what comes out is the structure again."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = transferred(method, monkeypatch, lambda x, t, text: torch.sin(7 * x), 13, latents)
    assert (out - latents[1]).std() < 0.3 < 0.8 < (out - latents[0]).std()


def test_appearance_guidance_falls_from_three_and_a_half_to_half_of_it(method, monkeypatch):
    given = []
    mean = method.mean
    monkeypatch.setattr(method, "mean", lambda noise, t, x: given.append(noise) or mean(noise, t, x))
    transferred(method, monkeypatch, lambda x, t, text: torch.full_like(x, 0.0 if method.processor.step is None else 1.0), 20, torch.randn(2, 4, 8, 8))
    guidance = [float(noise.mean()) for noise in given[16:]]  # after the inversion
    assert len(guidance) == 16 and guidance[:10] == [0] * 10
    assert guidance[10:] == pytest.approx([3.5 - 1.75 * step / 15 for step in range(10, 16)])
