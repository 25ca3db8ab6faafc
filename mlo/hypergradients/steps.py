"""The reverse pass through recorded optimizer steps that `Unroll` and `FiniteDifference` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from mlo.arithmetic import Gradient, Tensors, accumulate
from mlo.sweep import Response, Step

Product = Callable[[Step, Gradient, Sequence[str]], dict[str, Tensors]]
"""`product(step, direction, targets)`: the second-order products of the step's objective along `direction`."""


def pull_back_steps(cotangent: Tensors, response: Response, last: int | None, product: Product) -> dict[str, Tensors]:
    """Pull a cotangent back through the last recorded steps, newest first.

    With w' = step(w, dF/dw, state): the optimizer's own pullback turns a cotangent of (w', state') into those of (w,
    gradient, state, hyperparameters); the gradient's is then the direction of one second-order product, which gives the
    part for w and for all targets. What reaches the start belongs to the level that the solve started from, if any.

    Args:
        cotangent: of the level's variables after the last step.
        response: the level's recorded steps.
        last: how many steps to go back, None for all recorded ones; the state before them counts as constant.
        product: the second-order product.

    Returns:
        The cotangents of all targets.
    """
    num = len(response.steps) if last is None else min(last, len(response.steps))
    start = response.start if response.complete and num == len(response.steps) else None
    total: dict[str, Tensors] = {}
    state_cotangent = None
    for index, step in enumerate(islice(response.backwards(), num)):
        goes_on = index < num - 1 or start is not None
        a_weights, direction, state_cotangent, a_options = step.pull_back_update(
            cotangent, state_cotangent, before=goes_on
        )
        total = accumulate(total, step.pull_back_hyperparameters(a_options, response.current(step)))
        targets = (response.level, *response.current(step)) if goes_on else response.current(step)
        if targets and any(d is not None for d in direction):  # else the step's loss did not depend on the level
            products = product(step, direction, targets)
            if goes_on:
                own = products.pop(response.level)
                cotangent = tuple(a + b for a, b in zip(a_weights, own, strict=True))
            total = accumulate(total, products)
        else:
            cotangent = a_weights
    total = total if start is None else accumulate(total, {start: cotangent})
    return {q: total[q] if q in total else response.zeros(q) for q in response.targets}
