"""Submission through submitit: to this machine, and to a Slurm that only takes the order."""

import json
import os
import signal
import stat
import sys
import threading
import time

import pytest
from click.testing import CliRunner
from submitit import SlurmJob

import mlo
from mlo.campaign import Campaign, parse_cluster, plan_runs, prepare
from mlo.campaign.slurm import Job
from mlo.cli import _load, main

from ..swept_experiment import install


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


def sweep(recipe, folder, *arguments):
    return CliRunner().invoke(main, ["sweep", str(recipe), "--output", str(folder), *map(str, arguments)])


def wait_for(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # submitit's, which goes on
def test_jobs_on_this_machine(recipe, tmp_path):
    out = tmp_path / "out"
    arguments = ["--seeds", 1, "--slurm", "cluster=local", "--slurm", "timeout_min=5"]
    first = sweep(recipe, out, *arguments)
    assert first.exit_code == 0, first.output
    assert "seed=0  submitted    job " in first.output
    wait_for((out / "seed=0" / "result.json").exists)
    again = sweep(recipe, out, *arguments)
    assert again.exit_code == 0
    assert "seed=0  skipped" in again.output


def test_a_job_saves_when_it_is_asked_to_and_goes_on_as_another(recipe, tmp_path):
    settings = ("rounds=100000", "checkpoint_every=100000")
    campaign = Campaign(str(recipe), "swept", settings, (), (0,))
    (folder,) = prepare(campaign, plan_runs(campaign, _load, lambda _: None), tmp_path / "out", _load).values()
    job = Job(folder, 0)
    asked = []

    def on_signal(*_):
        asked.append(job.checkpoint())
        raise InterruptedError  # submitit ends the process here

    def send():
        wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n"))
        os.kill(os.getpid(), signal.SIGUSR2)

    previous = signal.signal(signal.SIGUSR2, on_signal)
    threading.Thread(target=send).start()
    try:
        with pytest.raises(InterruptedError):
            job()
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert len(list((folder / "checkpoints").iterdir())) == 1
    assert job._worker.is_over()
    assert not job._worker.succeeded
    assert isinstance(asked[0].function, Job)


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """The programs of a Slurm: sbatch keeps what it is given, sacct knows no job yet."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, lines in {
        "srun": "exit 0",
        "sbatch": f'cp "$1" {tmp_path}/batch.sh; echo "Submitted batch job 77"',
        "sacct": f"cat {tmp_path}/states",
    }.items():
        path = programs / name
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    states = tmp_path / "states"
    states.write_text("JobID|State\n")
    return states


def test_jobs_of_slurm(recipe, tmp_path, cluster):
    out = tmp_path / "out"
    arguments = ["--seeds", 2, "--slurm", "partition=gpu", "--slurm", "time=60", "--slurm", "gpus-per-node=1"]
    first = sweep(recipe, out, *arguments, "--jobs", 1)
    assert first.exit_code == 0, first.output
    assert "seed=1  submitted    job 77_1" in first.output
    batch = (tmp_path / "batch.sh").read_text()
    for line in ("--partition=gpu", "--time=60", "--gpus-per-node=1", "--array=0-1%1", "--job-name=mlo"):
        assert f"#SBATCH {line}\n" in batch
    assert json.loads((out / "slurm" / "jobs.json").read_text()) == {"seed=0": "77_0", "seed=1": "77_1"}

    (tmp_path / "batch.sh").unlink()
    cluster.write_text("JobID|State\n77_0|RUNNING\n77_1|PENDING\n")
    SlurmJob.watcher.clear()
    again = sweep(recipe, out, *arguments)
    assert "seed=0  submitted    job 77_0 of before, running" in again.output
    assert not (tmp_path / "batch.sh").exists()

    cluster.write_text("JobID|State\n77_0|RUNNING\n77_1|FAILED\n")
    SlurmJob.watcher.clear()
    third = sweep(recipe, out, *arguments)
    assert "seed=0  submitted    job 77_0 of before, running" in third.output
    assert "seed=1  submitted    job 77\n" in third.output
    assert (tmp_path / "batch.sh").exists()
    SlurmJob.watcher.clear()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["partition"], "--slurm partition: expected key=value"),
        (["cluster=pbs"], "cluster=pbs: expected one of slurm, local"),
        (["max_num_timeout=often"], "expected a whole number"),
        (["time=[1"], "--slurm time"),
    ],
)
def test_wrong_parameters(texts, message):
    with pytest.raises(mlo.MloError, match=message):
        parse_cluster(texts, None)


def test_an_unknown_parameter_and_no_slurm_are_told(recipe, tmp_path, cluster, monkeypatch):
    wrong = sweep(recipe, tmp_path / "a", "--seeds", 1, "--slurm", "partitoin=gpu")
    assert wrong.exit_code == 2
    assert "Unknown argument 'partitoin'" in wrong.output
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = sweep(recipe, tmp_path / "b", "--seeds", 1, "--slurm", "partition=gpu")
    assert absent.exit_code == 2
    assert "slurm" in absent.output.lower()


def test_without_submitit_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(mlo.MloError, match=r"pip install 'mlo\[slurm\]'"):
        parse_cluster(["partition=gpu"], None)
