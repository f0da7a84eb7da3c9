"""What the benchmark measures, for one picture or a batch."""

from __future__ import annotations

from .api import io
from .types import CATEGORY, masks, pictures, together


class Score(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_Score",
            display_name="Score Refinement",
            category=f"{CATEGORY}/score",
            description="Measures the redrawn part as the benchmark does: against the true picture if there is one, else what can be told from the image and the reference. Connect scores to Preview as Text.",
            search_aliases=["rba score", "psnr", "ssim", "image quality metric", "measure refinement", "compare to ground truth", "benchmark"],
            inputs=[
                io.Image.Input("refined", tooltip="The image with the redrawn part, from Refine by Align, Stitch or any editor."),
                io.Mask.Input("mask", tooltip="White over the part that was wrong; same size as the image."),
                io.Image.Input("truth", optional=True, tooltip="The picture as it should be, same size: for PSNR, SSIM, high-pass SSIM and NCC."),
                io.Image.Input("image", optional=True, tooltip="The image with its wrong part: counts pixels changed outside the mask, and shows what refining gained."),
                io.Image.Input("reference", optional=True, tooltip="The photo of the object: with image, whether more of its keypoints are found again (KGain; needs OpenCV)."),
                io.Mask.Input("reference_mask", optional=True, tooltip="White over the object in the reference. Without it the whole picture counts."),
            ],
            outputs=[
                io.Float.Output("psnr", tooltip="Peak signal-to-noise ratio under the mask, dB, higher is better. This and all others: mean of the batch, NaN where it cannot be measured."),
                io.Float.Output("ssim", tooltip="Structural similarity under the mask, at most 1."),
                io.Float.Output("hp_ssim", tooltip="The same of the fine detail alone: near 0 where the result is blurred."),
                io.Float.Output("ncc", tooltip="Correlation of the detail, small shifts forgiven, at most 1."),
                io.Float.Output("changed", tooltip="Pixels outside the mask that differ in 8 bits; 0 after Refine by Align."),
                io.Float.Output("kgain", tooltip="Share of images in which more of the reference's keypoints are found again than before."),
                io.String.Output("scores", tooltip="All of it in words, for Preview as Text."),
            ],
        )

    @classmethod
    def execute(cls, refined, mask, truth=None, image=None, reference=None, reference_mask=None) -> io.NodeOutput:
        from ..rba_core.bench.score import SCORES, described, mean, score  # with the judges' libraries, which take seconds

        def optional(batch):
            return [None] if batch is None else pictures(batch)

        batch = together(
            refined=pictures(refined), mask=masks(mask, refined, owner="refined image"), truth=optional(truth), image=optional(image), reference=optional(reference),
            reference_mask=[None] if reference_mask is None or reference is None else masks(reference_mask, reference, "reference mask", "reference"),
        )
        scores = [score(result, part, truth=true, image=whole, reference=photo, reference_mask=thing) for result, part, true, whole, photo, thing in batch]
        return io.NodeOutput(*(mean(scores, name) for name in SCORES), described(scores))
