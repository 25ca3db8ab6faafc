"""The arithmetic of a search's cost: from passes, measured in `measuring`, counted in `counting`, to days and GiB."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

DAY, MEBI = 86400, 1024
PROCESSES = (1, 8, 64)


@dataclass(frozen=True)
class Pass:
    """A kind of pass.

    Attributes:
        network: `teacher` or `student`.
        backward: of a count, whether it is a backward pass; of a measurement, whether there is one after the forward
            pass.
        lower: whether it is in the recipe's lower precision.
    """

    network: str
    backward: bool
    lower: bool = False


Counts: TypeAlias = "Counter[Pass]"
"""Passes in one round."""


@dataclass(frozen=True)
class Affine:
    """`fixed + per_image * batch`."""

    fixed: float
    per_image: float

    def __call__(self, batch: float) -> float:
        return self.fixed + self.per_image * batch

    def __sub__(self, other: Affine) -> Affine:
        return Affine(self.fixed - other.fixed, self.per_image - other.per_image)

    @classmethod
    def fit(cls, batches: Sequence[int], values: Sequence[float]) -> Affine:
        """Fit by least squares; a single value is taken as proportional to its batch."""
        if len(batches) == 1:
            return cls(0.0, values[0] / batches[0])
        per_image, fixed = np.polyfit(batches, values, 1)
        return cls(float(fixed), float(per_image))


@dataclass(frozen=True)
class Network:
    """What was measured of a network.

    Attributes:
        batches: images of the passes.
        seconds: by kind of pass, one entry a batch.
        mebibytes: peak of a forward and backward pass above what was there before, by whether it is in the lower
            precision, one entry a batch; empty where memory cannot be measured.
        macs: billions of multiplications in a forward pass on one image.
        weights: MiB of its weights.
    """

    batches: tuple[int, ...]
    seconds: Mapping[Pass, Sequence[float]]
    mebibytes: Mapping[bool, Sequence[float]]
    macs: float
    weights: float

    def time(self, of: Pass) -> Affine:
        """Return the seconds of a forward pass, or of a backward pass alone: what it adds to a forward pass."""
        forward = Affine.fit(self.batches, self.seconds[Pass(of.network, backward=False, lower=of.lower)])
        return Affine.fit(self.batches, self.seconds[of]) - forward if of.backward else forward

    def activations(self, batch: float, *, lower: bool) -> float:
        """Return the MiB of a forward and backward pass."""
        return Affine.fit(self.batches, self.mebibytes[lower])(batch)


@dataclass(frozen=True)
class Search:
    """What a recipe asks for, and what was counted of it.

    Attributes:
        batch: images of each kind in a batch, over all processes.
        rounds: of the search, those of the warm-up included.
        warmup_rounds: at its beginning, in which the architecture waits.
        warmup: passes in one of those.
        upper: passes in one of the others.
        copies: by network, how often each of its weights, with what has its shape, is there at most at once.
        keeps_graph: whether the teacher's graph on the unlabelled images waits for the student's product.
        labelled: whether the student learns from labelled images too, in one loss with the unlabelled ones.
        lower: whether first-order passes are in a lower precision.
        num_batches: of images that are there at once; a recorded step keeps those of all its micro-batches.
        image: MiB of one image.
    """

    batch: int
    rounds: int
    warmup_rounds: int
    warmup: Counts
    upper: Counts
    copies: Mapping[str, int]
    keeps_graph: bool
    labelled: bool
    lower: bool = False
    num_batches: int = 0
    image: float = 0.0

    def seconds(self, networks: Mapping[str, Network], processes: int = 1) -> dict[tuple[str, str], float]:
        """Return the seconds of the whole search by (part, network), the batch shared by so many processes for free."""
        parts = {"warm-up": (self.warmup_rounds, self.warmup), "rest": (self.rounds - self.warmup_rounds, self.upper)}
        return {
            (part, name): num * round_seconds(counts, name, network, self.batch / processes)
            for part, (num, counts) in parts.items()
            for name, network in networks.items()
        }

    def round(self, networks: Mapping[str, Network]) -> float:
        """Return the seconds of a round after the warm-up."""
        return sum(round_seconds(self.upper, name, network, self.batch) for name, network in networks.items())

    def mebibytes(self, networks: Mapping[str, Network], processes: int = 1) -> dict[str, float] | None:
        """Return the peak memory of a process, its parts by name; None where none was measured."""
        if not all(network.mebibytes for network in networks.values()):
            return None
        teacher, student, full = (
            networks[name].activations(self.batch / processes, lower=lower)
            for name, lower in (("teacher", self.lower), ("student", self.lower), ("teacher", False))
        )
        return (
            {
                f"weights of the {name}, x {self.copies[name]}": self.copies[name] * network.weights
                for name, network in networks.items()
            }
            | {f"images, {self.num_batches} batches": self.num_batches * self.batch / processes * self.image}
            | activations(teacher, student, full, keeps_graph=self.keeps_graph, labelled=self.labelled)
        )


def round_seconds(counts: Counts, name: str, network: Network, batch: float) -> float:
    """Return the seconds of a round's passes through one network."""
    return sum(num * network.time(of)(batch) for of, num in counts.items() if of.network == name)


