import itertools

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.patches import PathPatch
from torch import nn

import mlo
from mlo.drawing import DETACHED, DOWN, UP, describe_graph, draw_graph, graph_figure
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


class Estimator(mlo.Hypergradient):
    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return self.text

    def pullback(self, *arguments, **options):
        raise NotImplementedError


def level(name, size=2, **options):
    module = nn.Linear(size, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.025)
    return mlo.Problem(name, module, lambda levels, batch: torch.zeros(()), optimizer, None, **options)


def learning_by_teaching():
    teacher = level("teacher", 1200, hypergradient=Estimator("Unroll(last=2)"), steps=3)
    student = level("student", hypergradient=Estimator("Implicit($a$ <b> & c)"))
    edges = [
        ("architecture", "teacher"),
        ("teacher", "student"),
        ("teacher", "architecture"),
        ("student", "architecture"),
    ]
    return mlo.Graph(
        [teacher, student, level("architecture")],
        [*(mlo.Edge(*edge) for edge in edges), mlo.Edge("architecture", "student", detached=True)],
    )


def complete(num_levels, detached=()):
    names = [f"level_{index}" for index in range(num_levels)]
    edges = [mlo.Edge(*edge, detached=edge in detached) for edge in itertools.permutations(names, 2)]
    return mlo.Graph([level(name) for name in names], edges)


GRAPHS = {
    "one": lambda: complete(1),
    "two": lambda: complete(2),
    "lbt": learning_by_teaching,
    "chain": lambda: mlo.Graph(
        [level(name) for name in "abcd"], [mlo.Edge(*edge) for edge in ("ab", "bc", "cd", "da")]
    ),
    "long names": lambda: mlo.Graph(
        [level("a" * 60, hypergradient=Estimator("Long(" + "option=1, " * 30 + ")")), level("b")],
        [mlo.Edge("a" * 60, "b"), mlo.Edge("b", "a" * 60)],
    ),
    "six": lambda: complete(6, detached=[("level_0", "level_4"), ("level_5", "level_1")]),
    "eight": lambda: complete(8),
}


def test_a_graph_is_described_from_the_highest_level_down():
    assert describe_graph(learning_by_teaching()) == (
        "3 levels, 5 edges, highest level first\n"
        "\n"
        "architecture\n"
        "  module         Linear, 3 trainable weights\n"
        "  optimizer      SGD, learning rate 0.025\n"
        "  steps          1\n"
        "  best response  top level\n"
        "  reads          teacher, student\n"
        "  solves inside  teacher, student\n"
        "\n"
        "student\n"
        "  module         Linear, 3 trainable weights\n"
        "  optimizer      SGD, learning rate 0.025\n"
        "  steps          1\n"
        "  best response  Implicit($a$ <b> & c)\n"
        "  reads          teacher, architecture (detached)\n"
        "  solves inside  nothing\n"
        "\n"
        "teacher\n"
        "  module         Linear, 1,201 trainable weights\n"
        "  optimizer      SGD, learning rate 0.025\n"
        "  steps          3\n"
        "  best response  Unroll(last=2)\n"
        "  reads          architecture\n"
        "  solves inside  nothing"
    )


def test_weights_are_counted_and_learning_rates_listed_once():
    net = nn.Sequential(nn.Linear(3, 1), nn.Linear(4, 1), nn.Linear(5, 1))
    net[2].requires_grad_(False)
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[1].parameters(), "lr": torch.tensor(0.5)}]
    optimizer = torch.optim.SGD([*groups, {"params": net[2].parameters(), "lr": 0.1}])
    text = describe_graph(mlo.Graph([mlo.Problem("net", net, lambda levels, batch: torch.zeros(()), optimizer, None)]))
    assert text.startswith("1 level, 0 edges")
    assert "Sequential, 9 trainable weights" in text
    assert "learning rate 0.1, 0.5\n" in text


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_is_hidden(name):
    graph = GRAPHS[name]()
    figure = graph_figure(graph)
    texts, boxes, lines = text_boxes(figure), rounded_boxes(figure), curves(figure)
    assert [text for text, _ in texts if text in {level.name for level in graph.levels}] == [
        p.name for p in graph.levels
    ]
    assert overlapping(texts) == []
    assert outside(figure, texts) == []
    assert overlapping([(str(index), box) for index, box in enumerate(boxes)]) == []
    assert all(low.y1 < high.y0 for low, high in itertools.pairwise(boxes))
    kinds = len({(edge.detached, not edge.detached and edge.source < edge.target) for edge in graph.edges})
    assert len(lines) == len(graph.edges) + kinds
    for line in lines:
        assert not any(is_crossed(box, line) for box in [*boxes, *(box for _, box in texts)])


