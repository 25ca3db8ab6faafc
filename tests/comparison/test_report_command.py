"""Tables, curves, the page, and `mlo report`, which writes them."""

import csv
import io
import json
import statistics

import pytest
from click.testing import CliRunner
from scipy import stats

import mlo
from mlo.cli import main
from mlo.comparison import (
    Column,
    PublishedError,
    Reference,
    choose_columns,
    compare_with_random,
    draw_curve,
    find_curves,
    find_runs,
    group_runs,
    make_table,
    to_csv,
    to_latex,
    to_markdown,
)
from tests.pictures import assert_is_drawn, outside, overlapping, svg_texts, text_boxes
from tests.test_report import Page

from .made_runs import make_run, make_sweep

PUBLISHED = {
    "lbt/digits": [Reference(recipe="lbt/digits", paper="P_1 (A & B 2020)", test_error=PublishedError(mean=2.5))]
}


def groups(folder):
    return group_runs(find_runs([folder]))


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def test_the_table_has_means_and_sample_deviations(tmp_path):
    make_sweep(tmp_path, values=(1.0,), num_seeds=3)
    found = groups(tmp_path)
    header, _, row = cells(to_markdown(make_table(found, choose_columns(found), {})))
    errors = [2.6, 2.8, 2.72]
    assert header == ["recipe", "seeds", "test error (%)", "weights (M)", "search (device days)", "published"]
    assert row == [
        "lbt/digits", "3", f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}", "3.34 ± 0.04",
        "1.09 ± 0.05", "—",
    ]  # fmt: skip


def test_one_seed_has_no_deviation(tmp_path):
    make_sweep(tmp_path, values=(1.0,), num_seeds=1)
    found = groups(tmp_path)
    text = to_markdown(make_table(found, choose_columns(found), {}))
    assert cells(text)[2][:3] == ["lbt/digits", "1", "2.60"]
    assert "sample standard deviation" not in text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([3.0, 3.1], "3.05 ± 0.07"), ([0.031, 0.033], "0.032 ± 0.001"), ([0.5, 0.5], "0.50 ± 0.00"),
        ([1e-9, 3e-9], "2e-09 ± 1.4e-09"), ([0.0, 0.0], "0.00 ± 0.00"), ([-2.0], "-2.00"), ([12345.678], "12345.68"),
    ],
)  # fmt: skip
def test_numbers_are_written_with_the_digits_that_they_need(tmp_path, values, text):
    for seed, value in enumerate(values):
        make_run(tmp_path / str(seed), seed=seed, result={"x": value})
    (group,) = groups(tmp_path)
    column = Column("x", "x")
    assert column.show(column.estimate(group)) == text


def test_every_form_has_the_same_cells(tmp_path):
    make_sweep(tmp_path, values=(0.5, 1.0), num_seeds=2)
    make_run(tmp_path / "more", seed=9, settings={"lambda": 0.5})
    found = groups(tmp_path)
    columns = choose_columns(found, ["alpha_change"])
    table = make_table(found, columns, PUBLISHED)
    markdown = to_markdown(table)
    assert "| lbt/digits | lambda=0.5 |     2 |          1 |" in markdown
    assert "[1] P_1 (A & B 2020): test error 2.50 %" in markdown
    assert f"- {tmp_path / 'more'} (not begun)" in markdown
    assert len({len(line) for line in markdown.splitlines() if line[:1] == "|"}) == 1
    latex = to_latex(table)
    assert r"lbt/digits & lambda=0.5 & 2 & 1 & 2.74 $\pm$ 0.14 & 3.32 $\pm$ 0.03" in latex
    assert r"alpha\_change & published \\" in latex
    assert r"2.50 {[}1{]} \\" in latex
    assert r"{[}1{]} P\_1 (A \& B 2020): test error 2.50 \%." in latex
    rows = list(csv.DictReader(io.StringIO(to_csv(found, columns, PUBLISHED))))
    assert [row["lambda"] for row in rows] == ["0.5", "1"]
    assert [row["unfinished"] for row in rows] == ["1", "0"]
    assert float(rows[1]["test error (%) mean"]) == pytest.approx(2.7)
    assert float(rows[1]["test error (%) deviation"]) == pytest.approx(statistics.stdev([2.6, 2.8]))
    assert rows[1]["published mean"] == "2.5"
    assert rows[1]["published source"] == "P_1 (A & B 2020)"


