"""Folders of runs, made without running anything."""

import json
from pathlib import Path

from mlo.recipes.strict_yaml import format_yaml


def make_run(folder: Path, recipe="lbt/digits", *, seed=0, settings=None, result=None, metrics=""):
    """The folder of a run; unfinished without a result."""
    folder.mkdir(parents=True)
    data = {"problem": "lbt", "seed": seed, "lambda": 1.0, "gamma": 1.0, **(settings or {})}
    (folder / "recipe.yaml").write_text(f"# {recipe}\n# sha256 0\n{format_yaml(data)}")
    if metrics:
        (folder / "metrics.jsonl").write_text(metrics)
    if result is not None:
        (folder / "result.json").write_text(json.dumps({**result, "seed": seed, "recipe": recipe, "versions": {}}))
    return folder


def make_sweep(folder: Path, key="lambda", values=(0.1, 0.5, 1.0, 2.0, 3.0), num_seeds=7, recipe="lbt/digits"):
    """A sweep over a setting, whose test error is least at 1."""
    for value in values:
        for seed in range(num_seeds):
            error = 2.6 + 0.15 * (value - 1.0) ** 2 + 0.04 * ((seed * 5) % 7)
            found = {
                "test_error": error,
                "random_cell_test_error": error + 0.6 + 0.01 * ((seed * 3) % 7),
                "alpha_change": 0.1 + seed,
                "num_parameters": 3_300_000 + 40_000 * seed,
                "search_seconds": 90_000.0 + 4000 * seed,
            }
            make_run(
                folder / f"{key}={value:g}" / f"seed={seed}", recipe, seed=seed, settings={key: value}, result=found
            )
    return folder
