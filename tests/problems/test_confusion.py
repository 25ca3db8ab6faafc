import pytest

import mlo
from problems.confusion import confusion_figure, draw_confusion, write_confusion

MATRIX = [[8, 2, 0], [0, 0, 0], [1, 0, 9]]


def test_the_table_names_rows_and_columns(tmp_path):
    write_confusion(tmp_path / "confusion.csv", MATRIX, ["a", "b, c", "d"])
    lines = (tmp_path / "confusion.csv").read_text().splitlines()
    assert lines == ['true class,a,"b, c",d', "a,8,2,0", '"b, c",0,0,0', "d,1,0,9"]


def test_the_picture_writes_the_counts_of_few_classes(tmp_path):
    texts = [text.get_text() for text in confusion_figure(MATRIX, ["cat", "dog", "owl"]).axes[0].texts]
    assert texts == ["8", "2", "·", "·", "·", "·", "1", "·", "9"]
    draw_confusion(tmp_path / "confusion.png", MATRIX)
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"


def test_many_classes_are_a_map(tmp_path):
    many = [[int(i == j) for j in range(100)] for i in range(100)]
    figure = confusion_figure(many)
    assert not figure.axes[0].texts
    assert max(figure.get_size_inches()) < 8


@pytest.mark.parametrize(("matrix", "names"), [([[1, 2]], None), ([[1]], ["a", "b"]), ([], None)])
def test_a_matrix_of_another_shape_is_refused(matrix, names):
    with pytest.raises(mlo.MloError, match="Expected a square confusion matrix"):
        confusion_figure(matrix, names)