def test_a_group_without_a_finished_run_has_a_row(tmp_path):
    make_run(tmp_path / "a", settings={"lambda": 2.0})
    make_run(tmp_path / "b", result={"test_error": 3.0})
    found = groups(tmp_path)
    rows = cells(to_markdown(make_table(found, choose_columns(found), {})))
    assert rows[3] == ["lbt/digits", "lambda=2", "0", "1", "—", "—"]


def test_top_5_stands_beside_top_1(tmp_path):
    make_run(tmp_path / "a", result={"test_error": 26.7, "test_error_top5": 8.7})
    found = groups(tmp_path)
    assert cells(to_markdown(make_table(found, choose_columns(found), {})))[2][2:4] == ["26.70", "8.70"]


def test_repeated_seeds_and_missing_figures_are_noted(tmp_path):
    make_run(tmp_path / "a", result={"test_error": 3.0, "num_parameters": 1_000_000})
    make_run(tmp_path / "b", result={"test_error": 3.2})
    make_run(tmp_path / "c", seed=1, result={"test_error": 3.2})
    found = groups(tmp_path)
    notes = make_table(found, choose_columns(found), {}).notes
    assert "lbt/digits: 3 finished runs of 2 seeds; the runs of a seed count as their mean." in notes
    assert "lbt/digits: only 1 of 2 seeds have num_parameters." in notes


def test_an_unknown_metric_is_refused(tmp_path):
    make_sweep(tmp_path, values=(1.0,), num_seeds=1)
    with pytest.raises(mlo.MloError, match=r"--metrics alpha_chang: .*num_parameters.*did you mean 'alpha_change'"):
        choose_columns(groups(tmp_path), ["alpha_chang"])
    with pytest.raises(mlo.MloError, match="--metrics recipe"):
        choose_columns(groups(tmp_path), ["recipe"])


FOUND = [3.0, 3.2, 2.9, 3.1, 3.3, 2.8, 3.05]
RANDOM = [3.4, 3.3, 3.5, 3.2, 3.9, 3.1, 3.0]


@pytest.mark.parametrize(
    ("num_seeds", "name", "p"),
    [
        (5, "paired t test", stats.ttest_rel(FOUND[:5], RANDOM[:5]).pvalue),
        (7, "Wilcoxon signed-rank test", stats.wilcoxon(FOUND, RANDOM).pvalue),
    ],
)
def test_found_and_random_cells_are_compared_in_pairs(tmp_path, num_seeds, name, p):
    for seed in range(num_seeds):
        result = {"test_error": FOUND[seed], "random_cell_test_error": RANDOM[seed]}
        make_run(tmp_path / str(seed), seed=seed, result=result)
    (group,) = groups(tmp_path)
    gain = statistics.mean(RANDOM[:num_seeds]) - statistics.mean(FOUND[:num_seeds])
    assert compare_with_random(group) == (
        f"lbt/digits: the found cell errs {gain:.2f} points less than a random one; {name}, p = {p:.2g} "
        f"(n = {num_seeds} seeds)"
    )


@pytest.mark.parametrize(
    ("errors", "random", "text"),
    [
        ([3.0], [4.0], "1.00 points less than a random one; one seed tests nothing (n = 1 seed)"),
        ([3.0, 3.5], [2.5, 3.0], "0.50 points more than a random one; the same difference with every seed"),
        ([3.0] * 8, [3.0] * 8, "0.00 points less than a random one; the same difference with every seed"),
    ],
)
def test_where_no_test_applies_it_says_so(tmp_path, errors, random, text):
    for seed, (a, b) in enumerate(zip(errors, random, strict=True)):
        make_run(tmp_path / str(seed), seed=seed, result={"test_error": a, "random_cell_test_error": b})
    assert text in compare_with_random(groups(tmp_path)[0])


def test_runs_without_a_random_cell_are_not_compared(tmp_path):
    make_run(tmp_path / "a", result={"test_error": 3.0})
    assert compare_with_random(groups(tmp_path)[0]) is None


def test_a_curve_is_found_where_one_number_varies(tmp_path):
    make_sweep(tmp_path / "lambda", values=(0.5, 1.0, 2.0), num_seeds=2)
    make_sweep(tmp_path / "gamma", "gamma", values=(0.1, 1.0), recipe="lbt/other", num_seeds=1)
    first, second = find_curves(groups(tmp_path))
    assert (first.recipe, first.setting, [x for x, _ in first.points]) == ("lbt/digits", "lambda", [0.5, 1.0, 2.0])
    assert [found.num_seeds for _, found in second.points] == [1, 1]
    assert (second.recipe, second.setting) == ("lbt/other", "gamma")