def activations(
    teacher: float, student: float, product: float, *, keeps_graph: bool, labelled: bool
) -> dict[str, float]:
    """Return what is there at once at the worst moment of a round, by name.

    The student's loss holds its graphs on labelled and unlabelled images together, the validation loss those of teacher
    and student; a product of the teacher's holds one of the teacher. A kept graph is there beside the first two.

    Args:
        teacher: a forward and backward pass of it.
        student: the same.
        product: the same of the teacher in full precision, in which products are taken.
        keeps_graph: as in `Search`.
        labelled: as in `Search`.
    """
    moments = {
        "the student's loss": student * (2 if labelled else 1),
        "the validation loss": teacher + student,
    }
    kept = {"the teacher's kept graph": teacher} if keeps_graph else {}
    worst = max(moments, key=moments.__getitem__)
    if product > moments[worst] + sum(kept.values()):
        return {"activations in a product of the teacher": product}
    return {f"activations in {worst}": moments[worst], **kept}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a Markdown table and an empty line; numbers have three digits."""

    def show(cell: object) -> str:
        if not isinstance(cell, float):
            return str(cell)
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:.0f}"

    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(show, line))} |" for line in lines] + [""]


def report(search: Search, networks: Mapping[str, Network]) -> str:
    """Return all tables as Markdown."""
    measured: list[list[object]] = []
    fitted: list[list[object]] = []
    for name, network in networks.items():
        for low in sorted(network.mebibytes or {False: (), search.lower: ()}):
            forward, both = Pass(name, backward=False, lower=low), Pass(name, backward=True, lower=low)
            title = f"{name}, lower precision" if low else name
            peaks = network.mebibytes.get(low, ())
            for i, batch in enumerate(network.batches):
                peak = peaks[i] if peaks else "-"
                measured.append([title, batch, network.seconds[forward][i], network.seconds[both][i], peak])
            memory = network.activations(1, lower=low) - network.activations(0, lower=low) if peaks else "-"
            times = [1000 * network.time(of).per_image for of in (forward, both)]
            fitted.append([title, network.macs, 2 * network.macs / times[0] * 1000, *times, memory])
    kinds = sorted({*search.warmup, *search.upper}, key=lambda of: (of.network != "teacher", of.lower, of.backward))
    names = [f"{of.network} {'backward' if of.backward else 'forward'}{' (lower)' if of.lower else ''}" for of in kinds]
    warmup, upper = ([counts[of] for of in kinds] for counts in (search.warmup, search.upper))
    days = {key: value / DAY for key, value in search.seconds(networks).items()}
    splits = [
        [part, num, days[part, "teacher"], days[part, "student"], days[part, "teacher"] + days[part, "student"]]
        for part, num in (("warm-up", search.warmup_rounds), ("rest", search.rounds - search.warmup_rounds))
    ]
    memory = search.mebibytes(networks)
    scaled = []
    for processes in PROCESSES:
        own = search.mebibytes(networks, processes)
        total = sum(search.seconds(networks, processes).values())
        scaled.append([processes, total / DAY, sum(own.values()) / MEBI if own else "-"])
    return "\n".join(
        [
            *table(["network", "images", "forward, s", "forward + backward, s", "peak, MiB"], measured),
            *table(
                ["network", "GMAC", "GFLOP/s forward", "forward, ms an image", "backward, ms an image", "MiB an image"],
                fitted,
            ),
            *table(["passes in a round", *names], [["warm-up", *warmup], ["rest", *upper]]),
            *table(["part", "rounds", "teacher, days", "student, days", "both, days"], splits),
            *(table(["memory", "GiB"], [[k, v / MEBI] for k, v in memory.items()]) if memory else []),
            *table(["processes", "days, ideally", "GiB each"], scaled),
        ]
    )
