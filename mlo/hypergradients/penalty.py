"""Implicit differentiation by solving twice more, with the cotangent as a small penalty: first derivatives only."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlo.arithmetic import Gradient, Tensors, accumulate, norm
from mlo.hypergradients.base import Claim, Hypergradient
from mlo.hypergradients.checks import check_count, check_number
from mlo.sweep import End, Response, Step


@dataclass(frozen=True)
class Penalty(Hypergradient):
    """Re-solve the level under F_p + <a_p, w_p> / strength and under F_p - <a_p, w_p> / strength, to w+ and w-.

    c_q = strength / 2 * [dF_p/dw_q(w+) - dF_p/dw_q(w-)]. As w+- = w_p* -+ H^(-1) a_p / strength + O(1 / strength^2),
    this is the implicit derivative, -d2_qp F_p H^(-1) a_p, up to O(1 / strength^2). Value-function and penalty methods
    (F2SA, Kwon et al. 2023; BOME, Liu et al. 2022) in their two-sided form, which is that of equilibrium propagation
    (Scellier and Bengio 2017; Laborieux et al. 2021).

    Both solves begin at the state (weights, optimizer state) before the level's last recorded step, with its batch,
    random draws and learning rate, and take `steps` steps of the level's own optimizer. Exact for a level that has
    converged on that batch, as strength and steps -> infinity; with too few steps to forget their start, what has not
    been forgotten is missing (for plain SGD: Neumann's series with as many terms).

    Reports as a metric of the level, each round: `penalty_residual`, norm(H x - a_p) / norm(a_p) for the x that the two
    solves amount to; a warning says where it is above a half.

    Needs no second derivative, so that it works under `torch.compile` and with kernels that have none, such as flash
    attention; and no curvature product at any depth: in a nest the levels inside go on being solved at every step. The
    choice where second derivatives are not to be had; elsewhere `ConjugateGradient` is cheaper and has no strength.

    Rounding: the machine epsilon times strength times norm(dF_p/dw_q). In float32 keep to a strength of about 100, less
    where cotangents are short.

    Cost: 2 * steps gradients of F_p, and 2 with respect to the targets; memory for a few copies of the weights.

    Args:
        strength: divides the cotangent, positive; larger is more exact, until rounding shows.
        steps: of each of the two solves, at least 1.
        learning_rate: of the two solves; None for that of the level's last step, which a schedule may have brought down
            to where nothing moves any more.

    Raises:
        MloError: an argument is out of range.

    Example:
        >>> Penalty(steps=10)
        Penalty(strength=100.0, steps=10, learning_rate=None)
    """

    strength: float = 100.0
    steps: int = 50
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        check_number(self, "strength", allow_zero=False)
        check_count(self, "steps")
        if self.learning_rate is not None:
            check_number(self, "learning_rate", allow_zero=False)

    @property
    def recorded_steps(self) -> int:
        """The last one."""
        return 1

    @property
    def implicit(self) -> bool:
        """The response is a function of its targets alone."""
        return True

    @property
    def needs_second_derivatives(self) -> bool:
        """First derivatives are enough."""
        return False

    def claim(self, steps: int, num_variables: int) -> Claim:  # noqa: ARG002
        """Approximate, with an error of order 1 / strength^2 where both solves converge."""
        return Claim(
            f"{self!r} approaches the implicit derivative as strength -> infinity, if its {self.steps} steps converge"
        )

    def pullback(self, cotangent: Tensors, response: Response) -> Mapping[str, Tensors]:
        """Solve twice, and compare what the level's objective says of the targets."""
        if not response.targets or not response.steps:
            return {}
        step = response.last_step()
        if self.learning_rate is not None:
            rate = step.weights[0].new_tensor(self.learning_rate)
            update = replace(step.update, hyperparameters={**step.update.hyperparameters, "lr": rate})
            step = replace(step, update=update)
        signs = step.update.signs()
        tilt: Gradient = tuple(a / self.strength if i in signs else None for i, a in enumerate(cotangent))
        solutions = [self._solve(step, tilt, side) for side in (1.0, -1.0)]
        self._report(step, tilt, solutions, response)
        # Where the optimizer maximizes, F_p = -L_p: the way from one end to the other is then the other way round.
        ends = zip(*(s.weights for s in solutions), strict=True)
        above, below = zip(*(e if signs.get(i, 1.0) > 0 else e[::-1] for i, e in enumerate(ends)), strict=True)
        found = step.change(below, above, response.targets, (solutions[1].ends, solutions[0].ends))
        decay = step.pull_back_hyperparameters(_decay_change(step, solutions), response.targets)
        change = accumulate(found, decay)
        return {q: tuple(t * (self.strength / 2) for t in tensors) for q, tensors in change.items()}

    def _solve(self, step: Step, tilt: Gradient, side: float) -> _Solution:
        """Take the level's steps with F_p tilted by `side` times `tilt`."""
        weights, state, update = step.weights, step.update.state, step.update
        signs = update.signs()
        ends: dict[str, End] = {}
        found: Gradient = ()
        last = weights
        for _ in range(self.steps):
            last, found = weights, step.gradient_at(weights, ends)
            with torch.set_grad_enabled(step.create_graph):
                tilted = tuple(
                    g if g is None or t is None else g + side * signs[i] * t
                    for i, (g, t) in enumerate(zip(found, tilt, strict=True))
                )
                weights, state = update.apply(weights, tilted, state)
                update = update.following()
        return _Solution(weights, ends, last, found)

    def _report(self, step: Step, tilt: Gradient, solutions: Sequence[_Solution], response: Response) -> None:
        """Report how far the solves are from the end: norm(H x - a_p) / norm(a_p) for the x that they amount to."""
        with torch.no_grad():
            up, down = (step.update.total_gradient(s.last, s.gradient) for s in solutions)
            sides = [
                ((a - b) / 2 + t, t)
                for a, b, t in zip(up, down, tilt, strict=True)
                if a is not None and b is not None and t is not None
            ]
            group = step.call.levels[step.level].variables.group
            if not sides or not bool(length := norm([t for _, t in sides], group)):
                return
            residual = float(norm([left for left, _ in sides], group) / length)
        response.report("penalty_residual", residual)
        if not residual < 0.5:  # without figures in its text, so that it is shown once
            warnings.warn(
                f"level {response.level!r}, Penalty: its solves are far from their ends (metric penalty_residual). "
                f"Take more steps, give a larger learning_rate, or, where the cotangent is so short that rounding "
                f"hides it, a smaller strength.",
                RuntimeWarning,
                stacklevel=2,
            )


@dataclass(frozen=True)
class _Solution:
    """Where a tilted solve ended, and the gradient of F_p (without the tilt) before its last step."""

    weights: Tensors
    ends: dict[str, End]
    last: Tensors
    gradient: Gradient


def _decay_change(step: Step, solutions: Sequence[_Solution]) -> dict[str, Tensor]:
    """Return the change of F_p's derivative by a coupled weight decay, 1/2 norm(w_p)^2, if others determine it."""
    if "weight_decay" not in step.update.hyperparameters:
        return {}
    determined = [i for i, decay in step.update.decays().items() if isinstance(decay, Tensor)]
    above, below = (s.weights for s in solutions)
    terms = [(above[i].square().sum() - below[i].square().sum()) / 2 for i in determined]
    return {"weight_decay": torch.stack(terms).sum()} if terms else {}
