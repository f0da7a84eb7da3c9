import torch

from rba_core.bench import metrics
from rba_core.bench.dataset import Item
from rba_core.bench.methods import features


class ColourEncoder:
    """The small model with tokens that are the patches' colours, centred: matching needs nothing learned."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def tokens(self, pictures):
        return torch.nn.functional.avg_pool2d(pictures - 0.5, 14).flatten(2).mT


def test_features_find_the_region_of_the_same_colour(model, second_stage):
    image, reference = torch.full((3, 128, 128), 0.5), torch.full((3, 128, 128), 0.5)
    mask, wanted = torch.zeros(128, 128), torch.zeros(128, 128)
    image[:, ::2, ::3] += 0.1
    image[0, 40:60, 50:70], mask[40:60, 50:70] = 1.0, 1
    reference[1] = 0.8
    reference[0, 80:104, 16:40], reference[1, 80:104, 16:40], wanted[80:104, 16:40] = 1.0, 0.5, 1
    item = Item("x", "customization", {}, image, mask, reference, correspondence=wanted)
    outcome = features.features(item, ColourEncoder(model), 0)
    assert not outcome.fell_back and metrics.iou(outcome.region.mask, wanted) > 0.5
    same = Item("x", "customization", {}, image, mask, torch.full_like(reference, 0.7))
    assert features.features(same, ColourEncoder(model), 0).fell_back
