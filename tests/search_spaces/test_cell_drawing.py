import itertools

import numpy as np
import pytest

from mlo.errors import MloError
from problems.search_spaces.cell_layout import lay_out
from problems.search_spaces.drawing import alphas_figure, cell_figure, draw_alphas, draw_cell
from problems.search_spaces.genotypes import PUBLISHED
from tests.pictures import (
    assert_is_drawn,
    curves,
    is_crossed,
    outside,
    overlapping,
    rounded_boxes,
    svg_texts,
    text_boxes,
)

CELLS = {
    f"{name} {kind}": (getattr(genotype, kind), getattr(genotype, f"{kind}_concat"))
    for name, genotype in PUBLISHED.items()
    for kind in ("normal", "reduce")
}
PRIMITIVES = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3")


@pytest.mark.parametrize("name", CELLS)
def test_nothing_is_hidden_in_a_published_cell(name):
    edges, concat = CELLS[name]
    figure = cell_figure(edges, concat, name)
    texts, boxes, lines = text_boxes(figure), rounded_boxes(figure), curves(figure)
    assert sorted(text for text, _ in texts) == sorted(
        [name, "$c_{k-2}$", "$c_{k-1}$", "$c_k$", *(primitive for primitive, _ in edges)]
        + [str(node + 2) for node in range(len(edges) // 2)]
    )
    assert overlapping(texts) == []
    assert outside(figure, texts) == []
    assert overlapping([(str(index), box) for index, box in enumerate(boxes)]) == []
    assert len(boxes) == len(texts) - 1
    assert len(lines) == len(edges) + len(concat)
    # A line runs behind one box, that of its own operation, and through no other; to the output it runs through none.
    for index, line in enumerate(lines):
        assert sum(is_crossed(box, line) for box in boxes) == (index < len(edges))
        assert not is_crossed(dict(texts)[name], line)


def test_lines_lead_from_left_to_right_and_the_first_input_is_on_top():
    edges, concat = CELLS["AmoebaNet reduce"]
    sources = [source for _, source in edges]
    layout = lay_out(sources, concat, terminal=(0.6, 0.4), node=(0.4, 0.4), operation=(1.0, 0.25))
    assert [item.index for item in layout.columns[0]] == [0, 1]
    columns = {id(item): index for index, column in enumerate(layout.columns) for item in column}
    for edge, line in enumerate(layout.lines[: len(edges)]):
        assert (line[0].index, line[-1].index) == (sources[edge], edge // 2 + 2)
        assert line[-2].kind == "operation"
        assert line[-2].index == edge
    for line in layout.lines:
        steps = np.diff([columns[id(item)] for item in line])
        assert (steps == 1).all()
    assert [line[0].index for line in layout.lines[len(edges) :]] == list(concat)
    assert min(item.y - item.height / 2 for column in layout.columns for item in column) == 0.0
    assert max(item.y + item.height / 2 for column in layout.columns for item in column) == layout.height


@pytest.mark.parametrize(
    ("name", "fewest"),
    [("DARTS_V2 normal", 3), ("PC_DARTS_image normal", 1), ("NASNet normal", 1), ("AmoebaNet reduce", 4)],
)
def test_lines_cross_as_seldom_as_a_long_search_finds(name, fewest):
    edges, concat = CELLS[name]
    sizes = {"terminal": (0.6, 0.4), "node": (0.4, 0.4), "operation": (1.0, 0.25)}
    layout = lay_out([source for _, source in edges], concat, **sizes)
    crossings = 0
    for left, right in itertools.pairwise(layout.columns):
        steps = [(left.index(item), right.index(target)) for item in left for target in item.after]
        crossings += sum((a - c) * (b - d) < 0 for (a, b), (c, d) in itertools.combinations(steps, 2))
    assert crossings <= fewest


def test_unused_inputs_and_nodes_are_drawn_too():
    figure = cell_figure([("skip_connect", 0), ("other", 0), ("none", 0), ("dil_conv_3x3", 0)], [2], "")
    assert {"$c_{k-1}$", "3", "other"} <= {text for text, _ in text_boxes(figure)}
    assert overlapping([(str(index), box) for index, box in enumerate(rounded_boxes(figure))]) == []


def test_a_cell_is_written(tmp_path):
    edges, concat = CELLS["DARTS_V2 normal"]
    for name in ("one.svg", "two.svg", "one.png"):
        draw_cell(edges, concat, tmp_path / name, "Cell <of> $5$")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert_is_drawn(tmp_path / "one.png")
    texts = svg_texts(tmp_path / "one.svg")
    assert texts.count("sep_conv_3x3") == 5
    assert {"Cell <of> $5$", "skip_connect", "dil_conv_3x3", "2", "3", "4", "5"} <= set(texts)


def weights(seed, num_edges=5):
    logits = np.random.default_rng(seed).normal(size=(num_edges, len(PRIMITIVES)))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("changes", [False, True])
def test_every_weight_can_be_read(changes):
    probabilities = {"normal": weights(0), "reduce": weights(1, num_edges=9)}
    initial = {"normal": weights(2), "reduce": weights(3, num_edges=9)} if changes else None
    figure = alphas_figure(probabilities, PRIMITIVES, initial)
    texts = text_boxes(figure)
    assert overlapping(texts) == []
    assert outside(figure, texts) == []
    found = [text for text, _ in texts]
    for primitive in PRIMITIVES:
        assert found.count(primitive) == 2
    assert [text for text in found if "→" in text] == [
        *["0→2", "1→2", "0→3", "1→3", "2→3"],
        *["0→2", "1→2", "0→3", "1→3", "2→3", "0→4", "1→4", "2→4", "3→4"],
    ]
    for name, cell in probabilities.items():
        assert f"{name} cell" in found
        assert {f"{100 * weight:.1f}" for weight in cell.flat} <= set(found)
        if changes:
            points = 100 * (cell - initial[name])
            assert {f"{np.round(point, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}") for point in points.flat} <= set(
                found
            )


def test_cells_share_one_scale_of_colours_that_spans_their_weights():
    probabilities = {"normal": weights(0), "reduce": weights(1)}
    meshes = [mesh for axes in alphas_figure(probabilities, PRIMITIVES).axes[1:3] for mesh in axes.collections[:1]]
    values = 100 * np.stack(list(probabilities.values()))
    assert [mesh.get_clim() for mesh in meshes] == [pytest.approx((values.min(), values.max()))] * 2
    np.testing.assert_allclose(meshes[1].get_array(), values[1].T)


def test_heat_maps_are_written(tmp_path):
    for name in ("one.svg", "two.svg", "one.png"):
        draw_alphas(tmp_path / name, {"normal": np.full((2, 4), 0.25)}, PRIMITIVES)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert svg_texts(tmp_path / "one.svg").count("25.0") == 8
    assert_is_drawn(tmp_path / "one.png")


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (5,)])
def test_weights_of_another_shape_are_refused(shape):
    with pytest.raises(MloError, match=r"'normal' to have shape .* Got \("):
        alphas_figure({"normal": np.ones(shape)}, PRIMITIVES)


def test_a_primitive_that_an_edge_lacks_has_an_empty_tile(tmp_path):
    weights = np.array([[0.4, np.nan, 0.6, np.nan], [np.nan, 0.3, 0.5, 0.2]])
    figure = alphas_figure({"normal": weights}, PRIMITIVES, {"normal": weights})
    texts = [text.get_text() for axes in figure.axes[1:2] for text in axes.texts]
    assert [text for text in texts if "." in text and text[0] not in "+\N{MINUS SIGN}"] == [
        "40.0", "60.0", "30.0", "50.0", "20.0",
    ]  # fmt: skip
    draw_alphas(tmp_path / "alphas.png", {"normal": weights}, PRIMITIVES)
