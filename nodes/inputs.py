"""Inputs that several nodes have."""

from __future__ import annotations

from ..rba_core.pipeline import Settings
from ..rba_core.postprocessing import CleaningSettings
from ..rba_core.refinement import SCHEDULERS
from .api import io


def seed_input(tooltip: str = "Seed of the noise that is put on the crop while it is aligned."):
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def crop_inputs(purpose: str):
    return [
        io.Image.Input("crop", tooltip=f"The crop around the wrong part, from Zoom-in Crop (purpose: {purpose})."),
        io.Mask.Input("crop_mask", tooltip="White over the wrong part of the crop, from Zoom-in Crop."),
    ]


def bounding_box_input(tooltip: str = "Where the crop stands in the image, from Zoom-in Crop.", optional: bool = False):
    # io.BoundingBox.Input is a widget; force_input is younger than the type
    return io.Custom("BOUNDING_BOX").Input("bounding_box", optional=optional, tooltip=tooltip, extra_dict={"forceInput": True})


def reference_mask_input():
    return io.Mask.Input("reference_mask", optional=True, tooltip="White over the object in the reference. Without it the whole picture counts as the object.")


def layer_input():
    return io.Int.Input(
        "layer", default=-1, min=-1, max=15, advanced=True,
        tooltip="Cross-attention layer to read, 0 to 15 in the order in which they run. -1: the model's own (9).",
    )


def timestep_input():
    return io.Int.Input(
        "timestep", default=-1, min=-1, max=49, advanced=True,
        tooltip="Noise on the image while aligning, as a step of a 50-step sampler: 0 is the noisiest, 49 the cleanest. -1: the model's own.",
    )


def noise_level_input():
    return io.Float.Input(
        "noise_level", default=-1.0, min=-1.0, max=1.0, step=0.01, advanced=True,
        tooltip="The same noise as a standard deviation, 0 (the image as it is) to 1 (pure noise). Goes before timestep. -1: use timestep.",
    )


def cleaning_inputs():
    default = CleaningSettings()
    return [
        io.Float.Input(
            "threshold", default=default.threshold, min=0.05, max=1.0, step=0.01, advanced=True,
            tooltip="Share of the map's peak that a pixel needs to belong to the matched region. Lower: a larger region.",
        ),
        io.Float.Input(
            "peak_support", default=default.peak_support, min=0.0, max=1.0, step=0.01, advanced=True,
            tooltip="A lone peak on the map's border is taken for noise unless a neighbour reaches this share of it.",
        ),
        io.Float.Input(
            "flatness", default=default.flatness, min=1.0, max=20.0, step=0.1, advanced=True,
            tooltip="The map's peak must be this many times its mean, or the reference shows nothing like the masked part.",
        ),
    ]


def margin_input():
    return io.Float.Input(
        "margin", default=Settings().region_margin, min=0.0, max=1.0, step=0.01, advanced=True,
        tooltip="How much the matched region is widened before it guides the refinement, in shares of its longer side.",
    )


def min_confidence_input():
    return io.Float.Input(
        "min_confidence", default=Settings().min_confidence, min=0.0, max=1.0, step=0.01, advanced=True,
        tooltip="How sure the registration must be to be used, 0 to 1. Below it the matched region stays as aligned, and the model draws without the reference's pixels.",
    )


def on_flat_input():
    return io.Combo.Input(
        "on_flat", options=["error", "single-stage"], default="error",
        tooltip="Where nothing in the reference stands out: stop with an error, or let the whole reference guide the refinement.",
    )


def none_below_zero(value):
    return None if value < 0 else value


def sampling_inputs():
    return [
        seed_input("Seed of the noise that the redrawing starts from. The same seed gives the same result; change it to get another try."),
        io.Int.Input("steps", default=0, min=0, max=1000, tooltip="Denoising steps. 0: the model's own number."),
        io.Float.Input(
            "guidance", default=0.0, min=0.0, max=20.0, step=0.1,
            tooltip="Classifier-free guidance: how strongly the reference is followed. 1 turns it off and halves the time. 0: the model's own value.",
        ),
        io.Combo.Input("scheduler", options=["default", *SCHEDULERS], default="default", advanced=True, tooltip="The sampling method. default: the model's own."),
    ]


def sampling(steps: int, guidance: float, scheduler: str) -> dict:
    """What `sampling_inputs` say, as `refine` takes it: `None` is the model's own."""
    return {"steps": steps or None, "guidance": guidance or None, "scheduler": None if scheduler == "default" else scheduler}


def context_input(name: str = "context", crop: str = "crop"):
    return io.Float.Input(
        name, default=0.0, min=0.0, max=20.0, step=0.1, advanced=True,
        tooltip=f"Side of the {crop} in sides of the mask: 2 shows as much again around it. 0: the model's own.",
    )


def collage_inputs():
    return [
        io.Image.Input("collage", optional=True, tooltip="The reference as it lies over the crop, from Register."),
        io.Mask.Input("collage_mask", optional=True, tooltip="Where the collage counts, from Register; all black: nowhere. Without it, everywhere."),
    ]


def strength_input():
    return io.Float.Input(
        "strength", default=-1.0, min=-1.0, max=1.0, step=0.05, advanced=True,
        tooltip="How far the redrawing may depart from the registered reference, 0 (as it is) to 1 (a hint only). -1: the less, the higher the confidence.",
    )


def detail_transfer_input():
    return io.Float.Input(
        "detail_transfer", default=Settings().detail_transfer, min=0.0, max=1.0, step=0.05,
        tooltip="How much of the fine detail of the registered reference is carried into the redrawn part. 0: only what the model drew, as in the paper.",
    )


def stitching_inputs():
    return [
        io.Float.Input("feather", default=Settings().feather, min=0.0, max=100.0, step=0.5, advanced=True, tooltip="Width of the blend at the mask's edge, in pixels of the image, inside the mask."),
        io.Boolean.Input("colour_match", default=True, advanced=True, tooltip="Shift the redrawn part's tone to agree with what surrounds it."),
    ]
