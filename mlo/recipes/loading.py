"""From the name of a recipe to a checked, immutable `Recipe`, and back to text.

Called by the command line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, PositiveInt, ValidationError, field_validator

from mlo.devices import check_device
from mlo.errors import RecipeError
from mlo.recipes.files import BUNDLED_FOLDERS, find_recipe, read_recipe
from mlo.recipes.kinds import RecipePart
from mlo.recipes.messages import Finding, did_you_mean, show, word_errors
from mlo.recipes.overrides import Override, apply_overrides, parse_override
from mlo.recipes.strict_yaml import format_yaml

ENTRY_POINT_GROUP = "mlo.problems"


class Recipe(RecipePart):
    """What every recipe says; the schema of a problem is a subclass with fields of its own.

    Attributes:
        problem: the name of the problem, which selects the schema.
        description: one line for `mlo list`.
        seed: of all random numbers of the run.
        device: `auto`, or a device as PyTorch names it, such as `cuda:1`.
        precision: what the losses are computed in.
        rounds: of the problem's main engine; `--rounds` sets it.
        rollback: put the lower levels back before each upper step, and solve them again after it.
        compile: true, or names of the main levels: let first-order passes call their modules under `torch.compile`.
        engine: that trains the problem's levels: `mlo`, or `betty` to compare with; single levels are always trained by
            `mlo`.
        diagnostics_every: rounds from one comparison of the hypergradients with the exact ones to the next, or None.
        checkpoint_every: rounds from one checkpoint to the next.
        synchronize_batch_norm: in several processes, normalize over the batches of all, as one process would; false
            lets each normalize over its own, which is faster.
        threads: of torch on the CPU, or None to leave them as they are; small kernels run fastest on one.
    """

    problem: str
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    rounds: PositiveInt
    rollback: bool = False
    compile: bool | list[str] = False
    engine: Literal["mlo", "betty"] = "mlo"
    diagnostics_every: PositiveInt | None = None
    checkpoint_every: PositiveInt = 50
    synchronize_batch_norm: bool = True
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if value != "auto":
            check_device(value)
        return value


class DeclaredProblem(Protocol):
    """What an entry point of the group `mlo.problems` names: a class with the schema of its recipes."""

    recipe_type: ClassVar[type[Recipe]]


def installed_problems() -> dict[str, type[DeclaredProblem]]:
    """Load the problems that the installed packages declare, by the name that a recipe selects each with.

    Raises:
        RecipeError: a declared problem cannot be imported or has no `recipe_type`.
    """
    problems: dict[str, type[DeclaredProblem]] = {}
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda declared: declared.name):
        declaration = f"the problem {entry_point.name!r}, declared by an installed package as {entry_point.value!r}"
        try:
            loaded = entry_point.load()
        except (ImportError, AttributeError) as error:
            raise RecipeError(f"{declaration}, cannot be loaded: {error}") from error
        recipe_type = getattr(loaded, "recipe_type", None)
        if not (isinstance(recipe_type, type) and issubclass(recipe_type, Recipe)):
            raise RecipeError(
                f"{declaration}: expected a subclass of mlo's Recipe as its recipe_type, got {recipe_type!r}"
            )
        problems[entry_point.name] = loaded
    return problems


def load_recipe(
    name_or_path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    schemas: Mapping[str, type[Recipe]],
    folders: Sequence[Path] = BUNDLED_FOLDERS,
) -> Recipe:
    """Find, read, override and check a recipe.

    Args:
        name_or_path: the name of a bundled recipe or the path of a file.
        overrides: `key.path=value` texts, applied in order. Where the recipe is valid without them, they can also set
            single fields of what it leaves to the schema's defaults.
        schemas: the schema of each problem, as `installed_problems` finds them.
        folders: the folders of bundled recipes.

    Returns:
        The checked recipe, of the type that its `problem` selects.

    Raises:
        RecipeError: the recipe is not there, is not YAML, or is not valid; all that is invalid is named at once.
    """
    path = find_recipe(name_or_path, folders=folders)
    title = f"recipe {os.fspath(name_or_path)}" + (f" ({path})" if path != Path(name_or_path) else "")
    data = read_recipe(path, folders=folders)
    schema = _schema(data, schemas, title)
    own_findings: list[Finding] = []
    changes: list[Override] = []
    if overrides:
        try:
            data = _to_data(_validate(data, schema))
        except ValidationError as error:
            own_findings = word_errors(error, data, schema)
        try:
            changes = [parse_override(text) for text in overrides]
            data = apply_overrides(data, changes)
        except RecipeError as error:
            raise RecipeError(f"{title}: {error}") from error
    try:
        return _validate(data, schema)
    except ValidationError as error:
        findings = word_errors(error, data, schema)
        lines = [f"  {finding}{_origin(finding, own_findings, changes)}" for finding in findings]
        raise RecipeError("\n".join([f"{title} is not valid:", *lines])) from error


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML that `load_recipe` reads back as an equal one: every field, and nothing to extend."""
    return format_yaml(_to_data(recipe))


def _schema(data: Mapping[str, Any], schemas: Mapping[str, type[Recipe]], title: str) -> type[Recipe]:
    name = data.get("problem")
    if isinstance(name, str) and name in schemas:
        return schemas[name]
    found = show(name) if "problem" in data else "nothing"
    names = ", ".join(schemas) or "the problems of an installed package, and none is installed"
    raise RecipeError(f"{title}: problem: found {found}, expected one of {names}{did_you_mean(str(name), schemas)}")


def _validate(data: Mapping[str, Any], schema: type[Recipe]) -> Recipe:
    # pydantic's strict mode converts nothing, except that in JSON, which has lists only, a list may stand for a tuple.
    return schema.model_validate_json(json.dumps(data), strict=True)


def _to_data(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", by_alias=True)


def _origin(finding: Finding, own_findings: Sequence[Finding], changes: Sequence[Override]) -> str:
    """A clause that says which override a finding is about, unless the recipe has it without the overrides."""
    concerned = [change for change in changes if change.concerns(finding.path)]
    return f" (from --set {concerned[-1].text})" if concerned and finding not in own_findings else ""
