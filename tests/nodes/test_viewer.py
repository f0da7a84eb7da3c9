import comfy_stand_in
import pytest
import torch

from rba_core.overlay import attention_picture, outline


@pytest.fixture
def aligned(nodes, loaded, inputs, whole, zoomed, defaults):
    """Crop, attention and what they came from, as the nodes hand them on."""
    crop, crop_mask, box = zoomed
    raw, attention = nodes.alignment.Align.execute(loaded, crop, crop_mask, whole, **defaults(nodes.alignment.Align)).args
    return {"crop": crop, "attention": attention, "encoded_reference": whole, "reference": inputs["reference"], "crop_mask": crop_mask, "bounding_box": box, "raw": raw}


def shown(nodes, aligned, *names, **more):
    return nodes.viewer.CorrespondenceViewer.execute(**{name: aligned[name] for name in ("crop", "attention", "encoded_reference", "reference", *names)}, **more).ui


def picture(file):
    return comfy_stand_in.PreviewImage.files[file["filename"]]


def test_pictures_for_frontends_without_the_script(nodes, aligned):
    crop, reference = shown(nodes, aligned)["images"]
    assert torch.equal(picture(crop), aligned["crop"][0]) and torch.equal(picture(reference), aligned["reference"][0])


def test_rows_are_the_attention_s(nodes, aligned):
    (page,) = shown(nodes, aligned)["rba_correspondence"]
    (rows,) = aligned["attention"]
    assert picture(page["rows"]).shape == (*rows.shape, 3)
    torch.testing.assert_close(picture(page["rows"])[..., 0] * rows.amax(1, keepdim=True), rows)
    torch.testing.assert_close(torch.tensor(page["peaks"]), rows.amax(1), atol=1e-4, rtol=0)
    assert page["square"] == [aligned["encoded_reference"][0]["box"][side] for side in ("x", "y", "width", "height")]
    assert page["affine"] is None


def test_mask_is_outlined(nodes, aligned):
    crop, _ = shown(nodes, aligned, "crop_mask")["images"]
    assert torch.equal(picture(crop).movedim(-1, 0), outline(aligned["crop"][0].movedim(-1, 0), aligned["crop_mask"][0]))


def test_ring_lies_where_the_placement_sends_the_crop(nodes, aligned):
    square, box = nodes.types.Box(10, 20, 40, 40), nodes.types.boxes_in(aligned["bounding_box"])[0]
    affine = torch.tensor([[0.0, 3.0, 50.0], [2.0, 0.0, 40.0]])
    placement = nodes.alignment.place(aligned["attention"][0], nodes.types.ZoomCrop(aligned["crop"][0].movedim(-1, 0), aligned["crop_mask"][0], box), square)
    placement = type(placement)(affine, box, 0.5, placement.attention, square, placement.weight)
    (page,) = shown(nodes, aligned, "bounding_box", placement=[placement])["rba_correspondence"]
    assert page["affine"] == pytest.approx(affine.flatten().tolist(), abs=1e-3)


def test_placement_without_its_box_is_refused(nodes, aligned):
    with pytest.raises(ValueError, match="^bounding box: is not connected; with a placement"):
        shown(nodes, aligned, placement=[None])


def test_batch_gives_a_pair_each(nodes, aligned):
    twice = aligned | {name: aligned[name] * 2 for name in ("attention", "encoded_reference")} | {"crop": aligned["crop"].repeat(2, 1, 1, 1)}
    output = shown(nodes, twice)
    assert len(output["rba_correspondence"]) == 2 and len(output["images"]) == 4
    assert output["images"][::2] == [page["crop"] for page in output["rba_correspondence"]]


def test_flat_row_is_all_white():
    assert (attention_picture(torch.full((4, 9), 1 / 9)) == 1).all()
