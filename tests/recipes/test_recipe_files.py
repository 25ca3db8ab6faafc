from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import mlo
from mlo.errors import RecipeError
from mlo.recipes import BUNDLED_FOLDERS, find_recipe, list_recipes
from mlo.recipes.files import read_recipe

Write = Callable[[str, str], Path]


@pytest.fixture
def folders(tmp_path: Path, write: Write) -> tuple[Path, Path]:
    write("installed/lbt/digits.yaml", "problem: lbt\ndescription: the installed digits")
    write("checkout/lbt/digits.yaml", "problem: lbt\ndescription: the digits in the checkout")
    write("checkout/lbt/base.yaml", "problem: lbt")
    return tmp_path / "installed", tmp_path / "checkout"


def test_bundled_folders_are_beside_the_modules_and_beside_the_package() -> None:
    package = Path(mlo.__file__).parent
    assert (package / "_recipes", package.parent / "recipes") == BUNDLED_FOLDERS


def test_the_installed_copy_is_looked_up_first(folders: tuple[Path, Path]) -> None:
    installed, checkout = folders
    assert find_recipe("lbt/digits", folders=folders) == installed / "lbt/digits.yaml"
    assert find_recipe("lbt/base", folders=folders) == checkout / "lbt/base.yaml"


def test_a_path_is_found_from_the_working_directory(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("elsewhere/mine.yml", "problem: lbt")
    monkeypatch.chdir(tmp_path)
    assert find_recipe(path) == path
    assert find_recipe("elsewhere/mine.yml") == Path("elsewhere/mine.yml")


def test_an_unknown_name_names_the_places_and_the_nearest_name(folders: tuple[Path, Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe("lbt/digts", folders=folders)
    message = str(caught.value)
    assert f"there is no bundled recipe 'lbt/digts' in {folders[0]} or {folders[1]}" in message
    assert message.endswith("did you mean 'lbt/digits'?")


@pytest.mark.parametrize("name", ["../secret", "/lbt/digits", "", "unlike/anything"])
def test_a_name_leads_nowhere_outside_of_the_folders(name: str, folders: tuple[Path, Path], write: Write) -> None:
    write("secret.yaml", "problem: lbt")
    with pytest.raises(RecipeError, match="there is no bundled recipe"):
        find_recipe(name, folders=folders)


def test_a_missing_file_says_from_where_it_was_looked_for(folders: tuple[Path, Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe("lbt/digits.yaml", folders=folders)
    expected = f"there is no file 'lbt/digits.yaml', seen from {Path.cwd()}; did you mean 'lbt/digits'?"
    assert str(caught.value) == expected


def test_list_gives_names_and_descriptions(folders: tuple[Path, Path]) -> None:
    assert list_recipes(folders=folders) == [("lbt/base", ""), ("lbt/digits", "the installed digits")]


def test_extends_merges_mappings_and_replaces_lists(write: Write) -> None:
    write("base.yaml", "extends: root.yaml\nb: {x: 1, y: {z: 2}}\nlist: [1, 2, 3]")
    write("root.yaml", "a: 0\nb: {w: 0, x: 0}")
    path = write("mine.yaml", "extends: base.yaml\nb: {y: {q: 4}, x: 5}\nlist: [9]\nc: {d: 6}")
    assert read_recipe(path) == {
        "a": 0,
        "b": {"w": 0, "x": 5, "y": {"z": 2, "q": 4}},
        "list": [9],
        "c": {"d": 6},
    }


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ("{kind: unroll}", {"kind": "unroll"}),
        ("{kind: finite_difference, last: 2}", {"kind": "finite_difference", "radius": 0.1, "last": 2}),
        ("{last: 2}", {"kind": "finite_difference", "radius": 0.1, "last": 2}),
        ("null", None),
    ],
)
def test_extends_replaces_an_object_whose_kind_changes(write: Write, change: str, outcome: object) -> None:
    write("base.yaml", "hypergradient: {kind: finite_difference, radius: 0.1}")
    path = write("mine.yaml", f"extends: base.yaml\nhypergradient: {change}")
    assert read_recipe(path) == {"hypergradient": outcome}


def test_extends_takes_several_of_which_later_ones_win(write: Write) -> None:
    write("space.yaml", "a: {x: 1, y: 2}\nkept: 1")
    write("size.yaml", "a: {y: 3, z: 4}\nlist: [1]")
    path = write("mine.yaml", "extends: [space.yaml, size.yaml]\na: {z: 5}")
    assert read_recipe(path) == {"a": {"x": 1, "y": 3, "z": 5}, "kept": 1, "list": [1]}


def test_parts_are_extended_and_not_listed(folders: tuple[Path, Path]) -> None:
    (folders[0] / "_parts").mkdir()
    (folders[0] / "_parts" / "size.yaml").write_text("seed: 7")
    (folders[0] / "lbt" / "_space.yaml").write_text("extends: ../_parts/size.yaml\nproblem: lbt")
    (folders[0] / "lbt" / "new.yaml").write_text("extends: _space.yaml")
    assert "lbt/new" in dict(list_recipes(folders=folders))
    assert not any("_" in name for name, _ in list_recipes(folders=folders))
    assert read_recipe(folders[0] / "lbt" / "new.yaml", folders=folders) == {"seed": 7, "problem": "lbt"}
    with pytest.raises(mlo.RecipeError, match="there is no bundled recipe 'lbt/_space'"):
        find_recipe("lbt/_space", folders=folders)


def test_extends_takes_a_bundled_name_or_a_path_relative_to_the_file(folders: tuple[Path, Path], write: Write) -> None:
    assert read_recipe(write("a/x.yaml", "extends: lbt/base\nseed: 1"), folders=folders) == {
        "problem": "lbt",
        "seed": 1,
    }
    assert read_recipe(write("a/b/y.yaml", "extends: ../x.yaml"), folders=folders) == {"problem": "lbt", "seed": 1}


def test_a_cycle_is_named(write: Write, tmp_path: Path) -> None:
    write("b.yaml", "extends: c.yaml")
    write("c.yaml", "extends: ./a.yaml")
    with pytest.raises(RecipeError) as caught:
        read_recipe(write("a.yaml", "extends: b.yaml"))
    links = " -> ".join(str(tmp_path.resolve() / f"{name}.yaml") for name in "abca")
    assert str(caught.value) == f"a recipe extends itself: {links}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping from keys to values, found nothing"),
        ("- a", "expected a mapping from keys to values, found a list"),
        ("extends: 3", "extends: expected names or paths of recipes, found 3"),
        ("extends: lbt/bse", "did you mean 'lbt/base'?"),
        ("extends: gone.yaml", "gone.yaml', seen from"),
    ],
)
def test_errors_name_the_file(text: str, message: str, folders: tuple[Path, Path], write: Write) -> None:
    path = write("mine.yaml", text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, folders=folders)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(path)
