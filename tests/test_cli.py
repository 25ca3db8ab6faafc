"""The command line, on the bundled recipe at its smallest."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

import mlo
from mlo.cli import main
from mlo.recipes import list_recipes
from mlo.tracking import read_metrics

SMALL = [
    "batch_size=16", "supernet.channels=2", "student.width=2", "evaluation.epochs=1", "evaluation.channels=2",
    "evaluation.batch_size=128", "checkpoint_every=1",
]  # fmt: skip
FILES = {
    "recipe.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "genotype.json", "result.json", "cell_normal.svg",
    "cell_normal.png", "cell_reduce.svg", "cell_reduce.png", "alphas.png", "curves.png", "graph.svg", "report.html",
    "held.json",
}  # fmt: skip


def small(*more):
    return [word for item in (*SMALL, *more) for word in ("--set", item)]


def mlo_process(*arguments):
    return [sys.executable, "-c", "from mlo.cli import main; main()", *map(str, arguments)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = CliRunner().invoke(
        main, ["run", "lbt/digits", "--quiet", "--rounds", "3", "--seed", "4", "--output", str(folder), *small()]
    )
    assert done.exit_code == 0, done.output
    return folder, done.output


def test_run_writes_a_folder_worth_looking_at(finished):
    folder, output = finished
    assert {p.name for p in folder.iterdir()} == FILES
    result = json.loads((folder / "result.json").read_text())
    assert 0 <= result["test_error"] <= 100
    assert 0 <= result["random_cell_test_error"] <= 100
    for prefix in ("", "random_cell_"):
        assert 0 <= result[f"{prefix}test_error_top5"] <= result[f"{prefix}test_error"]
    assert result["alpha_change"] > 0
    assert result["num_parameters"] > 0
    assert result["seed"] == 4
    assert result["recipe"] == "lbt/digits"
    assert f"Report: {folder / 'report.html'}" in output
    assert re.search(r"test_error +\d", output)
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["round"] for line in lines if line["phase"] == "search"] == [1, 2, 3]
    assert {line["phase"] for line in lines} == {"search", "evaluation", "random_cell"}
    page = (folder / "report.html").read_text()
    assert "lbt/digits" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_resolved_recipe_replays_the_run(finished, tmp_path):
    folder, _ = finished
    done = CliRunner().invoke(
        main, ["run", str(folder / "recipe.yaml"), "--quiet", "--output", str(tmp_path / "again")]
    )
    assert done.exit_code == 0, done.output
    first, second = (
        [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in read_metrics(f / "metrics.jsonl")]
        for f in (folder, tmp_path / "again")
    )
    assert first == second


def test_a_finished_run_says_so(finished):
    folder, _ = finished
    done = CliRunner().invoke(main, ["resume", str(folder)])
    assert done.exit_code == 0
    assert "this run is finished; nothing to do" in done.output


def test_ctrl_c_saves_and_resume_goes_on_exactly(finished, tmp_path):
    whole, _ = finished
    folder = tmp_path / "run"
    arguments = ["run", "lbt/digits", "--quiet", "--rounds", 3, "--seed", 4, "--output", folder, *small()]
    with subprocess.Popen(mlo_process(*arguments), stderr=subprocess.PIPE, text=True) as process:
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert f"mlo resume {folder}" in errors
    assert not (folder / "result.json").exists()
    done = CliRunner().invoke(main, ["resume", str(folder), "--quiet"])
    assert done.exit_code == 0, done.output
    first, second = (json.loads((f / "result.json").read_text()) for f in (whole, folder))
    for key in ("test_error", "random_cell_test_error", "alpha_change", "num_parameters"):
        assert first[key] == second[key]
    assert (whole / "genotype.json").read_text() == (folder / "genotype.json").read_text()


def test_list_names_every_bundled_recipe():
    done = CliRunner().invoke(main, ["list"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()] == [name for name, _ in list_recipes()]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_graph_draws_and_tells(tmp_path, suffix):
    picture = tmp_path / f"g.{suffix}"
    swap = "levels.teacher.hypergradient.kind=finite_difference"
    done = CliRunner().invoke(main, ["graph", "lbt/digits", "--output", str(picture), *small(swap)])
    assert done.exit_code == 0, done.output
    assert picture.stat().st_size > 1000
    assert "Unroll(last=None, checkpoint=False, graphs=1)" in done.output
    assert "FiniteDifference(radius=0.01, last=1, one_sided=False)" in done.output
    assert "architecture (detached)" in done.output


UNROLL = ("levels.teacher.hypergradient.kind=unroll", "levels.student.hypergradient.kind=unroll")


def test_check_judges_learning_by_teaching(tmp_path, monkeypatch):
    """Its ReLU and max pooling are smooth at radii this small."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["check", "lbt/digits", "--directions", "2", "--seed", "1", *small(*UNROLL)])
    assert done.exit_code == 0, done.output
    assert re.search(r"architecture  2 of 224 +\d\.\de-0[6-9] +1.00000   exact, as claimed", done.output)
    assert (
        "teacher: Unroll(last=None, checkpoint=False, graphs=1) is exact: it goes back through all 1 steps"
        in done.output
    )
    assert not list(tmp_path.iterdir())


def test_check_exits_with_1_where_an_estimator_is_wrong(monkeypatch):
    right = mlo.Unroll.pullback

    def wrong(self, cotangent, response):
        return {q: tuple(2 * c for c in found) for q, found in right(self, cotangent, response).items()}

    monkeypatch.setattr(mlo.Unroll, "pullback", wrong)
    arguments = ["check", "lbt/digits", "--directions", "1", "--level", "architecture", *small(*UNROLL)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "WRONG" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "lbt/digitz"], "did you mean 'lbt/digits'?"),
        (["run", "lbt/digits", "--set", "levels.teacher.hypergradient.kind=unrol"], "did you mean 'unroll'?"),
        (["run", "lbt/digits", "--set", "lambd=2"], "did you mean 'lambda'?"),
        (["run", "lbt/digits", "--set", "gamma"], "gamma"),
        (["check", "lbt/digits", "--level", "techer"], "Did you mean 'teacher'?"),
        (["check", "lbt/digits", "--level", "teacher"], "found none: its hypergradient is a plain gradient"),
        (["run", "lbt/digits", "--device", "gpu"], "device: found \"gpu\", expected 'auto' or a torch device"),
        (["run", "lbt/digits", "--set", "batch_size=1"], "batch_size: found 1, expected"),
        (["run", "lbt/digits", "--set", "batch_size=5000"], "found batches of 5000 images and a part of"),
        (["run", "lbt/digits", "--set", "data.fractions=[0.5,0.5,0.5,0.5,0.5]"], "positive numbers that sum to 1"),
        (
            ["graph", "lbt/digits", "--set", "batch_size=5000"],
            "batch_size: expected at least one batch in each part of the data; found batches of 5000",
        ),
    ],
)
def test_mistakes_end_with_a_message_and_status_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("command", [[], ["list"], ["run"], ["resume"], ["graph"], ["check"], ["sweep"], ["report"]])
def test_help_has_an_example(command):
    done = CliRunner().invoke(main, [*command, "--help"])
    assert done.exit_code == 0
    assert "Example:\n" in done.output
    assert "mlo " in done.output.partition("Example:")[2]
