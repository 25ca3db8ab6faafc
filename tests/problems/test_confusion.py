import csv

import numpy as np
import pytest

from mlo.errors import MloError
from problems.confusion import confusion_figure, draw_confusion, write_confusion
from tests.pictures import assert_is_drawn, outside, overlapping, svg_texts, text_boxes

SMALL = [[8, 2, 0], [0, 5, 0], [1, 0, 3]]


def matrix_of(num_classes, count=900):
    counts = np.diag(np.full(num_classes, count))
    counts[0, -1] += 40
    return counts.tolist()


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "$"]


@pytest.mark.parametrize(
    ("num_classes", "names"), [(2, None), (10, None), (10, NAMES), (20, None), (21, None), (100, None), (1000, None)]
)
def test_a_matrix_can_be_read(num_classes, names):
    figure = confusion_figure(matrix_of(num_classes), names)
    texts = text_boxes(figure)
    assert overlapping(texts) == []
    assert outside(figure, texts) == []
    found = {text for text, _ in texts}
    assert {"predicted class", "true class", "100%"} <= found
    assert ("900" in found) == (num_classes <= 20)
    assert set(names or ()) <= found
    assert max(figure.get_size_inches()) < 12


def test_tiles_hold_the_counts_and_their_shade_is_the_part_of_the_row():
    figure = confusion_figure(SMALL, ["a", "b", "c"])
    axes = figure.axes[0]
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), [[80, 20, 0], [0, 100, 0], [25, 0, 75]])
    tiles = {text.get_position(): text.get_text() for text in axes.texts}
    assert [[tiles[column, row] for column in range(3)] for row in range(3)] == [
        ["8", "2", "·"],
        ["·", "5", "·"],
        ["1", "·", "3"],
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_a_class_without_images_has_no_part():
    (image,) = confusion_figure([[0, 0], [1, 1]]).axes[0].images
    np.testing.assert_array_equal(image.get_array(), [[0, 0], [50, 50]])


def test_pictures_and_table_are_written(tmp_path):
    for name in ("one.svg", "two.svg", "one.png"):
        draw_confusion(tmp_path / name, matrix_of(10))
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert {"Confusion matrix", "900", "40"} <= set(svg_texts(tmp_path / "one.svg"))
    assert_is_drawn(tmp_path / "one.png")
    write_confusion(tmp_path / "table.csv", SMALL, ["a", 'b "c"', "d, e"])
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["true class", "a", 'b "c"', "d, e"],
        ["a", "8", "2", "0"],
        ['b "c"', "0", "5", "0"],
        ["d, e", "1", "0", "3"],
    ]


@pytest.mark.parametrize(("matrix", "names"), [([], None), ([[1, 2]], None), ([[1, 0], [0, 1]], ["a"])])
def test_what_is_no_matrix_is_refused(matrix, names):
    with pytest.raises(MloError, match="Expected a square confusion matrix"):
        confusion_figure(matrix, names)
