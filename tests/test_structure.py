"""Who is solved inside whom."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlo.structure import Structure


def complete(n):
    names = [str(i) for i in range(n)]
    return Structure(names, [(a, b) for a in names for b in names if a != b])


def test_a_complete_nest():
    nest = complete(4)
    assert nest.inside == {"0": (), "1": ("0",), "2": ("0", "1"), "3": ("0", "1", "2")}
    assert nest.responds_to == {"0": ("1", "2", "3"), "1": ("2", "3"), "2": ("3",), "3": ()}
    assert nest.members["3"] == ("2",)
    assert nest.sweep_order["3"] == ("0", "1", "2")
    assert nest.tops == ("3",)


def test_a_diamond():
    edges = [("3", "0"), ("0", "1"), ("3", "1"), ("0", "2"), ("3", "2"), ("1", "3"), ("2", "3")]
    diamond = Structure("0123", edges)
    assert diamond.inside["3"] == ("0", "1", "2")
    assert diamond.members["3"] == ("0", "1", "2")
    assert diamond.responds_to["1"] == ("0", "3")
    assert diamond.sweep_order["3"].index("0") == 2


def test_levels_that_do_not_read_upwards_are_tops():
    chain = Structure("012", [("0", "1"), ("1", "2"), ("2", "1")])
    assert chain.tops == ("0", "2")
    assert chain.inside["2"] == ("1",)
    assert chain.responds_to["1"] == ("0", "2")


graphs = st.integers(2, 6).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))))
)


@settings(max_examples=200, deadline=None)
@given(graphs)
def test_the_laws_of_the_design(case):
    n, pairs = case
    names = [str(i) for i in range(n)]
    structure = Structure(names, [(str(a), str(b)) for a, b in pairs if a != b])
    for p in names:
        inside = structure.inside[p]
        assert all(int(q) < int(p) for q in inside)
        assert set(inside) == {m for q in structure.members[p] for m in (q, *structure.inside[q])}
        assert not set(structure.responds_to[p]) & {p, *inside}
        order = structure.sweep_order[p]
        assert sorted(order) == sorted(inside)
        for i, q in enumerate(order):  # each before the levels that it responds to
            assert not set(structure.responds_to[q]) & set(order[:i])
    everyone = {m for q in structure.tops for m in (q, *structure.inside[q])}
    assert everyone == set(names)


def test_the_order_of_edges_does_not_matter():
    edges = [("2", "0"), ("0", "1"), ("1", "2"), ("2", "1")]
    one, other = Structure("012", edges), Structure("012", list(reversed(edges)))
    assert one.sweep_order == other.sweep_order
    assert one.responds_to == other.responds_to


@pytest.mark.parametrize("length", [1, 8])
def test_chains_of_diamonds_have_each_level_once_in_the_sweep(length):
    names, edges = ["s0"], []
    for i in range(length):
        names += [f"a{i}", f"b{i}", f"s{i + 1}"]
        edges += [(f"s{i}", f"a{i}"), (f"s{i}", f"b{i}"), (f"a{i}", f"s{i + 1}"), (f"b{i}", f"s{i + 1}")]
    names.append("top")
    edges += [("top", "s0"), (f"s{length}", "top")]
    structure = Structure(names, edges)
    assert sorted(structure.sweep_order["top"]) == sorted(names[:-1])
