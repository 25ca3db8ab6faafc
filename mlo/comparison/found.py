"""The runs in some folders, finished or not.

Called by `mlo.comparison.groups` and `mlo.cli`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlo.errors import MloError
from mlo.recipes.strict_yaml import parse_yaml
from mlo.tracking import read_metrics


@dataclass(frozen=True)
class FoundRun:
    """A run as its folder tells it.

    Attributes:
        folder: of the run.
        recipe: name of its recipe.
        seed: of its random draws.
        settings: the leaves of its recipe by their dotted paths; lists are leaves.
        result: what `result.json` holds, or None where the run is not finished.
        state: of an unfinished run, where it is.
    """

    folder: Path
    recipe: str
    seed: int
    settings: Mapping[str, Any]
    result: Mapping[str, Any] | None
    state: str = ""

    def figure(self, key: str) -> float | None:
        """Return a figure of the result, or None where it has none of this name.

        Raises:
            MloError: it is not a finite number.
        """
        if self.result is None or key not in self.result:
            return None
        value = self.result[key]
        if not is_number(value) or not math.isfinite(value):
            raise MloError(f"{self.folder / 'result.json'}: {key}: expected a finite number; found {value!r}")
        return float(value)


def is_number(value: object) -> bool:
    """Whether a value read from a file is a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def find_runs(paths: Sequence[Path]) -> list[FoundRun]:
    """Find the runs that folders are or contain, at any depth; each once.

    Raises:
        MloError: a folder has no run, or a file of a run cannot be read.
    """
    found: dict[Path, FoundRun] = {}
    for path in paths:
        folders = list(_run_folders(path))
        if not folders:
            raise MloError(f"{path}: expected a run or a folder with runs; found no recipe.yaml in it at any depth")
        for folder in folders:
            if folder.resolve() not in found:
                found[folder.resolve()] = _read(folder)
    return list(found.values())


def _run_folders(path: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(path):
        folders.sort()
        if "recipe.yaml" in files:
            folders.clear()  # what is in a run is the run's
            yield Path(place)


def _read(folder: Path) -> FoundRun:
    path = folder / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MloError(f"{path}: expected the recipe of a run; found what is no text: {error}") from error
    recipe = parse_yaml(text, str(path))
    if not isinstance(recipe, dict) or not isinstance(recipe.get("seed"), int):
        raise MloError(f"{path}: expected the resolved recipe of a run, which has a seed; found none in it")
    name = text.partition("\n")[0].removeprefix("#").strip() if text.startswith("#") else folder.name
    result = _result(folder)
    state = _state(folder) if result is None else ""
    return FoundRun(folder, name, recipe["seed"], dict(_leaves(recipe)), result, state)


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _result(folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of the encoding
        raise MloError(
            f"{path}: expected JSON; found {error}. The file is damaged: remove it, and mlo resume {folder} writes it "
            f"again"
        ) from error
    if not isinstance(result, dict):
        raise MloError(f"{path}: expected a mapping of figures; found {str(result)[:40]!r}")
    return result


def _state(folder: Path) -> str:
    """Say how far an unfinished run has come."""
    metrics = folder / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else []
    last = lines[-1] if lines else {}
    return f"{last['phase']}, round {last['round']}" if "phase" in last and "round" in last else "not begun"
