"""Checks of the estimators' arguments."""

from __future__ import annotations

import math

from mlo.errors import MloError


def check_count(estimator: object, name: str, *, least: int = 1, none: str | None = None) -> None:
    """Refuse an argument that is not a whole number of at least `least`.

    Args:
        estimator: whose argument it is.
        name: of the argument.
        least: number that is allowed.
        none: what None stands for, where it is allowed.

    Raises:
        MloError: it is neither.
    """
    value = getattr(estimator, name)
    if value is None and none is not None:
        return
    if type(value) is not int or value < least:
        allowed = f", or None for {none}" if none is not None else ""
        raise MloError(
            f"{type(estimator).__name__}: {name} must be a whole number of at least {least}{allowed}; found {value!r}"
        )


def check_number(estimator: object, name: str, *, allow_zero: bool, or_else: str | None = None) -> None:
    """Refuse an argument that is not a finite positive number.

    Args:
        estimator: whose argument it is.
        name: of the argument.
        allow_zero: whether zero will do.
        or_else: a word that is allowed too.

    Raises:
        MloError: it is not.
    """
    value = getattr(estimator, name)
    if or_else is not None and value == or_else:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not allow_zero):
        kind = "a number of at least 0" if allow_zero else "a positive number"
        kind += f" or {or_else!r}" if or_else is not None else ""
        raise MloError(f"{type(estimator).__name__}: {name} must be {kind}; found {value!r}")


def check_flag(estimator: object, name: str) -> None:
    """Refuse an argument that is neither True nor False.

    Raises:
        MloError: it is not.
    """
    value = getattr(estimator, name)
    if not isinstance(value, bool):
        raise MloError(f"{type(estimator).__name__}: {name} must be True or False; found {value!r}")
