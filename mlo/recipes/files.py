"""Where recipes are, and what a recipe file says once it is merged with those that it extends.

Recipes are bundled with the package: an installed copy has them beside its modules in `mlo/_recipes`, a source tree has
them in `recipes/` beside the package. A bundled recipe is called by its path in there without the suffix, `lbt/digits`.
A file or folder whose name begins with an underscore is a part, to be extended by others, and no recipe by itself.
Called by `mlo.recipes.loading` and by the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlo.errors import RecipeError
from mlo.recipes.messages import did_you_mean
from mlo.recipes.strict_yaml import parse_yaml

_PACKAGE = Path(__file__).resolve().parents[1]
_SUFFIXES = (".yaml", ".yml")
REFERENCES = "references.yaml"
"""Name of the files, beside the bundled recipes, that hold published figures and are no recipes."""
BUNDLED_FOLDERS = (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes")
"""The folders of bundled recipes: the installed copy's, then the source tree's. One of them usually does not exist."""


def find_recipe(name_or_path: str | os.PathLike[str], *, folders: Sequence[Path] = BUNDLED_FOLDERS) -> Path:
    """Find a recipe's file.

    Args:
        name_or_path: the path of a file, when it ends with `.yaml` or `.yml`, or else the name of a bundled recipe.
        folders: the folders to look for a bundled recipe in; the first that has it wins.

    Raises:
        RecipeError: there is no such file or no such bundled recipe; says where it looked and which name is nearest.
    """
    path = Path(name_or_path)
    bundled = _bundled_recipes(folders)
    if path.suffix in _SUFFIXES:
        if path.is_file():
            return path
        failure = f"there is no file {str(path)!r}, seen from {Path.cwd()}"
    else:
        name = path.as_posix()
        if name in bundled:
            return bundled[name]
        places = " or ".join(str(folder) for folder in folders)
        failure = f"there is no bundled recipe {name!r} in {places} (a path to a file ends with .yaml)"
    raise RecipeError(failure + did_you_mean(path.as_posix().removesuffix(path.suffix), bundled))


def list_recipes(*, folders: Sequence[Path] = BUNDLED_FOLDERS) -> list[tuple[str, str]]:
    """List the bundled recipes: the name of each and its own `description`, sorted by name.

    Raises:
        RecipeError: a bundled recipe cannot be read.
    """
    return [
        (name, str(_read_mapping(path).get("description", "")))
        for name, path in sorted(_bundled_recipes(folders).items())
    ]


def read_recipe(path: Path, *, folders: Sequence[Path] = BUNDLED_FOLDERS) -> dict[str, Any]:
    """Read a recipe's file and merge it onto the recipe that it `extends`, if any, and so on.

    `extends` is the name of a bundled recipe or a path, relative to the file that says it, or a list of such, of which
    later ones win. Mappings are merged key by key and the extending recipe wins; lists are replaced, and so is a
    mapping whose `kind` changes, since the fields of one kind mean nothing to another.

    Raises:
        RecipeError: a file cannot be read, is not a mapping, extends what is not there, or extends itself.
    """
    return _read_extended(path, folders, extending=())


def _read_extended(path: Path, folders: Sequence[Path], extending: tuple[Path, ...]) -> dict[str, Any]:
    chain = (*extending, path.resolve())
    if path.resolve() in extending:
        raise RecipeError(f"a recipe extends itself: {' -> '.join(str(link) for link in chain)}")
    recipe = _read_mapping(path)
    if "extends" not in recipe:
        return recipe
    bases = recipe.pop("extends")
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise RecipeError(f"{path}: extends: expected names or paths of recipes, found {base!r}")
        try:
            is_path = Path(base).suffix in _SUFFIXES
            base_path = find_recipe(path.parent / base if is_path else base, folders=folders)
        except RecipeError as error:
            raise RecipeError(f"{path}: extends: {error}") from error
        merged = _merge(merged, _read_extended(base_path, folders, chain))
    return _merge(merged, recipe)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    if "kind" in base and "kind" in changes and base["kind"] != changes["kind"]:
        return dict(changes)
    merged = dict(base)
    for key, value in changes.items():
        inherited = base.get(key)
        if isinstance(inherited, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(inherited, value)
        else:
            merged[key] = value
    return merged


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    recipe = parse_yaml(text, str(path))
    if not isinstance(recipe, dict):
        found = "nothing" if recipe is None else f"a {type(recipe).__name__}"
        raise RecipeError(f"{path}: expected a mapping from keys to values, found {found}")
    return recipe


def _bundled_recipes(folders: Sequence[Path]) -> dict[str, Path]:
    recipes: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            name = path.relative_to(folder).with_suffix("")
            if not any(part.startswith("_") for part in name.parts) and path.name != REFERENCES:
                recipes.setdefault(name.as_posix(), path)
    return recipes
