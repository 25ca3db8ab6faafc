"""Implicit differentiation by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.arithmetic import Tensors
from mlo.hypergradients.base import Claim
from mlo.hypergradients.checks import check_count, check_number
from mlo.hypergradients.implicit import Implicit, System
from mlo.linear_solvers import LinearOperator, Solution, conjugate_gradient
from mlo.sweep import Response


@dataclass(frozen=True)
class ConjugateGradient(Implicit):
    """Solve (H + damping I) x = a by conjugate gradients, c_q = -d2_qp F_p x (Pedregosa 2016; Rajeswaran et al. 2019).

    Exact for a converged lower level whose Hessian H is positive definite, with enough iterations and no damping. The
    best choice for smooth lower levels that are solved well; for networks far from convergence, where H has negative
    eigenvalues, set a damping, or unroll.

    Reports as metrics of the level, each round: `cg_residual` (relative), `cg_iterations`, and `cg_negative_curvature`
    (1 if a direction of negative curvature ended it).

    Cost: the graph of the last step (in a nest one more gradient), and one backward pass through it an iteration.

    Args:
        iterations: at most, at least 1.
        damping: added to H's diagonal, not negative.
        tolerance: relative residual at which to stop, not negative.
        preconditioner: a symmetric positive definite approximate inverse of H, as a function of one tensor a parameter
            (those that the loss uses) to the same; None for none.
        warm_start: begin with the solution of the last round (AmIGO, Arbel and Mairal 2022).

    Raises:
        MloError: an argument is out of range.

    Example:
        >>> ConjugateGradient(iterations=10, damping=1e-3).iterations
        10
    """

    iterations: int = 20
    damping: float = 0.0
    tolerance: float = 1e-6
    preconditioner: Callable[[Tensors], Tensors] | None = None
    warm_start: bool = False

    def __post_init__(self) -> None:
        check_count(self, "iterations")
        check_number(self, "damping", allow_zero=True)
        check_number(self, "tolerance", allow_zero=True)

    def claim(self, steps: int, num_variables: int) -> Claim:  # noqa: ARG002
        """Exact where the level converges, undamped, with as many iterations as there are variables."""
        if self.damping:
            return Claim("ConjugateGradient is damped: it approaches the implicit derivative as damping -> 0")
        if self.iterations < num_variables:
            return Claim(f"ConjugateGradient may end early: {self.iterations} iterations for {num_variables} variables")
        return Claim(
            "ConjugateGradient is exact where the level converges within its steps", exact=True, converged=True
        )

    def solve(self, operator: LinearOperator, b: Tensor, response: Response, system: System) -> Solution:
        """Run the iterations, and report how they went."""
        given = self.preconditioner

        def preconditioner(v: Tensor) -> Tensor:
            assert given is not None
            return torch.cat([t.reshape(-1).to(v.dtype) for t in given(tuple(system.split(v)))])

        solution = conjugate_gradient(
            operator,
            b,
            iterations=self.iterations,
            damping=self.damping,
            tolerance=self.tolerance,
            preconditioner=None if given is None else preconditioner,
            start=self.remembered(response, "solution", b) if self.warm_start else None,
        )
        if self.warm_start:
            response.memory["solution"] = solution.x
        for name, value in solution.figures.items():
            response.report(f"cg_{name}", value)
        return solution
