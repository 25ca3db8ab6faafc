"""A run that is stopped or killed anywhere ends as if it had not been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mlo
from mlo.runs import Checkpoints, Interrupted, Run, resume
from mlo.tracking import read_metrics

from .toy_experiment import ToyExperiment, recipe_of

SCRIPT = Path(__file__).with_name("toy_experiment.py")


def lines_of(folder):
    """The metrics, without what differs from run to run."""
    return [
        {k: v for k, v in line.items() if not k.endswith("_seconds")} for line in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    Run.begin(folder, recipe_of(None), "toy", progress=False).execute(ToyExperiment(recipe_of(None)))
    return folder


def same_end(folder, whole):
    result, expected = (json.loads((f / "result.json").read_text()) for f in (folder, whole))
    assert result["weights"] == expected["weights"]
    assert lines_of(folder) == lines_of(whole)
    for path in (whole / "checkpoints").iterdir():
        a, b = (torch.load(f / "checkpoints" / path.name, weights_only=True) for f in (whole, folder))
        assert str(a) == str(b)
    assert (folder / "report.txt").read_text() == (whole / "report.txt").read_text()


def test_a_run_leaves_what_it_promises(whole):
    names = {p.name for p in whole.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "result.json"} <= names
    lines = lines_of(whole)
    assert [(line["phase"], line["round"]) for line in lines] == [("search", r) for r in range(1, 8)] + [
        ("evaluation", r) for r in range(1, 6)
    ]
    assert {"net.loss", "gate.loss", "net.learning_rate"} <= lines[0].keys()
    result = json.loads((whole / "result.json").read_text())
    assert result["recipe"] == "toy"
    assert result["seed"] == 0
    assert result["versions"]["torch"] == torch.__version__
    assert result["search_seconds"] > 0
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == [
        "evaluation-00000004.pt",
        "evaluation-00000005.pt",
        "search-00000006.pt",
        "search-00000007.pt",
    ]
    assert list((whole / "tensorboard").glob("events*"))


@pytest.mark.parametrize(("phase", "round_"), [("search", 1), ("search", 5), ("search", 7), ("evaluation", 3)])
def test_a_signal_saves_and_the_run_goes_on_exactly(tmp_path, whole, phase, round_):
    folder = tmp_path / "run"
    run = Run.begin(folder, recipe_of(None), "toy", progress=False)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run.execute(ToyExperiment(recipe_of(None), (phase, round_, signal.SIGTERM)))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not run.finished
    last = lines_of(folder)[-1]
    assert (last["phase"], last["round"]) == (phase, round_)  # the round was ended
    again = resume(folder, recipe_of, progress=False)
    again.execute(ToyExperiment(again.recipe))
    same_end(folder, whole)


@pytest.mark.parametrize(("phase", "round_"), [("search", 1), ("search", 6), ("evaluation", 4)])
def test_a_killed_run_goes_on_from_its_newest_checkpoint(tmp_path, whole, phase, round_):
    folder = tmp_path / "run"
    killed = subprocess.run([sys.executable, SCRIPT, folder, phase, str(round_), "SIGKILL"], check=False)
    assert killed.returncode == -signal.SIGKILL
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "sea')  # killed in the middle of a line
    again = resume(folder, recipe_of, progress=False)
    again.execute(ToyExperiment(again.recipe))
    same_end(folder, whole)


def test_a_damaged_newest_checkpoint_costs_a_few_rounds_only(tmp_path, whole):
    folder = tmp_path / "run"
    run = Run.begin(folder, recipe_of(None), "toy", progress=False)
    with pytest.raises(Interrupted):
        run.execute(ToyExperiment(recipe_of(None), ("search", 5, signal.SIGINT)))
    newest = max((folder / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:100])
    again = resume(folder, recipe_of, progress=False)
    with pytest.warns(UserWarning, match="going back to the one before"):
        again.execute(ToyExperiment(again.recipe))
    same_end(folder, whole)


def test_a_folder_with_files_is_not_written_over(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(mlo.MloError, match=r"expected a new or empty folder for the run; found files.*mlo resume"):
        Run.begin(tmp_path, recipe_of(None), "toy")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(mlo.MloError, match=r"expected the folder of a run; found no recipe.yaml in it"):
        resume(tmp_path, recipe_of)


def test_an_edited_recipe_is_not_resumed(tmp_path):
    folder = tmp_path / "run"
    run = Run.begin(folder, recipe_of(None), "toy", progress=False)
    with pytest.raises(Interrupted):
        run.execute(ToyExperiment(recipe_of(None), ("search", 2, signal.SIGINT)))
    edited = recipe_of(None).model_copy(update={"seed": 99})
    with pytest.raises(mlo.MloError, match="expected the recipe that the run began with; found an edited one"):
        resume(folder, lambda _: edited, progress=False)


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    folder = tmp_path / "run"
    run = Run.begin(folder, recipe_of(None), "toy", progress=False)
    with run._alone(), pytest.raises(mlo.MloError, match="expected no other process at work in this folder"):
        resume(folder, recipe_of, progress=False).execute(ToyExperiment(recipe_of(None)))


def test_a_signal_while_a_phase_is_being_prepared_is_not_lost(tmp_path):
    folder = tmp_path / "run"
    experiment = ToyExperiment(recipe_of(None))
    run = Run.begin(folder, recipe_of(None), "toy", progress=False)
    restore = Checkpoints.restore

    def interrupted(self, engine):
        os.kill(os.getpid(), signal.SIGTERM)
        restore(self, engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "restore", interrupted)
        with pytest.raises(Interrupted):
            run.execute(experiment)
    assert not list(folder.glob("metrics.jsonl")) or lines_of(folder) == []


class Stopping(ToyExperiment):
    """Ends its search when the gate's weight has moved far enough."""

    def run(self, run):
        graph = self.graph()
        gate = graph["gate"].module
        begin = gate.weight.item()
        engine = run.train("search", graph, 50, until=lambda: abs(gate.weight.item() - begin) > 0.35)
        return {"weights": [gate.weight.item()], "rounds": engine.rounds_done}

    def report(self, run):
        (run.folder / "report.txt").write_text("")


def test_a_phase_can_end_early_and_ends_there_when_resumed(tmp_path):
    whole = Run.begin(tmp_path / "whole", recipe_of(None), "toy", progress=False)
    result = whole.execute(Stopping(recipe_of(None)))
    assert 3 <= result["rounds"] < 50
    again = resume(tmp_path / "whole", recipe_of, progress=False)
    assert again.execute(Stopping(again.recipe))["rounds"] == result["rounds"]  # finished phases are only loaded
    begun = Run.begin(tmp_path / "run", recipe_of(None), "toy", progress=False)
    with pytest.raises(Interrupted):
        begun.execute(Stopping(recipe_of(None), ("search", 2, signal.SIGINT)))
    later = resume(tmp_path / "run", recipe_of, progress=False)
    later.execute(Stopping(later.recipe))
    same_end(tmp_path / "run", tmp_path / "whole")
