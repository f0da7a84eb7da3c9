"""Conversion maps a checkpoint, it does not read it into memory."""

import sys
import threading
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import save_file

from rba_core.conversion import import_sd15, weights
from rba_core.model import read_config


class Watch(threading.Thread):
    """Looks every few milliseconds how much memory the process has, its own and mapped from files: the most of each above where it began."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended, self.start_bytes, self.most, self.mapped = threading.Event(), self.now(), 0, 0

    @staticmethod
    def now() -> tuple[int, int]:
        told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
        return tuple(int(told[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))

    def run(self):
        while not self.ended.wait(0.002):
            own, mapped = (now - start for now, start in zip(self.now(), self.start_bytes))
            self.most, self.mapped = max(self.most, own), max(self.mapped, mapped)

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
@pytest.mark.parametrize("kind", ["whole.safetensors", "half.safetensors", "half.ckpt"])
def test_of_a_checkpoint_little_is_in_memory_at_once(kind, tmp_path, monkeypatch):
    """Of our own no more than one file that is written, mapped no more than one part's tensors."""
    monkeypatch.setattr(weights, "LARGEST_FILE", 2**24)
    width, multiples = 64, (1, 2, 4, 4)
    widths = [width * multiple for multiple in multiples]
    parts = read_config("sd1x")
    parts |= {"unet": parts["unet"] | {"block_out_channels": widths, "cross_attention_dim": 64}, "vae": parts["vae"] | {"block_out_channels": widths}}
    shapes = checkpoints.ldm_unet(4, width, multiples, 64) | checkpoints.ldm_vae(width, multiples) | {"model_ema.average": (10_000_000,)}
    dtype = torch.float16 if kind.startswith("half") else torch.float32
    state = {name: torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes.items()}
    save_file(state, tmp_path / kind) if kind.endswith("safetensors") else torch.save({"state_dict": state}, tmp_path / kind)
    del state
    torch.save(checkpoints.randomly(checkpoints.dinov2(64, 2, positions=16)), tmp_path / "dinov2.pth")
    with Watch() as watch:
        import_sd15(tmp_path / kind, tmp_path / "model", tmp_path / "dinov2.pth", config=parts)
    unet, vae = (sum(file.stat().st_size for file in (tmp_path / "model" / part).glob("*.safetensors")) for part in ("unet", "vae"))
    assert unet > 75e6 and vae > 20e6
    assert watch.most < 0.3 * (unet + vae)
    assert watch.mapped < dtype.itemsize / 4 * (unet + vae / 2)
