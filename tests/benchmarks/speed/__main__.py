"""python -m tests.benchmarks.speed [--only NAMES] [--quick] [--output FOLDER].

Runs the benchmarks, prints their tables, and writes them to FOLDER: `speed.md` (where that file has the two marks, only
what is between them is replaced), `speed.json` with every single time, and the pictures in `images/`. What FOLDER has
of benchmarks that are not run now stays, with what it was measured on.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mlo.figures import save_figure

from . import cleaning, compiled, depth, lbt_step, overhead, unrolling
from .report import Benchmark, Result, describe, machine

BENCHMARKS: tuple[Benchmark, ...] = (
    *lbt_step.BENCHMARKS,
    overhead.BENCHMARK,
    compiled.BENCHMARK,
    depth.BENCHMARK,
    unrolling.BENCHMARK,
    *cleaning.BENCHMARKS,
)
BEGIN = "<!-- measured: begin -->"
END = "<!-- measured: end -->"
APART = "Measured apart: "
QUICK = "*Quick: sizes and repetitions too small to go by.*"


def run(benchmarks: Sequence[Benchmark], *, quick: bool) -> Iterator[tuple[str, dict[str, Any], dict[str, Result]]]:
    """Run benchmarks one after the other; after each, give the text, the raw numbers and the results by name so far."""
    logging.disable(logging.INFO)  # Betty's
    torch.set_num_threads(1)
    where = machine()
    lines = [describe(where)]
    if quick:
        lines += ["", QUICK]
    results = {}
    for benchmark in benchmarks:
        results[benchmark.name] = result = benchmark.run(benchmark.installed(), quick)
        missing = benchmark.missing()
        absent = [f"Not installed, and left out: {', '.join(missing)}.", ""] if missing else []
        pictures = [f"![{benchmark.title}](images/speed-{name}.png)\n" for name in result.figures]
        lines += ["", f"## {benchmark.title}", "", *absent, *pictures, result.text]
        yield (
            "\n".join([*lines, ""]),
            {n: {**where, "quick": quick, "found": r.raw} for n, r in results.items()},
            results,
        )


def merged(text: str, earlier: str) -> str:
    """Return a report with the sections of an earlier one that it has not; those say what they were measured on."""
    (head, *new), (old_head, *old) = (re.split(r"(?m)^(?=## )", report.strip()) for report in (text, earlier))
    if (QUICK in head) != (QUICK in old_head):
        return text
    titles = [section.splitlines()[0] for section in new]
    sections = dict(zip(titles, new, strict=True))
    for section in old:
        title, _, rest = section.partition("\n")
        if title not in sections:
            apart = rest.strip().startswith(APART) or old_head.strip() == head.strip()
            rest = rest.strip() if apart else f"{APART}{old_head.strip()}\n\n{rest.strip()}"
            sections[title] = f"{title}\n\n{rest}\n"
    order = {f"## {benchmark.title}": place for place, benchmark in enumerate(BENCHMARKS)}
    ordered = sorted(sections, key=lambda title: order.get(title, len(order)))
    return "\n\n".join([head.strip(), *(sections[title].strip() for title in ordered)]) + "\n"


def write(folder: Path, text: str, numbers: dict[str, Any], results: dict[str, Result]) -> None:
    """Write a report, into the middle of the one that is there if it is marked."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path, of_numbers = folder / "speed.md", folder / "speed.json"
    before, after = "", ""
    if path.exists() and BEGIN in (present := path.read_text(encoding="utf-8")) and END in present:
        before, _, rest = present.partition(BEGIN)
        earlier, _, after = rest.partition(END)
        text = merged(text, earlier)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after or chr(10)}", encoding="utf-8")
    if of_numbers.exists():
        numbers = {**json.loads(of_numbers.read_text(encoding="utf-8")), **numbers}
    of_numbers.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    for result in results.values():
        for name, figure in result.figures.items():
            save_figure(figure, folder / "images" / f"speed-{name}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--output", type=Path, help="folder for speed.md, speed.json and images/")
    options = parser.parse_args(arguments)
    shown = 0
    for text, numbers, results in run([b for b in BENCHMARKS if b.name in options.only], quick=options.quick):
        print(text[shown:], flush=True)
        shown = len(text)
        if options.output:  # after each, so that an interrupted run leaves what it has found
            write(options.output, text, numbers, results)


if __name__ == "__main__":
    main()
