"""Differentiate the last step, its second-order product by central differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlo.arithmetic import Gradient, Tensors
from mlo.hypergradients.base import Claim, Hypergradient
from mlo.hypergradients.checks import check_count, check_flag, check_number
from mlo.hypergradients.steps import pull_back_steps
from mlo.sweep import Response, Step


@dataclass(frozen=True)
class FiniteDifference(Hypergradient):
    """The DARTS estimator (Liu et al. 2019, eq. 7-8; LBT, Sheth et al., eq. (7)-(8) and (11)-(12)), with any optimizer.

    For plain SGD, c_q = -lr * [dL_p/dw_q(w_p + eps a) - dL_p/dw_q(w_p - eps a)] / (2 eps), with eps = radius / norm(a),
    at the weights, batch, learning rate and random draws of the recorded step. For other optimizers a is first pulled
    back through the optimizer's own step, which for momentum, Adam and clipping scales and turns it.

    Error: the truncation is radius^2 / 6 times the third derivative along the direction, the rounding is the machine
    epsilon times norm(dL_p/dw_q) norm(a) / radius: for smooth losses use about 1e-2 in float32 and 1e-4 in float64.
    Networks with kinks (ReLU, max pooling) have no second derivative there; the difference then averages over the kinks
    within the radius.

    In a nest, where levels are solved inside this one, the product is taken by double backward instead: the difference
    relies on a symmetry of second derivatives that an inexact estimator further inside breaks.

    Cost: two gradients with respect to the targets a step, or one; forward passes of other levels are not repeated.

    With `one_sided`, the last step's own gradient takes the place of one of the two: its backward pass gives the
    derivatives with respect to the targets along with its own. [dL_p/dw_q(w_p + eps a) - dL_p/dw_q(w_p)] / eps has an
    error of radius / 2 times the third derivative: for smooth losses use about 1e-3 in float32 and 1e-7 in float64. The
    loss must be the same function when it is evaluated again after the step. Where it provably is not (modules in
    another mode, batches written into), where the step's gradient is no side (earlier steps, lower precision, sharded
    levels, levels that moved in between or are inside a nest), and where the loss reads levels both by calls that are
    kept and otherwise, or uses what a call returned both by itself and as the argument of another one, the difference
    is central.

    Args:
        radius: Euclidean norm of the perturbation of w_p, positive.
        last: go back this many steps; None for all.
        one_sided: take the last step's own gradient for one side of the difference.

    Example:
        >>> FiniteDifference()
        FiniteDifference(radius=0.01, last=1, one_sided=False)
    """

    radius: float = 0.01
    last: int | None = 1
    one_sided: bool = False

    def __post_init__(self) -> None:
        check_number(self, "radius", allow_zero=False)
        check_count(self, "last", none="all steps")
        check_flag(self, "one_sided")

    @property
    def recorded_steps(self) -> int | None:
        """The steps gone back."""
        return self.last

    @property
    def needs_second_derivatives(self) -> bool:
        """First derivatives are enough."""
        return False

    @property
    def keeps_partials(self) -> bool:
        """For the one side."""
        return self.one_sided

    def claim(self, steps: int, num_variables: int) -> Claim:  # noqa: ARG002
        """Approximate, with an error of order radius^2, or radius, where all steps are gone back."""
        if self.last is not None and self.last < steps:
            return Claim(f"{self!r} is truncated: it leaves out the first {steps - self.last} of {steps} steps")
        order = "radius" if self.one_sided else "radius^2"
        return Claim(
            f"{self!r} goes back through all {steps} steps, with an error of order {order}; on losses "
            f"with kinks (ReLU, max pooling) it averages over those within its radius"
        )

    def pullback(self, cotangent: Tensors, response: Response) -> Mapping[str, Tensors]:
        """Pull back through the steps, newest first."""
        return pull_back_steps(cotangent, response, self.last, self._product)

    def _product(self, step: Step, direction: Gradient, targets: Sequence[str]) -> dict[str, Tensors]:
        if step.inner is not None:
            return step.product(direction, targets)
        return step.difference(direction, targets, self.radius, one_sided=self.one_sided)
