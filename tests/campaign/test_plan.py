"""The runs of a campaign, their names, and what the folder of one says to another command."""

import json
from pathlib import Path

import pytest

import mlo
from mlo.campaign import Campaign, check_folder, parse_varied, plan_runs, prepare
from mlo.recipes import load_recipe

from ..swept_experiment import SweptRecipe


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "swept.yaml"
    path.write_text("problem: swept\n")
    return path


def load(path, overrides=()):
    return load_recipe(path, overrides, schemas={"swept": SweptRecipe})


def campaign(recipe, *varied, seeds=(0, 1), settings=()):
    return Campaign(str(recipe), "swept", tuple(settings), tuple(map(parse_varied, varied)), seeds)


def planned(recipe, *varied, **options):
    return plan_runs(campaign(recipe, *varied, **options), load, lambda _: None)


def names(runs):
    return [run.name for run in runs]


def test_every_combination_with_every_seed(recipe):
    runs = planned(recipe, "penalty=0.5,1", "rounds=1,2", seeds=(0, 3), settings=["precision=bf16"])
    assert names(runs) == [
        f"penalty={p}/rounds={r}/seed={s}" for p in ("0.5", "1") for r in (1, 2) for s in (0, 3)
    ]  # fmt: skip
    assert {run.recipe.precision for run in runs} == {"bf16"}
    last = runs[-1].recipe
    assert (last.penalty, last.rounds, last.seed) == (1.0, 2, 3)


def test_names_are_those_of_the_values_however_they_are_written(recipe):
    assert names(planned(recipe, "penalty=5e-1,1.0,1e-9", seeds=(7,))) == [
        "penalty=0.5/seed=7", "penalty=1/seed=7", "penalty=1e-09/seed=7",
    ]  # fmt: skip
    assert names(planned(recipe, seeds=(7,))) == ["seed=7"]


def test_names_are_folders_whatever_the_values(recipe):
    found = names(planned(recipe, "variant=a/b,a b,../up,c:d,a_b," + "x" * 300, seeds=(0,)))
    assert len(set(found)) == 6
    for name in found:
        folder, seed = name.split("/")
        assert seed == "seed=0"
        assert len(folder) < 90
        assert not set(folder) & set(' :*?"<>|\\')
    assert "variant=a_b/seed=0" in found  # legal as it stands


def test_all_mistakes_are_named_at_once(recipe):
    with pytest.raises(mlo.RecipeError) as caught:
        planned(recipe, "rounds=-1,2", "fails=never,nver", "penalty=1,x")
    lines = str(caught.value).splitlines()
    assert [line for line in lines if "rounds: found -1" in line] == lines[1:2]
    assert sum("did you mean 'never'" in line for line in lines) == 1
    assert sum("penalty: found" in line for line in lines) == 1


def test_what_only_a_check_finds_counts_too(recipe):
    def check(loaded):
        if loaded.variant != "plain":
            raise mlo.MloError(f"variant: {loaded.variant} cannot be built")

    with pytest.raises(mlo.RecipeError, match="one cannot be built\nvariant: two cannot be built"):
        plan_runs(campaign(recipe, "variant=plain,one,two"), load, check)


@pytest.mark.parametrize(
    ("varied", "settings", "message"),
    [
        (["rounds=1,2", "rounds=3"], [], "expected every setting once"),
        (["rounds=1,2"], ["rounds=3"], "this setting is varied too"),
        ([], ["seed=3"], "given by --seeds"),
        (["penalty=[],1"], [], "penalty: found"),
        (["variant=a,A"], [], "found two that make the same"),
    ],
)
def test_commands_that_contradict_themselves(recipe, varied, settings, message):
    with pytest.raises(mlo.RecipeError, match=message):
        planned(recipe, *varied, settings=settings)


def laid_out(recipe, folder, *varied, **options):
    asked = check_folder(campaign(recipe, *varied, **options), folder)
    return prepare(asked, plan_runs(asked, load, lambda _: None), folder, load)


def test_the_folder_says_what_it_is_of(recipe, tmp_path):
    folders = laid_out(recipe, tmp_path / "out", "penalty=0.5,1", settings=["rounds=3"])
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == {
        "recipe": str(recipe),
        "name": "swept",
        "settings": ["rounds=3"],
        "vary": {"penalty": ["0.5", "1"]},
        "seeds": [0, 1],
    }
    for name, folder in folders.items():
        assert folder == tmp_path / "out" / Path(name)
        assert [p.name for p in folder.iterdir()] == ["recipe.yaml"]
    assert load(folders["penalty=0.5/seed=1"] / "recipe.yaml").seed == 1


@pytest.mark.parametrize(
    ("varied", "seeds"),
    [
        (["penalty=0.5,1", "rounds=3,4"], (0, 1)),
        (["rounds=4,3", "penalty=1.0,5e-1"], (1, 0)),
        (["penalty=2,0.5,1", "rounds=3,4"], (0, 1, 2)),
    ],
)
def test_the_same_command_or_more_of_it_goes_on(recipe, tmp_path, varied, seeds):
    before = laid_out(recipe, tmp_path / "out", "penalty=0.5,1", "rounds=3,4")
    after = laid_out(recipe, tmp_path / "out", *varied, seeds=seeds)
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    ("varied", "options", "message"),
    [
        (["penalty=0.5"], {}, "--vary penalty: without 1 now"),
        (["penalty=0.5,1"], {"seeds": (1, 2)}, "--seeds: without 0 now"),
        (["rounds=1,2"], {}, "what is varied: penalty before, rounds now"),
        ([], {}, "what is varied: penalty before, nothing now"),
        (["penalty=0.5,1"], {"settings": ["rounds=5"]}, "--set: none before, --set rounds=5 now"),
    ],
)
def test_another_command_is_refused(recipe, tmp_path, varied, options, message):
    laid_out(recipe, tmp_path / "out", "penalty=0.5,1")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(mlo.MloError, match=message):
        laid_out(recipe, tmp_path / "out", *varied, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_all_differences_and_the_way_out_are_named(recipe, tmp_path):
    laid_out(recipe, tmp_path / "out", "penalty=0.5,1")
    other = Campaign("lbt/digits", "lbt/digits", (), (), (5,))
    with pytest.raises(mlo.MloError) as caught:
        check_folder(other, tmp_path / "out")
    for part in ("the recipe: swept before, lbt/digits now", "without 0, 1 now", "choose another --output"):
        assert part in str(caught.value)


def test_an_edited_recipe_is_refused(recipe, tmp_path):
    laid_out(recipe, tmp_path / "out", "penalty=0.5,1")
    recipe.write_text("problem: swept\nprecision: bf16\n")
    with pytest.raises(mlo.MloError, match=r"found runs of another one: penalty=0.5/seed=0, .*was edited since"):
        laid_out(recipe, tmp_path / "out", "penalty=0.5,1")


def test_a_folder_with_other_things_is_refused(recipe, tmp_path):
    with pytest.raises(mlo.MloError, match=r"found files and no sweep.json"):
        laid_out(recipe, tmp_path, "penalty=0.5,1")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": "a"}', '{"recipe": "a", "more": 1}'])
def test_a_damaged_manifest_is_refused(recipe, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text(text)
    with pytest.raises(mlo.MloError, match=r"sweep.json: expected what mlo sweep wrote there"):
        check_folder(campaign(recipe), tmp_path / "out")
