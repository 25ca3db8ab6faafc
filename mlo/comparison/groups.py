"""Groups of runs that differ in their seeds only, and in what the groups differ.

Called by `mlo.comparison.tables` and `mlo.cli`.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlo.comparison.found import FoundRun, is_number
from mlo.errors import MloError
from mlo.recipes.messages import did_you_mean
from mlo.recipes.overrides import shortest

INCIDENTAL = ("seed", "description", "device", "threads", "checkpoint_every")
"""Settings that do not tell groups apart: they change nothing about what a run is meant to compute."""


@dataclass(frozen=True)
class Group:
    """Runs of one recipe under the same settings.

    Attributes:
        recipe: name of the recipe.
        settings: those in which the groups of this recipe differ, with this one's values.
        finished: the runs with a result.
        unfinished: the others.
    """

    recipe: str
    settings: Mapping[str, Any]
    finished: tuple[FoundRun, ...]
    unfinished: tuple[FoundRun, ...]

    @property
    def label(self) -> str:
        """The settings in a line, such as "lambda=0.5, gamma=1"."""
        return ", ".join(f"{key}={show_value(value)}" for key, value in self.settings.items())

    @property
    def num_seeds(self) -> int:
        """Seeds of the finished runs."""
        return len({run.seed for run in self.finished})

    def figures(self, key: str) -> dict[int, float]:
        """Return a figure of the finished runs that have it, by seed: the mean where a seed was run repeatedly."""
        by_seed: dict[int, list[float]] = {}
        for run in self.finished:
            value = run.figure(key)
            if value is not None:
                by_seed.setdefault(run.seed, []).append(value)
        return {seed: statistics.fmean(values) for seed, values in sorted(by_seed.items())}


def group_runs(runs: Sequence[FoundRun], group_by: Sequence[str] = ()) -> list[Group]:
    """Group runs by recipe and by the settings in which the runs of a recipe differ, `INCIDENTAL` ones aside.

    Args:
        runs: finished or not.
        group_by: if given, these settings alone tell groups apart.

    Returns:
        The groups, sorted by recipe and by the values of the settings, numbers by size.

    Raises:
        MloError: no run has a setting of `group_by`.
    """
    known = {key for run in runs for key in run.settings}
    known |= {key[:place] for key in known for place, letter in enumerate(key) if letter == "."}
    for key in group_by:
        if key not in known:
            raise MloError(f"--group-by {key}: expected a setting of the runs' recipes{did_you_mean(key, known)}")
    groups: list[Group] = []
    for recipe in sorted({run.recipe for run in runs}):
        of_recipe = [run for run in runs if run.recipe == recipe]
        keys = list(group_by) or _differing(of_recipe)
        members: dict[tuple[str, ...], list[FoundRun]] = {}
        for run in of_recipe:
            members.setdefault(tuple(_identity(run, key) for key in keys), []).append(run)
        of_groups = [_group(recipe, keys, inside) for inside in members.values()]
        groups += sorted(of_groups, key=lambda group: [_rank(group.settings.get(key)) for key in keys])
    return groups


def show_value(value: Any) -> str:
    """A setting's value as it would be written behind `--set KEY=`."""
    return value if isinstance(value, str) else json.dumps(shortest(value))


def _group(recipe: str, keys: Sequence[str], runs: Sequence[FoundRun]) -> Group:
    return Group(
        recipe,
        {key: value for key in keys if (value := _setting(runs[0], key)) is not None or key in runs[0].settings},
        tuple(run for run in runs if run.result is not None),
        tuple(run for run in runs if run.result is None),
    )


def _differing(runs: Sequence[FoundRun]) -> list[str]:
    """The settings in which runs differ, in the order of their recipe.

    Where the kind of an object differs, its kind says so: what is inside is compared between runs of one kind only.
    """
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.settings) if key not in INCIDENTAL]
    kinds = [key for key in keys if key.endswith(".kind") and len({_identity(run, key) for run in runs}) > 1]
    found = []
    for key in keys:
        above = [kind for kind in kinds if kind != key and key.startswith(kind.removesuffix("kind"))]
        values: dict[tuple[str, ...], set[str]] = {}
        for run in runs:
            values.setdefault(tuple(_identity(run, kind) for kind in above), set()).add(_identity(run, key))
        if any(len(of_kind) > 1 for of_kind in values.values()):
            found.append(key)
    return found


def _identity(run: FoundRun, key: str) -> str:
    """A text that is equal for equal values; numbers that are equal are, and so is the absence of a setting."""
    value = _setting(run, key)
    if value is None and key not in run.settings:
        return ""
    return repr(float(value)) if is_number(value) else json.dumps(value)


def _setting(run: FoundRun, key: str) -> Any:
    """The value of a setting; for one that has settings inside, a short name that is equal for equal ones."""
    if key in run.settings:
        return run.settings[key]
    inside = {name: value for name, value in run.settings.items() if name.startswith(f"{key}.")}
    return f"#{hashlib.sha256(json.dumps(inside, sort_keys=True).encode()).hexdigest()[:6]}" if inside else None


def _rank(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if is_number(value) else (1, 0.0, show_value(value))
