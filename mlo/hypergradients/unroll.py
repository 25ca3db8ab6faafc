"""Differentiate the optimizer steps really taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlo.arithmetic import Tensors
from mlo.hypergradients.base import Claim, Hypergradient
from mlo.hypergradients.checks import check_count, check_flag
from mlo.hypergradients.steps import pull_back_steps
from mlo.sweep import Response, Step


@dataclass(frozen=True)
class Unroll(Hypergradient):
    """Reverse-mode differentiation of the level's recorded steps, by double backward.

    Franceschi et al. 2017, Algorithm 1. Goes through momentum, Nesterov, dampening, weight decay, Adam, AdamW, active
    clipping, and through the hypergradients of levels solved inside this one. Exact with all steps (`last=None`), from
    the start of the solve, which counts as constant.

    Cost: one double backward pass a step, 2 to 4 gradients, or 1 to 3 where the graph was kept; and memory for the
    weights, gradient and optimizer state of every step and for the kept graphs. With `checkpoint`, for 2 sqrt(K) of the
    K steps and no graph, for one more gradient a step (Griewank 1992; Chen et al. 2016). Batches are kept in either
    case, and in a nest what the levels inside recorded.

    Args:
        last: go back this many steps only (truncated back-propagation, Shaban et al. 2019); None for all.
        checkpoint: keep every sqrt(K)-th step, and recompute those between, segment by segment.
        graphs: how many of the last steps keep the graph of their gradient, so that it is not made again when they are
            gone back through; None for all, the least time and the most memory. Outside nests.

    Example:
        >>> Unroll(last=3)
        Unroll(last=3, checkpoint=False, graphs=1)
    """

    last: int | None = None
    checkpoint: bool = False
    graphs: int | None = 1

    def __post_init__(self) -> None:
        check_count(self, "last", none="all steps")
        check_flag(self, "checkpoint")
        check_count(self, "graphs", least=0, none="all steps")

    @property
    def recorded_steps(self) -> int | None:
        """The steps gone back."""
        return self.last

    @property
    def recomputes(self) -> bool:
        """Whether steps may be kept thin."""
        return self.checkpoint

    @property
    def kept_graphs(self) -> int | None:
        """The last ones, but where memory is to be saved."""
        return 0 if self.checkpoint else self.graphs

    def claim(self, steps: int, num_variables: int) -> Claim:  # noqa: ARG002
        """Exact with all steps."""
        if self.last is not None and self.last < steps:
            return Claim(f"{self!r} is truncated: it leaves out the first {steps - self.last} of {steps} steps")
        return Claim(f"{self!r} is exact: it goes back through all {steps} steps", exact=True)

    def pullback(self, cotangent: Tensors, response: Response) -> Mapping[str, Tensors]:
        """Pull back through the steps, newest first."""
        return pull_back_steps(cotangent, response, self.last, Step.product)
