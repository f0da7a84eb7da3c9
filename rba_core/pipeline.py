"""Refine-by-Align in one function: encode, crop, align, clean, register, refine, stitch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from scipy import ndimage
from torch import Tensor

from .alignment import Aligner, CrossAttention, correspondence
from .collage import Collage, lay_over, transfer_detail
from .dense_correspondence import Placement, place
from .errors import InputError
from .feature_alignment import model_aligner
from .geometry import Box
from .latent_preview import Preview
from .postprocessing import CleaningSettings, MatchedRegion, clean
from .reference_encoding import EncodedReference, encode_reference
from .refinement import Progress, default_strength, refine
from .registration import carry_back
from .stitch import stitch
from .zoom_crop import ZoomCrop, crop_for, separate

if TYPE_CHECKING:
    from .model import RefineByAlign

MIN_AGREEMENT = 0.02
"""Of the cells, for their map to be believed; below, Eq. 5 decides."""
DISPROVED = 0.001
"""Below this confidence of the registration the map is held for wrong, too, and Eq. 5 decides: all as in the paper. On the
validation split, items as they are and taken anew, Eq. 5 finds more of M* there, the map more above."""
CLOSE_UP = 2.5
"""Side of the reference that the next level of the alignment sees, in longer sides of M*."""
SETTLED = 0.15
"""What M* must have moved in a close-up, as 1 - IoU, for yet another one to be taken."""
ALIGNERS = ("attention", "features")


@dataclass(frozen=True)
class Settings:
    """Everything a user may turn; `None` takes the model's own default.

    single_stage       no alignment: the whole reference guides the refinement (the paper's ablation)
    on_flat            where alignment finds nothing: "error", or "single-stage" for that artifact
    one_crop           several artifacts in one mask are redrawn in one crop, not one by one
    layer, timestep, noise_level    see `align`
    steps, guidance, scheduler      see `refine`
    alignment_context, context      sides of the two zoom-in crops, in sides of the mask
    dense              M* is where the map carries the mask that the attention of all cells agrees on; False = the paper,
                       Eq. 5. Where they do not agree, or registration shows that they are wrong, Eq. 5 decides
    aligner            what finds the region: "attention", the model's cross-attention as in the paper; "features", the likeness
                       of its encoder's tokens; or any `Aligner`, as `FeatureAligner` is one
    levels             passes of the dense alignment at most; from the second on over close-ups of mask and region found. From
                       the third on they end where M* has settled, and one in which fewer cells agree does not count
    register           settle M* on the pixels around the mask, see `lay_over`; False = the paper
    min_confidence     what the registration must reach to be used, 0 to 1; below, the tokens alone guide
    strength           how far the refinement may depart from the registered reference, see `refine`; default: the
                       model's `collage_strength` times what the confidence lacks to 1
    detail_transfer    how much of the registered reference's high frequencies is carried into the result, 0 to 1;
                       0 leaves the registration out altogether: the paper's refinement
    region_margin      how much M* is grown before it is cut out, in shares of its longer side
    feather, colour_match           see `stitch`
    """

    single_stage: bool = False
    on_flat: str = "error"
    one_crop: bool = False
    layer: int | None = None
    timestep: int | None = None
    noise_level: float | None = None
    cleaning: CleaningSettings = field(default_factory=CleaningSettings)
    alignment_context: float | None = None
    aligner: str | Aligner = "attention"
    dense: bool = True
    levels: int = 2
    register: bool = True
    min_confidence: float = 0.03
    strength: float | None = None
    detail_transfer: float = 1.0
    region_margin: float = 0.12
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    context: float | None = None
    feather: float = 1.0
    colour_match: bool = True


@dataclass(frozen=True)
class Match:
    """What an artifact corresponds to: which of the references, M* on it, and that laid over the crop, however surely."""

    reference: int
    region: MatchedRegion | None
    collage: Collage | None

    @property
    def sureness(self) -> tuple[float, float]:
        """To choose among references by: the confidence, or else how far the attention agrees."""
        placement = self.region.placement if self.region else None
        return self.collage.confidence if self.collage else 0.0, placement.agreement if placement else 0.0


@dataclass(frozen=True)
class Refined:
    """image `[3, H, W]`, and of each artifact the match: its `region` is `None` where the whole reference was used."""

    image: Tensor
    matches: list[Match]

    @property
    def regions(self) -> list[MatchedRegion | None]:
        return [match.region for match in self.matches]

    @property
    def confidences(self) -> list[float | None]:
        """Of the registrations, used or not; `None` where there was none."""
        return [match.collage.confidence if match.collage else None for match in self.matches]


def refine_by_align(
    model: RefineByAlign,
    image: Tensor,
    mask: Tensor,
    reference: Tensor | Sequence[Tensor],
    reference_mask: Tensor | Sequence[Tensor | None] | None = None,
    *,
    settings: Settings = Settings(),
    seed: int = 0,
    progress: Progress | None = None,
    preview: Preview | None = None,
) -> Refined:
    """Redraw what `mask` covers in `image` from the corresponding part of `reference`.

    image, reference        `[3, H, W]` in [0, 1], each of its own size
    mask, reference_mask    `[H, W]`, above 0.5 = the artifact, the object; no reference mask = the whole picture

    Of several references of one object, with as many masks, each artifact takes the one that it is found in most
    surely. Outside the mask the result equals the image bit for bit. The same seed gives the same result.
    """
    references, object_masks = checked_references(image, mask, reference, reference_mask)
    if settings.on_flat not in ("error", "single-stage"):
        raise InputError("on_flat", f"is {settings.on_flat!r}", "use error or single-stage")
    if settings.levels < 1:
        raise InputError("levels", f"is {settings.levels}", "use 1 or more")
    wholes = [encode_reference(model, picture, object_mask) for picture, object_mask in zip(references, object_masks)]
    artifacts = [mask] if settings.one_crop else separate(mask)
    result, matches = image, []
    for index, artifact in enumerate(artifacts):
        crop = crop_for(model, result, artifact, settings.context)
        told = progress and (lambda done, total, index=index: progress(index * total + done, len(artifacts) * total))
        with model.reusing_latents():
            match = best_match(model, result, artifact, crop, references, wholes, settings, seed)
            guide, collage = wholes[match.reference], believed(match.collage, settings)
            if match.region is not None:
                guide = encode_reference(model, references[match.reference], grow(match.region, settings.region_margin) * guide.mask)
            result = redraw(model, result, artifact, crop, guide, collage, settings, seed, told, preview)
        matches.append(match)
    return Refined(result, matches)


def checked_references(
    image: Tensor, mask: Tensor, reference: Tensor | Sequence[Tensor], reference_mask: Tensor | Sequence[Tensor | None] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """References and their objects' masks as lists of one length. Raises `InputError` for any input that is not as it should be."""
    references = [reference] if isinstance(reference, Tensor) else list(reference)
    if reference_mask is None:
        reference_mask = [None] * len(references)
    reference_masks = [reference_mask] if isinstance(reference_mask, Tensor) else list(reference_mask)
    if not references:
        raise InputError("reference", "is missing", "give at least one photo of the object")
    if len(reference_masks) != len(references):
        raise InputError("reference mask", f"is given {len(reference_masks)} times for {len(references)} references", "give one for each reference, or none")
    for number, (picture, selection) in enumerate(zip(references, reference_masks), 1):
        check_inputs(image, mask, picture, selection, f" {number}" if len(references) > 1 else "")
    return references, [torch.ones(picture.shape[-2:]) if selection is None else selection for picture, selection in zip(references, reference_masks)]


def best_match(
    model: RefineByAlign, image: Tensor, mask: Tensor, crop: ZoomCrop, references: Sequence[Tensor], wholes: Sequence[EncodedReference], settings: Settings, seed: int
) -> Match:
    """The surest of what each reference gives for one artifact. Raises `InputError` where alignment finds nothing in any."""
    if settings.single_stage:
        return Match(0, None, None)
    matches, flat = [], None
    for index, (reference, whole) in enumerate(zip(references, wholes)):
        try:
            region, collage = find_region(model, image, mask, crop, reference, whole, settings, seed), None
        except InputError as error:
            flat = error
            continue
        if region is not None and settings.register and settings.detail_transfer > 0:
            region, collage = register(crop, reference, whole.mask, region, image, settings)
        matches.append(Match(index, region, collage))
    if not matches:
        raise flat
    return max(matches, key=lambda match: match.sureness)


def find_region(
    model: RefineByAlign, image: Tensor, mask: Tensor, closer: ZoomCrop, reference: Tensor, whole: EncodedReference, settings: Settings, seed: int
) -> MatchedRegion | None:
    """M* of one artifact, coarse to fine, or `None` where the attention says nothing and `on_flat` allows it.

    closer   the crop of the levels after the first
    """
    context = model.config.alignment_context if settings.alignment_context is None else settings.alignment_context
    aligner, region = aligner_of(model, settings, seed), None
    crop = crop_for(model, image, mask, context)
    seen = whole if settings.aligner == "attention" else aligner.encode(reference, whole.mask)
    for level in range(settings.levels if settings.dense else 1):
        if level:
            crop, seen = closer, aligner.encode(reference, close_up(region, whole.mask))
        attention = aligner.attend(crop, seen)
        found = carried(crop.mask, place(attention, crop, seen.box), seen.mask) if settings.dense else None
        if level > 1 and not improves(found, region):
            break
        before = region
        try:
            region = best_known(found, region, correspondence(attention, crop.mask), seen, settings.cleaning)
        except InputError:
            if settings.on_flat == "error":
                raise
            return None
        if level and not moved(before, region):
            break
    return region


def aligner_of(model: RefineByAlign, settings: Settings, seed: int) -> Aligner:
    """The settings' aligner, made where it is given by name."""
    if settings.aligner == "attention":
        return CrossAttention(model, settings.layer, settings.timestep, settings.noise_level, seed)
    if settings.aligner == "features":
        return model_aligner(model)
    if isinstance(settings.aligner, str):
        raise InputError("aligner", f"{settings.aligner!r} is not known", f"use {' or '.join(ALIGNERS)}")
    return settings.aligner


def improves(found: MatchedRegion | None, before: MatchedRegion) -> bool:
    """Whether one more close-up has cells that agree as well as those of the close-up before."""
    return found is not None and (before.placement is None or found.placement.agreement >= before.placement.agreement)


def moved(before: MatchedRegion, region: MatchedRegion) -> bool:
    shared = (before.mask * region.mask).sum() / torch.maximum(before.mask, region.mask).sum()
    return bool(1 - shared >= SETTLED)


def best_known(found: MatchedRegion | None, before: MatchedRegion | None, raw: Tensor, seen: EncodedReference, cleaning: CleaningSettings) -> MatchedRegion:
    """M* of one level: `found` where the cells agree; else that of the level before; else Eq. 5's, cleaned from the raw map
    `[N, N]`. Eq. 5's of the first level goes along with a placement. Raises `InputError` where the attention says nothing."""
    if before is not None:
        published = before.placement.published if before.placement else before.mask
    else:
        try:
            before = clean(raw, seen, cleaning)
            published = before.mask
        except InputError:
            if found is None:
                raise
            published = None
    return before if found is None else replace(found, placement=replace(found.placement, published=published))


def carried(mask: Tensor, placement: Placement | None, object_mask: Tensor) -> MatchedRegion | None:
    """M* as the map that the cells agree on carries the crop's mask; `None` where they do not, or it leaves the object."""
    if placement is None or not placement.agreement >= MIN_AGREEMENT:
        return None
    region = carry_back(mask, placement.affine, *object_mask.shape) * object_mask
    return MatchedRegion(region, Box.around(region), region, placement) if region.any() else None


def close_up(region: MatchedRegion, object_mask: Tensor) -> Tensor:
    """The object `[H, W]` within a square around M*, `CLOSE_UP` times its longer side."""
    square = region.box.square(round(CLOSE_UP * max(region.box.width, region.box.height)))
    return square.paste(torch.zeros_like(object_mask)[None], torch.ones(1, square.height, square.width))[0] * object_mask


def register(
    crop: ZoomCrop, reference: Tensor, object_mask: Tensor, region: MatchedRegion, image: Tensor, settings: Settings
) -> tuple[MatchedRegion, Collage]:
    """The reference laid over the crop, and M* to the pixel; where that is not to be believed M* as it was, and Eq. 5's where the
    pixels disprove the map that it came from."""
    collage = lay_over(crop, reference, object_mask, region, image, disagreed=settings.dense and region.placement is None)
    mask = region.mask
    if believed(collage, settings) is not None:
        mask = collage.region
    elif collage.confidence < DISPROVED and region.placement is not None and region.placement.published is not None:
        mask = region.placement.published
    return (region if mask is region.mask else MatchedRegion(mask, Box.around(mask), mask, region.placement)), collage


def believed(collage: Collage | None, settings: Settings) -> Collage | None:
    """The collage, unless it is too unsure or shows nothing under the mask."""
    return collage if collage is not None and collage.confidence >= settings.min_confidence and collage.region.any() else None


def redraw(
    model: RefineByAlign, image: Tensor, mask: Tensor, crop: ZoomCrop, guide: EncodedReference, collage: Collage | None, settings: Settings, seed: int,
    progress: Progress | None = None, preview: Preview | None = None,
) -> Tensor:
    """The image `[3, H, W]` with one artifact redrawn in its crop, guided by a region's tokens, and put back."""
    strength = settings.strength
    if strength is None:
        strength = default_strength(model, collage.confidence) if collage else 1.0
    redrawn = refine(
        model, crop, guide, collage=collage, strength=strength, steps=settings.steps, guidance=settings.guidance, scheduler=settings.scheduler, seed=seed,
        progress=progress, preview=preview,
    )  # fmt: skip
    if collage is not None:
        redrawn = transfer_detail(redrawn, collage, crop.mask, settings.detail_transfer)
    return stitch(image, mask, redrawn, crop.box, feather=settings.feather, colour_match=settings.colour_match)


def grow(region: MatchedRegion, margin: float) -> Tensor:
    """M* widened by `margin` of its box's longer side: alignment is no finer than a token."""
    reach = margin * max(region.box.width, region.box.height)
    near = ndimage.distance_transform_edt(region.mask.numpy() < 0.5) <= reach
    return torch.from_numpy(near).float()


def check_inputs(image: Tensor, mask: Tensor, reference: Tensor, reference_mask: Tensor | None, which: str = "") -> None:
    """which: " 2", say, in the words of an error on one of several references."""
    for name, picture in (("image", image), (f"reference{which}", reference)):
        if picture.ndim != 3 or picture.shape[0] != 3:
            raise InputError(name, f"has shape {tuple(picture.shape)}", "give RGB as [3, H, W]")
        if min(picture.shape[-2:]) < 16:
            raise InputError(name, f"is only {picture.shape[-1]} x {picture.shape[-2]} pixels", "give a picture of at least 16 x 16")
        if not torch.isfinite(picture).all():
            raise InputError(name, "holds NaN or infinite values", "check the node or file that made it")
        if picture.amin() < 0 or picture.amax() > 1:
            raise InputError(name, f"has values from {picture.amin():.3g} to {picture.amax():.3g}", "scale it to 0..1")
    check_mask("mask", mask, "image", image)
    if reference_mask is not None:
        check_mask(f"reference mask{which}", reference_mask, "reference", reference)
    if (mask > 0.5).all():
        raise InputError("mask", "covers the whole image", "leave some surroundings unpainted: they tell where the part belongs")


def check_mask(name: str, mask: Tensor, owner: str, picture: Tensor) -> None:
    """A mask `[H, W]` of the size of its picture `[..., H, W]`, finite, not empty."""
    if not torch.isfinite(mask).all():
        raise InputError(name, "holds NaN or infinite values", "check the node or file that made it")
    if not (mask > 0.5).any():
        raise InputError(name, "is empty", "paint over at least one pixel (white = selected)")
    if mask.shape != picture.shape[-2:]:
        sizes = " x ".join(map(str, reversed(mask.shape))), " x ".join(map(str, reversed(picture.shape[-2:])))
        raise InputError(name, f"is {sizes[0]}, its {owner} {sizes[1]}", f"give a mask of the {owner}'s size")
