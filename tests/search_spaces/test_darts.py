from collections import Counter

import pytest
import torch

from problems.search_spaces.darts import (
    DARTS,
    DARTS_PRIMITIVES,
    CellWeights,
    SearchSpace,
    discretize,
    random_genotype,
)

NONE, MAX, AVERAGE, SKIP, SEP3, SEP5, DIL3, DIL5 = range(8)
TWO_NODES = SearchSpace.uniform(num_nodes=2)


def weights(space: SearchSpace, *entries: tuple[int, int, float]) -> CellWeights:
    """Weights of 0.1 but for (edge, primitive, weight); the same for both cells."""
    cell = torch.full(space.normal_shape, 0.1)
    for edge, primitive, weight in entries:
        cell[edge, primitive] = weight
    return CellWeights(cell, cell.clone())


def test_the_primitives_in_the_published_order():
    assert DARTS_PRIMITIVES == (
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    )


def test_the_space_of_darts():
    assert DARTS.num_nodes == 4
    assert DARTS.normal_shape == DARTS.reduce_shape == (14, 8)
    assert SearchSpace.uniform(num_nodes=2).normal_shape == (5, 8)


def test_each_node_keeps_its_two_strongest_edges_and_their_best_primitive():
    # Node 2 has edges 0, 1; node 3 has edges 2, 3, 4, from nodes 0, 1, 2.
    found = discretize(
        weights(
            TWO_NODES, (0, SEP3, 0.4), (0, MAX, 0.3), (1, SKIP, 0.5), (2, DIL3, 0.3), (3, DIL5, 0.2), (4, SEP5, 0.6)
        ),
        TWO_NODES,
    )
    assert found.normal == (("skip_connect", 1), ("sep_conv_3x3", 0), ("sep_conv_5x5", 2), ("dil_conv_3x3", 0))
    assert found.reduce == found.normal
    assert found.normal_concat == found.reduce_concat == (2, 3)


def test_none_counts_neither_for_an_edge_nor_for_its_primitive():
    found = discretize(weights(TWO_NODES, (2, NONE, 0.9), (2, MAX, 0.2), (3, SEP3, 0.3), (4, AVERAGE, 0.4)), TWO_NODES)
    assert found.normal[2:] == (("avg_pool_3x3", 2), ("sep_conv_3x3", 1))


def test_ties_go_to_the_lower_source_and_the_earlier_primitive():
    found = discretize(weights(TWO_NODES, (4, DIL5, 0.1)), TWO_NODES)
    assert found.normal == (("max_pool_3x3", 0), ("max_pool_3x3", 1)) * 2


def test_normal_and_reduction_cells_are_read_separately():
    found = discretize(
        CellWeights(weights(DARTS, (13, SKIP, 0.9)).normal, weights(DARTS, (0, DIL3, 0.9)).reduce), DARTS
    )
    assert found.normal[6:] == (("skip_connect", 4), ("max_pool_3x3", 0))
    assert found.reduce[:2] == (("dil_conv_3x3", 0), ("max_pool_3x3", 1))
    assert found.normal_concat == (2, 3, 4, 5)


def test_the_order_is_by_softmax_weight_not_by_alpha():
    # Edge 0 has the larger alpha, but shares its weight with another primitive and loses.
    alpha = torch.zeros(5, 8)
    alpha[2, SEP3] = alpha[2, SEP5] = 3.0
    alpha[3, SKIP] = 2.9
    alpha[4, MAX] = 2.8
    found = discretize(CellWeights(alpha.softmax(1), alpha.softmax(1)), TWO_NODES)
    assert found.normal[2:] == (("skip_connect", 1), ("max_pool_3x3", 2))


