"""Implicit differentiation by a low-rank approximation of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.errors import MloError
from mlo.hypergradients.base import Claim
from mlo.hypergradients.checks import check_count, check_number
from mlo.hypergradients.implicit import Implicit, System
from mlo.linear_solvers import LinearOperator, Solution, nystrom
from mlo.sweep import Response


@dataclass(frozen=True)
class Nystrom(Implicit):
    """Replace H by a random low-rank approximation, and invert that (Hataya and Yamada 2023).

    Exact for a converged lower level at full rank, as damping -> 0. Needs no iteration to converge and no scale: the
    cost is fixed, and an eigenvalue of H far below the damping does no harm. The rank is clamped to the number of
    weights.

    Reports as metrics of the level, each round: `nystrom_negative_eigenvalues` (how many, of those found), which say
    that the level is not at a minimum.

    Cost: the graph of the last step (in a nest one more gradient), `rank` backward passes through it, and memory for
    `rank` vectors.

    Args:
        rank: at least 1.
        damping: added to the eigenvalues; positive, or 0 for a rank of at least the number of weights.

    Raises:
        MloError: an argument is out of range.

    Example:
        >>> Nystrom(rank=5)
        Nystrom(rank=5, damping=0.001)
    """

    rank: int = 10
    damping: float = 1e-3

    def __post_init__(self) -> None:
        check_count(self, "rank")
        check_number(self, "damping", allow_zero=True)

    def claim(self, steps: int, num_variables: int) -> Claim:  # noqa: ARG002
        """Approximate: of low rank, and damped."""
        return Claim(
            f"Nystrom is of rank {min(self.rank, num_variables)} of {num_variables}, and damped: it approaches the "
            f"implicit derivative at full rank as damping -> 0"
        )

    def solve(self, operator: LinearOperator, b: Tensor, response: Response, system: System) -> Solution:
        """Draw the directions, keyed by the step, and invert."""
        if self.damping == 0 and self.rank < b.numel():
            raise MloError(
                f"level {response.level!r}, Nystrom: expected a positive damping, by which what the rank leaves out is "
                f"divided; found 0 at rank {self.rank} of {b.numel()}. Give a damping, or the full rank."
            )
        if not bool(b.any()):
            return Solution(torch.zeros_like(b))
        generator = torch.Generator().manual_seed(system.key)
        solution = nystrom(operator, b, rank=self.rank, damping=self.damping, generator=generator)
        response.report("nystrom_negative_eigenvalues", solution.figures["negative_eigenvalues"])
        return solution
