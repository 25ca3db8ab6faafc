"""Relative errors of hypergradients in float64 against closed forms: mlo, TorchOpt, higher and Betty in one run.

python -m tests.benchmarks.accuracy [--output FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import platform
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mlo
from mlo.hypergradients import KINDS
from tests.conformance.quadratics import quadratic_engine, relative_error

from .cases import CASES, Case, Method
from .peers import METHODS as PEERS

DISTRIBUTIONS = {"TorchOpt": "torchopt", "higher": "higher", "Betty": "betty-ml"}
SETTINGS: dict[str, tuple[dict[str, Any], bool, bool]] = {  # arguments, exact for steps taken, exact for optima
    "first_order": ({}, False, False),
    "finite_difference": ({"radius": 1e-3, "last": None}, True, True),
    "unroll": ({}, True, True),
    "neumann": ({"terms": 60}, False, True),
    "cg": ({"tolerance": 1e-12}, False, True),
    "nystrom": ({"rank": 1000, "damping": 1e-10}, False, True),
    "sama": ({}, False, False),
    "penalty": ({"strength": 100, "steps": 120}, False, True),
}


def own_method(kind: str) -> Method:
    arguments, for_steps, for_optima = SETTINGS.get(kind, ({}, False, False))
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())

    def compute(case: Case) -> Tensor:
        engine = quadratic_engine(case.data, KINDS[kind](**arguments), case.optimizer, case.steps)
        return engine.hypergradient(f"l{case.upper}")["w"]

    return Method("mlo", f"`{KINDS[kind].__name__}({text})`", compute, for_steps, for_optima)


LEGEND = (
    "Relative errors, in parentheses where the method does not mean to compute that derivative; *cannot*: the library "
    "says so; *error*: it raises. In the second table Betty is given the exact best responses, the others take steps."
)
OWN = tuple(own_method(kind) for kind in KINDS)


def version(library: str) -> str | None:
    try:
        return importlib.metadata.version(DISTRIBUTIONS[library])
    except importlib.metadata.PackageNotFoundError:
        return None


def error_of(method: Method, case: Case) -> float | Exception:
    """The relative error, or why there is none. TorchOpt needs the default dtype to be that of the problem."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return relative_error(method.compute(case), case.data["hypergradient"])
    except Exception as error:  # noqa: BLE001 - whatever a library raises is the result
        return error
    finally:
        torch.set_default_dtype(dtype)


class Notes:
    """Numbered footnotes, each text once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        return [f"{number}. {text}" for number, text in enumerate(self.texts, 1)]


def cell(method: Method, case: Case, notes: Notes) -> str:
    found = error_of(method, case)
    if isinstance(found, float):
        return f"{found:.0e}" if method.claims(case) else f"({found:.0e})"
    message = " ".join(str(found).split()).split(". ")[0].rstrip(".")
    word = "cannot" if "not supported" in message else "error"
    return f"{word} {notes.mark(f'{method.library}: `{type(found).__name__}: {message}`')}"


def table(methods: Iterable[Method], cases: Sequence[Case], notes: Notes) -> list[str]:
    lines = ["| | " + " | ".join(case.title for case in cases) + " |", "|---" * (len(cases) + 1) + "|"]
    for method in methods:
        mark = f" {notes.mark(f'{method.library} {method.name}: {method.note}')}" if method.note else ""
        cells = " | ".join(cell(method, case, notes) for case in cases)
        lines.append(f"| {method.library} {method.name}{mark} | {cells} |")
    return lines


def report(methods: Sequence[Method], cases: Sequence[Case]) -> str:
    """The whole text: versions, one table for steps taken and one for converged levels, notes."""
    versions = ", ".join(f"{name} {version(name) or 'not installed'}" for name in DISTRIBUTIONS)
    lines = [
        f"mlo {mlo.__version__}, {versions}; torch {torch.__version__}, Python {platform.python_version()}.",
        LEGEND,
    ]
    notes = Notes()
    for title, implicit in (("Optimizer steps really taken", False), ("Levels solved to optimality", True)):
        chosen = [case for case in cases if case.implicit == implicit]
        if chosen:
            lines += ["", f"**{title}**", "", *table(methods, chosen, notes)]
    return "\n".join([*lines, "", *notes.lines(), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)  # Betty's
    torch.set_num_threads(1)
    text = report([*OWN, *(method for method in PEERS if version(method.library))], CASES)
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
