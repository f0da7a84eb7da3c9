"""Between ComfyUI's types and the library's: models, pictures, masks, boxes, encoded references, progress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import comfy.utils
import torch
from comfy import model_management
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ..rba_core.collage import Collage
from ..rba_core.errors import InputError
from ..rba_core.geometry import Box
from ..rba_core.imageio import to_bytes
from ..rba_core.latent_preview import Preview
from ..rba_core.pipeline import check_mask
from ..rba_core.reference_encoding import EncodedReference
from ..rba_core.refinement import Progress
from ..rba_core.zoom_crop import ZoomCrop
from .api import io

if TYPE_CHECKING:
    from ..rba_core.model import RefineByAlign

CATEGORY = "Refine by Align"
NATIVE = f"{CATEGORY}/native models"

Model = io.Custom("RBA_MODEL")
"""A `ModelPatcher` around a `RefineByAlignModel`."""

Reference = io.Custom("RBA_REFERENCE")
"""A list, one a picture of the batch, of `{"embedding": [1, N², C], "box": {x, y, width, height}, "mask": [H, W]}`, and
"detail": [3, 256, 256] of a model with a detail encoder."""

Attention = io.Custom("RBA_ATTENTION")
"""A list, one a picture of the batch, of `[d², N²]`: where each cell of a crop looks in a reference."""

Placement = io.Custom("RBA_PLACEMENT")
"""A list, one a picture of the batch, of the library's `Placement`, or `None` where the cells agreed on none."""


class RefineByAlignModel(torch.nn.Module):
    """What `ModelPatcher` holds: it writes `model.device`, which `RefineByAlign` computes."""

    def __init__(self, network: RefineByAlign):
        super().__init__()
        self.network = network


def on_device(model: ModelPatcher) -> RefineByAlign:
    network = model.model.network
    decoding = 2178 * network.config.image_size**2 * network.dtype.itemsize  # bytes, as core estimates it for the same autoencoder
    model_management.load_models_gpu([model], memory_required=decoding, force_full_load=True)
    model.model.to(model.load_device)  # --novram leaves layers that are not comfy.ops behind
    network.spare_memory(model_management.get_free_memory(model.load_device) < decoding)
    return network


