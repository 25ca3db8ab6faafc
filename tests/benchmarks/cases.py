"""The oracles as benchmark cases, and what a method of computing hypergradients is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance.quadratics import oracle, quadratic_loss


@dataclass(frozen=True)
class Case:
    """One oracle and how its lower levels are solved.

    `inside` maps a level to those solved inside it and inside no other of them; `optimizers` holds a class and its
    options for each level; `implicit` says that the oracle is of levels solved to optimality.
    """

    name: str
    title: str
    data: Mapping[str, Any]
    inside: Mapping[int, tuple[int, ...]]
    optimizers: tuple[tuple[type[torch.optim.Optimizer], Mapping[str, Any]], ...]
    steps: int
    implicit: bool

    @property
    def upper(self) -> int:
        return self.data["upper"]

    def optimizer(self, level: int, module: nn.Module) -> torch.optim.Optimizer:
        kind, options = self.optimizers[level]
        return kind(module.parameters(), **options)

    def loss(self, level: int, values: Mapping[int, Callable[[], Tensor]]) -> Tensor:
        return quadratic_loss(self.data, level)(SimpleNamespace(**{f"l{i}": v for i, v in values.items()}), None)


@dataclass(frozen=True)
class Method:
    """A way of one library to compute a hypergradient, and whether it means to be exact.

    `exact_for_steps`: for the steps really taken; `exact_for_optima`: for levels solved to optimality.
    """

    library: str
    name: str
    compute: Callable[[Case], Tensor]
    exact_for_steps: bool
    exact_for_optima: bool
    note: str = ""

    def claims(self, case: Case) -> bool:
        return self.exact_for_optima if case.implicit else self.exact_for_steps


def unrolled(kind: str, title: str) -> Case:
    name = f"bilevel_unroll_{kind}"
    data = oracle(name)
    options = {key: value for key, value in data["optimizer"].items() if key != "kind"}
    if kind == "nesterov":
        options["nesterov"] = True
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(kind, torch.optim.SGD)
    return Case(name, title, data, {1: (0,)}, ((optimizer, options),) * 2, data["steps"], implicit=False)


def one_step_of_lbt() -> Case:
    data = oracle("lbt_one_step")
    optimizers = tuple((torch.optim.SGD, {"lr": lr}) for lr in (*data["lr"], 0.1))
    return Case("lbt_one_step", "LBT, one step", data, {2: (0, 1)}, optimizers, data["steps"], implicit=False)


def converged(name: str, title: str, inside: Mapping[int, tuple[int, ...]], steps: int, rate: float) -> Case:
    data = oracle(name)
    optimizers = ((torch.optim.SGD, {"lr": rate}),) * len(data["dims"])
    return Case(name, title, data, inside, optimizers, steps, implicit=True)


CASES = (
    unrolled("sgd", "SGD, momentum"),
    unrolled("nesterov", "Nesterov"),
    unrolled("adam", "Adam"),
    unrolled("adamw", "AdamW"),
    one_step_of_lbt(),
    converged("bilevel_implicit", "two levels", {1: (0,)}, 120, 0.4),
    converged("lbt_implicit", "LBT", {2: (0, 1)}, 120, 0.4),
    converged("trilevel_nest_implicit", "nest of three", {2: (1,), 1: (0,)}, 40, 0.62),
    converged("fourlevel_diamond_implicit", "diamond of four", {3: (0, 1, 2)}, 120, 0.4),
)
