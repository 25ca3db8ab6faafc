"""Measure methods that do the same work, in turns, so that whatever disturbs the machine disturbs them all alike.

A method is prepared for a size, warmed up, and then timed A B C A B C ...; each of the methods gets the machine under
the same conditions within a turn, which is why their ratio is taken turn by turn.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

Work = Callable[[int], object]
"""`work(num)` does `num` units of work, whatever a unit is in the benchmark."""


@dataclass(frozen=True)
class Method:
    """One way to do the work of a benchmark.

    Attributes:
        name: in tables and pictures.
        library: the one that must be installed, as in `tests.benchmarks.accuracy.DISTRIBUTIONS`; "" for torch alone.
        prepare: a function of the module's top level that builds everything for a size; called in other processes too.
        note: how it differs from the others.
    """

    name: str
    library: str
    prepare: Callable[[int], Work]
    note: str = ""


@dataclass
class Measured:
    """What one method took at one size.

    Attributes:
        method: its name.
        size: of the problem.
        seconds: for one unit of work, one entry a turn.
        mebibytes: peak of the process above what it held before, or None if that was not measured.
        error: why there is no time; "" if there is one.
    """

    method: str
    size: int
    seconds: list[float] = field(default_factory=list)
    mebibytes: float | None = None
    error: str = ""

    @property
    def median(self) -> float:
        """Seconds for one unit of work."""
        return statistics.median(self.seconds)

    def ratios(self, base: Measured) -> list[float]:
        """Its time over that of another method, turn by turn."""
        return [own / other for own, other in zip(self.seconds, base.seconds, strict=True)]


def guarded(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Return (result, "") or (None, what was raised). Warnings of other libraries are silenced."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*arguments), ""
    except Exception as error:  # noqa: BLE001 - whatever a library raises is the result
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave all that is there now out of the collections within the block, which take long in a big process."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(work: Work, num: int) -> float:
    """Return the seconds of one unit of work; garbage of others is collected before."""
    gc.collect()
    start = time.perf_counter()
    work(num)
    return (time.perf_counter() - start) / num


def measure(
    methods: Iterable[Method],
    sizes: Sequence[int] = (0,),
    *,
    repeats: int,
    num: Callable[[int], int] = lambda _: 1,
    cap: float = float("inf"),
) -> list[Measured]:
    """Time all methods at all sizes, in turns, after one warm-up each.

    Args:
        methods: who takes part.
        sizes: in ascending order.
        repeats: turns at each size.
        num: units of work a turn, by size.
        cap: a method leaves when its next size would take more than so many seconds for a unit of work, if its time
            grows once more as it has just grown.
    """
    torch.set_num_threads(1)
    found: list[Measured] = []
    left: dict[str, str] = {}
    last: dict[str, float] = {}
    for size in sizes:
        works: dict[str, tuple[Work, Measured]] = {}
        for method in methods:
            own = Measured(method.name, size, error=left.get(method.name, ""))
            found.append(own)
            if not own.error:
                work, own.error = guarded(method.prepare, size)
                if not own.error:
                    _, own.error = guarded(work, max(1, num(size) // 4))  # the warm-up
                if not own.error:
                    works[method.name] = (work, own)
        with uncollected():
            for _ in range(repeats):
                for work, own in works.values():
                    seconds, error = guarded(timed, work, num(size))
                    own.error = own.error or error
                    if not error:
                        own.seconds.append(seconds)
        for name, (_, own) in works.items():
            told = own.error or f"{1000 * own.median:.4g} ms"
            print(f"{name}, size {size}: {told}", file=sys.stderr, flush=True)
            if own.error:
                continue
            growth = max(own.median / last.get(name, own.median), 1.0)
            last[name] = own.median
            if own.median * growth > cap:
                left[name] = f"left out: more than {cap:g} s to be expected"
    return found


def of(found: Iterable[Measured], method: str, size: int) -> Measured:
    """Return what was measured of a method at a size."""
    return next(one for one in found if one.method == method and one.size == size)
