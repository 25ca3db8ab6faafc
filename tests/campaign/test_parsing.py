import pytest

import mlo
from mlo.campaign import parse_seeds, parse_varied


@pytest.mark.parametrize(("text", "seeds"), [("1", (0,)), ("3", (0, 1, 2)), ("0,3, 7", (0, 3, 7)), ("5,", (5,))])
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ten", "expected how many, such as 10"),
        ("-3", "expected how many"),
        ("1.5", "expected how many"),
        ("", "expected how many"),
        (",", "expected how many"),
        ("0,,1", "expected how many"),
        ("0", r"expected 1 to 10000 seeds; for the one seed 0 give 0,"),
        ("20260101", r"for the one seed 20260101 give 20260101,"),
        ("1,2,1", "found 1 more than once"),
    ],
)
def test_wrong_seeds(text, message):
    with pytest.raises(mlo.RecipeError, match=message):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lambda=0.5", ("0.5",)),
        ("lambda = 0.5, 1", ("0.5", "1")),
        ("a.b=[1,2],[3,[4,5]]", ("[1,2]", "[3,[4,5]]")),
        ("h={kind: unroll, last: 2},{kind: sama}", ("{kind: unroll, last: 2}", "{kind: sama}")),
        ("description=\"one, two\",'three, four'", ('"one, two"', "'three, four'")),
        ("description=it's,that's", ("it's", "that's")),
        ("x=null,1,true", ("null", "1", "true")),
    ],
)
def test_values_are_split_outside_brackets_and_quotes(text, values):
    assert parse_varied(text).values == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lambda", "expected key.path=value,value"),
        ("=1", "expected key.path=value,value"),
        ("a..b=1", "expected key.path=value"),
        ("lambda=", "found nothing at one"),
        ("lambda=1,,2", "found nothing at one"),
        ("lambda=1,2,1.0", "found 1.0 more than once"),
        ("lambda=[1,2", "--vary lambda"),
        ("seed=1,2", "--seeds 1,2"),
        ("problem=a,b", "can be set in a recipe's file only"),
    ],
)
def test_wrong_values(text, message):
    with pytest.raises(mlo.RecipeError, match=message):
        parse_varied(text)


def test_true_and_one_are_two_values():
    assert parse_varied("x=true,1").values == ("true", "1")
