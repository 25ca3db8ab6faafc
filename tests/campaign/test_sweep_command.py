"""`mlo sweep`, with real runs in real processes."""

import json
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from mlo.cli import main
from mlo.files import alone

from ..swept_experiment import ROOT, install


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


def sweep(recipe, folder, *arguments):
    return CliRunner().invoke(main, ["sweep", str(recipe), "--output", str(folder), *map(str, arguments)])


def test_a_sweep_runs_reports_failures_goes_on_and_is_extended(recipe, tmp_path):
    out = tmp_path / "out"
    arguments = ["--vary", "fails=never,always", "--jobs", 2, "--retries", 0, "--set", "rounds=1"]
    first = sweep(recipe, out, "--seeds", 1, *arguments)
    assert first.exit_code == 1, first.output
    log = out / "fails=always" / "seed=0" / "log.txt"
    assert "fails=always/seed=0  failed       RuntimeError: the toy broke, as it was told to" in first.output
    assert f"log: {log}" in first.output
    assert "2 runs: 1 done, 1 failed" in first.output
    done = out / "fails=never" / "seed=0"
    assert json.loads((done / "result.json").read_text())["recipe"] == "swept"
    kept = (done / "result.json").stat().st_mtime_ns

    again = sweep(recipe, out, "--seeds", 2, *arguments[:-2], "--set", "rounds=1")
    assert again.exit_code == 1, again.output
    assert "4 runs: 1 done, 1 skipped, 2 failed" in again.output
    assert (done / "result.json").stat().st_mtime_ns == kept
    assert log.read_text().count("--- ") == 2
    assert json.loads((out / "fails=never" / "seed=1" / "result.json").read_text())["seed"] == 1

    other = sweep(recipe, out, "--seeds", 2, "--vary", "fails=never")
    assert other.exit_code == 2
    assert "--vary fails: without always now" in other.output


def test_a_run_that_fails_once_is_started_again(recipe, tmp_path):
    done = sweep(recipe, tmp_path / "out", "--seeds", "3,", "--set", "fails=once")
    assert done.exit_code == 0, done.output
    assert "seed=3  done" in done.output
    assert (tmp_path / "out" / "seed=3" / "log.txt").read_text().count("--- ") == 2
    assert f"Compare: mlo report {tmp_path / 'out'}" in done.output


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--seeds", "x"], ["--seeds x: expected how many"]),
        (["--seeds", "2", "--vary", "penalti=1,2"], ["did you mean 'penalty'?"]),
        (
            ["--seeds", "2", "--vary", "rounds=0,1", "--vary", "fails=never,nver"],
            ["rounds: found 0", "did you mean 'never'?"],
        ),
        (["--seeds", "2", "--vary", "variant=plain,impossible"], ["variant: expected one that can be built"]),
        (["--seeds", "2", "--slurm", "partition"], ["--slurm partition: expected key=value"]),
    ],
)
def test_mistakes_end_before_anything_is_written(recipe, tmp_path, arguments, messages):
    done = sweep(recipe, tmp_path / "out", *arguments)
    assert done.exit_code == 2, done.output
    for message in messages:
        assert message in done.output
    assert not (tmp_path / "out").exists()


def test_ctrl_c_saves_and_the_same_command_goes_on(recipe, tmp_path):
    out = tmp_path / "out"
    arguments = ["--seeds", "2", "--set", "rounds=100000", "--set", "checkpoint_every=100000"]
    command = [sys.executable, "-m", "mlo", "sweep", str(recipe), "--output", str(out), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        metrics = out / "seed=0" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "seed=0  interrupted  saved" in output
    assert "seed=1  waiting      not started" in output
    assert f"mlo sweep {recipe} --seeds 2 --set rounds=100000" in errors
    saved = list((out / "seed=0" / "checkpoints").iterdir())
    assert len(saved) == 1


def test_two_sweeps_at_once_in_one_folder_are_refused(recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with alone(out, "never seen"):
        refused = sweep(recipe, out, "--seeds", 1)
    assert refused.exit_code == 2
    assert f"{out}: expected no other sweep at work in this folder; found one." in " ".join(refused.output.split())
    assert not list(out.iterdir())
