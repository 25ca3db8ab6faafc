"""Take the level's curvature for the identity, in the optimizer's own scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlo.arithmetic import Tensors
from mlo.hypergradients.base import Claim, Hypergradient
from mlo.hypergradients.checks import check_number
from mlo.hypergradients.finite_difference import FiniteDifference
from mlo.sweep import Response


@dataclass(frozen=True)
class SAMA(Hypergradient):
    """Identity curvature, adapted by the optimizer's own scaling (SAMA, Choe et al. 2023, section 3.1-3.2).

    c_q = -d2_qp F_p v with v = (du/dg)^T a_p, where u(g) is what the optimizer subtracts from the weights in the
    level's last step, given the gradient g. For SGD v = lr * a_p; for Adam the derivative goes through both moments and
    their bias correction, at the state and step count of that very step. The mixed product is a central difference of
    first derivatives, at the weights of the step moved by +- radius * v / norm(v); in a nest, where levels are solved
    inside this one, double backward.

    Cheap, and never exact: all that curvature does over more than one step is left out. The number is that of
    `FiniteDifference(last=1)`. (The paper also moves the lower level along v after each upper step; that changes the
    lower level's algorithm, not the hypergradient, and is not done here.)

    Cost: two gradients with respect to the targets.

    Args:
        radius: Euclidean norm of the perturbation of w_p, positive.

    Raises:
        MloError: an argument is out of range.

    Example:
        >>> SAMA()
        SAMA(radius=0.01)
    """

    radius: float = 0.01

    def __post_init__(self) -> None:
        check_number(self, "radius", allow_zero=False)

    @property
    def recorded_steps(self) -> int:
        """The last one."""
        return 1

    @property
    def needs_second_derivatives(self) -> bool:
        """First derivatives are enough."""
        return False

    def claim(self, steps: int, num_variables: int) -> Claim:  # noqa: ARG002
        """Approximate by design."""
        return Claim(f"{self!r} takes the curvature for the identity: right in one step, off by what more of them do")

    def pullback(self, cotangent: Tensors, response: Response) -> Mapping[str, Tensors]:
        """Pull back through the optimizer's last step, then take the mixed product."""
        return FiniteDifference(self.radius, last=1).pullback(cotangent, response)
