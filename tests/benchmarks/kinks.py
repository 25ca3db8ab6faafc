"""How near differences come to the exact product on networks with kinks, by their radius, central and one-sided.

python -m tests.benchmarks.kinks [--output FILE]

DARTS and Learning by Teaching on a supernet (8 channels, 5 cells, batches of 16 random images of 16 x 16) that has been
trained a little. Compared is the second-order part of the architecture's hypergradient, what the estimators add to
`FirstOrder`, with that of `Unroll(last=1)` at the same state.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mlo
from tests.conformance.random_graphs import flat

from .speed.lbt_step import LAST, FusedCell, Networks

RADII = (0.003, 0.01, 0.03, 0.1, 0.3)
ROUNDS = (20, 40, 60)


class Agreement(NamedTuple):
    """Of the second-order part of a hypergradient with the exact one."""

    cosine: float
    error: float


def second_order(networks: Networks, problem: str, estimators: Sequence[mlo.Hypergradient]) -> list[Tensor]:
    """What each estimator adds to the direct gradient, at the networks as they are."""

    def hypergradient(estimator: mlo.Hypergradient) -> Tensor:
        engine = mlo.Engine(graph(networks, problem, estimator), seed=0, device="cpu")
        return flat(engine.hypergradient("architecture").values()).double()

    direct = hypergradient(mlo.FirstOrder())
    return [hypergradient(estimator) - direct for estimator in estimators]


def graph(networks: Networks, problem: str, estimator: mlo.Hypergradient) -> mlo.Graph:
    return networks.graph(estimator) if problem == "lbt" else networks.darts(estimator)


def compare(
    problem: str, size: int, radii: Sequence[float], rounds: Sequence[int]
) -> dict[tuple[float, bool], list[Agreement]]:
    """By radius and side, the agreement after so many rounds of training, and so many."""
    networks = Networks.of(size, FusedCell, LAST)
    found: dict[tuple[float, bool], list[Agreement]] = {(r, one): [] for r in radii for one in (False, True)}
    trained = mlo.Engine(graph(networks, problem, mlo.FiniteDifference()), seed=0, device="cpu")
    for end in rounds:
        trained.run(end - trained.rounds_done, progress=False)
        ways = [mlo.FiniteDifference(radius, one_sided=one) for radius, one in found]
        exact, *others = second_order(networks, problem, [mlo.Unroll(last=1), *ways])
        for own, part in zip(found.values(), others, strict=True):
            cosine = torch.nn.functional.cosine_similarity(part, exact, dim=0)
            own.append(Agreement(float(cosine), float((part - exact).norm() / exact.norm())))
    return found


def report(size: int, radii: Sequence[float], rounds: Sequence[int]) -> str:
    after = ", ".join(map(str, rounds))
    lines = [
        f"After {after} rounds: the range of the cosines, and in parentheses of the relative errors.",
        "",
        "| radius | DARTS, central | DARTS, one-sided | LBT, central | LBT, one-sided |",
        "|---|---|---|---|---|",
    ]
    found = {problem: compare(problem, size, radii, rounds) for problem in ("darts", "lbt")}
    for radius in radii:
        cells = [_range(found[problem][radius, one]) for problem in found for one in (False, True)]
        lines.append(f"| {radius:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(agreements: Sequence[Agreement]) -> str:
    cosines, errors = zip(*agreements, strict=True)
    return f"{min(cosines):.2f} to {max(cosines):.2f} ({min(errors):.1f} to {max(errors):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = report(5, RADII, ROUNDS)
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
