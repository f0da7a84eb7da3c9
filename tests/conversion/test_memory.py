"""Conversion maps a checkpoint, it does not read it into memory."""

import sys
import threading
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import save_file

from rba_core.conversion import import_sd15
from rba_core.model import read_config


class Watch(threading.Thread):
    """Looks every few milliseconds how much memory of its own, not mapped from files, the process has; `most` above where it began."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended, self.start_bytes, self.most = threading.Event(), self.anonymous(), 0

    @staticmethod
    def anonymous() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024

    def run(self):
        while not self.ended.wait(0.002):
            self.most = max(self.most, self.anonymous() - self.start_bytes)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.join()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells")
def test_the_watch_sees_what_is_read():
    with Watch() as watch:
        taken = torch.ones(25_000_000)
        watch.ended.wait(0.05)
    assert taken.nbytes * 0.9 < watch.most


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells")
def test_of_a_checkpoint_little_is_in_memory_at_once(tmp_path):
    width, multiples = 64, (1, 2, 4, 4)
    widths = [width * multiple for multiple in multiples]
    parts = read_config("sd1x")
    parts |= {"unet": parts["unet"] | {"block_out_channels": widths, "cross_attention_dim": 64}, "vae": parts["vae"] | {"block_out_channels": widths}}
    shapes = checkpoints.ldm_unet(4, width, multiples, 64) | checkpoints.ldm_vae(width, multiples) | {"model_ema.average": (10_000_000,)}
    save_file({name: torch.full(shape, 0.01) for name, shape in shapes.items()}, tmp_path / "sd.safetensors")
    torch.save(checkpoints.randomly(checkpoints.dinov2(64, 2, positions=16)), tmp_path / "dinov2.pth")
    size = (tmp_path / "sd.safetensors").stat().st_size
    assert size > 150e6
    with Watch() as watch:
        import_sd15(tmp_path / "sd.safetensors", tmp_path / "model", tmp_path / "dinov2.pth", config=parts)
    assert watch.most < 0.25 * size
