"""Searches from a recipe to a genotype: stages, rules, and interruptions in any of them."""

import json
import signal

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mlo
from mlo.cli import main
from mlo.recipes import installed_problems, load_recipe
from mlo.runs import Interrupted, Run, resume
from problems.darts_experiment import DARTSExperiment
from problems.data import DigitsRecipe
from problems.search_experiment import SearchExperiment
from problems.search_spaces import DARTS_PRIMITIVES
from tests.toys import signal_at_call

SCHEMAS = {name: kind.recipe_type for name, kind in installed_problems().items()}
SMALL = ("supernet.channels=2", "evaluation.channels=4", "evaluation.epochs=1", "rounds=3", "checkpoint_every=2")


def load(name, *overrides):
    return load_recipe(name, (*SMALL, *overrides), schemas=SCHEMAS)


def execute(folder, recipe, experiment=DARTSExperiment):
    run = Run.begin(folder, recipe, "test", progress=False)
    return run.execute(experiment(recipe))


P_DARTS = (
    "darts/digits-p-darts",
    "space.num_cells=[3,3,4]",
    "levels.architecture.warmup_rounds=1",
    "random_cell=false",
)


def test_a_warm_up_as_long_as_the_search_is_warned_of(tmp_path):
    recipe = load("darts/digits-first", "levels.architecture.warmup_rounds=3", "random_cell=false")
    with pytest.warns(
        UserWarning, match="warmup_rounds: expected fewer than the 3 rounds; found 3, so that the archit"
    ):
        assert execute(tmp_path, recipe)["alpha_change"] == 0


@pytest.mark.parametrize("size", [5000, 63])
def test_an_evaluation_that_cannot_be_is_found_before_the_search(monkeypatch, size):
    monkeypatch.setattr("problems.data.loading.whole_world", lambda: "two")
    monkeypatch.setattr("problems.data.loading.rank_of", lambda group: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(mlo.MloError, match=r"^evaluation\.batch_size: expected .* found .*\b" + str(size)):
        DARTSExperiment(load("darts/digits-first", f"evaluation.batch_size={size}")).graph()


def test_channels_that_partial_ones_do_not_divide():
    with pytest.raises(mlo.RecipeError, match=r"supernet: .* channels: expected a multiple of space.k = 3; found 2"):
        load("darts/digits-first", "space.kind=pc_darts", "space.k=3")


class Interrupting(DARTSExperiment):
    """Asks to be stopped in the second round of its second stage."""

    def declare(self, stage, data):
        graph = super().declare(stage, data)
        if len(stage.space.normal[0]) == 5:
            signal_at_call(graph["network"].module, 5, signal.SIGINT)
        return graph


def test_the_three_stages_of_p_darts_and_an_interruption_in_the_second(tmp_path):
    whole = execute(tmp_path / "whole", load(*P_DARTS))
    assert whole["search_rounds"] == 3
    genotype = json.loads((tmp_path / "whole" / "genotype.json").read_text())
    assert sum(name == "skip_connect" for name, _ in genotype["normal"]) <= 2
    for stage, num in ((1, 8), (2, 5), (3, 3)):
        state = torch.load(tmp_path / "whole" / "checkpoints" / f"search_{stage}-00000003.pt", weights_only=True)
        assert state["levels"]["architecture"]["module"]["normal"].shape == (14, num)
        assert state["levels"]["architecture"]["steps_taken"] == 2  # the first round of a stage is its warm-up

    recipe = load(*P_DARTS)
    begun = Run.begin(tmp_path / "run", recipe, "test", progress=False)
    with pytest.raises(Interrupted):
        begun.execute(Interrupting(recipe))
    assert not (tmp_path / "run" / "genotype.json").exists()
    again = resume(tmp_path / "run", lambda _: recipe, progress=False)
    result = again.execute(DARTSExperiment(again.recipe))
    for key in ("test_error", "alpha_change", "num_parameters"):
        assert result[key] == whole[key]
    assert json.loads((tmp_path / "run" / "genotype.json").read_text()) == genotype


def test_primitives_that_an_edge_has_lost_have_no_weight_in_the_picture(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("problems.search_experiment.draw_alphas", lambda *a, **k: seen.append((a, k)))
    monkeypatch.setattr(SearchExperiment, "report", lambda self, run: None)
    execute(tmp_path / "run", load(*P_DARTS))
    (((_, weights, primitives), _),) = seen
    assert set(primitives) <= set(DARTS_PRIMITIVES)
    assert list(primitives) == sorted(primitives, key=DARTS_PRIMITIVES.index)
    assert (np.isfinite(weights["normal"]).sum(axis=1) == 3).all()
    assert np.nansum(weights["normal"], axis=1) == pytest.approx(1.0)


def test_a_search_stops_at_skip_connections(tmp_path):
    """With skip-connections and little else to choose from, that is at once."""
    choice = 'space.primitives=["none","skip_connect"]'
    result = execute(tmp_path / "run", load("darts/digits-first", choice, "stop_at_skips=2", "random_cell=false"))
    assert result["search_rounds"] == 0
    result = execute(tmp_path / "other", load("darts/digits-first", choice, "stop_at_skips=9", "random_cell=false"))
    assert result["search_rounds"] == 3


@pytest.mark.parametrize("relaxation", ["gumbel_softmax", "sigmoid", "auxiliary_skip"])
@pytest.mark.parametrize("recipe", ["darts/digits-pc-darts", "lbt/digits"])
def test_any_relaxation_with_any_space(recipe, relaxation):
    warm = ("levels.architecture.warmup_rounds=0",)
    loaded = load(recipe, f"space.relaxation.kind={relaxation}", "supernet.channels=4", *warm)
    experiment = installed_problems()[loaded.problem](loaded)
    metrics = mlo.Engine(experiment.graph(), seed=0, device="cpu").run(1, progress=False)
    assert metrics["architecture.loss"] < 10


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space.num_primitives=[8,5]", "expected one number a stage in num_cells, num_primitives and skip_dropout"),
        ("space.num_primitives=[8,5,6]", "num_primitives: expected 8, all primitives, then fewer"),
        ("space.frozen_epochs=30", "frozen_epochs: expected at most epochs = 20; found 30"),
        ('space.primitives=["skip_conect","none"]', "did you mean 'skip_connect'"),
        (
            "space.num_primitives=[8,5,2]",
            "max_skips: expected at least 8, or null, where an edge may have skip_connect",
        ),
    ],
)
def test_mistakes_in_a_recipe_are_named(override, message):
    with pytest.raises(mlo.RecipeError, match=message):
        load("darts/digits-p-darts", override)


def test_data_are_read_once_though_the_graph_is_built_before_the_run(tmp_path, monkeypatch):
    built, build = [], DigitsRecipe.build
    monkeypatch.setattr(DigitsRecipe, "build", lambda self, seed: built.append(seed) or build(self, seed))
    flags = [flag for setting in (*SMALL, "rounds=1", "random_cell=false") for flag in ("--set", setting)]
    done = CliRunner().invoke(main, ["run", "darts/digits-first", *flags, "--quiet", "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert built == [0]
