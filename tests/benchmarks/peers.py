"""The same by TorchOpt, higher and Betty, each used as its documentation says, with its best settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance.quadratics import Vector, relative_error

from .cases import Case, Method

Values = dict[int, Callable[[], Tensor]]
Differentiable = Callable[[Vector, type[torch.optim.Optimizer], Mapping[str, Any]], tuple[nn.Module, Any]]
"""Makes a module's value and optimizer differentiable: `module()` and `optimizer.step(loss)`."""


def with_higher(module: Vector, kind: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    import higher

    functional = higher.monkeypatch(module)
    optimizer = kind(module.parameters(), **options)
    return functional, higher.get_diff_optim(optimizer, module.parameters(), fmodel=functional)


def with_torchopt(
    module: Vector, kind: type[torch.optim.Optimizer], options: Mapping[str, Any]
) -> tuple[nn.Module, Any]:
    import torchopt

    classes = {
        torch.optim.SGD: torchopt.MetaSGD,
        torch.optim.Adam: torchopt.MetaAdam,
        torch.optim.AdamW: torchopt.MetaAdamW,
    }
    return module, classes[kind](module, **options)


def unrolled(case: Case, make: Differentiable) -> Tensor:
    """Unroll the steps of all lower levels, nests as loops within loops, written by hand."""
    upper = Vector(case.data["w0"][case.upper])

    def solve(level: int, values: Values) -> Values:
        for q in case.inside.get(level, ()):
            module, optimizer = make(Vector(values[q]().tolist()), *case.optimizers[q])
            values = {**values, q: module}
            for _ in range(case.steps):
                values = solve(q, values)
                optimizer.step(case.loss(q, values))
            values = solve(q, values)
        return values

    start: Values = {i: Vector(w) for i, w in enumerate(case.data["w0"])}
    loss = case.loss(case.upper, solve(case.upper, {**start, case.upper: upper}))
    return torch.autograd.grad(loss, upper.w)[0]


def torchopt_implicit(case: Case, linear_solve: Any) -> Tensor:
    """Each level's solution is TorchOpt's `custom_root` of the gradient of its objective."""
    from torchopt.diff.implicit import custom_root

    def loss(level: int, values: Mapping[int, Tensor]) -> Tensor:
        values = solve(level, dict(values))
        return case.loss(level, {i: lambda t=t: t for i, t in values.items()})

    def solution(level: int, values: Mapping[int, Tensor]) -> Tensor:
        outer = [i for i in case.data["reads"][level] if i not in case.inside.get(level, ())]
        kind, options = case.optimizers[level]
        decay = 0.0 if kind is torch.optim.AdamW else options.get("weight_decay", 0.0)

        def objective(w: Tensor, *others: Tensor) -> Tensor:
            return loss(level, {**values, **dict(zip(outer, others, strict=True)), level: w}) + decay / 2 * w @ w

        @custom_root(torch.func.grad(objective), argnums=tuple(range(1, len(outer) + 1)), solve=linear_solve)
        def root(w: Tensor, *others: Tensor) -> Tensor:
            module = Vector(w.tolist())
            optimizer = case.optimizer(level, module)
            now = {**values, **dict(zip(outer, others, strict=True)), level: module.w}
            for _ in range(case.steps):
                with torch.enable_grad():
                    module.w.grad = torch.autograd.grad(loss(level, now), module.w)[0]
                optimizer.step()
            return module.w.detach()

        return root(values[level], *(values[i] for i in outer))

    def solve(level: int, values: dict[int, Tensor]) -> dict[int, Tensor]:
        for q in case.inside.get(level, ()):
            values = {**values, q: solution(q, values)}
            values = solve(q, values)
        return values

    start = {i: torch.tensor(w, dtype=torch.float64) for i, w in enumerate(case.data["w0"])}
    upper = start[case.upper].requires_grad_()
    return torch.autograd.grad(loss(case.upper, start), upper)[0]


def torchopt_cg(case: Case) -> Tensor:
    from torchopt.linear_solve import solve_cg

    return torchopt_implicit(case, solve_cg(rtol=1e-12))


def torchopt_neumann(case: Case) -> Tensor:
    from torchopt.linear_solve import solve_inv

    return torchopt_implicit(case, solve_inv(ns=True, maxiter=200, alpha=0.4))


def betty(case: Case, kind: str, problem: str = "ImplicitProblem", **settings: Any) -> Tensor:
    """Run Betty until the top level's first step, and take the gradient that it gives to `grad_callback`.

    Problems with converged levels start at the exact best responses, and the lower levels stand still.
    """
    import betty.problems
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine

    found: list[Tensor] = []

    def declare(level: int) -> Any:
        is_upper = level == case.upper

        class Level(getattr(betty.problems, "ImplicitProblem" if is_upper else problem)):
            def get_batch(self):
                return ()

            def training_step(self, batch):
                read = {i: getattr(self, f"l{i}") for i in case.data["reads"][level]}
                return case.loss(level, {**read, level: self})

            def grad_callback(self):
                if is_upper and not found:
                    found.append(next(self.module.parameters()).grad.clone())

        values = case.data["best_responses"] if case.implicit and not is_upper else case.data["w0"]
        module = Vector(values[level])
        standing = torch.optim.SGD(module.parameters(), lr=0.0)
        config = Config(
            type=kind,
            retain_graph=True,
            unroll_steps=1 if case.implicit else case.steps,
            first_order=problem == "ImplicitProblem",
            **settings,
        )
        return Level(f"l{level}", config, module, standing if case.implicit else case.optimizer(level, module))

    levels = [declare(level) for level in range(case.upper + 1)]
    upward: dict[Any, list[Any]] = {}
    downward: dict[Any, list[Any]] = {}
    for target, sources in enumerate(case.data["reads"]):
        for source in sources:
            edges = upward if source < target else downward
            edges.setdefault(levels[source], []).append(levels[target])
    engine_config = EngineConfig(train_iters=1 if case.implicit else case.steps, strategy="cpu")
    Engine(levels, engine_config, {"u2l": downward, "l2u": upward}).run()
    return found[0]


def betty_cg(case: Case) -> Tensor:
    """Whatever number of iterations happens to be nearest."""
    tried = [betty(case, "cg", cg_iterations=n, cg_alpha=1.0) for n in range(1, 11)]
    return min(tried, key=lambda found: relative_error(found, case.data["hypergradient"]))


METHODS = (
    Method(
        "TorchOpt",
        "`MetaSGD`, `MetaAdam`, `MetaAdamW`",
        lambda case: unrolled(case, with_torchopt),
        exact_for_steps=True,
        exact_for_optima=True,
        note="with `torch.set_default_dtype(torch.float64)`, or else Adam's bias correction is in float32; "
        "graphs and nests of levels are loops written by hand",
    ),
    Method(
        "TorchOpt",
        "`custom_root`, `solve_cg`",
        torchopt_cg,
        exact_for_steps=False,
        exact_for_optima=True,
        note="one root for each level, composed by hand; in a nest one root stands in another's optimality condition",
    ),
    Method(
        "TorchOpt",
        "`custom_root`, `solve_inv(ns=True)`",
        torchopt_neumann,
        exact_for_steps=False,
        exact_for_optima=True,
    ),
    Method(
        "higher",
        "`get_diff_optim`",
        lambda case: unrolled(case, with_higher),
        exact_for_steps=True,
        exact_for_optima=True,
        note="its Adam adds eps before the bias correction, `torch.optim.Adam` after it; loops written by hand",
    ),
    Method(
        "Betty",
        "`darts`",
        lambda case: betty(case, "darts", darts_alpha=1e-3),
        exact_for_steps=False,
        exact_for_optima=False,
        note="takes the curvature for the identity; the learning rate and the optimizer take no part",
    ),
    Method(
        "Betty",
        "`neumann`",
        lambda case: betty(case, "neumann", neumann_iterations=200, neumann_alpha=0.4),
        exact_for_steps=False,
        exact_for_optima=True,
    ),
    Method(
        "Betty",
        "`cg`",
        betty_cg,
        exact_for_steps=False,
        exact_for_optima=True,
        note="the best of 1 to 10 iterations; it does not converge, as each direction is made from the residual before "
        "the last",
    ),
    *(
        Method(
            "Betty",
            f"`{problem}`",
            lambda case, problem=problem: betty(case, "darts", problem),
            exact_for_steps=True,
            exact_for_optima=True,
        )
        for problem in ("IterativeProblem", "HigherIterativeProblem")
    ),
)
