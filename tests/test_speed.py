"""Alignment stops at its layer; what that saves, counted in floating-point operations of Stable Diffusion 1's U-Net."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from rba_core.alignment import attention_at


@pytest.fixture(scope="module")
def operations():
    """Operations of a pass up to a layer, of a whole pass with `None`: all widths an eighth, latents 32 x 32."""
    unet = UNet2DConditionModel(
        in_channels=9, block_out_channels=[40, 80, 160, 160], cross_attention_dim=96, attention_head_dim=8, norm_num_groups=8
    ).eval()
    sample, timestep, context = torch.randn(1, 9, 32, 32), torch.tensor([999]), torch.randn(1, 256, 96)

    def count(layer: int | None) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if layer is None:
                unet(sample, timestep, context)
            else:
                attention_at(unet, layer, sample, timestep, context)
        return counter.get_total_flops()

    return count


def test_aligning_at_layer_9_costs_at_most_65_percent_of_a_whole_pass(operations):
    share = operations(9) / operations(None)
    print(f"alignment at layer 9: {share:.3f} of a whole pass")
    assert 0.2 < share <= 0.65


def test_later_layers_cost_more(operations):
    costs = [operations(layer) for layer in (0, 4, 6, 9, 12, 15)]
    assert costs == sorted(costs) and len(set(costs)) == len(costs)
    assert costs[-1] < operations(None)
