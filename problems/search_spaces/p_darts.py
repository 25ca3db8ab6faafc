"""P-DARTS: three searches, each deeper than the one before and among fewer primitives.

`prune` makes the space of the next stage from the architecture of the last one; `SkipDropout` is the schedule of the
dropout that keeps skip-connections from winning early. The last stage is discretized with at most so many of them in
the normal cell (`discretize(max_skips=...)`), found automatically where the published code leaves the choice to the
reader. `problems.search_experiment` runs the stages.

Source: P-DARTS (Chen et al. 2019), section 3 and its published code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from problems.search_spaces.cells import CellPrimitives
from problems.search_spaces.darts import SearchSpace
from problems.search_spaces.supernet import Architecture


def prune(architecture: Architecture, num_primitives: int) -> SearchSpace:
    """Keep the strongest primitives of each edge, in their order; `none` may be among them.

    Args:
        architecture: Of the stage that is done.
        num_primitives: To be kept on each edge, at least 2.

    Raises:
        ValueError: There are not so many, or fewer than 2 are asked for, or a score is not finite.
    """
    available = min(architecture.space.normal_shape[1], architecture.space.reduce_shape[1])
    if not 2 <= num_primitives <= available:
        raise ValueError(f"expected between 2 and {available} primitives to be kept, got {num_primitives}")
    scores, space = architecture.scores(), architecture.space
    if not (scores.normal.isfinite().all() and scores.reduce.isfinite().all()):
        raise ValueError("expected finite weights of the primitives, got an architecture that has diverged")
    return SearchSpace(
        _strongest(scores.normal, space.normal, num_primitives), _strongest(scores.reduce, space.reduce, num_primitives)
    )


def _strongest(scores: Tensor, primitives: CellPrimitives, num: int) -> CellPrimitives:
    kept = scores.topk(num, dim=1).indices.sort(dim=1).values.tolist()
    return tuple(tuple(names[index] for index in row) for names, row in zip(primitives, kept, strict=True))


@dataclass(frozen=True)
class SkipDropout:
    """The dropout of identities over one stage: falling linearly while alpha is frozen, then exponentially.

    At epoch e of E, p = initial * (E - e - 1) / E while e < F, then initial * exp(-0.2 * (e - F)).

    Args:
        initial: At the beginning, in [0, 1).
        epochs: E, of a stage.
        frozen_epochs: F, in which alpha stands still.

    Raises:
        ValueError: A number is out of range.
    """

    initial: float
    epochs: int = 25
    frozen_epochs: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.initial < 1 or not 0 <= self.frozen_epochs <= self.epochs:
            raise ValueError(f"expected 0 <= initial < 1 and 0 <= frozen_epochs <= epochs, got {self}")

    def __call__(self, progress: float) -> float:
        """Return the probability at a fraction of the stage."""
        epoch = math.floor(progress * self.epochs + 1e-6)  # a product may fall short of a whole number by rounding
        if epoch < self.frozen_epochs:
            return self.initial * (self.epochs - epoch - 1) / self.epochs
        return self.initial * math.exp(-0.2 * (epoch - self.frozen_epochs))
