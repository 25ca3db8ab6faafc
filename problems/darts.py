"""Differentiable architecture search (DARTS; Liu, Simonyan, Yang 2019): two levels, two edges.

With w the weights of the network and A its architecture (DARTS eq. (3)-(4)):

    min_A  L(w*(A), A, D^val)    where    w*(A) = argmin_w  L(w, A, D^tr)

First order or second order is the estimator of the level `network`: `FirstOrder()`, or `FiniteDifference()` as the
paper has it (eq. (7)-(8)), or any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn import functional

import mlo
from problems.lbt import Labelled, accuracy


@dataclass(frozen=True)
class ArchitectureSearch:
    """The losses and edges of DARTS.

    The module of the level `architecture` is called with the progress of the run and returns what that of `network`
    takes as its second argument; its `penalty()` is added to the upper loss.
    """

    @property
    def edges(self) -> tuple[mlo.Edge, ...]:
        """Who reads whom."""
        return mlo.Edge("architecture", "network"), mlo.Edge("network", "architecture")

    def network_loss(self, levels: mlo.Levels, batch: Labelled) -> mlo.Output:
        """Cross-entropy on training images."""
        images, labels = batch
        logits = levels.network(images, levels.architecture(levels.progress))
        return mlo.Output(functional.cross_entropy(logits, labels), {"accuracy": accuracy(logits, labels)})

    def architecture_loss(self, levels: mlo.Levels, batch: Labelled) -> mlo.Output:
        """Cross-entropy on validation images."""
        images, labels = batch
        logits = levels.network(images, levels.architecture(levels.progress))
        loss = functional.cross_entropy(logits, labels) + levels.architecture.penalty()
        return mlo.Output(loss, {"network_accuracy": accuracy(logits, labels)})
