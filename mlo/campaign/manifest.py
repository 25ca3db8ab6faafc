"""The folder of a campaign: `sweep.json`, and one folder a run that holds its recipe before it is started.

A run is laid out as soon as the campaign is, and from then on is a run like any other that was interrupted: `mlo resume
FOLDER` starts it or goes on with it. So a recipe that is edited while the campaign runs cannot split it. Called by
`mlo.cli`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from mlo.campaign.parsing import Varied, canonical
from mlo.campaign.plan import Campaign, PlannedRun
from mlo.errors import MloError
from mlo.files import write_text
from mlo.recipes import Recipe, RecipePart
from mlo.recipes.overrides import parse_override
from mlo.runs import Run

MANIFEST = "sweep.json"


class _Manifest(RecipePart):
    """The content of `sweep.json`; of every varied setting the values, as texts of YAML."""

    recipe: str
    name: str
    settings: list[str]
    vary: dict[str, list[str]]
    seeds: Annotated[list[int], Field(min_length=1)]


def read_manifest(folder: Path) -> Campaign | None:
    """Read the campaign that a folder was made by; None if there is none.

    Raises:
        MloError: `sweep.json` is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = _Manifest.model_validate_json(path.read_text(encoding="utf-8"), strict=True)
    except (ValidationError, UnicodeDecodeError) as error:
        raise MloError(
            f"{path}: expected what mlo sweep wrote there; found {str(error).splitlines()[-1].strip()}. If you edited "
            f"the file, take the change back; else remove it, and the same command writes it again"
        ) from error
    return Campaign(
        recipe=found.recipe,
        name=found.name,
        settings=tuple(found.settings),
        varied=tuple(Varied(key, tuple(values)) for key, values in found.vary.items()),
        seeds=tuple(found.seeds),
    )


def in_the_order_of(campaign: Campaign, earlier: Campaign) -> Campaign:
    """Check that a campaign goes on with an earlier one, or only extends it, and take over the order of its settings.

    Raises:
        MloError: it does something else; says all that differs.
    """
    differences = []
    if campaign.name != earlier.name:
        differences.append(f"the recipe: {earlier.name} before, {campaign.name} now")
    if _values(campaign.settings) != _values(earlier.settings):
        before, now = (" ".join(f"--set {text}" for text in c.settings) or "none" for c in (earlier, campaign))
        differences.append(f"--set: {before} before, {now} now")
    keys, before_keys = ({varied.key for varied in c.varied} for c in (campaign, earlier))
    if keys != before_keys:
        before, now = (", ".join(sorted(k)) or "nothing" for k in (before_keys, keys))
        differences.append(f"what is varied: {before} before, {now} now")
    values = {varied.key: varied for varied in campaign.varied}
    for varied in earlier.varied:
        if varied.key in values:
            kept = {canonical(f"{varied.key}={value}") for value in values[varied.key].values}
            gone = [value for value in varied.values if canonical(f"{varied.key}={value}") not in kept]
            if gone:
                differences.append(f"--vary {varied.key}: without {', '.join(gone)} now")
    gone_seeds = [str(seed) for seed in earlier.seeds if seed not in campaign.seeds]
    if gone_seeds:
        differences.append(f"--seeds: without {', '.join(gone_seeds)} now")
    if differences:
        raise MloError("\n  ".join(["it was made by another command, which this one does not extend:", *differences]))
    return replace(campaign, varied=tuple(values[varied.key] for varied in earlier.varied))


def check_folder(campaign: Campaign, folder: Path) -> Campaign:
    """Compare a campaign with what is in its folder, before it is planned.

    Returns:
        The campaign, its settings in the order in which the folder has them.

    Raises:
        MloError: the folder is another campaign's, or holds other things.
    """
    earlier = read_manifest(folder)
    if earlier is not None:
        try:
            return in_the_order_of(campaign, earlier)
        except MloError as error:
            raise MloError(f"{folder}: {error}\nRepeat that command, extend it, or choose another --output") from error
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MloError(
            f"{folder}: expected a new or empty folder, or that of a sweep; found files and no {MANIFEST}. Choose "
            f"another --output"
        )
    return campaign


def prepare(
    campaign: Campaign, runs: Sequence[PlannedRun], folder: Path, load: Callable[[Path], Recipe]
) -> dict[str, Path]:
    """Write the manifest, and the folder of every run that has none.

    Args:
        campaign: compared with the folder by `check_folder`.
        runs: of the campaign.
        folder: of the campaign; made if it is not there.
        load: reads a recipe from a path.

    Returns:
        The folder of each run by its name, in order.

    Raises:
        MloError: a run that is there was made by another recipe, whatever the commands say; all such are named.
    """
    folders = {run.name: folder / run.name for run in runs}
    there = [run for run in runs if (folders[run.name] / "recipe.yaml").is_file()]
    changed = [run.name for run in there if load(folders[run.name] / "recipe.yaml") != run.recipe]
    if changed:
        raise MloError(
            f"{folder}: expected runs of the recipe as it is now; found runs of another one: {', '.join(changed)}. The "
            f"recipe's file was edited since. Take the change back, or choose another --output"
        )
    data: Mapping[str, Any] = {
        "recipe": campaign.recipe,
        "name": campaign.name,
        "settings": list(campaign.settings),
        "vary": {varied.key: list(varied.values) for varied in campaign.varied},
        "seeds": list(campaign.seeds),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MANIFEST, json.dumps(data, indent=2) + "\n")
    for run in runs:
        if run not in there:
            Run.begin(folders[run.name], run.recipe, campaign.name)
    return folders


def _values(settings: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    return [(parse_override(text).path, canonical(text)) for text in settings]
