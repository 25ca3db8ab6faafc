"""Published figures as data."""

import pytest

import mlo
from mlo.comparison import published, read_references
from mlo.recipes import list_recipes

ROW = "- recipe: lbt/a\n  paper: P (A 2020)\n  test_error: {mean: 2.5}\n"


def read(tmp_path, text):
    path = tmp_path / "references.yaml"
    path.write_text(text)
    return read_references(path)


def test_rows_say_what_they_say(tmp_path):
    short, long, imagenet = read(
        tmp_path,
        ROW + "- {recipe: lbt/a, paper: P, table: Table 5, method: m, test_error: {mean: 3, deviation: 0.125}, "
        "weights: 3.3, search_days: 4}\n"
        "- {recipe: lbt/b, paper: P, test_error: {mean: 26.7}, top5_error: {mean: 8.7}}\n",
    )
    assert short.sentence == "P (A 2020): test error 2.50 %"
    assert long.sentence == "P, Table 5, m: test error 3.000 ± 0.125 %, 3.3 M weights, search 4 device days"
    assert imagenet.error == "26.7 / 8.7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: a", "expected a list of rows"),
        ("", "expected a list of rows"),
        (ROW + "  wieghts: 3\n", r"row 1.wieghts: found an unknown key .*did you mean 'weights'"),
        (ROW + ROW.replace("mean", "maen"), r"row 2.test_error.maen: found an unknown key"),
        (ROW.replace("2.5", "250"), r"row 1.test_error.mean: found 250, expected a number less than or equal to 100"),
        (ROW.replace("2.5", "'2.5'"), r"row 1.test_error.mean: found \"2.5\", expected a number"),
        (ROW.replace("paper", "source"), r"row 1.paper: found nothing"),
        ("- 3\n", r"row 1: found 3, expected a mapping"),
        ("- {", "line 1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(mlo.RecipeError, match=message):
        read(tmp_path, text)


def test_the_bundled_tables_are_valid_and_no_recipes():
    rows = published()
    assert rows["darts/cifar10-first"][0].error == "3.00 ± 0.14"
    assert [row.error for row in rows["lbt/cifar10-rn18-darts"]] == ["2.65", "2.61"]
    assert all("references" not in name for name, _ in list_recipes())


def test_a_folder_without_tables_has_none(tmp_path):
    assert published([tmp_path / "absent", tmp_path]) == {}