@pytest.mark.parametrize("name", ["lbt", "chain", "six"])
def test_arcs_meet_at_crossings_only(name):
    lines = [points[::4] for points in curves(graph_figure(GRAPHS[name]()))]
    for one, other in itertools.combinations(lines, 2):
        distance = np.hypot(*(one[:, None] - other[None]).transpose(2, 0, 1)).min(axis=1)
        near = (distance < 0.05).sum() * 0.04
        assert near < 0.3


def test_an_edge_leads_from_its_source_to_its_target_in_its_colour():
    figure = graph_figure(complete(3, detached=[("level_0", "level_1")]))
    low, _, high = rounded_boxes(figure)
    lines = [patch for patch in figure.axes[0].patches if isinstance(patch, PathPatch)]
    found = {}
    for line, points in zip(lines, curves(figure), strict=True):
        found.setdefault(line.get_edgecolor(), []).append((line.get_linestyle() not in {"-", "solid"}, points))
    up, down, detached = (found[to_rgba(color)] for color in (UP, DOWN, DETACHED))
    # One edge each way passes the middle level; the legend adds a line of each kind.
    assert [len(kind) for kind in (up, down, detached)] == [2 + 1, 3 + 1, 1 + 1]
    (arc,) = (points for _, points in up if points[:, 0].max() > low.x1 + 0.1)
    assert arc[0] == pytest.approx((low.x1, (low.y0 + low.y1) / 2))
    assert arc[-1] == pytest.approx((high.x1, (high.y0 + high.y1) / 2), abs=0.1)
    (arc,) = (points for _, points in down if points[:, 0].min() < low.x0 - 0.1 and len(points) > 100)
    assert arc[0] == pytest.approx((high.x0, (high.y0 + high.y1) / 2))
    assert {dashed for dashed, _ in detached} == {True}
    assert {dashed for dashed, _ in up + down} == {False}


@pytest.mark.parametrize("name", ["one", "lbt"])
def test_a_picture_is_written(tmp_path, name):
    draw_graph(GRAPHS[name](), tmp_path / "graph.png")
    assert_is_drawn(tmp_path / "graph.png")
    draw_graph(GRAPHS[name](), tmp_path / "graph.svg")
    draw_graph(GRAPHS[name](), tmp_path / "again.svg")
    assert (tmp_path / "graph.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    expected = [text for text, _ in text_boxes(graph_figure(GRAPHS[name]()))]
    assert sorted(svg_texts(tmp_path / "graph.svg")) == sorted(expected)


def test_text_is_not_read_as_mathematics_or_markup(tmp_path):
    draw_graph(learning_by_teaching(), tmp_path / "graph.svg")
    assert "Implicit($a$ <b> & c)" in svg_texts(tmp_path / "graph.svg")


def test_the_description_tells_of_starts_options_and_micro_batches():
    task = level("task", start="initial", hyperparameters={"lr": lambda levels: levels.initial.weight}, micro_batches=4)
    edges = [mlo.Edge("initial", "task"), mlo.Edge("task", "initial")]
    text = describe_graph(mlo.Graph([task, level("initial")], edges))
    upper, lower = text.split("\n\n")[1:]
    assert [" ".join(line.split()) for line in lower.splitlines()[-3:]] == [
        "starts at initial",
        "set by others lr",
        "micro-batches 4",
    ]
    assert not any(word in upper for word in ("starts at", "set by others", "micro-batches"))
