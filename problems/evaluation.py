"""The evaluation phase: a genotype's network trained from scratch, as a graph of one level, then tested once.

Source: DARTS (Liu et al. 2019), section 3.2, appendix A.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import functional

import mlo
from mlo.errors import MloError
from mlo.recipes import LevelRecipe, RecipePart
from problems.data import BatchSize, Splits, loader
from problems.data.loading import Loader
from problems.lbt import accuracy
from problems.search_spaces import EvaluationNetwork, Genotype
from problems.search_spaces.stems import Stem


class EvaluationRecipe(RecipePart):
    """How a found cell is stacked and trained.

    Attributes:
        channels: of the first cells.
        num_cells: cells.
        epochs: passes over the labelled images.
        batch_size: images in a batch, at least 2; a step sees `network.micro_batches` batches.
        stem: `cifar` keeps the resolution of the images, `imagenet` divides it by 8.
        auxiliary_weight: of the auxiliary head's loss; 0 for no head.
        drop_path: probability at the end of training, rising from 0 with the progress of the run.
        label_smoothing: part of each label that is spread over all classes.
        channels_last: keep the channels of a pixel next to each other in memory, which is faster.
        cutout: side of the square that is cut out of each training image, in pixels, or None.
        network: optimizer, schedule and clipping.
    """

    channels: PositiveInt
    num_cells: PositiveInt
    epochs: PositiveInt
    batch_size: BatchSize
    stem: Stem = "cifar"
    auxiliary_weight: NonNegativeFloat = 0.4
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    cutout: PositiveInt | None = None
    channels_last: bool = True
    network: LevelRecipe


@dataclass(frozen=True)
class Training:
    """The loss of the one level `network`.

    Args:
        drop_path: final drop-path probability, in [0, 1).
        auxiliary_weight: of the auxiliary loss, at least 0.
        label_smoothing: part of each label that is spread over all classes, in [0, 1).
    """

    drop_path: float
    auxiliary_weight: float
    label_smoothing: float = 0.0

    def loss(self, levels: mlo.Levels, batch: tuple[Tensor, Tensor]) -> mlo.Output:
        """Cross-entropy of the network, plus that of the auxiliary head."""
        images, labels = batch
        logits = levels.network(images, self.drop_path * levels.progress)
        loss = functional.cross_entropy(logits.main, labels, label_smoothing=self.label_smoothing)
        metrics = {"accuracy": accuracy(logits.main, labels)}
        if logits.auxiliary is not None:
            auxiliary = functional.cross_entropy(logits.auxiliary, labels, label_smoothing=self.label_smoothing)
            loss = loss + self.auxiliary_weight * auxiliary
        return mlo.Output(loss, metrics)


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return how a network's convolutions are to be laid out; the images follow."""
    return torch.channels_last if channels_last else torch.contiguous_format


def evaluation_batches(recipe: EvaluationRecipe, data: Splits) -> Loader:
    """Return the batches that the network of a genotype is trained on.

    Raises:
        MloError: the batches do not fit the data, or the processes.
    """
    try:
        images = data.evaluation_training(cutout=recipe.cutout)
        return loader(images, recipe.batch_size, num_workers=data.num_workers)
    except MloError as error:
        raise MloError(f"evaluation.{error}") from error


def evaluation_graph(
    recipe: EvaluationRecipe, genotype: Genotype, data: Splits, *, max_rounds: int | None = None
) -> tuple[mlo.Graph, int]:
    """Build the network of a genotype and declare its training.

    Args:
        recipe: sizes and optimizer.
        genotype: the cells.
        data: trained on all labelled images that are not for the test.
        max_rounds: at which the training ends if the recipe's epochs make more; the schedule then spans these.

    Returns:
        The graph of one level, `network`, and the number of rounds, each of `recipe.network.steps` optimizer steps.
    """
    batches = evaluation_batches(recipe, data)
    level = recipe.network
    steps_per_epoch = len(batches) / level.micro_batches
    rounds = max(1, int(recipe.epochs * steps_per_epoch / level.steps))
    if max_rounds is not None:
        rounds = min(rounds, max_rounds)
    network = EvaluationNetwork(
        genotype,
        data.num_classes,
        recipe.channels,
        recipe.num_cells,
        data.in_channels,
        auxiliary=recipe.auxiliary_weight > 0,
        stem=recipe.stem,
    ).to(memory_format=memory_format(recipe.channels_last))
    training = Training(recipe.drop_path, recipe.auxiliary_weight, recipe.label_smoothing)
    problem = level.declare(
        "network",
        network,
        training.loss,
        batches,
        total_steps=rounds * level.steps,
        steps_per_epoch=steps_per_epoch,
    )
    return mlo.Graph([problem]), rounds
