"""A run: a recipe, a folder, and the phases that its problem trains in; interrupted anywhere, it goes on exactly.

A problem's `run` is plain code that trains one engine after another through `Run.train`. To resume, the same code is
executed again: a phase that was finished loads its last checkpoint instead of training, the one that was interrupted
goes on from its newest, and later ones begin. Everything else in `run` must follow from the recipe and from the
engines.

The folder:

    recipe.yaml     the resolved recipe; replays the run
    metrics.jsonl   one line a round, of all phases
    tensorboard/    the same as events
    checkpoints/    PHASE-ROUND.pt, the two newest of each phase
    held.json       fingerprints of what the run depends on, such as its images
    result.json     written last: a run that has it is finished
"""

from __future__ import annotations

import abc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Protocol

import numpy
import torch

from mlo.devices import find_device
from mlo.distributed import Group, agreed, are_alike, by_first, from_first, rank_of, whole_world
from mlo.engine import Engine
from mlo.errors import CheckpointError, InteropError, MloError
from mlo.files import alone, write_text
from mlo.graph import Graph
from mlo.interop.betty import PACKAGE, betty_engine, check_betty
from mlo.launching import processes_here
from mlo.recipes import Recipe, dump_recipe
from mlo.synchronized import synchronize_batch_norm
from mlo.tracking import Callback, JsonLines, RoundReport, TensorBoard, cut_metrics, read_metrics
from mlo.version import __version__

RESULT = "result.json"
"""The file that a finished run has."""

_HELD = "held.json"
_KEPT_CHECKPOINTS = 2
_DIGEST = "sha256 "


class Interrupted(Exception):  # noqa: N818 - not an error: everything is saved
    """The run was asked to stop, and has saved.

    Attributes:
        signal_number: that asked for it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Trained(Protocol):
    """The engine of a phase: `mlo.Engine`, or Betty's.

    Attributes:
        graph: that it trained, in place.
        rounds_done: rounds played.
    """

    graph: Graph
    rounds_done: int

    def stop(self) -> None:
        """Let it return after the round it is in."""


class Experiment(abc.ABC):
    """What an entry point of the group "mlo.problems" names: a problem that recipes can run.

    Args:
        recipe: an instance of `recipe_type`.
    """

    recipe_type: ClassVar[type[Recipe]]

    @abc.abstractmethod
    def __init__(self, recipe: Any) -> None:
        """Remember the recipe; build nothing expensive."""

    @abc.abstractmethod
    def graph(self) -> Graph:
        """Build the problem's main graph."""

    @abc.abstractmethod
    def run(self, run: Run) -> Mapping[str, Any]:
        """Train all phases through `run.train`, write into `run.folder`, and return the figures of `result.json`."""

    def report(self, run: Run) -> None:  # noqa: B027 - optional
        """Write pages about a finished run into its folder; nothing by default."""


