"""The texts of `--seeds` and `--vary`.

Called by `mlo.cli`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from mlo.errors import RecipeError
from mlo.recipes.overrides import parse_override

_OPENING, _CLOSING = "[{", "]}"
_MAX_SEEDS = 10_000


@dataclass(frozen=True)
class Varied:
    """A setting and the values that it takes, `--vary lambda=0.5,1,2`.

    Attributes:
        key: dotted path of the setting.
        values: as the user wrote them, each what `--set` takes.
    """

    key: str
    values: tuple[str, ...]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `--seeds`: a number of seeds, or the seeds themselves.

    Args:
        text: "10" for seeds 0 to 9; "0,3,7" for these three; "7," for this one.

    Returns:
        The seeds, none twice.

    Raises:
        RecipeError: it is neither.

    Example:
        >>> parse_seeds("3"), parse_seeds("4,1"), parse_seeds("7,")
        ((0, 1, 2), (4, 1), (7,))
    """
    words = [word.strip() for word in text.split(",")]
    if words[-1] == "" and len(words) > 1:
        words.pop()
    if not all(re.fullmatch(r"[0-9]{1,18}", word) for word in words):
        raise RecipeError(
            f"--seeds {text}: expected how many, such as 10 for the seeds 0 to 9, or which, such as 0,3,7 (one: 7,)"
        )
    seeds = [int(word) for word in words]
    if "," not in text:
        if not 1 <= seeds[0] <= _MAX_SEEDS:
            raise RecipeError(f"--seeds {text}: expected 1 to {_MAX_SEEDS} seeds; for the one seed {text} give {text},")
        return tuple(range(seeds[0]))
    twice = [seed for seed, count in Counter(seeds).items() if count > 1]
    if twice:
        raise RecipeError(f"--seeds {text}: expected every seed once; found {twice[0]} more than once")
    return tuple(seeds)


def parse_varied(text: str) -> Varied:
    """Read `--vary key.path=value,value`.

    Args:
        text: values are YAML, as in `--set`, and are separated by the commas outside brackets and quotes.

    Raises:
        RecipeError: there is no key or no value, a value is not YAML or given twice, or the key is `seed`.

    Example:
        >>> parse_varied("data.fractions=[0.5, 0.5],[0.2, 0.8]").values
        ('[0.5, 0.5]', '[0.2, 0.8]')
    """
    key, equals, values = text.partition("=")
    key = ".".join(word.strip() for word in key.split("."))
    if not equals or not key:
        raise RecipeError(f"--vary {text}: expected key.path=value,value, such as lambda=0.5,1,2")
    if key == "seed":
        raise RecipeError(f"--vary {text}: seeds are given by --seeds, such as --seeds {values}")
    texts = _split(values)
    if not all(texts):
        raise RecipeError(f"--vary {text}: expected a value on both sides of every comma; found nothing at one")
    found: list[str] = []
    for value in texts:
        try:
            found.append(canonical(f"{key}={value}"))
        except RecipeError as error:
            raise RecipeError(f"--vary {text}: {str(error).replace('--set ', '')}") from error
        if found[-1] in found[:-1]:
            raise RecipeError(f"--vary {text}: expected every value once; found {value} more than once")
    return Varied(key, tuple(texts))


def canonical(setting: str) -> str:
    """Write the value of `key.path=value` so that equal values are equal texts: 1, 1.0 and 1e0 are one number."""
    value = parse_override(setting).value
    return repr(float(value)) if isinstance(value, int) and not isinstance(value, bool) else repr(value)


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (depth or not parts[-1].strip()):  # an apostrophe within a word is no quote
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts]
