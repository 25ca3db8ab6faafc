import pytest
import torch
from torch import nn

import mlo
from problems.data import Images
from problems.measures import Predictions, multiply_adds, num_parameters, predict
from problems.search_spaces import PUBLISHED, EvaluationNetwork

MULTIPLY_ADDS = {"DARTS_V1": 506, "DARTS_V2": 530, "PDARTS": 543, "PC_DARTS_cifar": 571, "PC_DARTS_image": 582,
                 "NASNet": 604, "AmoebaNet": 527}  # fmt: skip
"""In millions, at 224 x 224 pixels, 48 channels and 14 cells."""


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_of_the_published_networks(name):
    with torch.device("meta"):
        network = EvaluationNetwork(PUBLISHED[name], 1000, 48, 14, auxiliary=True, stem="imagenet")
    assert round(multiply_adds(network, 3, 224) / 1e6) == MULTIPLY_ADDS[name]
    assert network.training


def test_the_auxiliary_head_is_not_counted():
    plain, headed = (EvaluationNetwork(PUBLISHED["PDARTS"], 10, 4, 3, auxiliary=head) for head in (False, True))
    assert num_parameters(plain) == num_parameters(headed) == sum(p.numel() for p in plain.parameters())
    assert multiply_adds(plain, 3, 32) == multiply_adds(headed, 3, 32)


def test_errors_and_confusion():
    ranked = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 0], [1, 2, 0]])
    predictions = Predictions(ranked, torch.tensor([0, 0, 1, 1]), 4)
    assert [predictions.error(top) for top in (1, 2, 3)] == [50.0, 0.0, 0.0]
    assert predictions.confusion() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="expected top from 1 to 3; found 4"):
        predictions.error(4)


def test_five_guesses_are_reported_where_there_are_more_classes():
    ranked = torch.tensor([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]])
    labels = torch.tensor([0, 1, 0])
    assert Predictions(ranked, labels, 6).errors() == {"test_error": 200 / 3, "test_error_top5": 100 / 3}
    assert Predictions(ranked[:1], labels[:1], 5).errors() == {"test_error": 0.0}


class Constant(nn.Module):
    """Finds the class that the first pixel says, in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        assert not self.training
        logits = torch.zeros(len(x), 7)
        logits[torch.arange(len(x)), x[:, 0, 0, 0].long()] = 1.0
        return type("Logits", (), {"main": logits})()


def test_images_are_predicted_once_in_evaluation_mode():
    images = torch.zeros(20, 1, 2, 2)
    images[:, 0, 0, 0] = torch.arange(20) % 7
    labels = torch.arange(20) % 7
    labels[:3] = 6
    network = Constant()
    predictions = predict(network, Images(images, labels), batch_size=8)
    assert network.training
    assert predictions.labels.tolist() == labels.tolist()
    assert predictions.ranked.shape == (20, 5)
    assert predictions.error() == pytest.approx(100 * 3 / 20)
    with pytest.raises(mlo.MloError, match="expected at least one image"):
        predict(network, Images(images[:0], labels[:0]))
