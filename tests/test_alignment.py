import gc
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor

from rba_core.alignment import align, attention_at, correspondence, cross_attentions
from rba_core.errors import InputError
from rba_core.reference_encoding import encode_reference
from rba_core.zoom_crop import zoom_crop

SD1X_BY_EXECUTION = [
    *(f"down_blocks.{block}.attentions.{layer}" for block in range(3) for layer in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.{block}.attentions.{layer}" for block in range(1, 4) for layer in range(3)),
]


@pytest.fixture(scope="module")
def inputs(model, scene_of_module):
    """Sample, timestep and context of one alignment pass."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, model.unet.config.in_channels, 8, 8, generator=generator)
    context = torch.randn(1, 256, 32, generator=generator)
    mask = torch.zeros(64, 64)
    mask[10:40, 21:50] = 1
    return mask, sample, torch.tensor([999]), context


@pytest.fixture(scope="module")
def scene_of_module():
    generator = torch.Generator().manual_seed(5)
    image, reference = torch.rand(3, 96, 130, generator=generator), torch.rand(3, 81, 101, generator=generator)
    mask = torch.zeros(96, 130)
    mask[30:50, 41:70] = 1
    return image, mask, reference


@pytest.fixture(scope="module")
def crop_and_reference(model, scene_of_module):
    image, mask, reference = scene_of_module
    return zoom_crop(image, mask, 64, context=3), encode_reference(model, reference, torch.ones(81, 101))


def hooks(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def names(unet: UNet2DConditionModel) -> list[str]:
    by_module = {module: name for name, module in unet.named_modules()}
    return [by_module[layer] for layer in cross_attentions(unet)]


def test_there_are_16_cross_attentions_named_as_in_stable_diffusion_1():
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=[32, 32, 32, 32], cross_attention_dim=16, attention_head_dim=2)
    assert names(unet) == [f"{name}.transformer_blocks.0.attn2" for name in SD1X_BY_EXECUTION]
    assert names(unet)[9] == "up_blocks.1.attentions.2.transformer_blocks.0.attn2"


def test_they_are_counted_in_the_order_in_which_they_run(model, inputs):
    _, sample, timestep, context = inputs
    ran = []
    handles = [
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
        for name, module in model.unet.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2")
    ]
    try:
        with torch.no_grad():
            model.unet(sample, timestep, context)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == cross_attentions(model.unet)
    registered = [name for name in model.unet.attn_processors if name.endswith("attn2.processor")]
    assert registered != [f"{name}.processor" for name in names(model.unet)]  # the trap: this lists the middle last


class Recorder(AttnProcessor):
    """Attention in full, over all queries, by diffusers' own means, kept as `[heads, Q, N²]`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        self.probabilities = attn.get_attention_scores(query, key, attention_mask)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


@pytest.mark.parametrize("layer", range(16))
def test_the_map_equals_a_full_pass_over_all_queries_weighted_by_the_mask(model, inputs, layer):
    mask, sample, timestep, context = inputs
    attention = cross_attentions(model.unet)[layer]
    usual = attention.processor
    recorder = Recorder()
    attention.set_processor(recorder)
    try:
        with torch.no_grad():
            model.unet(sample, timestep, context)
    finally:
        attention.set_processor(usual)
    every_query = recorder.probabilities.mean(0)  # heads
    side = round(len(every_query) ** 0.5)
    weights = mask.view(side, 64 // side, side, 64 // side).mean((1, 3)).flatten()
    expected = (weights[:, None] * every_query).sum(0) / weights.sum()

    with torch.no_grad():
        partial = attention_at(model.unet, layer, sample, timestep, context)
    assert torch.allclose(partial, every_query, atol=1e-5)
    assert torch.allclose(partial.sum(-1), torch.ones(len(partial)), atol=1e-5)
    assert torch.allclose(correspondence(partial, mask).flatten(), expected, atol=1e-5)


def test_layer_9_of_an_8_by_8_latent_has_2_by_2_queries(model, inputs):
    """Sides 8, 8, 4, 4, 2, 2, middle 1, then 2, 4, 8: SD's 64 to 8 at this model's size."""
    _, sample, timestep, context = inputs
    with torch.no_grad():
        queries = [len(attention_at(model.unet, layer, sample, timestep, context)) for layer in range(16)]
    assert queries == [64, 64, 16, 16, 4, 4, 1, 4, 4, 4, 16, 16, 16, 64, 64, 64]


@pytest.mark.parametrize("layer", [0, 3, 5, 6, 8, 9, 12, 15])
def test_nothing_after_the_layer_runs(model, inputs, layer):
    mask, sample, timestep, context = inputs
    ran: list[str] = []
    leaves = {m: n for n, m in model.unet.named_modules() if not list(m.children())}
    handles = [m.register_forward_pre_hook(lambda m, _: ran.append(leaves[m])) for m in leaves]
    try:
        with torch.no_grad():
            model.unet(sample, timestep, context)
        full = list(ran)
        ran.clear()
        with torch.no_grad():
            attention_at(model.unet, layer, sample, timestep, context)
    finally:
        for handle in handles:
            handle.remove()
    target = names(model.unet)[layer]
    assert ran[-2:] == [f"{target}.to_q", f"{target}.to_k"]
    assert ran[:-2] == full[: full.index(f"{target}.to_q")]
    assert f"{target}.to_v" not in ran


def test_no_attention_of_other_layers_is_kept(model, inputs):
    """What a pass leaves alive is the answer alone: no records that grow with the layers passed."""
    mask, sample, timestep, context = inputs
    alive = []
    handles = [layer.register_forward_hook(lambda _, __, out: alive.append(weakref.ref(out))) for layer in cross_attentions(model.unet)]
    try:
        with torch.no_grad():
            answer = attention_at(model.unet, 12, sample, timestep, context)
    finally:
        for handle in handles:
            handle.remove()
    gc.collect()
    assert len(alive) == 12 and not [reference for reference in alive if reference() is not None]
    assert answer.untyped_storage().nbytes() == answer.numel() * 4


def test_hooks_are_gone_after_a_pass_and_after_an_error(model, inputs):
    mask, sample, timestep, context = inputs
    before = hooks(model.unet)
    with torch.no_grad():
        attention_at(model.unet, 9, sample, timestep, context)
    assert hooks(model.unet) == before
    with pytest.raises(RuntimeError), torch.no_grad():
        attention_at(model.unet, 9, sample[:, :-1], timestep, context)
    assert hooks(model.unet) == before
    with torch.no_grad():
        model.unet(sample, timestep, context)  # and a whole pass still works


@pytest.mark.parametrize("layer", [-1, 16, 99])
def test_a_layer_that_does_not_exist_is_refused(model, inputs, layer):
    with pytest.raises(InputError, match="layer: is .* 0 to 15"):
        attention_at(model.unet, layer, *inputs[1:])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_unet_aligns_as_it_did(make_model, inputs, in_place):
    model, (_, *given) = make_model.__wrapped__(), inputs
    wanted, compiled = attention_at(model.unet, 9, *given), model.unet
    if in_place:
        compiled.compile(backend="eager")
    else:
        compiled = torch.compile(compiled, backend="eager")
    assert torch.equal(attention_at(compiled, 9, *given), wanted)


def test_correspondence_weights_the_rows_and_sums_to_one():
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])  # cells of 1, 1/2, 0 and 1/2
    assert correspondence(torch.eye(4), mask).tolist() == [[0.5, 0.25], [0.0, 0.25]]


