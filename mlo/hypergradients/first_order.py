"""Ignore the best response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlo.arithmetic import Tensors
from mlo.hypergradients.base import Claim, Hypergradient
from mlo.sweep import Response


@dataclass(frozen=True)
class FirstOrder(Hypergradient):
    """No indirect part: the level's best response counts as constant (first-order DARTS, Liu et al. 2019, section 2.3).

    Where the level starts from another one's variables, that is w_p* = start: the cotangent goes on to it unchanged
    (first-order MAML, Finn et al. 2017, section 5.2).

    Costs nothing. Exact only where the level is ignored on purpose.
    """

    @property
    def recorded_steps(self) -> int:
        """None of the level's steps are needed."""
        return 0

    @property
    def needs_update_rule(self) -> bool:
        """Any optimizer will do."""
        return False

    @property
    def needs_second_derivatives(self) -> bool:
        """First derivatives are enough."""
        return False

    def claim(self, steps: int, num_variables: int) -> Claim:  # noqa: ARG002
        """Approximate by design."""
        return Claim(f"{self!r} ignores the level's response: off by all of the indirect part through it")

    def pullback(self, cotangent: Tensors, response: Response) -> Mapping[str, Tensors]:
        """Return nothing: every cotangent is zero, but for that of a start."""
        return {} if response.start is None else {response.start: cotangent}
