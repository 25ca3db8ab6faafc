"""What the engine costs: rounds of a small problem beside loops written by hand that compute the very same numbers.

The problem is as small as they come (a classifier of about 6000 weights, batches of 64, one lower step for each upper
one), so that the time of the machinery is not hidden behind that of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

import mlo

from ..accuracy import Notes
from . import trainers
from .bilevel import Bilevel, made_up
from .report import Benchmark, Result, agree, difference, ratio_table, raw
from .timing import Method, Work, measure

DIFFERENCE, UNROLL = mlo.FiniteDifference(), mlo.Unroll(last=1)
BY_DIFFERENCES = "by hand, differences"
BY_DOUBLE_BACKWARD = "by hand, double backward"
TRAINERS: dict[str, Callable[[Bilevel], Work]] = {
    BY_DIFFERENCES: partial(trainers.by_hand, product=trainers.by_differences),
    "mlo FiniteDifference()": partial(trainers.with_mlo, estimator=DIFFERENCE),
    "Betty darts": partial(trainers.with_betty, kind="darts"),
    BY_DOUBLE_BACKWARD: partial(trainers.by_hand, product=trainers.by_double_backward),
    "by hand, graph kept": trainers.by_hand_unrolled,
    "mlo Unroll(last=1)": partial(trainers.with_mlo, estimator=UNROLL),
    "Betty neumann": partial(trainers.with_betty, kind="neumann", neumann_iterations=0),
    "TorchOpt MetaSGD": trainers.with_torchopt,
    "higher innerloop_ctx": trainers.with_higher,
}
GROUPS = {BY_DIFFERENCES: tuple(TRAINERS)[:3], BY_DOUBLE_BACKWARD: tuple(TRAINERS)[3:]}
NOTES = {
    "Betty darts": "differences around the weights after the step, the curvature taken for the identity",
    BY_DOUBLE_BACKWARD: "the step's gradient is computed again, with its graph, when the hypergradient needs it",
    "by hand, graph kept": "the step's graph is kept, as in TorchOpt and higher, so that nothing is computed twice",
    "Betty neumann": "no iterations, which is one double backward pass at the weights after the step",
    "higher innerloop_ctx": "the module is patched in every round, and weights and momentum are written back by hand",
}
LIBRARIES = {"mlo": "mlo", "Betty": "Betty", "TorchOpt": "TorchOpt", "higher": "higher"}


def prepare(name: str, size: int) -> Work:
    return TRAINERS[name](made_up(1, hidden=size))


METHODS = tuple(
    Method(name, LIBRARIES.get(name.split()[0], ""), partial(prepare, name), NOTES.get(name, "")) for name in TRAINERS
)


def check(methods: Sequence[Method], rounds: int) -> dict[str, float]:
    """Play rounds in float64 and compare the weights of both levels with those of the loop by hand.

    Returns:
        Method -> relative difference of how far the weights went; Betty, which computes another thing, is left out.
    """
    found = {}
    for base, names in GROUPS.items():
        ends = {}
        for name in names:
            if name.startswith("Betty") or name not in [m.name for m in methods]:
                continue
            problem = made_up(1, dtype=torch.float64)
            start = problem.variables
            TRAINERS[name](problem)(rounds)
            ends[name] = [end - begin for end, begin in zip(problem.variables, start, strict=True)]
            found[name] = difference(ends[name], ends[base])
            agree(f"{name} and {base}", found[name], 1e-6)
    return found


def run(methods: Sequence[Method], quick: bool) -> Result:
    rounds, turns = (5, 3) if quick else (50, 15)
    checked = check(methods, rounds)
    found = measure(methods, (64,), repeats=turns, num=lambda _: rounds)
    notes = Notes()
    lines = []
    for base, names in GROUPS.items():
        chosen = [m for m in methods if m.name in names]
        lines += [*ratio_table(chosen, found, 64, base, notes), ""]
    worst = max(checked.values())
    text = (
        f"Milliseconds a round, median and range of {turns} turns of {rounds} rounds each. Betty aside, all in a table "
        f"moved the weights of both levels alike: to {worst:.0e} in float64, after {rounds} rounds."
    )
    return Result("\n".join([text, "", *lines, *notes.lines()]), {"agreement": checked, "measured": raw(found)})


BENCHMARK = Benchmark("overhead", "What the engine costs", run, METHODS)
