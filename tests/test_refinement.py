from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from rba_core.collage import Collage
from rba_core.errors import InputError
from rba_core.geometry import resize
from rba_core.reference_encoding import encode_reference
from rba_core.refinement import SCHEDULERS, refine
from rba_core.zoom_crop import zoom_crop


@pytest.fixture
def crop(scene):
    return zoom_crop(scene.image, scene.mask, 64)


@pytest.fixture
def reference(model, scene):
    return encode_reference(model, scene.reference, scene.reference_mask)


class Spy:
    """What the U-Net was called with."""

    def __init__(self, monkeypatch, model):
        self.samples, self.timesteps, self.contexts = [], [], []
        forward = model.unet.forward

        def spy(sample, timestep, context, *args, **kwargs):
            self.samples.append(sample.clone())
            self.timesteps.append(int(timestep))
            self.contexts.append(context.clone())
            return forward(sample, timestep, context, *args, **kwargs)

        monkeypatch.setattr(model.unet, "forward", spy)


def test_the_crop_comes_back_in_its_size_and_range(every_model, scene, crop):
    redrawn = refine(every_model, crop, encode_reference(every_model, scene.reference, scene.reference_mask))
    assert redrawn.shape == (3, 64, 64) and redrawn.dtype == torch.float32
    assert torch.isfinite(redrawn).all() and redrawn.min() >= 0 and redrawn.max() <= 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_same_seed_gives_the_same_crop_and_another_seed_another(model, crop, reference, scheduler):
    first, again, other = (refine(model, crop, reference, scheduler=scheduler, seed=seed) for seed in (3, 3, 4))
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_global_random_state_is_left_alone(model, crop, reference, scheduler):
    before = torch.get_rng_state()
    refine(model, crop, reference, scheduler=scheduler)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_runs_with_any_number_of_steps(model, crop, reference, scheduler, steps, monkeypatch):
    spy = Spy(monkeypatch, model)
    assert torch.isfinite(refine(model, crop, reference, scheduler=scheduler, steps=steps)).all()
    assert len(spy.samples) == steps
    assert spy.timesteps == sorted(spy.timesteps, reverse=True) and spy.timesteps[0] >= 990


def test_schedulers_differ(model, crop, reference):
    results = [refine(model, crop, reference, scheduler=name) for name in ("ddim", "dpm++", "ddpm")]
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_an_unknown_scheduler_is_refused(model, crop, reference):
    with pytest.raises(InputError, match="scheduler: 'plms' is not known"):
        refine(model, crop, reference, scheduler="plms")


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(model, crop, reference, steps):
    with pytest.raises(InputError, match="steps"):
        refine(model, crop, reference, steps=steps)


def test_more_steps_than_the_schedule_has_are_refused(model, crop, reference):
    with pytest.raises(InputError, match="steps"):
        refine(model, crop, reference, steps=1001)


def test_without_guidance_the_unet_runs_once_a_step_on_one_sample(model, crop, reference, monkeypatch):
    spy = Spy(monkeypatch, model)
    refine(model, crop, reference, guidance=1, steps=4)
    assert [len(sample) for sample in spy.samples] == [1] * 4
    assert all(torch.equal(context, reference.embedding) for context in spy.contexts)


def test_with_guidance_it_runs_on_two_one_with_the_embedding_dropped(model, crop, reference, monkeypatch):
    spy = Spy(monkeypatch, model)
    refine(model, crop, reference, guidance=2.5, steps=4)
    assert [len(sample) for sample in spy.samples] == [2] * 4
    for sample, context in zip(spy.samples, spy.contexts):
        assert torch.equal(sample[0], sample[1])
        assert (context[0] == 0).all() and torch.equal(context[1:], reference.embedding)


def test_guidance_goes_from_the_dropped_prediction_through_the_guided_one(make_model, crop, scene, monkeypatch):
    """Replace the U-Net by one that answers 0 without and 1 with an embedding: one DDIM step shows the mixture."""
    model = make_model.__wrapped__()
    reference = encode_reference(model, scene.reference, scene.reference_mask)
    predictions = []

    def unet(sample, timestep, context, **_):
        answer = (context != 0).flatten(1).any(1).float()[:, None, None, None].expand(-1, 4, 8, 8)
        return type("Output", (), {"sample": answer})()

    def step(scheduler, prediction, *args, **kwargs):
        predictions.append(prediction)
        return usual(scheduler, prediction, *args, **kwargs)

    usual = DDIMScheduler.step
    monkeypatch.setattr(DDIMScheduler, "step", step)
    monkeypatch.setattr(model.unet, "forward", unet)
    refine(model, crop, reference, guidance=2.5, steps=2)
    assert all((prediction == 2.5).all() and prediction.shape == (1, 4, 8, 8) for prediction in predictions)


