"""The cost of one hypergradient is linear in the levels and edges, not in the paths through the graph."""

import time
from collections import Counter

import pytest

import mlo

from .diamonds import Diamonds
from .quadratics import relative_error


class Counted(mlo.Hypergradient):
    """Unrolls, and counts its pullbacks."""

    def __init__(self):
        self.calls = Counter()

    def pullback(self, cotangent, response):
        self.calls[response.level] += 1
        return mlo.Unroll().pullback(cotangent, response)


def counts(num):
    """How often each lower level's loss and pullback are called in one hypergradient, and the top's loss."""
    diamonds = Diamonds(num, Counted())
    engine = diamonds.engine()
    structure = engine.graph.structure
    assert [name for name, inside in structure.inside.items() if inside] == ["top"]
    assert set(structure.inside["top"]) == set(diamonds.lower)
    engine.hypergradient("top")
    diamonds.losses.clear()  # the first one also traces what each loss reads
    diamonds.estimator.calls.clear()
    engine.hypergradient("top")
    top = diamonds.losses.pop("top")
    return diamonds.losses, diamonds.estimator.calls, top


def test_the_number_of_calls_is_linear_in_the_levels():
    each = set()
    for num in (4, 16, 64):
        losses, pullbacks, top = counts(num)
        assert len(losses) == len(pullbacks) == 3 * num
        assert set(pullbacks.values()) == {1}
        assert top == 1
        each |= set(losses.values())
    assert each == {2}  # one call for the step, one for the products with all that the level reads


def test_the_time_is_linear_in_the_levels():
    """Time of the processor, best of three, taken in turns: other processes matter less."""
    engines = {num: Diamonds(num, Counted()).engine() for num in (16, 64)}
    taken = {num: [] for num in engines}
    for _ in range(4):
        for num, engine in engines.items():
            start = time.process_time()
            engine.hypergradient("top")
            taken[num].append(time.process_time() - start)
    fewer, more = (min(times[1:]) for times in taken.values())  # the first also traces what each loss reads
    assert more / fewer < 4 * 1.8


@pytest.mark.parametrize("num", [1, 8])
def test_every_path_counts(num):
    diamonds = Diamonds(num, Counted())
    assert relative_error(diamonds.engine().hypergradient("top")["w"], diamonds.exact()) < 1e-9
