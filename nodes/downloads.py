"""Weights from their publishers, when the user asks for them."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..rba_core.downloads import DOWNLOADS, download
from .api import io, ui
from .types import CATEGORY, BatchProgress


def target_folder(name: str) -> str:
    return folder_paths.get_folder_paths(DOWNLOADS[name].folder)[0]


class DownloadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        offered = "; ".join(f"{name}: {pin.what}, {pin.size / 1e9:.2f} GB, {pin.licence}" for name, pin in DOWNLOADS.items())
        return io.Schema(
            node_id="RBA_DownloadModel",
            display_name="Download Model (Refine by Align)",
            category=f"{CATEGORY}/loading",
            description="Fetches a file of weights from its publisher into ComfyUI's models, once, when run. The revision is pinned, size and sha256 are checked. An interrupted download goes on where it stopped.",
            search_aliases=["download weights", "fetch checkpoint", "rba download", "get dinov2"],
            inputs=[io.Combo.Input("name", options=list(DOWNLOADS), default="dinov2-base", tooltip=f"{offered}.")],
            outputs=[io.String.Output("path", tooltip="The file, checked.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, name):
        return (Path(target_folder(name)) / DOWNLOADS[name].file).is_file()

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        path = str(download(DOWNLOADS[name], target_folder(name), BatchProgress(1).of(0)))
        return io.NodeOutput(path, ui=ui.PreviewText(f"{path}\n{DOWNLOADS[name]}"))
