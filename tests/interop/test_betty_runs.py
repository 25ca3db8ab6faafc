"""`mlo run --engine betty`: an ordinary folder, except that nothing can be gone on with."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from click.testing import CliRunner

from mlo.cli import main
from mlo.errors import InteropError
from mlo.runs import Interrupted, Run, resume
from mlo.tracking import read_metrics
from tests.test_cli import FILES, small
from tests.toy_experiment import ToyExperiment, ToyRecipe

ESTIMATORS = [f"levels.{level}.hypergradient.kind=finite_difference" for level in ("teacher", "student")]
TOY = ToyRecipe(problem="toy", engine="betty")


def invoke(*arguments):
    return CliRunner().invoke(main, [str(word) for word in arguments])


def test_what_betty_cannot_do_ends_the_command_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("run", "lbt/digits", "--engine", "betty", "--set", "rounds=2", "--set", "diagnostics_every=1")
    assert done.exit_code == 2
    for level in ("teacher", "student"):
        assert (
            f"level {level!r}, Unroll(last=None, checkpoint=False, graphs=1): Betty has no such estimator"
            in done.output
        )
        assert f"--set levels.{level}.hypergradient.kind=finite_difference" in done.output
    assert "diagnostics_every=1: Betty records no steps" in done.output
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_one_level_has_nothing_for_betty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("run", "evaluate/digits", "--engine", "betty", "--set", "genotype=DARTS_V2")
    assert done.exit_code == 2
    assert "engine: expected 'mlo', as problem 'evaluation' has the one level 'network'; found 'betty'" in done.output


def test_the_sweep_of_engines_is_refused_as_a_run_is(tmp_path):
    arguments = ["--seeds", 1, "--vary", "engine=mlo,betty", "--output", tmp_path / "sweep"]
    done = invoke("sweep", "lbt/digits", *arguments)
    assert done.exit_code == 2
    assert "Betty cannot express" in done.output
    assert not (tmp_path / "sweep").exists()


def test_digits_with_learning_by_teaching(tmp_path):
    pytest.importorskip("betty", reason="an optional peer; .ci/run installs it")
    folder = tmp_path / "run"
    arguments = ["lbt/digits", "--engine", "betty", "--set", "rounds=2", "--quiet", "--output", folder]
    done = invoke("run", *arguments, *small(*ESTIMATORS, "random_cell=false"))
    assert done.exit_code == 0, done.output
    assert {p.name for p in folder.iterdir()} == FILES
    result = json.loads((folder / "result.json").read_text())
    assert result["engine"] == "betty"
    assert result["versions"]["betty-ml"] == "0.2.1"
    assert result["search_rounds"] == 2
    assert result["alpha_change"] > 0
    assert "engine: betty" in (folder / "recipe.yaml").read_text()
    searched = [line for line in read_metrics(folder / "metrics.jsonl") if line["phase"] == "search"]
    assert [line["round"] for line in searched] == [1, 2]
    assert {"teacher.loss", "student.accuracy", "architecture.loss", "round_seconds"} <= searched[0].keys()
    checkpoints = {path.name.partition("-")[0] for path in (folder / "checkpoints").iterdir()}
    assert checkpoints == {"evaluation"}  # of one level, trained by our engine
    again = invoke("resume", folder)
    assert again.exit_code == 0
    assert "this run is finished; nothing to do" in again.output


def test_a_run_is_betty_s_in_its_search_and_ours_in_its_first_round(tmp_path):
    pytest.importorskip("betty", reason="an optional peer; .ci/run installs it")
    lines = {}
    for engine in ("mlo", "betty"):
        recipe = ToyRecipe(problem="toy", engine=engine)
        run = Run.begin(tmp_path / engine, recipe, "toy", progress=False)
        result = run.execute(ToyExperiment(recipe))
        assert result["engine"] == engine
        lines[engine] = [line for line in read_metrics(run.folder / "metrics.jsonl") if line["phase"] == "search"]
    assert [line["round"] for line in lines["betty"]] == list(range(1, 8))
    for name in ("net.loss", "gate.loss", "net.learning_rate"):
        assert lines["betty"][0][name] == pytest.approx(lines["mlo"][0][name], rel=1e-6)
    assert lines["betty"][2]["net.loss"] != lines["mlo"][2]["net.loss"]


def test_a_phase_may_end_early(tmp_path):
    pytest.importorskip("betty", reason="an optional peer; .ci/run installs it")
    run = Run.begin(tmp_path / "run", TOY, "toy", progress=False)
    graph = ToyExperiment(TOY).graph()
    weight = graph["gate"].module.weight
    begin = weight.item()
    engine = run.train("search", graph, 50, until=lambda: abs(weight.item() - begin) > 0.15)
    assert abs(weight.item() - begin) > 0.15
    assert 1 < engine.rounds_done < 50  # Adam moves it by 0.1 in the first
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == engine.rounds_done


def test_an_interrupted_run_trains_anew(tmp_path):
    pytest.importorskip("betty", reason="an optional peer; .ci/run installs it")
    whole = Run.begin(tmp_path / "whole", TOY, "toy", progress=False).execute(ToyExperiment(TOY))
    folder = tmp_path / "run"
    run = Run.begin(folder, TOY, "toy", progress=False)
    with pytest.raises(Interrupted):
        run.execute(ToyExperiment(TOY, ("search", 3, signal.SIGTERM)))
    assert not run.finished
    before = (folder / "metrics.jsonl").read_text()
    assert before.count("\n") == 4  # the round was ended
    again = resume(folder, lambda path: TOY, progress=False).execute(ToyExperiment(TOY))
    assert again["weights"] == whole["weights"]
    rounds, expected = (
        [(line["phase"], line["round"]) for line in read_metrics(where / "metrics.jsonl")]
        for where in (folder, tmp_path / "whole")
    )
    assert rounds == expected


def test_the_command_line_says_so_too(tmp_path, monkeypatch):
    pytest.importorskip("betty", reason="an optional peer; .ci/run installs it")

    def stopped(self, experiment):
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(Run, "execute", stopped)
    done = invoke("run", "darts/digits-first", "--engine", "betty", "--quiet", "--output", tmp_path / "run")
    assert done.exit_code == 128 + signal.SIGINT
    assert f"what it trained begins anew. Go on with:\n\n    mlo resume {tmp_path}" in done.output


def test_a_run_that_was_laid_out_and_not_begun_can_be_resumed(tmp_path):
    """As a sweep does."""
    pytest.importorskip("betty", reason="an optional peer; .ci/run installs it")
    folder = tmp_path / "run"
    Run.begin(folder, TOY, "toy", progress=False)
    result = resume(folder, lambda path: TOY, progress=False).execute(ToyExperiment(TOY))
    assert all(torch.isfinite(torch.tensor(result["weights"])))


def test_several_processes_are_refused_in_a_run_that_goes_on_too(tmp_path, monkeypatch):
    run = Run.begin(tmp_path / "run", TOY, "toy", progress=False)
    monkeypatch.setattr(run, "_group", object())
    monkeypatch.setattr(run, "_check_signal", lambda: None)  # which asks the others
    with pytest.raises(InteropError, match="expected 'mlo' in a job of several processes; found 'betty'"):
        run.train("search", ToyExperiment(TOY).graph(), 1)
