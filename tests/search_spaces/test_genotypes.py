import json
from dataclasses import FrozenInstanceError, replace

import pytest

from problems.search_spaces.genotypes import PUBLISHED, Genotype

EDGES = (("sep_conv_3x3", 0), ("skip_connect", 1), ("max_pool_3x3", 0), ("dil_conv_5x5", 2))
SMALL = Genotype(normal=EDGES, normal_concat=(2, 3), reduce=EDGES, reduce_concat=(3,))


def test_the_published_names():
    assert list(PUBLISHED) == [
        "DARTS_V1",
        "DARTS_V2",
        "PDARTS",
        "PC_DARTS_cifar",
        "PC_DARTS_image",
        "NASNet",
        "AmoebaNet",
    ]


def test_a_published_genotype_is_the_published_one():
    genotype = PUBLISHED["DARTS_V2"]
    assert genotype.normal == (
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("skip_connect", 0),
        ("dil_conv_3x3", 2),
    )
    assert PUBLISHED["AmoebaNet"].normal_concat == (4, 5, 6)
    assert PUBLISHED["NASNet"].reduce_concat == (4, 5, 6)


def test_genotypes_are_immutable_and_hashable():
    with pytest.raises(FrozenInstanceError):
        SMALL.normal = ()
    with pytest.raises(TypeError):
        PUBLISHED["mine"] = SMALL
    assert len(set(PUBLISHED.values())) == 7


@pytest.mark.parametrize("genotype", [SMALL, *PUBLISHED.values()])
def test_json_round_trip(genotype):
    assert Genotype.from_json(json.loads(json.dumps(genotype.to_json()))) == genotype


def test_json_is_plain():
    assert SMALL.to_json()["reduce"] == [
        ["sep_conv_3x3", 0],
        ["skip_connect", 1],
        ["max_pool_3x3", 0],
        ["dil_conv_5x5", 2],
    ]
    assert SMALL.to_json()["reduce_concat"] == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normal": ()}, "normal: expected two edges for each node, got 0 edges"),
        ({"reduce": EDGES[:3]}, "reduce: expected two edges for each node, got 3 edges"),
        (
            {"normal": (*EDGES[:3], ("dil_conv_4x4", 1))},
            r"normal, edge 3 into node 3: unknown primitive 'dil_conv_4x4': did you mean 'dil_conv_5x5'",
        ),
        (
            {"reduce": (*EDGES[:3], ("dil_conv_5x5", 3))},
            "reduce, edge 3 into node 3: expected a source node from 0 to 2, got 3",
        ),
        ({"normal": (("skip_connect", -1), *EDGES[1:])}, "normal, edge 0 into node 2: .* from 0 to 1, got -1"),
        ({"normal_concat": ()}, r"normal_concat: expected distinct nodes from 2 to 3, got \(\)"),
        ({"reduce_concat": (2, 2)}, r"reduce_concat: expected distinct nodes from 2 to 3, got \(2, 2\)"),
        ({"reduce_concat": (1, 2)}, "reduce_concat: expected distinct nodes from 2 to 3"),
        ({"normal_concat": (3, 4)}, "normal_concat: expected distinct nodes from 2 to 3"),
    ],
)
def test_what_is_no_cell_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normal": "sep_conv_3x3"}, "normal: expected a list of"),
        ({"normal": [["sep_conv_3x3"]]}, "normal: expected a list of"),
        ({"reduce": [["sep_conv_3x3", "0"], ["skip_connect", 1]]}, "reduce: expected a list of"),
        ({"reduce": [["sep_conv_3x3", True], ["skip_connect", 1]]}, "reduce: expected a list of"),
        ({"normal_concat": 2}, "normal_concat: expected a list of nodes, got 2"),
        ({"reduce_concat": [2.0]}, r"reduce_concat: expected a list of nodes, got \[2.0\]"),
        ({"extra": []}, "fields normal, normal_concat, reduce, reduce_concat; got .*extra"),
    ],
)
def test_json_of_another_form_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Genotype.from_json({**SMALL.to_json(), **change})


def test_json_without_fields_is_refused():
    with pytest.raises(ValueError, match="got none"):
        Genotype.from_json({})