@pytest.mark.parametrize(
    "settings",
    [
        [{"lambda": 1.0}, {"lambda": 1.0}],
        [{"lambda": 1.0}, {"lambda": 2.0, "gamma": 3.0}],
        [{"rollback": True}, {"rollback": False}],
        [{"precision": "bf16"}, {"precision": "fp32"}],
        [{"x": 1}, {"x": None}],
    ],
)
def test_no_curve_elsewhere(tmp_path, settings):
    for index, one in enumerate(settings):
        make_run(tmp_path / str(index), settings=one, result={"test_error": 3.0})
    assert find_curves(groups(tmp_path)) == []


@pytest.mark.parametrize(
    "values", [(0.1, 0.5, 1.0, 2.0, 3.0), (1e-4, 1e-2, 1.0), (0.0, 0.01, 1.0), tuple(range(1, 30))]
)
def test_a_curve_is_drawn(tmp_path, values):
    make_sweep(tmp_path, values=values, num_seeds=3, recipe="lbt/cifar10-rn18-pc-darts_$x$")
    (curve,) = find_curves(groups(tmp_path))
    figure = draw_curve(curve)
    boxes = text_boxes(figure)
    assert not overlapping(boxes)
    assert not outside(figure, boxes)
    (container,) = figure.axes[0].containers
    line, _, (bars,) = container
    assert list(line.get_ydata()) == [found.mean for _, found in curve.points]
    heights = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
    assert heights == pytest.approx([2 * found.deviation for _, found in curve.points])


def report(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_command_prints_and_writes_everything(tmp_path):
    make_sweep(tmp_path / "sweep", num_seeds=2)
    make_run(tmp_path / "sweep" / "<b>", seed=7)
    done = report(tmp_path / "sweep")
    assert done.exit_code == 0, done.output
    out = tmp_path / "sweep" / "comparison"
    names = {"table.md", "table.tex", "table.csv", "comparison.html", "lbt-digits-lambda.png", "lbt-digits-lambda.svg"}
    assert {path.name for path in out.iterdir()} == names
    assert done.output.startswith((out / "table.md").read_text())
    assert f"Written: {out / 'lbt-digits-lambda.png'}" in done.output
    assert_is_drawn(out / "lbt-digits-lambda.png")
    assert "test error (%)" in svg_texts(out / "lbt-digits-lambda.svg")
    page = Page((out / "comparison.html").read_text())
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    for text in ("lambda=0.5", "paired t test, p = 0.0", "<b> (not begun)"):
        assert text in page.text
    again = report(tmp_path / "sweep")  # what the first one wrote is no run
    assert again.output == done.output


def test_the_command_takes_its_options(tmp_path):
    make_sweep(tmp_path / "a", values=(1.0, 2.0), num_seeds=2)
    make_sweep(tmp_path / "b", "gamma", values=(2.0, 3.0), num_seeds=2)
    done = report(
        tmp_path / "a", tmp_path / "b", "--group-by", "lambda", "--metrics", "alpha_change, random_cell_test_error",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    header, _, first, *_ = cells(done.output)
    assert header[-3:-1] == ["alpha_change", "random_cell_test_error"]
    assert first[:3] == ["lbt/digits", "lambda=1", "2"]
    assert "6 finished runs of 2 seeds" in done.output
    assert (tmp_path / "out" / "lbt-digits-lambda.svg").exists()


def test_a_published_row_stands_beside_a_bundled_recipe(tmp_path):
    make_run(tmp_path / "a", "darts/cifar10-second", result={"test_error": 2.8})
    done = report(tmp_path / "a", "--output", tmp_path / "out")
    assert cells(done.output)[2][-1] == "2.76 ± 0.09 [1]"
    assert "[1] DARTS (Liu et al. 2019), second order: test error 2.76 ± 0.09 %, 3.3 M weights" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "found no recipe.yaml"), (["--metrics", "x"], "--metrics x"), (["--group-by", "x"], "--group-by x")],
)
def test_mistakes_end_before_anything_is_written(tmp_path, arguments, message):
    if arguments:
        make_run(tmp_path / "runs" / "a", result={"test_error": 2.8})
    else:
        (tmp_path / "runs").mkdir()
    done = report(tmp_path / "runs", "--output", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_a_damaged_result_ends_the_command(tmp_path):
    folder = make_run(tmp_path / "a", result={"test_error": 2.8})
    (folder / "result.json").write_text(json.dumps({"test_error": 2.8})[:-4])
    done = report(tmp_path)
    assert done.exit_code == 2
    assert "The file is damaged" in done.output
