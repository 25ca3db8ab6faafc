"""Implicit differentiation by a Neumann series."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlo.errors import DivergenceError
from mlo.hypergradients.base import Claim
from mlo.hypergradients.checks import check_count, check_number
from mlo.hypergradients.implicit import Implicit, System
from mlo.linear_solvers import LinearOperator, Solution, largest_eigenvalue, neumann
from mlo.sweep import Response


@dataclass(frozen=True)
class Neumann(Implicit):
    """Replace H^(-1) by scale * sum over k < terms of (I - scale H)^k (Lorraine et al. 2020).

    Exact for a converged lower level as terms -> infinity, if all eigenvalues of H lie between 0 and 2 / scale. With
    plain SGD and `scale` its learning rate, the terms are those of an unroll of as many steps at the converged weights.
    Truncation works as damping, which makes few terms robust far from convergence.

    Reports as metrics of the level, each round: `neumann_residual` (relative), `neumann_growth` (largest ratio of two
    successive terms; above 1 the series diverges, and a warning says so once) and `neumann_scale`.

    Cost: the graph of the last step (in a nest one more gradient), and `terms - 1` backward passes through it; the
    automatic scale costs up to 20 more in the first round, and 1 or 2 in those that follow.

    Args:
        terms: of the series, at least 1.
        scale: "auto" for the inverse of H's largest absolute eigenvalue, by power iteration; or a positive number.
        warm_start: begin with the solution of the last round, of which each term is then a correction (SOBA, Dagreou et
            al. 2022).

    Raises:
        MloError: an argument is out of range.
        DivergenceError: in a sweep, the terms have grown 1000 times.

    Example:
        >>> Neumann(terms=5)
        Neumann(terms=5, scale='auto', warm_start=False)
    """

    terms: int = 10
    scale: float | Literal["auto"] = "auto"
    warm_start: bool = False

    def __post_init__(self) -> None:
        check_count(self, "terms")
        check_number(self, "scale", allow_zero=False, or_else="auto")

    def claim(self, steps: int, num_variables: int) -> Claim:  # noqa: ARG002
        """Approximate: a truncated series."""
        return Claim("Neumann is a truncated series: it approaches the implicit derivative as terms -> infinity")

    def solve(self, operator: LinearOperator, b: Tensor, response: Response, system: System) -> Solution:
        """Sum the series, and report how it went."""
        largest = float(torch.linalg.vector_norm(b, float("inf")))
        if largest == 0 or (system.is_scaled and not largest < float("inf")):  # which is for the loss scale to see
            return Solution(b * 0)
        scale = self._automatic_scale(operator, b, response, system) if self.scale == "auto" else float(self.scale)
        start = self.remembered(response, "solution", b) if self.warm_start else None
        solution = neumann(operator, b, terms=self.terms, scale=scale, start=start)
        if self.warm_start:
            response.memory["solution"] = solution.x
        for name, value in {**solution.figures, "scale": scale}.items():
            response.report(f"neumann_{name}", value)
        self._check_growth(solution, scale, response)
        return solution

    def _automatic_scale(self, operator: LinearOperator, b: Tensor, response: Response, system: System) -> float:
        start = self.remembered(response, "eigenvector", b)
        if start is None:
            generator = torch.Generator().manual_seed(system.key)
            start = torch.randn(b.shape, generator=generator, dtype=b.dtype).to(b.device)
        largest, response.memory["eigenvector"] = largest_eigenvalue(operator, start)
        if largest == 0:
            raise DivergenceError(
                f"level {response.level!r}, Neumann: expected a loss with curvature; found that its Hessian is zero. "
                f"Give a scale, add weight decay, or choose mlo.Unroll()."
            )
        return 1 / largest

    def _check_growth(self, solution: Solution, scale: float, response: Response) -> None:
        residual, growth = solution.figures["residual"], solution.figures["growth"]
        found = f"level {response.level!r}, Neumann: the terms of the series grow"
        mend = (
            "choose scale='auto'"
            if self.scale != "auto"
            else "take fewer terms, as H seems to have negative eigenvalues"
        )
        if not residual < 1000:  # nan, too
            raise DivergenceError(
                f"{found}, to {residual:.3g} times the first (scale {scale:.3g}). Lower the scale: {mend}."
            )
        if growth > 1 + 1e-3:  # without figures in its text, so that it is shown once
            warnings.warn(f"{found} (metric neumann_growth): {mend}.", RuntimeWarning, stacklevel=2)
