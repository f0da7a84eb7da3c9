"""The pictures of the help pages: what the nodes give on the sample with rba-tiny.

    python tests/nodes/help_pictures.py [FOLDER]     default: web/docs/img

The others are screenshots in ComfyUI: Correspondence Viewer and Score of `workflows/look_and_score.json`; of nodes whose weights
do not come with the pack the graph alone, not run: Align (DIFT) of `dift_alignment.json`, Download Model of `download_weights.json`,
the rest of the native models' nodes of `native_sampler.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

PACK = Path(__file__).parents[2]
sys.path[:0] = [str(PACK), str(PACK / "tests")]

import comfy_stand_in  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from rba_core.geometry import resize  # noqa: E402
from rba_core.imageio import to_bytes  # noqa: E402
from rba_core.overlay import outline  # noqa: E402
from rba_core.reference_encoding import segment  # noqa: E402

HEIGHT, GAP, WHITE = 300, 12, (1.0, 1.0, 1.0)


def run(node, *arguments, **changes):
    """A node's outputs, widgets that are not named at their defaults."""
    schema = node.define_schema()
    values = {entry.id: entry.options.get("default", entry.options.get("options", [None])[0]) for entry in schema.inputs if "default" in entry.options or "options" in entry.options}
    names = [entry.id for entry in schema.inputs]
    output = node.execute(**values | dict(zip(names, arguments)) | changes)
    return dict(zip((socket.id for socket in schema.outputs), output.args))


def channels(image) -> torch.Tensor:
    """IMAGE or MASK -> `[3, H, W]`"""
    return image[0].movedim(-1, 0) if image.ndim == 4 else image[0].expand(3, -1, -1)


def tile(path: Path, *pictures: torch.Tensor) -> None:
    """Side by side, white between."""
    scaled = [resize(picture, HEIGHT, round(picture.shape[2] * HEIGHT / picture.shape[1])) for picture in pictures]
    gap = torch.ones(3, HEIGHT, GAP)
    row = [part for picture in scaled for part in (gap, picture)][1:]
    Image.fromarray(to_bytes(torch.cat(row, 2))).save(path, quality=82, optimize=True, progressive=True)


def main(folder: Path) -> None:
    nodes = comfy_stand_in.load_pack()
    alignment, refinement, loading, preview, editors = nodes.alignment, nodes.refinement, nodes.loading, nodes.preview, nodes.editors
    folder.mkdir(parents=True, exist_ok=True)

    def save(node, *pictures):
        tile(folder / f"{node.define_schema().node_id}.jpg", *pictures)

    model = run(loading.LoadModel)["model"]
    image, mask, photo, thing = run(loading.Sample).values()
    marked = outline(channels(image), mask[0])
    save(loading.Sample, channels(image), channels(mask), channels(photo), channels(thing))

    whole = run(alignment.EncodeReference, model, photo, thing)["encoded_reference"]
    save(alignment.EncodeReference, channels(photo), segment(channels(photo), thing[0], model.model.network.config.reference_fill)[0])

    wide = run(refinement.ZoomCrop, model, image, mask, purpose="alignment")
    close = run(refinement.ZoomCrop, model, image, mask, purpose="refinement")

    def cut_from(bounding_box):
        box = nodes.types.boxes_in(bounding_box)[0]
        return outline(marked, box.paste(torch.zeros(1, *mask.shape[1:]), torch.ones(1, box.height, box.width))[0], WHITE)

    save(refinement.ZoomCrop, cut_from(close["bounding_box"]), outline(channels(close["crop"]), close["crop_mask"][0]))

    def overlay(region, encoded=None):
        return channels(run(preview.CorrespondencePreview, photo, region, encoded_reference=encoded)["overlay"])

    aligned = run(alignment.Align, model, wide["crop"], wide["crop_mask"], whole)
    raw = overlay(aligned["correspondence_map"], whole)
    save(alignment.Align, outline(channels(wide["crop"]), wide["crop_mask"][0]), raw)

    first = run(
        alignment.PostProcess, aligned["correspondence_map"], whole, attention=aligned["attention"], crop_mask=wide["crop_mask"], bounding_box=wide["bounding_box"]
    )
    nearer = run(alignment.EncodeReference, model, photo, first["close_up"])["encoded_reference"]
    again = run(alignment.Align, model, close["crop"], close["crop_mask"], nearer)
    found = run(
        alignment.PostProcess, again["correspondence_map"], nearer, attention=again["attention"], crop_mask=close["crop_mask"], bounding_box=close["bounding_box"],
        matched_region=first["matched_region"], placement=first["placement"],
    )  # fmt: skip
    region = overlay(found["matched_region"])
    save(alignment.PostProcess, raw, region, channels(photo) * first["close_up"])
    save(preview.CorrespondencePreview, region)

    by_patches = run(nodes.feature_alignment.AlignDINOv2, wide["crop"], wide["crop_mask"], photo, thing, model=model)
    save(
        nodes.feature_alignment.AlignDINOv2, outline(channels(wide["crop"]), wide["crop_mask"][0]),
        overlay(by_patches["correspondence_map"], by_patches["encoded_reference"]),
    )  # fmt: skip

    laid = run(
        alignment.Register, close["crop"], close["crop_mask"], close["bounding_box"], image, photo, thing, found["matched_region"], placement=found["placement"]
    )
    save(alignment.Register, channels(laid["matches"]), channels(laid["collage"]))

    guide = run(alignment.EncodeReference, model, photo, laid["guide_mask"])["encoded_reference"]
    collage = {"collage": laid["collage"], "collage_mask": laid["collage_mask"]}
    redrawn = run(refinement.Refine, model, close["crop"], close["crop_mask"], guide, confidence=laid["confidence"], **collage)["redrawn"]
    save(refinement.Refine, channels(close["crop"]), channels(laid["collage"]), channels(redrawn))

    refined = run(refinement.Stitch, image, mask, redrawn, close["bounding_box"], crop_mask=close["crop_mask"], **collage)["refined"]
    save(refinement.Stitch, marked, channels(redrawn), channels(refined))

    match = run(editors.FindRegion, model, image, mask, photo, thing)["matched_region"]
    save(editors.FindRegion, marked, overlay(match))
    cut = run(editors.EditorCrop, image, mask)
    save(editors.EditorCrop, cut_from(cut["bounding_box"]), outline(channels(cut["crop"]), cut["crop_mask"][0]))
    shown, alone = (run(editors.ReferenceCrop, photo, match, thing, background=background)["reference_crop"] for background in ("as it is", "grey"))
    save(editors.ReferenceCrop, overlay(match), channels(shown), channels(alone))

    result = run(refinement.RefineByAlign, model, image, mask, photo, thing)
    save(refinement.RefineByAlign, marked, overlay(result["matched_region"]), channels(result["refined"]))
    save(loading.LoadModel, channels(image), channels(result["refined"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PACK / "web" / "docs" / "img")
