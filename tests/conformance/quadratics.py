"""The closed-form oracles: quadratic multi-level problems whose hypergradients were computed by linear algebra.

L_p = 1/2 sum_ab w_a' Q[p][a][b] w_b + sum_a b[p][a]' w_a, over a, b in {p} and what p reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mlo

ORACLES = Path(__file__).parent / "oracles"


def oracle(name: str) -> dict[str, Any]:
    return json.loads((ORACLES / f"{name}.json").read_text())


class Vector(nn.Module):
    """A level whose variables are one vector, which it returns."""

    def __init__(self, values) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self):
        return self.w


def quadratic_loss(data: dict[str, Any], p: int) -> Callable[[Any, Any], torch.Tensor]:
    levels_read = sorted({p, *data["reads"][p]})
    q = {(i, j): torch.tensor(data["Q"][p][i][j], dtype=torch.float64) for i in levels_read for j in levels_read}
    b = {i: torch.tensor(data["b"][p][i], dtype=torch.float64) for i in levels_read}

    def loss(levels, batch):
        w = {i: getattr(levels, f"l{i}")() for i in levels_read}
        pairs = sum(0.5 * w[i] @ q[i, j] @ w[j] for i in levels_read for j in levels_read)
        return pairs + sum(b[i] @ w[i] for i in levels_read)

    return loss


def quadratic_engine(
    data: dict[str, Any],
    estimator: mlo.Hypergradient,
    optimizer: Callable[[int, nn.Module], torch.optim.Optimizer],
    steps: int,
    **options: Any,
) -> mlo.Engine:
    modules = [Vector(w) for w in data["w0"]]
    problems = [
        mlo.Problem(f"l{i}", m, quadratic_loss(data, i), optimizer(i, m), None, hypergradient=estimator, steps=steps)
        for i, m in enumerate(modules)
    ]
    edges = [mlo.Edge(f"l{s}", f"l{t}") for t, sources in enumerate(data["reads"]) for s in sources]
    return mlo.Engine(mlo.Graph(problems, edges), seed=0, device="cpu", **options)


def optimizer_of(data: dict[str, Any]) -> Callable[[int, nn.Module], torch.optim.Optimizer]:
    """The optimizer that an oracle names, for every level."""
    options = dict(data["optimizer"])
    kind = options.pop("kind")
    if kind == "nesterov":
        options["nesterov"] = True
    classes = {
        "sgd": torch.optim.SGD,
        "nesterov": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    return lambda _, module: classes[kind](module.parameters(), **options)


def relative_error(found: torch.Tensor, expected: Any) -> float:
    target = torch.as_tensor(expected, dtype=torch.float64)
    return float((found - target).norm() / target.norm())
