"""The one method that an estimator supplies."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass

from mlo.arithmetic import Tensors
from mlo.sweep import Response


@dataclass(frozen=True)
class Claim:
    """What an estimator promises, measured against the steps that the level really takes; `Engine.check` judges it.

    Args:
        text: what to expect of it, a line.
        exact: it promises the derivative of the steps taken, up to rounding.
        converged: it promises that only where the level converges within its steps.
    """

    text: str
    exact: bool = False
    converged: bool = False


class Hypergradient(abc.ABC):
    """How one level's best response is differentiated.

    An estimator of one's own is a subclass with `pullback`, passed as `Problem(..., hypergradient=MyEstimator())`.
    Inside a nest the result is differentiated again where an exact estimator is used further up: compute it with torch
    operations, and from `Step`'s own methods.
    """

    @property
    def recorded_steps(self) -> int | None:
        """How many of the level's last steps `response.steps` must hold; None for all of them, 0 for none."""
        return None

    @property
    def needs_update_rule(self) -> bool:
        """Whether `Step.pull_back_update` is used, which exists for registered optimizers only."""
        return True

    @property
    def needs_second_derivatives(self) -> bool:
        """Whether second-order products of the level's loss are taken by double backward, outside nests too."""
        return True

    @property
    def recomputes(self) -> bool:
        """Whether `response.backwards()` is used, for which every sqrt(K)-th of K steps is recorded in full.

        The others then lack weights, gradient and optimizer state in `response.steps`.
        """
        return False

    @property
    def kept_graphs(self) -> int | None:
        """How many of the last steps keep the graph of their gradient for their first product; None for all of them.

        The product then costs no gradient, and the graph takes memory from the step on. None is kept where levels are
        solved inside this one, in lower precision, of micro-batches, of compiled modules, or with several processes;
        where one proves to be out of date, the gradient is computed again, and none is kept any more.
        """
        return 0

    @property
    def keeps_partials(self) -> bool:
        """Whether the last step keeps the derivatives of its loss by all levels that it reads, for `Step.difference`.

        They are taken in the step's own backward pass, where that computes what a difference does: not in nests, in
        lower precision, or of sharded levels.
        """
        return False

    @property
    def implicit(self) -> bool:
        """Whether the response counts as a function of its targets alone, rather than of the steps taken.

        Within a nest such a response is differentiated by `pullback` again, and not through its recorded steps.
        """
        return False

    def claim(self, steps: int, num_variables: int) -> Claim:  # noqa: ARG002
        """Say what is to be expected of the pullback; nothing by default.

        Args:
            steps: that the level takes in a solve.
            num_variables: entries of the level's variables.
        """
        return Claim(f"{type(self).__name__} makes no claim")

    @abc.abstractmethod
    def pullback(self, cotangent: Tensors, response: Response) -> Mapping[str, Tensors]:
        """Pull a cotangent of the level's variables back onto what the level responds to: c_q = (dw_p*/dw_q)^T a_p.

        Args:
            cotangent: a_p, one tensor a variable of the level.
            response: the recorded steps of the level, and `response.targets`, the levels whose cotangents are wanted.

        Returns:
            For each target q the cotangent c_q, one tensor a variable of q. Targets left out count as zero.
        """