def test_edges_with_primitives_of_their_own():
    space = SearchSpace(
        normal=(("none", "skip_connect"), ("sep_conv_3x3", "dil_conv_5x5")),
        reduce=(("max_pool_3x3",), ("avg_pool_3x3",)),
    )
    cell = CellWeights(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.ones(2, 1))
    found = discretize(cell, space)
    assert found.normal == (("dil_conv_5x5", 1), ("skip_connect", 0))
    assert found.reduce == (("max_pool_3x3", 0), ("avg_pool_3x3", 1))


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"weights.normal: expected \(edges, primitives\) = \(14, 8\), got \(5, 8\)"):
        discretize(weights(TWO_NODES), DARTS)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"weights\.reduce: expected finite numbers"):
        discretize(weights(DARTS)._replace(reduce=torch.full((14, 8), float("nan"))))


@pytest.mark.parametrize(
    ("normal", "reduce", "message"),
    [
        ((("skip_connect",),) * 3, (("skip_connect",),) * 3, "got 3"),
        ((("skip_connect",),) * 2, (("skip_connect",),) * 5, "got 2 in normal, 5 in reduce"),
        (
            (("skip_connect",), ("none", "skip_connect")),
            (),
            "normal, edge 1: expected 1 primitives, as on edge 0, got 2",
        ),
        ((("skip_conect",),) * 2, (), "unknown primitive 'skip_conect': did you mean 'skip_connect'"),
        ((("skip_connect", "skip_connect"),) * 2, (), "normal, edge 0: a primitive is repeated"),
        ((("none",),) * 2, (), "normal, edge 0: expected at least one primitive besides none"),
        (((),) * 2, (), "normal, edge 0: expected at least one primitive besides none"),
        ((("skip_connect",),) * 2, (), "got 0"),
    ],
)
def test_what_is_no_search_space_is_refused(normal, reduce, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(normal, reduce)


def test_a_space_without_nodes_is_refused():
    with pytest.raises(ValueError, match="num_nodes >= 1, got 0"):
        SearchSpace.uniform(num_nodes=0)


def test_random_genotypes_are_cells_of_the_space_and_repeat_with_the_seed():
    generator = torch.Generator().manual_seed(3)
    drawn = [random_genotype(generator) for _ in range(20)]
    for genotype in drawn:
        for cell in (genotype.normal, genotype.reduce):
            assert len(cell) == 8
            assert all(name in DARTS_PRIMITIVES[1:] for name, _ in cell)
            assert all(cell[2 * node][1] < cell[2 * node + 1][1] <= node + 1 for node in range(4))
        assert genotype.normal_concat == genotype.reduce_concat == (2, 3, 4, 5)
    assert len(set(drawn)) == 20
    generator.manual_seed(3)
    assert [random_genotype(generator) for _ in range(20)] == drawn


def test_random_genotypes_do_not_touch_the_global_generator():
    before = torch.get_rng_state()
    random_genotype(torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_genotypes_are_uniform():
    generator = torch.Generator().manual_seed(0)
    num_draws = 600
    nodes = [random_genotype(generator, TWO_NODES).reduce[2:] for _ in range(num_draws)]
    pairs = Counter((first[1], second[1]) for first, second in nodes)
    names = Counter(name for node in nodes for name, _ in node)
    # Five standard deviations of a binomial count.
    assert set(pairs) == {(0, 1), (0, 2), (1, 2)}
    assert all(abs(count - num_draws / 3) < 5 * (num_draws * 2 / 9) ** 0.5 for count in pairs.values())
    assert set(names) == set(DARTS_PRIMITIVES[1:])
    assert all(abs(count - 2 * num_draws / 7) < 5 * (2 * num_draws * 6 / 49) ** 0.5 for count in names.values())


def test_random_genotypes_of_edges_with_primitives_of_their_own():
    space = SearchSpace((("none", "skip_connect"), ("none", "max_pool_3x3")), (("avg_pool_3x3",), ("dil_conv_3x3",)))
    genotype = random_genotype(torch.Generator().manual_seed(0), space)
    assert genotype.normal == (("skip_connect", 0), ("max_pool_3x3", 1))
    assert genotype.reduce == (("avg_pool_3x3", 0), ("dil_conv_3x3", 1))