def delivered(results: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The results of a batch as one tensor where ComfyUI wants it."""
    return torch.stack(results).to(model_management.intermediate_device(), dtype)


def pictures(image: Tensor) -> Tensor:
    """IMAGE `[B, H, W, C]` -> `[B, 3, H, W]`, without alpha; clamped, as upscalers overshoot 0..1; contiguous, as sums
    depend on the order in memory."""
    return image[..., :3].movedim(-1, 1).cpu().float().clamp(0, 1).contiguous()


def image_of(picture: Tensor) -> Tensor:
    """`[3, H, W]` -> `[H, W, 3]`"""
    return picture.movedim(0, -1)


def mask_batch(mask: Tensor) -> Tensor:
    """MASK `[B, H, W]` or `[H, W]` -> `[B, H, W]`, of any size."""
    return mask.reshape(-1, *mask.shape[-2:]).cpu().float()


def masks(mask: Tensor, image: Tensor, name: str = "mask", owner: str = "image") -> Tensor:
    """The same of masks that must have the size of their IMAGE, none of them empty."""
    mask = mask_batch(mask)
    for one in mask:
        check_mask(name, one, owner, image[0, ..., 0])
    return mask


def object_masks(mask: Tensor | None, reference: Tensor) -> Tensor:
    """The same of the object in the reference; no mask: the whole picture."""
    return torch.ones(reference.shape[:3]) if mask is None else masks(mask, reference, "reference mask", "reference")


def put_back(picture: Tensor, mask: Tensor, image: Tensor) -> Tensor:
    """`picture` `[3, H, W]` under the mask and `image` `[H, W, C]` elsewhere: alpha and values beyond 0..1 stay."""
    image = image.cpu()
    rgb = torch.where(mask[..., None] > 0.5, image_of(picture).to(image), image[..., :3])
    return torch.cat([rgb, image[..., 3:]], -1)


def together(**batches) -> list[tuple]:
    """Batches of one length, item by item; a batch of one serves all."""
    longest, count = max(((name, len(batch)) for name, batch in batches.items()), key=lambda item: item[1])
    for name, batch in batches.items():
        if len(batch) not in (1, count):
            raise InputError(name.replace("_", " "), f"has {len(batch)} in its batch, {longest.replace('_', ' ')} has {count}", "give one for all, or one for each")
    return list(zip(*(list(batch) * (count // len(batch)) for batch in batches.values()), strict=True))


def square_side(name: str, image: Tensor, remedy: str) -> int:
    """Of an IMAGE that has to be square."""
    height, width = image.shape[1:3]
    if height != width:
        raise InputError(name, f"is {width} x {height}, not square", remedy)
    return width


def model_crop(picture: Tensor, mask: Tensor, model: RefineByAlign) -> ZoomCrop:
    size = model.config.image_size
    if picture.shape[1:] != (size, size):
        raise InputError("crop", f"is {picture.shape[2]} x {picture.shape[1]}", f"this model works at {size} x {size}: connect Zoom-in Crop")
    return ZoomCrop(picture, (mask > 0.5).float(), Box(0, 0, size, size))


def collages(collage: Tensor | None, collage_mask: Tensor | None) -> list[Collage | None]:
    """The registered reference of each picture; `None` where its mask is empty. No mask: all of it counts."""
    if collage is None:
        return [None]
    side = square_side("collage", collage, "connect the collage of Register")
    shown = torch.ones(1, side, side) if collage_mask is None else (mask_batch(collage_mask) > 0.5).float()
    if shown.shape[1:] != (side, side):
        raise InputError("collage mask", f"is {shown.shape[2]} x {shown.shape[1]}, its collage {side} x {side}", "connect the collage mask of Register")
    batch = together(collage=pictures(collage), collage_mask=shown)
    return [Collage(picture, valid, valid, 1.0) if valid.any() else None for picture, valid in batch]


def plain(reference: EncodedReference) -> dict[str, Any]:
    """As it goes from node to node, see `Reference`."""
    detail = {} if reference.detail is None else {"detail": reference.detail}
    return {"embedding": reference.embedding.to(model_management.intermediate_device()), "box": asdict(reference.box), "mask": reference.mask, **detail}


def encoded(reference: dict[str, Any], model: RefineByAlign | None = None) -> EncodedReference:
    """The way back, on the model's device where it is to be read by a model."""
    embedding = reference["embedding"]
    if model is not None:
        if embedding.shape[-1] != model.unet.config.cross_attention_dim:
            raise InputError("reference", "was encoded by another model", "encode it with the model that reads it")
        embedding = embedding.to(model.device, model.dtype)
    return EncodedReference(embedding, Box(**reference["box"]), reference["mask"], reference.get("detail"))


def boxes_out(boxes: list[Box]) -> dict | list[list[dict]]:
    """BOUNDING_BOX as core has it: a dict for one picture, a list of boxes per picture for a batch."""
    if len(boxes) == 1:
        return asdict(boxes[0])
    return [[asdict(box)] for box in boxes]


def crops_out(crops: list[ZoomCrop]) -> tuple[Tensor, Tensor, dict | list]:
    """Their pictures as IMAGE, masks as MASK, and boxes."""
    return delivered([image_of(crop.image) for crop in crops]), delivered([crop.mask for crop in crops]), boxes_out([crop.box for crop in crops])


def boxes_in(bounding_box: dict | list) -> list[Box]:
    """One box a picture from any of core's forms: a dict, a list of them, or a list of boxes per picture."""
    found = [bounding_box] if isinstance(bounding_box, dict) else [box[0] if isinstance(box, list) else box for box in bounding_box]
    return [Box(*(round(box[side]) for side in ("x", "y", "width", "height"))) for box in found]


class BatchProgress:
    """ComfyUI's progress bar over a batch; ends the run when the user cancels."""

    def __init__(self, count: int):
        self.count, self.bar, self.picture = count, comfy.utils.ProgressBar(count), None

    def of(self, index: int) -> Progress:
        def report(done: int, total: int) -> None:
            model_management.throw_exception_if_processing_interrupted()
            self.bar.update_absolute(index * total + done, self.count * total, self.picture)

        return report

    def preview(self) -> Preview | None:
        """Keeps what it is shown for the next report; `None` where ComfyUI is told to show no previews."""
        if args.preview_method == LatentPreviewMethod.NoPreviews:
            return None

        def keep(picture: Tensor) -> None:
            self.picture = ("JPEG", Image.fromarray(to_bytes(picture.cpu())), args.preview_size)

        return keep

    def over(self, batch: list[tuple]) -> Iterator[tuple]:
        """The items of a batch that is not sampled, one by one."""
        for index, item in enumerate(batch):
            model_management.throw_exception_if_processing_interrupted()
            yield item
            self.bar.update_absolute(index + 1)
