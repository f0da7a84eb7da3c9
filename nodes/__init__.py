"""The nodes: schemas, and the way from ComfyUI's types to `rba_core` and back."""

from .alignment import Align, EncodeReference, PostProcess, Register
from .api import ComfyExtension, io
from .downloads import DownloadModel
from .editors import EditorCrop, FindRegion, ReferenceCrop
from .feature_alignment import AlignDIFT, AlignDINOv2
from .loading import LoadModel, Sample
from .native import AlignNative, InpaintingCondition, LoadReferenceEncoder, ReferenceConditioning
from .preview import CorrespondencePreview
from .refinement import Refine, RefineByAlign, Stitch, ZoomCrop
from .score import Score
from .viewer import CorrespondenceViewer


class RefineByAlignExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadModel, RefineByAlign, EncodeReference, ZoomCrop, Align, PostProcess, Register, Refine, Stitch, CorrespondencePreview, Sample,
            FindRegion, EditorCrop, ReferenceCrop, AlignDINOv2, AlignDIFT, LoadReferenceEncoder, ReferenceConditioning, InpaintingCondition, AlignNative,
            DownloadModel, CorrespondenceViewer, Score,
        ]  # fmt: skip
