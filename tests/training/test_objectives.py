import math

import pytest
import torch
from torch import Tensor

from rba_core.alignment import cross_attentions
from rba_core.autoencoder import BlockAutoencoder
from rba_core.data.scenes import REFERENCE_FILL, Scenes, SceneSampler, TextureBank, grid
from rba_core.training.autoencoder import AutoencoderObjective
from rba_core.training.encoder import EncoderObjective, damage, place_tokens, token_targets
from rba_core.training.refiner import RefinerObjective, RefinerSettings, imperfect_collage


@pytest.fixture(scope="module")
def bank() -> TextureBank:
    return TextureBank(8, 64, seed=0)


@pytest.fixture
def sampler(bank) -> SceneSampler:
    return SceneSampler(bank, seed=1, image_size=64, reference_size=224)


def everywhere(flow: Tensor) -> Tensor:
    return torch.ones(len(flow), 1, *flow.shape[1:3])


def test_the_identity_flow_gives_the_identity():
    flow = grid(16, 2)
    targets = token_targets(flow, everywhere(flow), side=16)
    assert torch.allclose(targets, torch.eye(256).expand(2, -1, -1), atol=1e-5)


def test_on_a_finer_grid_it_still_points_at_the_same_token():
    flow = grid(64, 1)
    targets = token_targets(flow, everywhere(flow), side=16)
    assert targets.argmax(-1)[0].tolist() == list(range(256))
    assert torch.allclose(targets.sum(-1), torch.ones(1, 256), atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_rows_sum_to_the_share_of_their_points_that_are_visible(side):
    flow = grid(16, 1)
    visible = (torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    targets = token_targets(flow, visible, side=side)
    cell = 16 // side
    shares = visible.view(side, cell, side, cell).mean((1, 3)).flatten()
    assert targets.shape == (1, side * side, 256) and targets.min() >= 0
    assert torch.allclose(targets.sum(-1)[0], shares, atol=1e-5)


def test_x_goes_to_columns_and_y_to_rows():
    column, row = 3, 11
    point = torch.tensor([(column + 0.5) / 8 - 1, (row + 0.5) / 8 - 1])
    targets = token_targets(point.expand(1, 4, 4, 2), torch.ones(1, 1, 4, 4), side=1)
    assert targets[0, 0].nonzero().flatten().tolist() == [row * 16 + column]


def test_between_tokens_the_weight_is_shared():
    point = torch.tensor([(3 + 0.75) / 8 - 1, (11 + 0.5) / 8 - 1])  # a quarter of the way from column 3 to 4
    targets = token_targets(point.expand(1, 4, 4, 2), torch.ones(1, 1, 4, 4), side=1)[0, 0].view(16, 16)
    assert targets[11, 3:5].tolist() == pytest.approx([0.75, 0.25], abs=1e-5)
    assert float(targets.sum()) == pytest.approx(1)


def test_a_flow_far_outside_stays_finite_and_counts_only_where_visible():
    flow = grid(16, 1) + 50
    assert torch.isfinite(token_targets(flow, everywhere(flow), side=4)).all()
    assert (token_targets(flow, 0 * everywhere(flow), side=4) == 0).all()


def test_damage_changes_the_masked_part_only(sampler):
    scenes = sampler.sample(16, "alignment")
    damaged = damage(scenes, torch.Generator().manual_seed(0), shares=(0.25, 0.25, 0.25, 0.25))
    outside = (scenes.mask < 0.5).expand_as(scenes.image)
    assert torch.equal(damaged[outside], scenes.image[outside])
    inside = ~outside
    assert (damaged[inside] != scenes.image[inside]).float().mean() > 0.9
    cut_out = [(damaged[i][inside[i]] == REFERENCE_FILL).all() for i in range(16)]
    assert 0 < sum(map(int, cut_out)) < 16


def test_damage_comes_in_the_shares_asked_for(sampler):
    scenes = sampler.sample(6, "alignment")
    inside = (scenes.mask > 0.5).expand_as(scenes.image)
    cut_out, smeared, swapped, garbled = (damage(scenes, torch.Generator().manual_seed(0), tuple(map(float, row))) for row in torch.eye(4))
    assert (cut_out[inside] == REFERENCE_FILL).all()
    assert torch.equal(swapped[inside], scenes.image.roll(1, 0)[inside])
    assert all((kind[inside] != scenes.image[inside]).float().mean() > 0.8 for kind in (smeared, garbled))
    assert not torch.equal(smeared, garbled)


def finite(terms: dict[str, Tensor]) -> bool:
    return all(term.ndim == 0 and math.isfinite(float(term)) for term in terms.values())


def reached(module) -> list[bool]:
    return [p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters()]


@pytest.fixture
def small(make_model):
    return make_model.__wrapped__(6, "v_prediction")


def test_the_encoders_objective_is_finite_and_trains_the_encoder(small, sampler):
    objective = EncoderObjective(small, width=16)
    scenes = SceneSampler(sampler.bank, 1, image_size=224, reference_size=224).sample(2, "alignment")
    terms = objective(scenes, damage(scenes, torch.Generator().manual_seed(0), shares=(0.6, 0.2, 0.2, 0.0)))
    assert terms.keys() == {"match", "back", "paint"} and finite(terms)
    assert all(float(term) >= 0 for term in terms.values())
    sum(terms.values()).backward()
    assert all(reached(small.encoder.encoder)) and all(reached(objective.match)) and objective.temperature.grad != 0


def test_where_nothing_is_known_of_the_correspondence_the_rest_trains(make_model, sampler):
    """Two photos of one object: `visible` is 0 in some rows of a batch, or in all."""
    scenes = SceneSampler(sampler.bank, 1, image_size=224, reference_size=224).sample(3, "alignment")
    scenes.flow[0] = 7.0
    some, none = (scenes.visible * torch.tensor(rows)[:, None, None, None] for rows in ([0.0, 1.0, 1.0], [0.0, 0.0, 0.0]))
    objective = EncoderObjective(make_model.__wrapped__(6, "v_prediction"), width=16)
    values = {}
    for name, visible in (("some", some), ("none", none)):
        scenes.visible = visible
        values[name] = objective(scenes, scenes.image)
        assert finite(values[name])
        sum(values[name].values()).backward()
    assert float(values["none"]["match"]) == float(values["none"]["back"]) == 0 < float(values["some"]["match"])
    known = Scenes(*(value[1:] for value in vars(Scenes(scenes.image, scenes.mask, scenes.reference, scenes.flow, some)).values()))
    assert torch.allclose(objective(known, known.image)["match"], values["some"]["match"])

    for mode in ("alignment", "refinement"):
        scenes = sampler.sample(2, mode)
        scenes.visible = torch.zeros_like(scenes.visible)
        refiner = RefinerObjective(make_model.__wrapped__(6, "v_prediction", collage=True))
        terms = refiner(scenes, mode, torch.Generator().manual_seed(0))
        assert finite(terms) and terms["denoise"] > 0 and all(float(term) == 0 for name, term in terms.items() if name != "denoise")
        sum(terms.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in refiner.parameters() if p.grad is not None)


def test_the_matching_loss_falls_when_the_crop_is_the_reference(small):
    """A picture against itself is easier than against another: the targets are the right way round."""
    objective = EncoderObjective(small, width=32)
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(14, 2).repeat_interleave(14, 3)
    flow = grid(56, 2)
    itself = Scenes(pictures, torch.zeros(2, 1, 224, 224), pictures, flow, everywhere(flow))
    turned = Scenes(pictures, torch.zeros(2, 1, 224, 224), pictures.transpose(2, 3), flow, everywhere(flow))
    with torch.no_grad():
        right, wrong = (objective(scenes, pictures) for scenes in (itself, turned))
    assert float(right["match"]) < float(wrong["match"]) and float(right["back"]) < float(wrong["back"])


def test_placed_tokens_are_most_like_their_neighbours(small):
    place_tokens(small.encoder)
    places = torch.nn.functional.normalize(small.encoder.embeddings.position_embeddings[0, 1:].detach(), dim=-1)
    likeness = (places @ places.T).view(256, 16, 16)
    here = likeness[8 * 16 + 5]
    assert divmod(int(here.argmax()), 16) == (8, 5)
    assert here[8, 5] > here[8, 6] > here[8, 8] and here[8, 5] > here[9, 5] > here[11, 5]


def test_the_autoencoders_objective_is_finite_and_trains_the_decoder(sampler):
    objective = AutoencoderObjective(BlockAutoencoder(luma=4, chroma=1, width=4, latent_channels=6))
    pictures = sampler.sample(2, "refinement").image
    optimiser = torch.optim.Adam(objective.parameters(), lr=1e-3)
    told = []
    for _ in range(8):
        terms = objective(pictures)
        assert terms.keys() == {"pixels", "detail"} and finite(terms)
        told.append(float(sum(terms.values())))
        optimiser.zero_grad()
        sum(terms.values()).backward()
        optimiser.step()
    assert all(reached(objective.vae.residual))
    assert told[-1] < told[0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("mode", ["alignment", "refinement"])
def test_the_refiners_objective_trains_unet_and_mlp_and_neither_encoder_nor_autoencoder(make_model, sampler, mode, prediction):
    model = make_model.__wrapped__(6, prediction)
    objective = RefinerObjective(model, RefinerSettings(drop=0.0))
    terms = objective(sampler.sample(3, mode), mode, torch.Generator().manual_seed(0))
    assert terms.keys() == {"denoise", "attend5", "attend9", "attend12", "attend14"} and finite(terms)
    sum(terms.values()).backward()
    assert all(reached(model.projector)) and all(reached(model.context_projector)) and all(reached(model.context_adapter))
    assert sum(reached(model.unet)) > 0.95 * len(reached(model.unet))
    assert not any(reached(model.encoder)) and not any(reached(model.vae))


def test_a_model_that_reads_the_collage_is_trained_with_it_in_refinement(make_model, sampler, monkeypatch):
    model = make_model.__wrapped__(6, "v_prediction", collage=True)
    objective = RefinerObjective(model, RefinerSettings(attention_weight=0))
    shown, usual = [], model.inpainting_condition

    def spy(*args, **kwargs):
        shown.append(kwargs.get("collage"))
        return usual(*args, **kwargs)

    monkeypatch.setattr(model, "inpainting_condition", spy)
    for mode in ("alignment", "refinement"):
        assert finite(objective(sampler.sample(8, mode), mode, torch.Generator().manual_seed(0)))
    assert shown[0] is None and shown[1] is not None


def test_the_collage_of_training_is_the_reference_laid_nearly_in_place(sampler):
    scenes = sampler.sample(24, "refinement")
    laid, valid = imperfect_collage(scenes, torch.Generator().manual_seed(0))
    assert laid.shape == scenes.image.shape and valid.shape == scenes.mask.shape
    assert torch.isfinite(laid).all() and laid.min() >= 0 and laid.max() <= 1
    given = valid.flatten(1).any(1)
    assert 0.5 < float(given.float().mean()) < 1  # some items are shown none
    right, elsewhere = (
        float(((laid - other).abs().mean(1, keepdim=True) * valid).sum() / valid.sum()) for other in (scenes.image, scenes.image.roll(1, 0))
    )
    assert right < 0.6 * elsewhere


def test_without_attention_terms_it_is_equation_2(make_model, sampler):
    objective = RefinerObjective(make_model.__wrapped__(), RefinerSettings(attention_weight=0))
    terms = objective(sampler.sample(2, "alignment"), "alignment", torch.Generator().manual_seed(0))
    assert terms.keys() == {"denoise"} and finite(terms)


def test_with_every_embedding_dropped_nothing_is_asked_of_attention(make_model, sampler):
    model = make_model.__wrapped__()
    objective = RefinerObjective(model, RefinerSettings(drop=1.0))
    terms = objective(sampler.sample(2, "alignment"), "alignment", torch.Generator().manual_seed(0))
    assert finite(terms) and all(float(terms[f"attend{layer}"]) == 0 for layer in (5, 9, 12, 14))
    sum(terms.values()).backward()
    assert not any(reached(model.projector))


def test_the_noise_predicted_exactly_costs_nothing(make_model, sampler, monkeypatch):
    """Whatever the schedule and the weights: a U-Net that answers the target has no loss."""
    for prediction in ("epsilon", "v_prediction"):
        model = make_model.__wrapped__(0, prediction)
        objective = RefinerObjective(model, RefinerSettings(attention_weight=0))
        scenes = sampler.sample(2, "refinement")
        with torch.no_grad():
            latents = model.encode_image(scenes.image)

        def unet(sample, timestep, context, **_):
            alpha = model.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
            noise = (sample[:, :4] - alpha.sqrt() * latents) / (1 - alpha).sqrt()
            answer = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
            return type("Output", (), {"sample": answer})()

        monkeypatch.setattr(model.unet, "forward", unet)
        assert float(objective(scenes, "refinement", torch.Generator().manual_seed(0))["denoise"]) < 1e-4


def test_the_attention_terms_fall_when_trained_on(make_model, sampler):
    model = make_model.__wrapped__(sharpness=1.0)
    objective = RefinerObjective(model, RefinerSettings(drop=0.0, attention_weight=1.0, layers=(9,)))
    scenes = sampler.sample(4, "alignment")
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    told = []
    for _ in range(15):
        term = objective(scenes, "alignment", torch.Generator().manual_seed(0))["attend9"]
        told.append(float(term.detach()))
        optimiser.zero_grad()
        term.backward()
        optimiser.step()
    assert told[-1] < told[0] - 0.1


def test_gradient_checkpointing_changes_no_gradient(make_model, sampler):
    scenes = sampler.sample(2, "alignment")
    gradients = []
    for checkpointing in (False, True):
        model = make_model.__wrapped__().train()
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
        objective = RefinerObjective(model, RefinerSettings(attention_weight=1.0))
        sum(objective(scenes, "alignment", torch.Generator().manual_seed(0)).values()).backward()
        assert objective.hidden is None  # what runs again in the backward pass is not held on to
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0 and torch.allclose(*gradients, atol=1e-6)


def test_nothing_that_is_trained_stays_without_a_gradient(make_model, sampler):
    """Training on several processes waits for every gradient."""
    model = make_model.__wrapped__(6, "v_prediction", collage=True)
    for mode in ("alignment", "refinement"):
        objective = RefinerObjective(model, RefinerSettings(attention_weight=0))
        sum(objective(sampler.sample(2, mode), mode, torch.Generator().manual_seed(0)).values()).backward()
        assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
        objective.zero_grad(set_to_none=True)
    objective = EncoderObjective(make_model.__wrapped__(), width=16)
    scenes = SceneSampler(sampler.bank, 1, image_size=224, reference_size=224).sample(2, "alignment")
    sum(objective(scenes, scenes.image).values()).backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_the_attention_terms_read_the_layers_by_execution(make_model, sampler):
    model = make_model.__wrapped__()
    objective = RefinerObjective(model)
    hooked = [index for index, layer in enumerate(cross_attentions(model.unet)) if layer._forward_pre_hooks]
    assert hooked == list(objective.settings.layers)
