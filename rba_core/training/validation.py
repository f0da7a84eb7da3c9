"""What a leg makes of held-out scenes: losses, mIoU of the matched region, PSNR under the mask, and pictures to look at."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..alignment import align
from ..collage import Collage
from ..data.scenes import Scenes
from ..errors import InputError
from ..geometry import Box, resize
from ..imageio import to_bytes, write_picture
from ..overlay import outline, overlay
from ..postprocessing import clean
from ..reference_encoding import EncodedReference, encode_reference
from ..refinement import refine
from ..zoom_crop import ZoomCrop
from .encoder import EncoderObjective, damage, token_targets
from .refiner import RefinerObjective, imperfect_collage

THRESHOLD = 0.4
"""Share of its peak that a map needs to count as region, of the truth's as of the prediction's."""


def true_map(scenes: Scenes) -> Tensor:
    """What the known flow says of M_a, spread over the reference's tokens: `[B, 16, 16]`."""
    mask = F.interpolate(scenes.mask, scenes.visible.shape[-2:], mode="area")
    return token_targets(scenes.flow, scenes.visible * mask, 1).view(-1, 16, 16)


def mean_iou(maps: Tensor, truth: Tensor) -> float:
    """Mean over the items `[B, 16, 16]` whose region is in sight, both maps cut at `THRESHOLD` of their peak; 0 to 1."""
    in_sight = truth.amax((1, 2)) > 1e-4
    found, wanted = (value >= THRESHOLD * value.amax((1, 2), keepdim=True) for value in (maps[in_sight].cpu(), truth[in_sight].cpu()))
    return float(((found & wanted).sum((1, 2)) / (found | wanted).sum((1, 2))).mean()) if in_sight.any() else 0.0


def validate_encoder(objective: EncoderObjective, scenes: Scenes, sheet: Path) -> dict:
    """`scenes` on the objective's device. The matched region is where the tokens under M_a look."""
    damaged = damage(scenes, torch.Generator().manual_seed(0), shares=(0.6, 0.2, 0.2, 0.0))
    terms = objective(scenes, damaged)
    query, key = F.normalize(objective.match(objective.tokens(torch.cat([damaged, scenes.reference]))).float(), dim=-1).chunk(2)
    attention = (query @ key.mT * objective.temperature.exp()).softmax(-1)
    maps = torch.einsum("bq,bqn->bn", F.adaptive_avg_pool2d(scenes.mask, 16).flatten(1), attention).view(-1, 16, 16)
    truth = true_map(scenes)
    rows = []
    for index, picture in enumerate(damaged):
        matched, wanted = (_on_reference(scenes.reference[index], value[index]) for value in (maps, truth))
        rows.append([outline(picture, scenes.mask[index, 0]), matched, wanted, scenes.image[index]])
    write_sheet(sheet, ["crop and mask", "matched", "true region", "as it should be"], rows)
    return {"loss": float(sum(terms.values())), **{name: float(term) for name, term in terms.items()}, "miou": mean_iou(maps, truth)}


def validate_refiner(objective: RefinerObjective, scenes: dict[str, Scenes], sheet: Path) -> dict:
    """Both stages as they are used, over `scenes` by mode, on the CPU: align at the model's layer and noise, clean,
    encode the matched region, refine. A model that reads the collage is shown the one of training.
    """
    model = objective.model
    terms: dict[str, float] = {}
    for mode, batch in scenes.items():
        for name, term in objective(batch.to(model.device), mode, torch.Generator().manual_seed(0)).items():
            terms[name] = terms.get(name, 0.0) + float(term) / len(scenes)

    batch = scenes["alignment"]
    generator = torch.Generator().manual_seed(0)
    damaged = damage(batch, generator, shares=(0.0, 0.4, 0.2, 0.4))
    laid, valid = imperfect_collage(batch, generator) if model.config.collage else (None, None)
    maps, errors, rows = [], [], []
    for index, (picture, mask, reference, truth) in enumerate(zip(damaged, batch.mask[:, 0], batch.reference, batch.image)):
        size = reference.shape[-1]
        crop = ZoomCrop(picture, mask, Box(0, 0, mask.shape[1], mask.shape[0]))
        whole = EncodedReference(model.embed(reference[None]), Box(0, 0, size, size), torch.ones(size, size))
        maps.append(align(model, crop, whole))
        try:
            region = clean(maps[-1], whole).mask
        except InputError:  # a flat map: the whole reference then guides, as in the pipeline
            region = whole.mask
        collage = Collage(laid[index], valid[index, 0], region, 0.0) if laid is not None else None
        refined = refine(model, crop, encode_reference(model, reference, region), collage=collage).cpu()
        if mask.any():
            errors.append(float((((refined - truth) ** 2).mean(0) * mask).sum() / mask.sum()))
        rows.append([outline(picture, mask), _on_reference(reference, maps[-1], region), torch.where(mask > 0.5, refined, picture), truth])
    write_sheet(sheet, ["crop and mask", "matched", "refined", "truth"], rows)
    psnr = float(-10 * torch.tensor(errors).clamp(min=1e-6).log10().mean()) if errors else 0.0
    return {"loss": sum(terms.values()), **terms, "miou": mean_iou(torch.stack(maps), true_map(batch)), "psnr": psnr}


def _on_reference(reference: Tensor, token_map: Tensor, mask: Tensor | None = None) -> Tensor:
    soft = F.interpolate((token_map / token_map.max().clamp(min=1e-9))[None, None].to(reference), reference.shape[-2:], mode="bilinear")[0, 0]
    return overlay(reference, soft, soft >= THRESHOLD if mask is None else mask)


def write_sheet(path: Path, headings: list[str], rows: list[list[Tensor]], tile: int = 192) -> None:
    """A PNG with a row an item and a column a heading."""
    gap, heading = 6, 20
    sheet = Image.new("RGB", ((tile + gap) * len(headings), heading + (tile + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(headings):
        draw.text((column * (tile + gap) + 2, 2), text, fill="black", font=ImageFont.load_default(13))
        for row, pictures in enumerate(rows):
            fitted = to_bytes(resize(pictures[column].cpu(), tile, tile))
            sheet.paste(Image.fromarray(fitted), (column * (tile + gap), heading + row * (tile + gap)))
    write_picture(path, sheet)
