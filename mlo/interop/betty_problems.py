"""Betty's problems and engine over the levels of a graph. Imports Betty; `mlo.interop.betty` imports this where needed.

The classes override documented hooks of Betty's `Problem` and `Engine` alone. They keep Betty's arithmetic: which
gradients are taken, at which weights, on which batch, in which order, is its own code.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import betty.engine
import betty.problems
import torch
from betty.configs import Config, EngineConfig
from betty.logging.logger_base import get_logger
from torch import Tensor, nn

from mlo.autodiff import checked_output
from mlo.devices import without_autocast
from mlo.errors import DivergenceError
from mlo.graph import Graph
from mlo.interop.betty_translation import Options, Translation, passes_first_order
from mlo.levels import Levels, LevelView, Output, Sum, Variables
from mlo.problem import Problem
from mlo.randomness import isolated, random_key, seed_generators, term_key
from mlo.state import move_optimizer
from mlo.streams import Stream
from mlo.tracing import check_loss
from mlo.tracking import Callback, ProgressBar, RoundReport, check_callbacks, mean

Tally = Callable[[str, "Tensor | float"], None]
"""`tally("LEVEL.NAME", value)`: keeps a figure of a step for the metrics of the round."""


class LevelProblem(betty.problems.ImplicitProblem):
    """A level as a problem of Betty.

    Module, optimizer and scheduler are the user's own, trained in place.

    Args:
        problem: the level.
        graph: that it belongs to.
        config: of Betty.
        seed: of batches and random draws: those of `mlo.Engine` in the level's own steps.
        tally: receives the figures of the level's own steps.
    """

    def __init__(self, problem: Problem, graph: Graph, config: Config, seed: int, tally: Tally) -> None:
        super().__init__(problem.name, config, problem.module, problem.optimizer, problem.scheduler)
        self._declared = problem
        self._graph = graph
        self._seed = seed
        self._tally = tally
        self._variables = Variables(problem.module)
        self._views: Mapping[str, LevelView] = {}
        self._everyone: Mapping[str, Sequence[Tensor]] | None = None
        self._progress: Callable[[], float] = float
        self._stream: Stream | None = None
        self._key = seed
        self._output: Output | None = None

    def connect(self, problems: Mapping[str, LevelProblem], progress: Callable[[], float]) -> None:
        """Let the loss read other problems, and the progress of the run; its first value is compared with the edges."""
        readable = (self.name, *self._graph.reads(self.name))
        self._views = {name: LevelView(problems[name].module, problems[name]) for name in readable}
        self._progress = progress
        self._everyone = {name: problem._variables.parameters for name, problem in problems.items()}

    def check_unchanged(self) -> None:
        """Refuse a module whose trainable parameters are no longer those that the engine was built with."""
        self._variables.check_unchanged(self.name, self._declared.module)

    def set_gradients_aside(self) -> list[tuple[Tensor, Tensor]]:
        """Take away what parameters have in `.grad`, to which Betty would add; return what was where."""
        held = (p for group in self._declared.optimizer.param_groups for p in group["params"])
        kept = [(p, p.grad) for p in (*self._variables.parameters, *held) if p.grad is not None]
        for p, _ in kept:
            p.grad = None
        return kept

    # --- the loss and its batches -------------------------------------------------------------------------------------

    def training_step(self, batch: Any) -> Tensor:
        """Return the level's loss, each of whose terms has random draws of its own, as in `mlo.Engine`."""
        levels, results = Levels(self.name, self._views, self._progress()), []
        for index, term in enumerate(self._declared.terms):
            if index:  # the first goes on with what `get_batch` has seeded
                seed_generators(term_key(self._key, 0, index), torch.device(self.device))
            results.append(checked_output(self.name, term(levels, batch)))
        self._output = Sum.of(results)
        if self._everyone is not None:
            check_loss(self._graph, self.name, self._output.loss, levels._accessed, self._everyone)
            self._everyone = None
        return self._output.loss

    def get_batch(self) -> Any:
        """Draw the level's next batch, and seed what its step draws."""
        if self._stream is None:  # the device is known by now
            self._stream = Stream(self.name, self._declared.data, self._seed, torch.device(self.device))
        batch = self._stream.next()
        step, micro = divmod(self.count - 1, self.gas)
        index = (micro,) if self.gas > 1 else ()
        self._key = random_key(self._seed, self.name, "step", step, *index)
        seed_generators(self._key, torch.device(self.device))
        return batch

    def get_loss(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Evaluate the loss for the level's own step, and tally its figures."""
        loss, figures = super().get_loss(batch)
        assert self._output is not None
        rate = self.optimizer.param_groups[0].get("lr", math.nan)
        for name, value in {"loss": figures["loss"], **self._output.metrics, "learning_rate": rate}.items():
            self._tally(f"{self.name}.{name}", value.detach() if isinstance(value, Tensor) else value)
        return loss, figures

    # --- what is the user's -------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the level's variables: a frozen parameter cannot be differentiated with respect to."""
        return list(self._variables.parameters)

    def parameters(self) -> list[nn.Parameter]:
        """Return the same: Betty's conjugate gradient takes these two for equal."""
        return list(self._variables.parameters)

    def add_paths(self, paths: Sequence[Sequence[LevelProblem]]) -> None:
        """Add the paths of the hypergradient, except for those through a level that counts as constant."""
        super().add_paths([p for p in paths if not passes_first_order(self._graph, [each.name for each in p[1:-1]])])

    def patch_optimizer(self) -> None:
        """Keep the optimizer: Betty would build another one of its defaults, without its groups and its state."""
        move_optimizer(self.optimizer, torch.device(self.device))

    def patch_scheduler(self) -> None:
        """Keep the scheduler, which drives that optimizer."""

    def train(self) -> None:
        """Begin training; the module stays in the mode that the user put it in."""
        betty.problems.Problem.train(self)

    def eval(self) -> None:
        """End training; the module stays in its mode."""
        betty.problems.Problem.eval(self)


class RoundEngine(betty.engine.Engine):
    """Betty's engine, played in rounds of a graph.

    Args:
        graph: the levels, and who reads whom.
        translation: of the graph.
        rounds: to be played.
        seed: of all random draws and data orders.
        options: of the engine.

    Attributes:
        graph: as given.
        rounds_done: rounds played so far.
        total_rounds: as given.
    """

    def __init__(self, graph: Graph, translation: Translation, rounds: int, seed: int, options: Options) -> None:
        self.graph = graph
        self.rounds_done = 0
        self.total_rounds = rounds
        self._iterations = translation.schedule.iterations
        self._options = options
        self._tallies: dict[str, list[Tensor | float]] = {}
        self._stopping = False
        own = {
            p.name: LevelProblem(p, graph, Config(**translation.settings[p.name]), seed, self._tally)
            for p in graph.levels
        }
        for problem in own.values():
            problem.connect(own, self._progress)
        dependencies = translation.dependencies

        def arrows(pairs: Mapping[str, tuple[str, ...]]) -> dict[LevelProblem, list[LevelProblem]]:
            return {own[name]: [own[other] for other in others] for name, others in pairs.items() if others}

        config = EngineConfig(train_iters=rounds * self._iterations, roll_back=options.rollback)
        with _silenced():
            super().__init__(
                list(own.values()), config, {"u2l": arrows(dependencies.lowers), "l2u": arrows(dependencies.parents)}
            )

    def configure_systems(self) -> dict[str, Any]:
        """Set the device that was asked for: Betty's strategies know the CPU and the first GPU."""
        settings: dict[str, Any] = super().configure_systems()
        self.device = self._options.device
        return settings

    def set_problem_attr(self, problem: LevelProblem) -> str:
        """Put no problem into another one's attributes: losses read levels, and a level may have any name."""
        return str(problem.name)

    def run(
        self, *, callbacks: Sequence[Callback] = (), progress: bool = False, title: str = "betty"
    ) -> dict[str, float]:
        """Play the rounds that are left.

        Args:
            callbacks: called after every round.
            progress: show a progress bar.
            title: of the progress bar.

        Returns:
            The metrics of the last round, as `mlo.Engine.run`; empty if none was played.

        Raises:
            MloError: something else than a callback, or a level whose trainable parameters have changed.
            GraphError: a loss does not read what its edges declare (found in its first step), or returns no number.
            DivergenceError: a loss is no longer finite.
        """
        check_callbacks(callbacks)
        metrics: dict[str, float] = {}
        for problem in self.problems:
            problem.check_unchanged()
        self.train()
        with ExitStack() as stack:
            stack.callback(self._go_on)
            stack.enter_context(self._without_gradients())
            everyone = list(callbacks)
            if progress:
                everyone.append(stack.enter_context(ProgressBar(title, self.rounds_done, self.total_rounds)))
            while self.rounds_done < self.total_rounds and not self._stopping:
                metrics = self._play_round()
                for callback in everyone:
                    callback.on_round(RoundReport(self.rounds_done, self.total_rounds, metrics))
        return metrics

    def stop(self) -> None:
        """Let `run` return after the round it is in, or before its first."""
        self._stopping = True

    def _go_on(self) -> None:
        self._stopping = False

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        """Begin without what earlier code left in `.grad`, and put that back."""
        kept = [pair for problem in self.problems for pair in problem.set_gradients_aside()]
        try:
            yield
        finally:
            for p, gradient in kept:
                p.grad = gradient

    def _play_round(self) -> dict[str, float]:
        started = time.perf_counter()
        self._tallies.clear()
        device = self._options.device
        with isolated(device), without_autocast(device), _silenced(), torch.inference_mode(False), torch.enable_grad():
            for _ in range(self._iterations):
                self.global_step += 1
                self.train_step()
        self.rounds_done += 1
        metrics = {name: mean(name, values) for name, values in self._tallies.items()}
        for name in self.graph.structure.names:
            loss = metrics.get(f"{name}.loss", 0.0)
            if not math.isfinite(loss):
                raise DivergenceError(
                    f"round {self.rounds_done} with Betty's engine, level {name!r}: expected a finite loss; found "
                    f"{loss}. Lower the learning rate of the level or of one that it reads, or set clip_norm."
                )
        return metrics | {"round_seconds": time.perf_counter() - started}

    def _tally(self, name: str, value: Tensor | float) -> None:
        self._tallies.setdefault(name, []).append(value)

    def _progress(self) -> float:
        return self.rounds_done / self.total_rounds


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep Betty's reports off standard output; its warnings stay."""
    logger = get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