def test_defaults_are_the_models(model, crop, reference, monkeypatch):
    spy = Spy(monkeypatch, model)
    redrawn = refine(model, crop, reference)
    assert len(spy.samples) == model.config.steps == 3 and len(spy.samples[0]) == 2
    assert torch.equal(redrawn, refine(model, crop, reference, steps=3, guidance=1.5, scheduler="ddim"))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_at_the_end_the_unmasked_latents_are_the_known_ones(model, crop, reference, scheduler, monkeypatch):
    kept = {}
    decode = model.decode_latents
    monkeypatch.setattr(model, "decode_latents", lambda latents: decode(kept.setdefault("latents", latents)))
    refine(model, crop, reference, scheduler=scheduler)
    with torch.no_grad():
        known = model.encode_image(crop.image[None])
    hole = F.adaptive_max_pool2d(crop.mask[None, None], 8).expand_as(known) > 0
    assert hole.any() and not hole.all()
    assert torch.equal(kept["latents"][~hole], known[~hole])
    assert not torch.allclose(kept["latents"][hole], known[hole])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_on_the_way_the_unmasked_latents_carry_the_noise_of_their_step(every_model, scene, crop, scheduler, monkeypatch):
    """The U-Net's input is sqrt(a) known + sqrt(1 - a) noise there, whatever units the scheduler calculates in."""
    spy = Spy(monkeypatch, every_model)
    reference = encode_reference(every_model, scene.reference, scene.reference_mask)
    refine(every_model, crop, reference, scheduler=scheduler, steps=5, guidance=1, seed=6)
    with torch.no_grad():
        known = every_model.encode_image(crop.image[None])
    noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(6))
    hole = F.adaptive_max_pool2d(crop.mask[None, None], 8).expand_as(known) > 0
    for sample, timestep in zip(spy.samples[1:], spy.timesteps[1:]):
        alpha = every_model.scheduler.alphas_cumprod[timestep]
        expected = alpha.sqrt() * known + (1 - alpha).sqrt() * noise
        assert torch.allclose(sample[:, :4][~hole], expected[~hole], atol=0.03), timestep


def test_the_embedding_guides(model, scene, crop, reference):
    other = encode_reference(model, 1 - scene.reference, scene.reference_mask)
    assert not torch.equal(refine(model, crop, reference), refine(model, crop, other))


def test_progress_is_told_after_each_step(model, crop, reference):
    told = []
    refine(model, crop, reference, steps=5, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_raising_from_progress_cancels_at_once(model, crop, reference, monkeypatch):
    spy = Spy(monkeypatch, model)

    class Cancelled(Exception):
        pass

    def progress(done, total):
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        refine(model, crop, reference, steps=6, progress=progress)
    assert len(spy.samples) == 2


@pytest.mark.parametrize("features", [0, 6])
def test_the_condition_holds_mask_latents_and_context_features_and_does_not_see_the_artifact(make_model, crop, features):
    model, mask = make_model(features), crop.mask[None, None]
    with torch.no_grad():
        condition = model.inpainting_condition(crop.image[None], mask)
        painted_over = model.inpainting_condition((crop.image * (1 - crop.mask))[None], mask)
        changed_beside = model.inpainting_condition((crop.image * crop.mask)[None], mask)
    assert condition.shape == (1, 1 + 4 + features, 8, 8)
    assert torch.equal(condition[:, :1], F.adaptive_max_pool2d(mask, 8))
    assert torch.allclose(condition, painted_over, atol=1e-6)
    for channel in range(1, 5 + features):
        assert not torch.allclose(condition[:, channel], changed_beside[:, channel], atol=1e-3)


def test_the_models_own_scheduler_keeps_its_state(model, crop, reference):
    before = dict(model.scheduler.config), model.scheduler.timesteps.clone()
    refine(model, crop, reference, steps=4)
    assert dict(model.scheduler.config) == before[0] and torch.equal(model.scheduler.timesteps, before[1])


@pytest.mark.parametrize("guidance", [1, 2])
def test_bfloat16_on_the_cpu_works(make_model, scene, crop, guidance):
    model = make_model.__wrapped__(6).to(torch.bfloat16)
    redrawn = refine(model, crop, encode_reference(model, scene.reference, scene.reference_mask), guidance=guidance)
    assert redrawn.dtype == torch.float32 and torch.isfinite(redrawn).all()


@pytest.fixture
def laid(scene) -> Collage:
    picture = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(2))
    return Collage(picture, torch.ones(40, 40), scene.reference_mask, 0.9)


