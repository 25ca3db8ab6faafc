"""Commands in several processes: the same run as in one, written once."""

import json
import os
import subprocess
import sys

import pytest

from mlo.launching import _without_launch

COMMAND = [sys.executable, "-m", "mlo", "run", "darts/digits-first", "--quiet", "--rounds", "2"]
SETTINGS = (
    "supernet.channels=2",
    "evaluation.epochs=1",
    "evaluation.channels=4",
    "evaluation.batch_size=512",
    "random_cell=false",
)


def run(folder, *options):
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, *words, "--output", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["phase"] == "search" for key in ("network.loss", "architecture.loss")]


def test_two_processes_do_what_one_does(tmp_path):
    one, two = run(tmp_path / "one"), run(tmp_path / "two", "--launch", "2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert two.stdout.count("test_error ") == 1
    written = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "supernet.num_cells=many"], 'supernet.num_cells: found "many"'),
        (["--engine", "betty"], "engine: expected 'mlo' in a job of several processes; found 'betty'"),
    ],
)
def test_a_mistake_in_the_recipe_is_found_before_processes_are_started(tmp_path, options, message):
    found = run(tmp_path / "run", "--launch", "2", *options)
    assert (found.returncode, found.stderr.count("Error: "), "Traceback" in found.stderr) == (2, 1, False)
    assert message in found.stderr
    assert not (tmp_path / "run").exists()


def test_the_started_command_is_the_same_without_launch():
    assert _without_launch(["run", "a", "--launch", "2", "--quiet"]) == ["run", "a", "--quiet"]
    assert _without_launch(["run", "--launch=4", "a"]) == ["run", "a"]