class Run:
    """A recipe at work in a folder.

    In a job of several processes each executes the same code. The first one writes into the run's folder, the others
    into folders of their own that are thrown away.

    Args:
        folder: of the run; made by `begin`, found by `resume`.
        recipe: resolved.
        name: of the recipe, as the user called it.
        progress: show progress bars.

    Attributes:
        home: the folder of the run.
        folder: where this process writes: the folder of the run, or one of its own.
    """

    def __init__(self, folder: Path, recipe: Recipe, name: str, *, progress: bool = True) -> None:
        self.home = folder
        self.folder = folder
        self.recipe = recipe
        self.name = name
        self._group = whole_world()
        if self._group is not None and not are_alike(dump_recipe(recipe), self._group):
            raise MloError(
                f"{folder}: expected the same recipe in all processes; found another one in one of them. Start all "
                f"with the same command on the same files."
            )
        self._progress = progress and rank_of(self._group) == 0
        if rank_of(self._group) > 0:
            self._scratch = tempfile.TemporaryDirectory(prefix="mlo-", ignore_cleanup_errors=True)
            self.folder = Path(self._scratch.name)
            for file in ("recipe.yaml", "metrics.jsonl"):
                if (folder / file).exists():
                    shutil.copy(folder / file, self.folder)
        self._engine: Trained | None = None
        self._signal: int | None = None

    @classmethod
    def begin(cls, folder: str | os.PathLike[str], recipe: Recipe, name: str, *, progress: bool = True) -> Run:
        """Make the folder of a new run.

        Raises:
            MloError: the folder exists and is not empty.
        """
        path = Path(folder)

        def make() -> None:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise MloError(
                    f"{path}: expected a new or empty folder for the run; found files. Choose another --output, or go "
                    f"on with that run: mlo resume {path}"
                )
            path.mkdir(parents=True, exist_ok=True)
            # The name and the digest stand in comments, so that the file is the recipe and nothing else.
            text = dump_recipe(recipe)
            write_text(path / "recipe.yaml", f"# {name}\n# {_DIGEST}{_digest(text)}\n{text}")

        by_first(make, whole_world())
        return cls(path, recipe, name, progress=progress)

    @property
    def is_first(self) -> bool:
        """Whether this is the only process, or the one of several that speaks and writes."""
        return rank_of(self._group) == 0

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return is_finished(self.home)

    def execute(self, experiment: Experiment) -> dict[str, Any]:
        """Run or go on with the experiment, and write its result.

        Raises:
            Interrupted: by SIGINT or SIGTERM; everything is saved.
        """
        if self.recipe.threads is not None:
            torch.set_num_threads(self.recipe.threads)
        with self._alone(), self._stoppable():
            figures = dict(experiment.run(self))
        result = {
            **figures,
            "seed": self.recipe.seed,
            "recipe": self.name,
            "engine": self.recipe.engine,
            "versions": versions(self.recipe.engine),
        }
        write_json(self.folder / RESULT, result)
        if self.is_first:
            experiment.report(self)
        return result

    def result(self) -> dict[str, Any]:
        """Return the result of a finished run."""
        return dict(json.loads((self.home / RESULT).read_text(encoding="utf-8")))

    def train(
        self, phase: str, graph: Graph, rounds: int, *, until: Callable[[], bool] | None = None, **options: Any
    ) -> Trained:
        """Train a graph to `rounds` rounds, or load the engine that has been.

        The recipe's engine trains it, a graph of one level always `mlo.Engine`.

        Args:
            phase: name of the phase, different from that of any other.
            graph: freshly built, the same at every execution.
            rounds: of the whole phase.
            until: asked before every round whether to end the phase here; must follow from the state of the graph.
            options: of the engine, such as `rollback`.

        Raises:
            Interrupted: the run was asked to stop; the engine is saved.
        """
        self._check_signal()
        check_processes(self.recipe, self._group is not None)
        if self.recipe.engine == "betty" and len(graph.levels) > 1:
            return self._train_with_betty(phase, graph, rounds, until, options)
        if self._group is not None and self.recipe.synchronize_batch_norm:
            for level in graph.levels:
                synchronize_batch_norm(level.module)
        recipe, names = self.recipe, graph.structure.names
        compiled = recipe.compile if isinstance(recipe.compile, bool) else [n for n in recipe.compile if n in names]
        engine = Engine(
            graph,
            seed=recipe.seed,
            device=recipe.device,
            precision=recipe.precision,
            compile=compiled,  # another phase than the main one may lack the levels that are named
            **options,
        )
        self._engine = engine  # from here on a signal stops it
        self._check_signal()
        checkpoints = Checkpoints(self.home / "checkpoints", phase, self._group)
        checkpoints.restore(engine)
        if engine.rounds_done >= rounds or (until is not None and until()):
            return engine
        metrics = self.folder / "metrics.jsonl"
        self._cut(metrics, phase, engine.rounds_done)

        def keep(report: RoundReport) -> None:
            if until is not None and until():
                engine.stop()
            if report.round % self.recipe.checkpoint_every == 0:
                checkpoints.save(engine)

        with self._recorded(phase, engine.rounds_done) as callbacks:
            engine.run(
                rounds - engine.rounds_done,
                total_rounds=rounds,
                callbacks=[*callbacks, _Then(keep)],
                progress=self._progress,
                title=phase.replace("_", " "),
            )
        self._engine = None
        checkpoints.save(engine)
        self._check_signal()
        return engine

    def _train_with_betty(
        self, phase: str, graph: Graph, rounds: int, until: Callable[[], bool] | None, options: Mapping[str, Any]
    ) -> Trained:
        """Train a graph with Betty's engine, which leaves no checkpoints: a resumed run trains the phase anew."""
        recipe = self.recipe
        self._cut(self.folder / "metrics.jsonl", phase, 0)
        engine = betty_engine(
            graph, rounds=rounds, seed=recipe.seed, device=recipe.device, precision=recipe.precision, **options
        )
        self._engine = engine  # from here on a signal stops it
        self._check_signal()

        def keep(report: RoundReport) -> None:  # noqa: ARG001
            if until is not None and until():
                engine.stop()

        if until is None or not until():
            with self._recorded(phase, 0) as callbacks:
                engine.run(
                    callbacks=[*callbacks, _Then(keep)],
                    progress=self._progress,
                    title=f"{phase.replace('_', ' ')} (Betty)",
                )
        self._engine = None
        self._check_signal()
        return engine

    @contextmanager
    def _recorded(self, phase: str, rounds_done: int) -> Iterator[list[Callback]]:
        """Keep the metrics of a phase, from `rounds_done` on."""
        with ExitStack() as stack:
            yield [
                stack.enter_context(JsonLines(self.folder / "metrics.jsonl", {"phase": phase})),
                stack.enter_context(TensorBoard(self.folder / "tensorboard", f"{phase}/", rounds_done)),
            ]

    def holds(self, what: str, fingerprint: str) -> None:
        """Write down what the run depends on beside its recipe, such as its data; a resumed run must find the same.

        Args:
            what: for messages.
            fingerprint: different if it is another one.

        Raises:
            MloError: the run began with another one.
        """
        path = self.home / _HELD
        held = from_first(lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}, self._group)
        if held.setdefault(what, fingerprint) != fingerprint:
            raise MloError(
                f"{self.home}: expected the {what} that the run began with; found others, so that what it was trained "
                f"on and what it is tested on would no longer be apart. Bring them back, or begin a new run: mlo run "
                f"{self.home / 'recipe.yaml'}"
            )
        if self.is_first:
            write_json(path, held)

    def seconds(self, phase: str) -> float:
        """Return the time that a phase's rounds took, interruptions left out."""
        lines = read_metrics(self.folder / "metrics.jsonl")
        return sum(float(str(line["round_seconds"])) for line in lines if line["phase"] == phase)

    def _cut(self, metrics: Path, phase: str, rounds_done: int) -> None:
        """Cut the metrics back to the checkpoint that the phase goes on from."""
        if not metrics.exists():
            return
        lines = read_metrics(metrics)
        keep = [line for line in lines if line["phase"] != phase or int(str(line["round"])) <= rounds_done]
        cut_metrics(metrics, keep)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a second process in the same folder (where the platform has file locks)."""
        refusal = (
            f"{self.home}: expected no other process at work in this folder; found one. Wait for it, or stop it first."
        )
        with ExitStack() as stack:
            by_first(lambda: stack.enter_context(alone(self.home / "recipe.yaml", refusal)), self._group)
            yield

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return

        def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            if self._signal is not None and self._group is None:
                raise KeyboardInterrupt  # asked twice; of several processes each is asked by terminal and by torchrun
            self._signal = number
            if self._engine is not None:
                self._engine.stop()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _check_signal(self) -> None:
        number = agreed(self._signal or 0, self._group)
        if number:
            raise Interrupted(number)


class Checkpoints:
    """The checkpoints of one phase: the newest two, so that a damaged one costs a few rounds and not the run.

    Args:
        folder: of all checkpoints.
        phase: that they belong to.
        group: the processes that save and restore together, of which the first writes.
    """

    def __init__(self, folder: Path, phase: str, group: Group = None) -> None:
        self._folder = folder
        self._phase = phase
        self._group = group

    def save(self, engine: Engine) -> None:
        """Write a checkpoint and remove all but the newest."""
        engine.save(self._folder / f"{self._phase}-{engine.rounds_done:08d}.pt")
        if rank_of(self._group) == 0:
            for path in self._newest_first()[_KEPT_CHECKPOINTS:]:
                path.unlink()

    def restore(self, engine: Engine) -> None:
        """Load the newest checkpoint that can be read, if there is one."""
        for path in from_first(self._newest_first, self._group):
            try:
                engine.load(path)
            except CheckpointError as error:
                warnings.warn(f"{error}; going back to the one before", stacklevel=2)
            else:
                return

    def _newest_first(self) -> list[Path]:
        name = re.compile(re.escape(self._phase) + r"-\d{8}\.pt")
        found = self._folder.glob("*.pt") if self._folder.is_dir() else ()
        return sorted((path for path in found if name.fullmatch(path.name)), reverse=True)


class _Then:
    """A function as a callback."""

    def __init__(self, function: Any) -> None:
        self.on_round = function


def resume(folder: str | os.PathLike[str], load: Any, *, progress: bool = True) -> Run:
    """Find a run in its folder.

    Args:
        folder: of the run.
        load: reads a recipe from a path.
        progress: show progress bars.

    Raises:
        MloError: there is no run in the folder.
    """
    path = Path(folder) / "recipe.yaml"
    if not path.is_file():
        raise MloError(f"{folder}: expected the folder of a run; found no recipe.yaml in it")
    comments = _comments(path)
    recipe = load(path)
    for comment in comments:
        if comment.startswith(_DIGEST) and comment.removeprefix(_DIGEST) != _digest(dump_recipe(recipe)):
            raise MloError(
                f"{path}: expected the recipe that the run began with; found an edited one. Take the change back, or "
                f"begin a new run with it: mlo run {path}"
            )
    return Run(Path(folder), recipe, comments[0] if comments else path.parent.name, progress=progress)


def recipe_name(recipe: str) -> str:
    """Return what runs of a recipe are called: the name of a bundled one or of a file; of a run's own recipe its own.

    Args:
        recipe: as the user calls it.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        return recipe
    comments = _comments(path) if path.is_file() else []
    return comments[0] if len(comments) == 2 and comments[1].startswith(_DIGEST) else path.stem


