"""From a recipe, seeds and varied settings to the runs of a campaign, each checked before the first one starts.

Called by `mlo.cli`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlo.campaign.parsing import Varied
from mlo.errors import MloError, RecipeError
from mlo.recipes import Recipe, dump_recipe
from mlo.recipes.overrides import parse_override, shortest

Load = Callable[[str, tuple[str, ...]], Recipe]
_LONGEST = 60


@dataclass(frozen=True)
class Campaign:
    """What `mlo sweep` was asked to run.

    Attributes:
        recipe: name of a bundled recipe or path of a file, as the user gave it.
        name: of the recipe, as its runs carry it.
        settings: of all runs, as `--set` takes them.
        varied: settings whose values are combined, each with each.
        seeds: of every combination.
    """

    recipe: str
    name: str
    settings: tuple[str, ...]
    varied: tuple[Varied, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a campaign.

    Attributes:
        name: unique in the campaign; the run's folder in that of the campaign, such as "lambda=0.5/seed=3".
        recipe: resolved.
    """

    name: str
    recipe: Recipe


def plan_runs(campaign: Campaign, load: Load, check: Callable[[Recipe], object]) -> list[PlannedRun]:
    """Make the runs of a campaign: every combination of the varied settings, with every seed.

    A run's name says its varied settings and its seed, in the values of the checked recipe: `--vary lambda=1,2` and
    `--vary lambda=1.0,2e0` name the same folders.

    Args:
        campaign: what to run.
        load: reads a recipe with overrides.
        check: raises an MloError if a recipe, though valid, cannot be run; called once a combination.

    Raises:
        RecipeError: some combination is not valid; all that is wrong with any is named at once.
    """
    _check_keys(campaign)
    runs: list[PlannedRun] = []
    mistakes: dict[str, None] = {}  # in order, each once: combinations share most of them
    for values in itertools.product(*(varied.values for varied in campaign.varied)):
        chosen = [f"{varied.key}={value}" for varied, value in zip(campaign.varied, values, strict=True)]
        try:
            recipes = [load(campaign.recipe, (*campaign.settings, *chosen, f"seed={s}")) for s in campaign.seeds]
            check(recipes[0])
        except MloError as error:
            mistakes |= dict.fromkeys(str(error).splitlines())
            continue
        for seed, recipe in zip(campaign.seeds, recipes, strict=True):
            parts = [_folder(varied.key, text, recipe) for varied, text in zip(campaign.varied, chosen, strict=True)]
            runs.append(PlannedRun("/".join([*parts, f"seed={seed}"]), recipe))
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    _check_unique(runs)
    return runs


def _check_keys(campaign: Campaign) -> None:
    varied = [v.key for v in campaign.varied]
    twice = [key for key, count in Counter(varied).items() if count > 1]
    if twice:
        raise RecipeError(f"--vary {twice[0]}: expected every setting once; give all its values in one --vary")
    for text in campaign.settings:
        key = ".".join(parse_override(text).path)
        if key == "seed":
            raise RecipeError(f"--set {text}: the seeds of a sweep are given by --seeds")
        if key in varied:
            raise RecipeError(f"--set {text}: this setting is varied too; take --set or --vary away")


def _check_unique(runs: Sequence[PlannedRun]) -> None:
    """Refuse two values that are one in the checked recipe, such as 1 and 1.0, or in the name of a folder."""
    seen: dict[str, str] = {}
    for run in runs:
        for identity in (dump_recipe(run.recipe), run.name.casefold()):  # some file systems do not tell case
            if identity in seen:
                raise RecipeError(
                    f"--vary: expected values that make different runs; found two that make the same: {seen[identity]} "
                    f"and {run.name}"
                )
            seen[identity] = run.name


def _folder(key: str, text: str, recipe: Recipe) -> str:
    """`KEY=VALUE` as a folder's name: readable, the same for equal values, different for different ones."""
    override = parse_override(text)
    value: Any = recipe.model_dump(mode="json", by_alias=True)
    for part in override.path:
        value = value[part]
    if isinstance(value, dict):
        value = override.value  # shorter: the checked one has all defaults
    value = shortest(value)
    plain = value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))
    legal = re.sub(r"[^\w.+,=\[\]{}-]", "_", plain)
    if legal != plain or len(legal) > _LONGEST or not legal:
        legal = f"{legal[:_LONGEST]}~{hashlib.sha256(plain.encode()).hexdigest()[:8]}"
    return f"{key}={legal}"
