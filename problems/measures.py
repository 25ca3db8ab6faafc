"""What is measured of a trained network: its errors on images, its weights, its multiply-adds.

`problems.evaluation` and the runs call it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import cast

import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from mlo.errors import MloError
from problems.data import Batch, loader
from problems.search_spaces import EvaluationNetwork

_NUM_RANKED = 5


@dataclass(frozen=True)
class Predictions:
    """The most likely classes of images, beside the true ones; on the CPU.

    Attributes:
        ranked: shape (n, k), the k = min(5, classes) most likely classes of each image, the likeliest first.
        labels: shape (n,), the true classes.
        num_classes: classes.
    """

    ranked: Tensor
    labels: Tensor
    num_classes: int

    def error(self, top: int = 1) -> float:
        """Return the percentage of images whose class is not among the likeliest.

        Args:
            top: how many count, from 1 to k.

        Raises:
            ValueError: so many are not known.
        """
        if not 1 <= top <= self.ranked.shape[1]:
            raise ValueError(f"expected top from 1 to {self.ranked.shape[1]}; found {top}")
        missed = (self.ranked[:, :top] != self.labels[:, None]).all(dim=1)
        return 100.0 * int(missed.sum()) / len(missed)

    def errors(self) -> dict[str, float]:
        """Return the errors that a run reports, in percent: of one guess, and of five where there are more classes."""
        errors = {"test_error": self.error()}
        return errors | {"test_error_top5": self.error(5)} if self.num_classes > 5 else errors

    def confusion(self) -> Sequence[Sequence[int]]:
        """Return how many images of each true class (a row) were given each class (a column), of all classes."""
        counts = confusion_matrix(self.labels, self.ranked[:, 0], labels=range(self.num_classes))
        rows: list[list[int]] = counts.tolist()
        return rows


@torch.no_grad()
def predict(
    network: EvaluationNetwork, images: Dataset[Batch], batch_size: int = 256, *, num_workers: int = 0
) -> Predictions:
    """Classify images in evaluation mode, each once; the network's mode is put back.

    Args:
        network: on any device.
        images: as the network is to see them.
        batch_size: images at a time.
        num_workers: processes that load.

    Raises:
        MloError: there is no image.
    """
    if not len(cast("Sized", images)):
        raise MloError("expected at least one image to predict the class of; found none")
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    ranked, labels, num_classes = [], [], 0
    for x, y in loader(images, batch_size, shuffle=False, num_workers=num_workers):
        logits = network(x.to(device)).main
        num_classes = logits.shape[1]
        # A stable sort: of two equally likely classes the first, as argmax has it.
        order = logits.argsort(dim=1, descending=True, stable=True)
        ranked.append(order[:, :_NUM_RANKED].cpu())
        labels.append(y)
    network.train(was_training)
    return Predictions(torch.cat(ranked), torch.cat(labels), num_classes)


def num_parameters(network: EvaluationNetwork) -> int:
    """Count the weights, those of the auxiliary head left out, which is not part of the final network."""
    return sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary_head."))


def multiply_adds(network: EvaluationNetwork, in_channels: int, image_size: int) -> int:
    """Count the multiply-adds of the convolutions and linear layers for one image, without the auxiliary head.

    Nothing is computed: a copy of the network runs on PyTorch's meta device.

    Args:
        network: in any mode, which is left as it is.
        in_channels: of the image.
        image_size: its height and width, in pixels.

    Example:
        >>> from problems.search_spaces import PUBLISHED
        >>> network = EvaluationNetwork(PUBLISHED["DARTS_V2"], 1000, channels=48, num_cells=14, stem="imagenet")
        >>> round(multiply_adds(network, in_channels=3, image_size=224) / 1e6)
        530
    """
    bare = copy.deepcopy(network).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        bare(torch.empty(1, in_channels, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2  # which counts a multiplication and an addition as two
