"""Commands in several processes: the same run as in one, written once."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import mlo
from mlo.cli import main
from mlo.files import alone
from mlo.launching import _without_launch, is_launched, same_path, start_processes
from mlo.recipes import installed_problems, load_recipe
from mlo.runs import check_processes

MLO = [sys.executable, "-m", "mlo"]
SETTINGS = (
    "supernet.channels=2",
    "evaluation.epochs=1",
    "evaluation.channels=4",
    "evaluation.batch_size=512",
    "random_cell=false",
)


def command(folder, *options, rounds=2):
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    ways = ["--quiet", "--rounds", str(rounds), "--output", str(folder)]
    return [*MLO, "run", "darts/digits-first", *words, *ways, *options]


def finished(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=240, check=False)


def run(folder, *options, rounds=2):
    return finished(command(folder, *options, rounds=rounds))


def broken_off(words, act, *, rounds=2):
    """Start a command, do something to it as soon as it has played so many rounds, and wait for its end."""
    folder = Path(words[words.index("--output") + 1] if "--output" in words else words[-1])
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        metrics, end = folder / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= rounds):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        act(process.pid)
        error = process.communicate(timeout=120)[1]
    return process.returncode, error


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["phase"] == "search" for key in ("network.loss", "architecture.loss")]


def test_two_processes_do_what_one_does(tmp_path):
    wider = ("--set", "supernet.channels=4")  # two channels normalize so little that a kink can decide the 4th digit
    one, two = run(tmp_path / "one", *wider), run(tmp_path / "two", *wider, "--launch", "2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert two.stdout.count("test_error ") == 1
    written = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == written


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_stopped_by_a_signal_that_loading_processes_must_not_hear(tmp_path):
    """torchrun sends it on to the group of each process, those that load for it included."""
    folder = tmp_path / "run"
    options = ("--launch", "2", "--set", "data.num_workers=1")
    words = command(folder, *options, rounds=10**4)
    status, error = broken_off(words, lambda pid: os.kill(pid, signal.SIGTERM))
    assert (status, error.count("mlo resume"), "Traceback" in error) == (128 + signal.SIGTERM, 1, False), error
    assert list((folder / "checkpoints").glob("search-*.pt"))


def test_stopped_by_a_signal_and_resumed_in_one_process(tmp_path):
    folder = tmp_path / "stopped"
    words = command(folder, "--launch", "2", rounds=4)
    status, error = broken_off(words, lambda pid: os.kill(pid, signal.SIGINT))
    assert (status, error.count("mlo resume"), "Traceback" in error) == (130, 1, False), error
    assert 4 <= len(losses(folder)) < 8
    resumed = finished([*MLO, "resume", str(folder), "--quiet"])
    assert resumed.returncode == 0, resumed.stderr
    assert run(tmp_path / "whole", rounds=4).returncode == 0
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)  # batches differ by 10 %


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes under /proc")
@pytest.mark.parametrize(("launcher", "rank"), [("mlo", 1), ("torchrun", 0), ("torchrun", 1)])
def test_a_process_that_is_killed_ends_all_and_the_run_goes_on(tmp_path, launcher, rank):
    def kill(pid):
        os.kill(children(pid)[rank], signal.SIGKILL)

    words = command(tmp_path / "run", "--set", "checkpoint_every=1", rounds=10_000)
    if launcher == "mlo":
        status, error = broken_off([*words, "--launch", "2"], kill)
        assert (status, "Traceback" in error) == (2, False), error
        assert "was killed (signal 9). If the run had begun, go on with mlo resume" in error
    else:  # which says much of its own
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        status, error = broken_off([sys.executable, *torchrun, *words[1:]], kill)
        assert status != 0
    assert error.count("found that one has ended or hangs") == 1, error  # what the other one says
    done = len(losses(tmp_path / "run")) // 2
    resumed = [*MLO, "resume", "--quiet", str(tmp_path / "run")]
    status, error = broken_off(resumed, lambda pid: os.kill(pid, signal.SIGINT), rounds=done + 2)
    assert (status, error.count("mlo resume")) == (130, 1), error


def test_other_processes_look_for_modules_where_this_one_does(monkeypatch, tmp_path):
    """`python -m` would take packages of the present folder for those that are installed."""
    (tmp_path / "problems").mkdir()
    (tmp_path / "problems" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    assert same_path() == {"PYTHONSAFEPATH": "1"}
    if sys.version_info >= (3, 11):
        looks = [sys.executable, "-m", "problems.lbt"]
        assert subprocess.run(looks, env={**os.environ, **same_path()}, check=False).returncode == 0
    monkeypatch.syspath_prepend(str(tmp_path))
    assert same_path() == {}


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    recipe = load_recipe("darts/digits-first", schemas={"darts": installed_problems()["darts"].recipe_type})
    for device in ("auto", "cuda"):
        of_device = recipe.model_copy(update={"device": device})
        check_processes(of_device, True, 2)
        check_processes(of_device, False, 3)
        with pytest.raises(mlo.MloError, match="at most 2 processes on this machine, one for each GPU; found 3"):
            check_processes(of_device, True, 3)
    check_processes(recipe.model_copy(update={"device": "cpu"}), True, 3)
    with pytest.raises(mlo.MloError, match=r"'cuda' in a job of several processes.*found 'cuda:1'"):
        check_processes(recipe.model_copy(update={"device": "cuda:1"}), True, 2)


@pytest.mark.parametrize(
    ("output", "settings", "message"),
    [
        ("run", ["--set", "batch_size=33"], "expected a multiple of the 2 processes"),
        ("file/run", [], "file/run: Not a directory; choose another place"),  # the first process alone finds out
    ],
)
def test_a_mistake_is_said_once(tmp_path, output, settings, message):
    (tmp_path / "file").touch()
    found = run(tmp_path / output, "--launch", "2", *settings)
    assert (found.returncode, found.stderr.count("Error: "), "Traceback" in found.stderr) == (2, 1, False), found.stderr
    assert message in found.stderr


def test_processes_with_different_recipes_say_so(tmp_path):
    words = " ".join(command(tmp_path / "run", "--set", "seed=$RANK"))
    found = finished(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python",
         "sh", "-c", f"exec {words}"]
    )  # fmt: skip
    assert found.returncode != 0
    assert found.stderr.count("expected the same recipe in all processes; found another one in one of them") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="without file locks")
def test_a_folder_in_use_is_said_once(tmp_path):
    assert run(tmp_path / "run").returncode == 0
    (tmp_path / "run" / "result.json").unlink()
    with alone(tmp_path / "run" / "recipe.yaml", "in use"):
        found = finished([*MLO, "resume", str(tmp_path / "run"), "--launch", "2", "--quiet"])
    assert (found.returncode, found.stderr.count("Error: ")) == (2, 1), found.stderr
    assert "expected no other process at work in this folder" in found.stderr


@pytest.mark.parametrize(("status", "said"), [(1, False), (2, False), (143, False), (7, True)])
def test_a_process_that_ends_by_itself_is_named(monkeypatch, status, said):
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=status, error_file="none")

    def run(arguments):
        raise ChildFailedError("mlo", {1: failure})

    monkeypatch.setattr(torchrun, "run", run)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(mlo.MloError if said else SystemExit, match=f"with status {status}" if said else str(status)):
        start_processes(2)


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


def test_variables_that_are_missing_are_named(monkeypatch):
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert not is_launched()  # some other program's
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(main, ["list"]).exit_code == 0
    done = CliRunner().invoke(main, ["run", "lbt/digits"])
    assert done.exit_code == 2
    assert "WORLD_SIZE=2: expected the variables that torchrun sets; found no LOCAL_RANK and no MASTER" in done.output


def test_commands_of_a_single_process_are_refused_in_several(tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mlo", "list"]
    found = finished([sys.executable, *words])
    assert found.stderr.count("mlo list: expected a single process; found one of several") == 1
    assert not found.stdout


def test_the_started_command_is_the_same_without_launch():
    assert _without_launch(["run", "a", "--launch", "2", "--quiet"]) == ["run", "a", "--quiet"]
    assert _without_launch(["run", "--launch=4", "a"]) == ["run", "a"]