def test_a_model_that_reads_the_collage_is_shown_it_under_the_mask_alone(make_model, scene, crop, laid, monkeypatch):
    model = make_model(6, "v_prediction", collage=True)
    spy = Spy(monkeypatch, model)
    reference = encode_reference(model, scene.reference, scene.reference_mask)
    with_it = refine(model, crop, reference, collage=laid, guidance=1)
    without = refine(model, crop, reference, guidance=1)
    assert not torch.equal(with_it, without)
    seen, blank = spy.samples[0], spy.samples[3]
    hole = F.adaptive_avg_pool2d(crop.mask[None, None], 8)
    assert torch.equal(seen[:, :9], blank[:, :9])
    assert torch.allclose(seen[:, 9:10], hole) and (blank[:, 9:10] == 0).all()
    assert torch.allclose(blank[:, 10:14], blank[:, 5:9], atol=1e-6)  # nothing laid: the blanked picture again
    with torch.no_grad():
        shown = torch.where(crop.mask > 0.5, resize(laid.picture, 64, 64), crop.image)
        assert torch.allclose(seen[:, 10:14], model.encode_image(shown[None]), atol=1e-5)


def test_a_collage_that_is_valid_nowhere_is_none(make_model, scene, crop, laid):
    model = make_model(6, "v_prediction", collage=True)
    reference = encode_reference(model, scene.reference, scene.reference_mask)
    nowhere = replace(laid, valid=torch.zeros(40, 40))
    assert torch.allclose(refine(model, crop, reference, collage=nowhere), refine(model, crop, reference), atol=1e-5)


def test_with_strength_0_the_latents_end_as_the_collages(model, crop, reference, laid, monkeypatch):
    kept = {}
    decode = model.decode_latents
    monkeypatch.setattr(model, "decode_latents", lambda latents: decode(kept.setdefault("latents", latents)))
    refine(model, crop, reference, collage=laid, strength=0.0)
    with torch.no_grad():
        shown = torch.where(crop.mask > 0.5, resize(laid.picture, 64, 64), crop.image)
        assert torch.allclose(kept["latents"], model.encode_image(shown[None]), atol=1e-5)


def test_the_more_strength_the_further_from_the_collage(model, crop, reference, laid):
    shown = torch.where(crop.mask > 0.5, resize(laid.picture, 64, 64), crop.image)
    with torch.no_grad():
        as_it_is = model.decode_latents(model.encode_image(shown[None]))[0]
    inside = crop.mask > 0.5
    results = [refine(model, crop, reference, collage=laid, strength=strength, steps=4) for strength in (0.0, 0.5, 1.0)]
    distances = [float((result - as_it_is)[:, inside].abs().mean()) for result in results]
    assert distances[0] < 1e-4 < distances[1] and distances[0] < distances[2]
    assert not torch.equal(results[1], results[2])


def test_where_the_collage_is_not_valid_it_is_redrawn_whatever_the_strength(model, crop, reference, laid):
    nowhere = replace(laid, valid=torch.zeros(40, 40))
    assert torch.equal(refine(model, crop, reference, collage=nowhere, strength=0.0), refine(model, crop, reference))


def test_without_a_collage_strength_changes_nothing(model, crop, reference):
    assert torch.equal(refine(model, crop, reference, strength=0.2), refine(model, crop, reference))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_outside_0_to_1_is_refused(model, crop, reference, strength):
    with pytest.raises(InputError, match="strength"):
        refine(model, crop, reference, strength=strength)


def test_guidance_in_two_passes_is_that_in_one(make_model, scene):
    model = make_model.__wrapped__()
    crop = zoom_crop(scene.image, scene.mask, 64, context=2, multiple=8)
    reference = encode_reference(model, scene.reference, scene.reference_mask)
    batches = []
    model.unet.register_forward_pre_hook(lambda unet, arguments: batches.append(len(arguments[0])))
    together = refine(model, crop, reference, guidance=3.0)
    model.spare_memory()
    apart = refine(model, crop, reference, guidance=3.0)
    assert batches == [2] * 3 + [1] * 6
    assert (together - apart).abs().max() < 1e-4
