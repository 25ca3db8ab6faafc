"""Update rules repeat torch's own steps, and their pullbacks are the derivatives of those."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlo.optimizers import Update, clip

SETTINGS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    (torch.optim.SGD, {"lr": torch.tensor([0.1], dtype=torch.float64), "momentum": 0.9}),
    (torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.05}),
    (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    (torch.optim.Adam, {"lr": 0.1, "maximize": True, "eps": 1e-3}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
    (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True, "maximize": True}),
]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in ((2, 3), (), (4,))
    ]


def gradients(seed, missing=()):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), (), (4,))]
    return tuple(None if i in missing else g for i, g in enumerate(found))


def groups(own):
    """Two groups with their own learning rates, and one parameter that the optimizer does not hold."""
    return [{"params": own[:1]}, {"params": own[1:2], "lr": 0.02}]


@pytest.mark.parametrize(("kind", "options"), SETTINGS, ids=str)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_the_rule_repeats_the_optimizers_steps(kind, options, clip_norm):
    own = parameters()
    optimizer = kind(groups(own), **options)
    weights, state = tuple(p.detach().clone() for p in own), ({}, {}, {})
    for step, missing in enumerate([(), (1,), (), (0,), ()]):  # with parameters that a step does not use
        gradient = gradients(step, missing)
        update = Update.capture(optimizer, own, gradient, clip_norm)
        for p, g in zip(own, clip(gradient, clip_norm), strict=True):
            p.grad = g
        optimizer.step()
        weights, state = update.apply(weights, gradient, state)
        for p, w in zip(own, weights, strict=True):
            torch.testing.assert_close(w, p.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kind", "options"), SETTINGS, ids=str)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_the_pullback_is_the_derivative(kind, options, clip_norm):
    own = parameters()
    optimizer = kind(groups(own), **options)
    for step in range(2):
        for p, g in zip(own, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
    gradient = gradients(7)
    update = Update.capture(optimizer, own, gradient, clip_norm)
    weights = tuple(p.detach().clone() for p in own)
    cotangent = gradients(8)
    _, after = update.apply(weights, gradient, update.state)
    state_cotangent = tuple({name: torch.ones_like(t) for name, t in s.items()} for s in after)
    a_w, a_g, a_s, _ = update.pull_back(weights, gradient, cotangent, state_cotangent)

    def value(w, g, s):
        new_w, new_s = update.apply(w, g, s)
        total = sum((c * t).sum() for c, t in zip(cotangent, new_w, strict=True))
        return total + sum(t.sum() for each in new_s for t in each.values())

    radius = 1e-6
    for k, moved in enumerate((gradients(9), gradients(10))):
        sides = []
        for sign in (1, -1):
            shifted = tuple(t + sign * radius * d for t, d in zip((weights, gradient)[k], moved, strict=True))
            sides.append(value(*((shifted, gradient) if k == 0 else (weights, shifted)), update.state))
        slope = (sides[0] - sides[1]) / (2 * radius)
        found = sum((a * d).sum() for a, d in zip((a_w, a_g)[k], moved, strict=True))
        assert float(found) == pytest.approx(float(slope), rel=1e-6, abs=1e-7)
    moved_state = tuple({n: 0.3 * t for n, t in s.items()} for s in update.state)
    sides = [
        value(
            weights,
            gradient,
            tuple({n: t + sign * radius * moved_state[i][n] for n, t in s.items()} for i, s in enumerate(update.state)),
        )
        for sign in (1, -1)
    ]
    found = sum((a_s[i][n] * d).sum() for i, s in enumerate(moved_state) for n, d in s.items())
    assert float(found) == pytest.approx(float(sides[0] - sides[1]) / (2 * radius), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_zero_gradient_gives_no_nan(kind):
    own = parameters()
    optimizer = kind(own, lr=0.1)
    gradient = tuple(torch.zeros_like(p) for p in own)
    update = Update.capture(optimizer, own, gradient, 1.0)
    a_w, a_g, *_ = update.pull_back(tuple(own), gradient, gradients(3), None)
    assert all(t.isfinite().all() for t in (*a_w, *a_g))


def test_a_zero_learning_rate_gives_a_zero_gradient_cotangent():
    own = parameters()
    update = Update.capture(torch.optim.SGD(own, lr=0.0, momentum=0.9), own, gradients(1), None)
    a_w, a_g, *_ = update.pull_back(tuple(own), gradients(1), gradients(3), None)
    assert all((g == 0).all() for g in a_g)
    assert all(torch.equal(a, c) for a, c in zip(a_w, gradients(3), strict=True))


@settings(max_examples=30, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 1000), st.sampled_from(SETTINGS))
def test_the_pullback_is_linear(alpha, beta, seed, setting):
    own = parameters()
    kind, options = setting
    update = Update.capture(kind(own, **options), own, gradients(seed), 1.0)

    def pull(cotangent):
        a_w, a_g, *_ = update.pull_back(tuple(own), gradients(seed), cotangent, None)
        return torch.cat([t.reshape(-1) for t in (*a_w, *a_g)])

    a, b = gradients(seed + 1), gradients(seed + 2)
    mixed = tuple(alpha * x + beta * y for x, y in zip(a, b, strict=True))
    torch.testing.assert_close(pull(mixed), alpha * pull(a) + beta * pull(b), rtol=1e-9, atol=1e-9)