def _comments(path: Path) -> list[str]:
    """The name and the digest in a run's recipe."""
    return [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines()[:2] if line.startswith("#")]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_finished(folder: Path) -> bool:
    """Return whether the run in a folder has its result."""
    return (folder / RESULT).is_file()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file, atomically."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def check_engine(recipe: Recipe, graph: Graph) -> None:
    """Refuse a recipe whose engine cannot train its main graph, before anything is written.

    Raises:
        GraphError: `compile` names what is no level of the graph.
        InteropError: another framework is missing, or cannot express the graph.
    """
    for name in () if isinstance(recipe.compile, bool) else recipe.compile:
        graph.check_name(name, "compile")
    if recipe.engine != "betty":
        return
    if len(graph.levels) == 1:
        raise InteropError(
            f"engine: expected 'mlo', as problem {recipe.problem!r} has the one level "
            f"{graph.levels[0].name!r}; found 'betty'. Leave it out."
        )
    check_processes(recipe, whole_world() is not None)
    if recipe.compile:
        raise InteropError(
            f"compile: expected false with the engine 'betty'; found {recipe.compile!r}. Leave compile out."
        )
    check_betty(
        graph,
        device=recipe.device,
        precision=recipe.precision,
        rollback=recipe.rollback,
        diagnostics_every=recipe.diagnostics_every,
    )


