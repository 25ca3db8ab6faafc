"""Hypergradients against closed forms."""

import pytest
import torch

import mlo

from .quadratics import optimizer_of, oracle, quadratic_engine, relative_error

UNROLLED = ["bilevel_unroll_sgd", "bilevel_unroll_nesterov", "bilevel_unroll_adam", "bilevel_unroll_adamw"]


@pytest.mark.parametrize("name", UNROLLED)
@pytest.mark.parametrize("estimator", [mlo.Unroll(), mlo.FiniteDifference(radius=1e-3, last=None)], ids=repr)
def test_unrolled_steps_match_the_closed_form(name, estimator):
    data = oracle(name)
    engine = quadratic_engine(data, estimator, optimizer_of(data), data["steps"])
    assert relative_error(engine.hypergradient("l1")["w"], data["hypergradient"]) < 1e-9


@pytest.mark.parametrize("estimator", [mlo.Unroll(), mlo.FiniteDifference()], ids=repr)
def test_one_round_of_lbt_matches_the_closed_form(estimator):
    data = oracle("lbt_one_step")
    rates = [*data["lr"], 0.1]
    engine = quadratic_engine(data, estimator, lambda i, m: torch.optim.SGD(m.parameters(), lr=rates[i]), data["steps"])
    assert relative_error(engine.hypergradient("l2")["w"], data["hypergradient"]) < 1e-9
    engine.run(1, progress=False)
    for i, after in enumerate(data["after"]):
        assert relative_error(engine.graph[f"l{i}"].module.w.detach(), after) < 1e-12


@pytest.mark.parametrize(
    ("name", "steps", "rate"),
    [
        ("bilevel_implicit", 120, 0.4),
        ("lbt_implicit", 120, 0.4),
        ("fourlevel_diamond_implicit", 120, 0.4),
        ("trilevel_nest_implicit", 16, 0.62),
    ],
)
def test_unrolling_to_convergence_gives_the_implicit_gradient(name, steps, rate):
    """Also the order of the sweep: highest level first is 35 % off in a nest."""
    data = oracle(name)
    engine = quadratic_engine(data, mlo.Unroll(), lambda _, m: torch.optim.SGD(m.parameters(), lr=rate), steps)
    upper = f"l{data['upper']}"
    assert relative_error(engine.hypergradient(upper)["w"], data["hypergradient"]) < 1e-5
