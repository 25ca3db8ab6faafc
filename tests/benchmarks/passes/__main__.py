"""python -m tests.benchmarks.passes RECIPE [KEY=VALUE ...] [--batch N ...] [--device auto] [--output FILE.md].

What a search by Learning by Teaching costs, computed from single passes: the supernet and the student of a recipe are
built at full size and measured on a few random images; what a round does with them is counted in a small twin of the
recipe. Nothing of the recipe's data is needed. `docs/cost.md` explains the formula, which is in `cost`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mlo.devices import find_device
from mlo.errors import MloError

from ..speed.report import describe, machine
from .cost import report
from .counting import count
from .measuring import Rounds, measured

TURNS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, compute, print."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.passes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="of the problem lbt, such as lbt/imagenet-rn18-pc-darts")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for mlo run --set")
    parser.add_argument("--batch", nargs="+", type=int, help="images of the measured passes: 4 8 16, on CUDA 16 32 64")
    parser.add_argument("--turns", type=int, default=TURNS, help="measurements of each, of which the median counts")
    parser.add_argument("--device", default="auto", help="as in a recipe")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="a file to write the report to")
    options = parser.parse_args(arguments)
    if min(options.turns, *(options.batch or (1,))) < 1:
        parser.error("--turns and --batch: expected numbers of at least 1")
    torch.set_num_threads(1)
    try:
        _report(options)
    except MloError as error:
        parser.exit(1, f"Error: {error}\n")


def _report(options: argparse.Namespace) -> None:
    device = find_device(options.device, [])
    batches = sorted(options.batch or ((16, 32, 64) if device.type == "cuda" else (4, 8, 16)))
    search = count(options.recipe, options.overrides)
    networks = measured(options.recipe, options.overrides, batches, device, options.turns)
    where = describe(machine())
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}; {where}"
    words = ["python -m tests.benchmarks.passes", options.recipe, *options.overrides]
    words += ["--batch", *map(str, options.batch)] if options.batch else []
    words += ["--turns", str(options.turns)] if options.turns != TURNS else []
    command = " ".join(words)
    smallest = max(2, batches[0])  # of a recipe
    real = Rounds(options.recipe, tuple(options.overrides), device).seconds(smallest)
    expected = replace(search, batch=smallest).round(networks)
    check = (
        f"A real round after the warm-up, with batches of {smallest} images: {real:.3g} s; its passes, by the fit: "
        f"{expected:.3g} s."
    )
    text = f"`{command}`, {device.type}: {where}\n\n{report(search, networks)}\n{check}\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
