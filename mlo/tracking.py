"""What happens after every round: the progress bar, and the metrics' files.

A callback is any object with `on_round(report)`; `Engine.run(callbacks=[...])` calls each after every round, in order.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mlo.errors import MloError
from mlo.files import write_text

Metrics = Mapping[str, float]
_WIDE = 130


@dataclass(frozen=True)
class RoundReport:
    """What a callback learns of a round.

    Attributes:
        round: rounds done, counted from 1.
        total_rounds: that the run is meant to have.
        metrics: "LEVEL.NAME" -> value, each the mean over the level's steps in the round; those ending in "_seconds"
            are times.
    """

    round: int
    total_rounds: int
    metrics: Metrics


class Callback(Protocol):
    """Something to do after every round."""

    def on_round(self, report: RoundReport) -> None:
        """Use the report of the round just done."""


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Refuse what cannot be called after a round.

    Raises:
        MloError: naming it.
    """
    for callback in callbacks:
        if not callable(getattr(callback, "on_round", None)):
            raise MloError(f"callbacks: expected objects with a method on_round(report); found {callback!r}")


class ProgressBar:
    """A progress bar on standard error: round, time left, losses and accuracies by level.

    Args:
        title: shown in front.
        done: rounds done before.
        total: rounds of the whole run.
    """

    def __init__(self, title: str, done: int, total: int) -> None:
        narrow = "{desc}: {n_fmt}/{total_fmt} <{remaining}{postfix}"  # figures rather than a bar where both do not fit
        self._bar = tqdm(
            desc=title,
            initial=done,
            total=total,
            unit="round",
            dynamic_ncols=True,
            mininterval=0.2,
            bar_format=narrow if shutil.get_terminal_size().columns < _WIDE else None,
        )

    def on_round(self, report: RoundReport) -> None:
        """Advance by one round."""
        self._bar.set_postfix_str(summary(report.metrics), refresh=False)
        self._bar.update(1)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


class JsonLines:
    """One line of JSON a round, appended and flushed.

    Args:
        path: of the file.
        fields: put in front of each line, such as the phase.
    """

    def __init__(self, path: str | os.PathLike[str], fields: Mapping[str, str] | None = None) -> None:
        self._file: IO[str] = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._fields = dict(fields or {})

    def on_round(self, report: RoundReport) -> None:
        """Append the round."""
        self._file.write(json.dumps({**self._fields, "round": report.round, **report.metrics}) + "\n")
        self._file.flush()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard scalars, one a metric.

    Args:
        folder: for the event files.
        prefix: put in front of each tag.
        done: rounds done before; events of later rounds, left by an interrupted run, are hidden.
    """

    def __init__(self, folder: str | os.PathLike[str], prefix: str = "", done: int = 0) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        self._prefix = prefix

    def on_round(self, report: RoundReport) -> None:
        """Write the round."""
        for name, value in report.metrics.items():
            self._writer.add_scalar(self._prefix + name.replace(".", "/"), value, report.round)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


def cut_metrics(path: str | os.PathLike[str], keep: Iterable[Mapping[str, object]]) -> None:
    """Rewrite a file of JSON lines so that it holds just `keep`, atomically."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in keep))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, object]]:
    """Read a file of JSON lines; none if it is missing, and a last line that was cut off in the middle is left out."""
    lines: list[dict[str, object]] = []
    if not Path(path).exists():
        return lines
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def mean(name: str, values: Sequence[Tensor | float]) -> float:
    """Average the values that a metric had in a round.

    Raises:
        MloError: one is no number.
    """
    try:
        if len(values) == 1:
            return float(values[0])
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise MloError(f"metric {name!r}: expected a number or a tensor of one entry; found {values[0]!r}") from error
    if not all(map(math.isfinite, numbers)):
        return sum(numbers) / len(numbers)
    return math.fsum(numbers) / len(numbers)


def summary(metrics: Metrics) -> str:
    """Return the losses and accuracies in a short form: "teacher 1.23 54%, student 0.98 61%"."""
    parts = []
    for name, value in metrics.items():
        level, _, metric = name.partition(".")
        if metric == "loss":
            shown = [f"{v:.0%}" for n, v in metrics.items() if n.startswith(f"{level}.") and n.endswith("accuracy")]
            parts.append(" ".join([f"{level} {value:.3g}", *shown]))
    return ", ".join(parts)
