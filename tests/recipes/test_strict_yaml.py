from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlo.errors import RecipeError
from mlo.recipes.strict_yaml import format_yaml, parse_yaml

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        ("-2E+5", -2e5),
        ("1.5e3", 1500.0),
        (".5e-1", 0.05),
        ("3.", 3.0),
        ("-.inf", -math.inf),
        ("17", 17),
        ("-0", 0),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("[1e-3, {a: 2e2}]", [1e-3, {"a": 200.0}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(text, "x.yaml")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["yes", "off", "010", "1:30", "2024-01-31", "e3", "1e", "'3e-4'", "0x", "1.2.3", "="])
def test_what_looks_like_a_number_boolean_or_date_to_yaml_1_1_is_a_string(text: str) -> None:
    assert parse_yaml(text, "x.yaml") == text.strip("'")


@pytest.mark.parametrize(
    ("text", "place", "key", "first_line"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1", "a", 1),
        ("top:\n  - {b: 1}\n  - inner:\n      c: 1\n      d: 2\n      c: 3", "line 6, column 7", "c", 4),
        ("{e: 1, 'e': 2}", "line 1, column 8", "e", 1),
    ],
)
def test_a_duplicate_key_is_refused_at_any_depth(text: str, place: str, key: str, first_line: int) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "some/x.yaml")
    assert str(caught.value) == f"some/x.yaml, {place}: duplicate key '{key}', first given on line {first_line}"


def test_merging_may_repeat_keys() -> None:
    text = "wide: &wide {deep: &deep {<<: &base {a: 1, b: 2}, b: 3}}\nother: {<<: *deep, a: 4}"
    found = parse_yaml(text, "x.yaml")
    assert found == {"wide": {"deep": {"a": 1, "b": 3}}, "other": {"a": 4, "b": 3}}


def test_of_several_merged_mappings_the_earlier_wins() -> None:
    text = (
        "one: &one {rate: 1}\ntwo: &two {rate: 2, size: 2}\nall: {<<: [*one, *two]}\nown: {<<: [*two, *one], size: 3}"
    )
    found = parse_yaml(text, "x.yaml")
    assert found["all"] == {"rate": 1, "size": 2}
    assert found["own"] == {"rate": 2, "size": 3}
    assert found["two"] == {"rate": 2, "size": 2}


@pytest.mark.parametrize(
    ("text", "place"), [("a: {<<: 1}", "column 9"), ("b: &b {c: 1}\na: {<<: [*b, word]}", "line 2, column 14")]
)
def test_what_is_no_mapping_cannot_be_merged(text: str, place: str) -> None:
    with pytest.raises(RecipeError, match=f"{place}: expected a mapping to merge, or a list of them; found a scalar"):
        parse_yaml(text, "x.yaml")


def test_a_mapping_merged_into_itself_is_as_it_was() -> None:
    assert parse_yaml("a: &a {<<: *a, b: 1}", "x.yaml") == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "x.yaml, line 1, column 9: while parsing a flow sequence: expected ',' or ']'"),
        ("a: 1\n\tb: 2", "x.yaml, line 2, column 1: while scanning for the next token: found character"),
        ("1: a", "x.yaml, line 1, column 1: the key '1' is not a string; put it in quotes"),
        ("a: 1\ntrue: b", "x.yaml, line 2, column 1: the key 'true' is not a string"),
        ("a: !!python/name:os.system x", "x.yaml, line 1, column 4: tags, such as"),
        ("!!set {a, b}", "x.yaml, line 1, column 1: tags, such as"),
        ("a: &loop [*loop]", "x.yaml, line 1, column 4: found unconstructable recursive node"),
        ("a: 1\n---\nb: 2", "x.yaml, line 2, column 1: expected a single document"),
        ("a: \x07", "x.yaml: unacceptable character"),
        ("[" * 2000, "x.yaml: maximum recursion depth"),
    ],
)
def test_other_errors_say_where(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=r"^x\.yaml") as caught:
        parse_yaml(text, "x.yaml")
    assert message in str(caught.value)


@given(TREES)
def test_what_is_written_is_read_back(tree: object) -> None:
    assert parse_yaml(format_yaml(tree), "x.yaml") == tree


@pytest.mark.parametrize("text", ["1e3", "yes", "010", "2024-01-31", "3e-4"])
def test_strings_that_another_yaml_takes_for_something_else_are_quoted(text: str) -> None:
    written = format_yaml({"a": text})
    assert yaml.safe_load(written) == parse_yaml(written, "x.yaml") == {"a": text}


def test_mappings_keep_their_order() -> None:
    assert format_yaml({"b": 3e-7, "a": [1, 2]}) == "b: 3.0e-07\na:\n- 1\n- 2\n"
