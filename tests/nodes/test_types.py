import comfy_stand_in
import pytest
import torch


def test_pictures_drop_alpha_and_overshoot(nodes):
    image = torch.full((2, 5, 7, 4), 1.2)
    assert nodes.types.pictures(image).shape == (2, 3, 5, 7)
    assert nodes.types.pictures(image).max() == 1


def test_mask_without_a_batch_axis(nodes):
    assert nodes.types.masks(torch.ones(5, 7), torch.zeros(1, 5, 7, 3)).shape == (1, 5, 7)


def test_mask_of_load_image_without_alpha_is_empty_rather_than_of_another_size(nodes):
    with pytest.raises(ValueError, match="^mask: is empty; paint over"):
        nodes.types.masks(torch.zeros(1, 64, 64), torch.zeros(1, 512, 512, 3))


def test_mask_of_another_size_is_refused(nodes):
    with pytest.raises(ValueError, match="^mask: is 7 x 5, its image 9 x 5; give a mask of the image's size$"):
        nodes.types.masks(torch.ones(1, 5, 7), torch.zeros(1, 5, 9, 3))


def test_one_serves_all(nodes):
    assert nodes.types.together(image=[1, 2, 3], mask=["m"], reference=["a", "b", "c"]) == [(1, "m", "a"), (2, "m", "b"), (3, "m", "c")]


def test_batches_that_do_not_pair_are_named_with_both_counts(nodes):
    with pytest.raises(ValueError, match="^reference mask: has 2 in its batch, image has 3; give one for all, or one for each$"):
        nodes.types.together(image=[1, 2, 3], mask=[1], reference_mask=[1, 2])


def test_what_lies_outside_the_mask_is_kept_bit_for_bit(nodes):
    image = torch.rand(6, 8, 4) * 3 - 1
    mask = torch.zeros(6, 8)
    mask[2:4, 3:5] = 1
    result = nodes.types.put_back(torch.full((3, 6, 8), 0.5), mask, image)
    assert torch.equal(result[mask == 0], image[mask == 0])
    assert torch.equal(result[..., 3], image[..., 3])
    assert (result[mask == 1][:, :3] == 0.5).all()


@pytest.mark.parametrize("count", [1, 3])
def test_boxes_go_out_in_core_s_form_and_come_back(nodes, count):
    boxes = [nodes.types.Box(index - 2, 4, 10, 12) for index in range(count)]
    out = nodes.types.boxes_out(boxes)
    assert out == ({"x": -2, "y": 4, "width": 10, "height": 12} if count == 1 else [[{"x": index - 2, "y": 4, "width": 10, "height": 12}] for index in range(3)])
    assert nodes.types.boxes_in(out) == boxes


def test_boxes_of_other_nodes(nodes):
    assert nodes.types.boxes_in([{"x": 1.6, "y": 2.0, "width": 3.4, "height": 4, "label": "cup", "score": 0.9}]) == [nodes.types.Box(2, 2, 3, 4)]


def test_encoded_reference_is_plain_data_and_comes_back(nodes, loaded, model, inputs):
    (reference,) = nodes.alignment.EncodeReference.execute(loaded, inputs["reference"], inputs["reference_mask"])[0]
    assert set(reference["box"]) == {"x", "y", "width", "height"}
    again = nodes.types.plain(nodes.types.encoded(reference, model))
    assert torch.equal(again["embedding"], reference["embedding"]) and again["box"] == reference["box"] and torch.equal(again["mask"], reference["mask"])


def test_reference_of_another_model_is_refused(nodes, model):
    reference = {"embedding": torch.zeros(1, 256, 7), "box": {"x": 0, "y": 0, "width": 8, "height": 8}, "mask": torch.ones(8, 8)}
    with pytest.raises(ValueError, match="^reference: was encoded by another model"):
        nodes.types.encoded(reference, model)


def test_crop_of_another_size_is_refused(nodes, model):
    with pytest.raises(ValueError, match="^crop: is 96 x 80; this model works at 64 x 64: connect Zoom-in Crop$"):
        nodes.types.model_crop(torch.zeros(3, 80, 96), torch.ones(80, 96), model)


def test_model_can_be_patched(nodes, loaded, model):
    """`ModelPatcher` sets `device` on what it holds, which the library's model computes."""
    assert nodes.types.on_device(loaded) is model
    assert loaded.model.device == torch.device("cpu")


def test_progress_runs_over_the_batch(nodes):
    progress = nodes.types.BatchProgress(2)
    for index in range(2):
        for done in (1, 2, 3):
            progress.of(index)(done, 3)
    assert comfy_stand_in.ProgressBar.made[-1].updates == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]


def test_memory_is_spared_where_little_is_free(nodes, loaded, monkeypatch):
    assert nodes.types.on_device(loaded).sparing is False
    monkeypatch.setattr(nodes.types.model_management, "get_free_memory", lambda device: 1000)
    try:
        assert nodes.types.on_device(loaded).sparing is True
    finally:
        loaded.model.network.spare_memory(False)


def test_batch_that_is_not_sampled_shows_progress_and_can_be_cancelled(nodes, monkeypatch):
    progress = nodes.types.BatchProgress(3)
    assert list(progress.over(["a", "b", "c"])) == ["a", "b", "c"]
    assert [done for done, _ in comfy_stand_in.ProgressBar.made[-1].updates] == [1, 2, 3]

    def interrupted():
        raise comfy_stand_in.InterruptProcessingException

    monkeypatch.setattr(nodes.types.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy_stand_in.InterruptProcessingException):
        next(progress.over(["a"]))
