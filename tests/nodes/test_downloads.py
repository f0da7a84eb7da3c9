import hashlib
import sys
from dataclasses import replace

import comfy_stand_in
import pytest


@pytest.fixture
def small(nodes, monkeypatch, tmp_path):
    """A pin of a few bytes, that are there already: nothing is fetched."""
    folder = tmp_path / "clip_vision"
    monkeypatch.setitem(sys.modules["folder_paths"].folder_names_and_paths, "clip_vision", ([str(folder)], {".safetensors"}))
    pin = replace(nodes.downloads.DOWNLOADS["dinov2-base"], size=4, sha256=hashlib.sha256(b"here").hexdigest())
    monkeypatch.setitem(nodes.downloads.DOWNLOADS, "dinov2-base", pin)
    return folder / pin.file


def test_a_file_that_is_there_is_told(nodes, small):
    assert nodes.downloads.DownloadModel.fingerprint_inputs("dinov2-base") is False
    small.parent.mkdir()
    small.write_bytes(b"here")
    assert nodes.downloads.DownloadModel.fingerprint_inputs("dinov2-base") is True
    output = nodes.downloads.DownloadModel.execute("dinov2-base")
    assert output.args == (str(small),)
    assert str(small) in output.ui.value and "sha256 " in output.ui.value and "4 bytes" in output.ui.value


def test_bytes_go_to_comfyui_s_bar_and_its_cancel_ends_them(nodes, small, monkeypatch):
    def fetch(wanted, folder, progress):
        progress(1, wanted.size)
        monkeypatch.setattr(nodes.types.model_management, "throw_exception_if_processing_interrupted", interrupt)
        progress(2, wanted.size)

    def interrupt():
        raise comfy_stand_in.InterruptProcessingException

    monkeypatch.setattr(nodes.downloads, "download", fetch)
    with pytest.raises(comfy_stand_in.InterruptProcessingException):
        nodes.downloads.DownloadModel.execute("dinov2-base")
    assert comfy_stand_in.ProgressBar.made[-1].updates == [(1, 4)]


def test_every_pin_has_a_folder_of_comfyui_s(nodes):
    assert {pin.folder for pin in nodes.downloads.DOWNLOADS.values()} <= {"checkpoints", "clip_vision"}
