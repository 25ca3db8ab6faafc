"""The evaluation phase: a genotype's network trained from scratch, as a graph of one level, then tested once.

Source: DARTS (Liu et al. 2019), section 3.2, appendix A.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

import mlo
from mlo.recipes import LevelRecipe, RecipePart
from problems.data import Batch, Splits, loader
from problems.lbt import accuracy
from problems.search_spaces import EvaluationNetwork, Genotype


class EvaluationRecipe(RecipePart):
    """How a found cell is stacked and trained.

    Attributes:
        channels: of the first cells.
        num_cells: cells.
        epochs: passes over the labelled images.
        batch_size: images.
        auxiliary_weight: of the auxiliary head's loss; 0 for no head.
        drop_path: probability at the end of training, rising from 0 with the progress of the run.
        cutout: side of the square that is cut out of each training image, in pixels, or None.
        network: optimizer, schedule and clipping.
    """

    channels: PositiveInt
    num_cells: PositiveInt
    epochs: PositiveInt
    batch_size: PositiveInt
    auxiliary_weight: NonNegativeFloat = 0.4
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2
    cutout: PositiveInt | None = None
    network: LevelRecipe


@dataclass(frozen=True)
class Training:
    """The loss of the one level `network`.

    Args:
        drop_path: final drop-path probability, in [0, 1).
        auxiliary_weight: of the auxiliary loss, at least 0.
    """

    drop_path: float
    auxiliary_weight: float

    def loss(self, levels: mlo.Levels, batch: tuple[Tensor, Tensor]) -> mlo.Output:
        """Cross-entropy of the network, plus that of the auxiliary head."""
        images, labels = batch
        logits = levels.network(images, self.drop_path * levels.progress)
        loss = functional.cross_entropy(logits.main, labels)
        metrics = {"accuracy": accuracy(logits.main, labels)}
        if logits.auxiliary is not None:
            loss = loss + self.auxiliary_weight * functional.cross_entropy(logits.auxiliary, labels)
        return mlo.Output(loss, metrics)


def evaluation_graph(recipe: EvaluationRecipe, genotype: Genotype, data: Splits) -> tuple[mlo.Graph, int]:
    """Build the network of a genotype and declare its training.

    Args:
        recipe: sizes and optimizer.
        genotype: the cells.
        data: trained on all labelled images that are not for the test.

    Returns:
        The graph of one level, `network`, and the number of rounds that the recipe's epochs make.
    """
    images = data.evaluation_training(cutout=recipe.cutout)
    batches = loader(images, recipe.batch_size, num_workers=data.num_workers)
    rounds = recipe.epochs * len(batches)
    network = EvaluationNetwork(
        genotype,
        data.num_classes,
        recipe.channels,
        recipe.num_cells,
        data.in_channels,
        auxiliary=recipe.auxiliary_weight > 0,
    )
    training = Training(recipe.drop_path, recipe.auxiliary_weight)
    problem = recipe.network.declare("network", network, training.loss, batches, total_steps=rounds)
    return mlo.Graph([problem]), rounds


def num_parameters(network: EvaluationNetwork) -> int:
    """Count the weights, those of the auxiliary head left out, which is not part of the final network."""
    return sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary_head."))


@torch.no_grad()
def error_rate(network: Any, images: Dataset[Batch], batch_size: int = 256, num_workers: int = 0) -> float:
    """Return the percentage of wrong predictions, in evaluation mode; the network's mode is put back.

    Args:
        network: whose output's `main` are the logits.
        images: not augmented, with labels.
        batch_size: images.
        num_workers: processes that load.
    """
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    wrong = count = 0
    for x, y in loader(images, batch_size, shuffle=False, num_workers=num_workers):
        wrong += int((network(x.to(device)).main.argmax(dim=-1) != y.to(device)).sum())
        count += len(y)
    network.train(was_training)
    return 100.0 * wrong / count