def test_the_map_is_16_by_16_finite_and_sums_to_one(every_model, scene_of_module):
    image, mask, reference = scene_of_module
    raw = align(every_model, zoom_crop(image, mask, 64, context=3), encode_reference(every_model, reference, torch.ones(81, 101)))
    assert raw.shape == (16, 16)
    assert raw.min() >= 0 and float(raw.sum()) == pytest.approx(1, abs=1e-5)


def test_the_same_seed_gives_the_same_map_and_another_seed_another(model, crop_and_reference):
    first, again, other = (align(model, *crop_and_reference, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_random_state_is_neither_read_nor_moved(model, crop_and_reference):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = align(model, *crop_and_reference)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, align(model, *crop_and_reference))


def test_t_0_is_the_noisiest_of_50_steps_and_noise_falls_with_t(every_model):
    noise = [float(1 - every_model.scheduler.alphas_cumprod[every_model.noise_step(t)]) for t in range(50)]
    assert noise == sorted(noise, reverse=True) and len(set(noise)) == 50
    assert int(every_model.noise_step(0)) == 999  # spaced "trailing": it ends on the schedule's last step


@pytest.mark.parametrize("timestep", [-1, 50])
def test_a_timestep_outside_the_50_is_refused(model, crop_and_reference, timestep):
    with pytest.raises(InputError, match="timestep"):
        align(model, *crop_and_reference, timestep=timestep)


def test_a_noise_level_goes_to_the_nearest_training_step(model):
    levels = (1 - model.scheduler.alphas_cumprod).sqrt()
    for step in (0, 1, 250, 999):
        assert int(model.noise_step(0, float(levels[step]))) == step
    assert int(model.noise_step(0, 0.0)) == 0 and int(model.noise_step(0, 1.0)) == 999
    between = float(levels[400] * 0.9 + levels[401] * 0.1)
    assert int(model.noise_step(0, between)) == 400


@pytest.mark.parametrize("level", [-0.1, 1.1, 2.0, float("nan")])
def test_a_noise_level_outside_0_to_1_is_refused(model, crop_and_reference, level):
    with pytest.raises(InputError, match="noise level"):
        align(model, *crop_and_reference, noise_level=level)


def test_the_unet_sees_the_noised_image_the_mask_and_the_image_without_the_artifact(model, crop_and_reference, monkeypatch):
    crop, reference = crop_and_reference
    seen = {}

    def spy(unet, layer, sample, timestep, context, **residuals):
        seen.update(layer=layer, sample=sample, timestep=timestep, context=context)
        return attention_at(unet, layer, sample, timestep, context, **residuals)

    monkeypatch.setattr("rba_core.alignment.attention_at", spy)
    align(model, crop, reference, noise_level=0.0, seed=8)
    sample = seen["sample"]
    with torch.no_grad():
        latents = model.encode_image(crop.image[None])
        blanked = model.encode_image((crop.image * (1 - crop.mask) + 0.5 * crop.mask)[None])
    alpha = model.scheduler.alphas_cumprod[0]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(8))
    assert int(seen["timestep"]) == 0 and seen["layer"] == 9
    assert torch.allclose(sample[:, :4], alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, atol=1e-5)
    assert torch.equal(sample[:, 4:5], torch.nn.functional.adaptive_max_pool2d(crop.mask[None, None], 8))
    assert torch.allclose(sample[:, 5:], blanked, atol=1e-6)
    assert torch.equal(seen["context"], reference.embedding)


def test_context_features_can_see_the_artifact_while_the_known_latents_never_do(make_model, scene_of_module):
    """Colours and layout often survive in an artifact; the latents of the known region leave it out in both stages."""
    image, mask, reference = scene_of_module
    model = make_model(6)
    crop = zoom_crop(image, mask, 64, context=3)
    with torch.no_grad():
        seen = model.inpainting_condition(crop.image[None], crop.mask[None, None], seen=crop.image[None])
        blank = model.inpainting_condition(crop.image[None], crop.mask[None, None])
    assert torch.equal(seen[:, :5], blank[:, :5])
    assert not torch.allclose(seen[:, 5:], blank[:, 5:], atol=1e-3)