def check_processes(recipe: Recipe, several: bool, num_here: int | None = None) -> None:
    """Refuse what a job of several processes cannot be: Betty's, or on fewer GPUs than it needs.

    Args:
        recipe: of the job.
        several: whether it is one.
        num_here: of its processes on this machine; None to ask what started this one.

    Raises:
        InteropError: it has Betty's engine.
        MloError: one GPU is named, or there are fewer than processes.
    """
    if not several:
        return
    if recipe.engine == "betty":
        raise InteropError(
            "engine: expected 'mlo' in a job of several processes; found 'betty'. Start a single process, without "
            "--launch, or leave the engine out."
        )
    num_here = processes_here() if num_here is None else num_here
    if recipe.device != "cuda" and recipe.device.startswith("cuda"):
        raise MloError(
            f"device: expected 'cuda' in a job of several processes, each of which takes the GPU of its number; found "
            f"{recipe.device!r}. Choose GPUs by CUDA_VISIBLE_DEVICES."
        )
    if find_device(recipe.device, []).type == "cuda" and num_here > torch.cuda.device_count():
        raise MloError(
            f"expected at most {torch.cuda.device_count()} processes on this machine, one for each GPU; found "
            f"{num_here}. Start fewer, or set device=cpu."
        )


def versions(engine: str = "mlo") -> dict[str, str]:
    """Return the versions that a result depends on."""
    others = {PACKAGE: importlib.metadata.version(PACKAGE)} if engine == "betty" else {}
    return {
        **others,
        "mlo": __version__,
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
