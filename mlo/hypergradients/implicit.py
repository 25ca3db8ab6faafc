"""What the estimators that solve a linear system with the Hessian of the level's objective share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlo.arithmetic import Tensors, accumulate
from mlo.hypergradients.base import Hypergradient
from mlo.linear_solvers import LinearOperator, Solution
from mlo.sweep import Response, SecondOrder, Step


class Implicit(Hypergradient):
    """Implicit differentiation: c_q = -d2_qp F_p x with H x = a_p, H = d2_pp F_p (the implicit function theorem).

    F_p is the level's total objective: its loss with the best responses of the levels inside it, and its optimizer's
    coupled weight decay. H and the mixed product are taken at the weights, batch and random draws of the level's last
    step, so the result is right where the level has converged on that batch. A subclass supplies `solve`.

    Parameters that the loss does not use, or that the optimizer does not hold, take no part. No update rule is needed:
    the optimizer may be any that comes to rest where the gradient of F_p vanishes.

    Within a nest the derivative of x itself is again taken implicitly: dx = H^(-1) (da - dH x).
    """

    @property
    def recorded_steps(self) -> int:
        """The last one."""
        return 1

    @property
    def needs_update_rule(self) -> bool:
        """Any optimizer will do."""
        return False

    @property
    def kept_graphs(self) -> int:
        """That of the last step: all products go through it."""
        return 1

    @property
    def implicit(self) -> bool:
        """The response is a function of its targets alone."""
        return True

    @abc.abstractmethod
    def solve(self, operator: LinearOperator, b: Tensor, response: Response, system: System) -> Solution:
        """Solve H x = b approximately.

        Args:
            operator: the product of H with a vector of shape (n,).
            b: of shape (n,), over all entries of the variables that take part.
            response: of the level, with its memory.
            system: how vectors and variables belong together.
        """

    @staticmethod
    def remembered(response: Response, name: str, like: Tensor) -> Tensor | None:
        """Return a vector that was kept in the last round, if it still fits."""
        kept = response.memory.get(name)
        return kept if kept is not None and kept.shape == like.shape and bool(torch.isfinite(kept).all()) else None

    def pullback(self, cotangent: Tensors, response: Response) -> Mapping[str, Tensors]:
        """Solve, and take the mixed products along the solution."""
        if not response.targets or not response.steps:
            return {}
        step = response.last_step()
        with step.second_order((response.level, *response.targets)) as product:
            system = System(step, product)
            if not system.indices:
                return {}
            b = system.flat(cotangent)

            def solve(b: Tensor, response: Response) -> Tensor:
                with torch.no_grad():
                    return self.solve(system.hessian, b, response, system).x

            x = solve(b, response)
            if step.create_graph:  # solutions with other right-hand sides are nothing to start from, nor to remember
                kept = {name: t for name, t in response.memory.items() if name != "solution"}
                x = _differentiable(system, lambda b: solve(b, replace(response, memory=dict(kept))), b, x)
            found = product(system.direction(-x), response.targets, create_graph=step.create_graph)
        decay = step.pull_back_hyperparameters(system.decay_cotangent(-x), response.targets)
        return accumulate(found, decay)


class System:
    """The linear system of one level: vectors of all entries that take part, and the product with H.

    Attributes:
        indices: of the parameters that take part.
        parameters: their values.
        key: of random draws.
        is_scaled: whether the loss above is scaled (fp16), so that a right-hand side may overflow.
    """

    def __init__(self, step: Step, product: SecondOrder) -> None:
        self._signs, decays = step.update.signs(), step.update.decays()
        self._product = product
        self._level = step.level
        self.indices = sorted(self._signs)
        self._count = len(step.weights)
        self.parameters = [step.weights[i] for i in self.indices]
        self.key = step.call.key
        self.is_scaled = step.call.parts[0].backend.autocast == torch.float16
        dtypes = {t.dtype for t in self.parameters}
        self._dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float64
        self._determined = any(isinstance(decay, Tensor) for decay in decays.values())
        self._decay: Tensor | None = None
        if any(isinstance(decay, Tensor) or decay for decay in decays.values()):
            ones = [torch.ones(t.numel(), dtype=self._dtype, device=t.device) for t in self.parameters]
            self._decay = torch.cat([decays[i] * one for i, one in zip(self.indices, ones, strict=True)])

    def flat(self, tensors: Tensors) -> Tensor:
        """Return the entries that take part of one tensor a variable, as one vector."""
        return torch.cat([tensors[i].reshape(-1).to(self._dtype) for i in self.indices])

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return a vector's entries in the shapes of `parameters`."""
        pieces = torch.split(vector, [t.numel() for t in self.parameters])
        return [p.view(t.shape).to(t.dtype) for p, t in zip(pieces, self.parameters, strict=True)]

    def direction(self, vector: Tensor) -> tuple[Tensor | None, ...]:
        """Return the direction of a product that belongs to a vector: None for variables that take no part."""
        result: list[Tensor | None] = [None] * self._count
        for i, piece in zip(self.indices, self.split(vector), strict=True):
            result[i] = piece if self._signs[i] == 1 else -piece
        return tuple(result)

    def decay_cotangent(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the mixed product with a coupled weight decay that other levels determine, if it is."""
        if not self._determined:
            return {}
        return {"weight_decay": torch.dot(vector, torch.cat([t.reshape(-1).to(self._dtype) for t in self.parameters]))}

    def hessian(self, vector: Tensor, *, create_graph: bool = False) -> Tensor:
        """Return H times a vector."""
        found = self._product(self.direction(vector), (self._level,), create_graph=create_graph)
        image = self.flat(found[self._level])
        return image if self._decay is None else image + self._decay * vector


class _Inverse(torch.autograd.Function):
    """Zero, with the derivative of H^(-1) r with respect to r at r = 0."""

    @staticmethod
    def forward(ctx: Any, inverse: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
        ctx.inverse = inverse
        return torch.zeros_like(r)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return None, ctx.inverse(cotangent)


def _differentiable(system: System, solve: Callable[[Tensor], Tensor], b: Tensor, x: Tensor) -> Tensor:
    """Give a solution x of H x = b its derivative: that of x + H^(-1) (b - H x), H and b variable, x and H^(-1) not."""

    def inverse(cotangent: Tensor) -> Tensor:
        found = solve(cotangent)
        return _differentiable(system, solve, cotangent, found) if torch.is_grad_enabled() else found

    with torch.enable_grad():
        x = x.detach()
        residual = b - system.hessian(x, create_graph=True)
        correction: Tensor = _Inverse.apply(inverse, residual)
        return x + correction
