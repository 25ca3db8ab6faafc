"""The reverse pass through recorded optimizer steps that `Unroll` and `FiniteDifference` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlo.autodiff import Gradient
from mlo.levels import Tensors
from mlo.sweep import Response, Step

Product = Callable[[Step, Gradient, Sequence[str]], dict[str, Tensors]]
"""`product(step, direction, targets)`: the second-order products of the step's objective along `direction`."""


def pull_back_steps(cotangent: Tensors, response: Response, last: int | None, product: Product) -> dict[str, Tensors]:
    """Pull a cotangent back through the last recorded steps, newest first.

    With w' = step(w, dF/dw, state): the optimizer's own pullback turns a cotangent of (w', state') into those of (w,
    gradient, state); the gradient's is then the direction of one second-order product, which gives the part for w and
    for all targets.

    Args:
        cotangent: of the level's variables after the last step.
        response: the level's recorded steps.
        last: how many steps to go back, None for all recorded ones; the state before them counts as constant.
        product: the second-order product.
    """
    steps = list(response.steps if last is None else response.steps[-last:])
    total = {q: response.zeros(q) for q in response.targets}
    state_cotangent = None
    for index in reversed(range(len(steps))):
        step, is_first = steps[index], index == 0
        a_weights, direction, state_cotangent = step.pull_back_update(cotangent, state_cotangent)
        if all(d is None for d in direction):  # the step's loss did not depend on the level
            cotangent = a_weights
            continue
        targets = response.current(step) if is_first else (response.level, *response.current(step))
        if not targets:
            continue
        products = product(step, direction, targets)
        if not is_first:
            own = products.pop(response.level)
            cotangent = tuple(a + b for a, b in zip(a_weights, own, strict=True))
        for q, c in products.items():
            total[q] = tuple(a + b for a, b in zip(total[q], c, strict=True))
    return total
