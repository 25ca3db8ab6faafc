"""Every bundled recipe is read, built and run for two rounds, small, on data of the real format."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torchvision.datasets import CIFAR10, CIFAR100

from mlo.cli import main
from mlo.recipes import installed_problems, list_recipes, load_recipe
from tests.problems.data.files import write_cifar, write_folder

RECIPES = [name for name, _ in list_recipes()]
SCHEMAS = {name: kind.recipe_type for name, kind in installed_problems().items()}

SMALL = {
    "batch_size": 2,
    "supernet.channels": 4,
    "supernet.num_cells": 3,
    "student.width": 2,
    "evaluation.channels": 4,
    "evaluation.num_cells": 3,
    "evaluation.epochs": 1,
    "evaluation.batch_size": 48,
    "evaluation.cutout": 8,
    "evaluation.auxiliary_weight": 0.4,
}
"""What makes any recipe small."""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for dataset, per_class in ((CIFAR10, 1), (CIFAR100, 2)):
        write_cifar(dataset, tmp_path / "data", monkeypatch, per_class=per_class)
    for part, count in (("train", 40), ("val", 2)):
        write_folder(tmp_path / "data" / "imagenet" / part, {f"n{index}": count for index in range(6)}, size=(40, 36))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(name):
    """The overrides that make a recipe small, those that it has a place for."""
    data = load_recipe(name, schemas=SCHEMAS).model_dump(mode="json", by_alias=True)
    found = {}
    for key, value in SMALL.items():
        *path, last = key.split(".")
        place = data
        for part in path:
            place = place.get(part) or {}
        if last in place and place[last] is not None:
            found[key] = value
    for level, recipe in data.get("levels", {}).items():
        found[f"levels.{level}.warmup_rounds"] = min(1, recipe["warmup_rounds"])
        found[f"levels.{level}.scheduler.warmup_steps"] = min(1, recipe["scheduler"]["warmup_steps"])
    if data.get("evaluation", {}).get("network"):
        found["evaluation.network.micro_batches"] = 1
        found["evaluation.network.scheduler.warmup_epochs"] = 0
    if data.get("space", {}).get("kind") == "p_darts":
        found["space.num_cells"] = "[3, 3, 3]"
    if data["data"]["kind"] == "digits":
        found["data.fractions"] = "[0.05, 0.05, 0.05, 0.05, 0.8]"
    if data["data"]["kind"] == "imagenet":
        found |= {"data.image_size": 64, "evaluation.batch_size": 96}
    return [f"{key}={value}" for key, value in found.items()]


def blank(*arguments, **options):
    """Stand in for a drawing: pictures take longer than such a run, and those of digits are enough."""
    next(argument for argument in arguments if isinstance(argument, Path)).touch()


@pytest.mark.parametrize("name", RECIPES)
def test_two_rounds(name, folders, monkeypatch):
    if "digits" not in name:
        functions = [f"search_experiment.draw_{what}" for what in ("cell", "alphas", "curves", "graph")]
        for function in (*functions, "evaluation_experiment.draw_curves"):
            monkeypatch.setattr(f"problems.{function}", blank)
    arguments = [argument for change in small(name) for argument in ("--set", change)]
    kind = load_recipe(name, schemas=SCHEMAS).problem
    command = (
        ["evaluate", "PC_DARTS_cifar", "--recipe", name] if kind == "evaluation" else ["run", name, "--rounds", "2"]
    )
    done = CliRunner().invoke(main, [*command, *arguments, "--quiet", "--device", "cpu", "--output", "out"])
    assert done.exit_code == 0, done.output
    assert (folders / "out" / "report.html").is_file()
    for path in (folders / "out" / "checkpoints").glob("*.pt"):
        for level in torch.load(path, weights_only=True)["levels"].values():
            assert level["steps_taken"] > 0 or level["kinds"][0] == "Adam"
