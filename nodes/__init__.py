"""The nodes: schemas, and the way from ComfyUI's types to `rba_core` and back."""

from .alignment import Align, EncodeReference, PostProcess, Register
from .api import ComfyExtension, io
from .loading import LoadModel, Sample
from .preview import CorrespondencePreview
from .refinement import Refine, RefineByAlign, Stitch, ZoomCrop
from .score import Score
from .viewer import CorrespondenceViewer


class RefineByAlignExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadModel, RefineByAlign, EncodeReference, ZoomCrop, Align, PostProcess, Register, Refine, Stitch, CorrespondencePreview, CorrespondenceViewer, Score, Sample]
