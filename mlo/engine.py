"""The engine: the loop over the levels. This docstring is the algorithm.

    round:      for each level q inside no other, lowest first:
                    `steps` times: take_step(q)          (in its first `warmup_rounds` rounds: solve(q) alone)

    take_step(q):   solve(q)
                    draw a batch; gradient = sweep(q)        (mlo.sweep: the total derivative of q's loss)
                    step q's optimizer, then its scheduler

    solve(u):   for each level q of E(u) that is not inside another one, lowest first:
                    `steps` times: take_step(q), recorded
                    solve(q)

E(u) is what is solved inside u (mlo.structure). Nothing is computed twice: the weights after the lower steps are the
virtual weights of the hypergradient. With `rollback` they are only virtual: after its sweep u puts the levels inside it
back to where they were, steps, and solves them again for real, on the same batches and random draws (as the code of
DARTS does).

This is the only file that lets an optimizer step, and the only one that knows time; `mlo.sweep` is pure functions of
records.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlo.arithmetic import dense
from mlo.autodiff import Backend, Call, Gradients, Level
from mlo.calls import Calls
from mlo.checking import Check, LevelCheck, Settings, check_level, checkable
from mlo.checkpoint import read_checkpoint, write_checkpoint
from mlo.compilation import compiled
from mlo.devices import find_device, without_autocast
from mlo.diagnostics import asymmetries, check_interval, diagnose
from mlo.distributed import (
    Group,
    agreed,
    align,
    are_alike,
    average_buffers,
    by_first,
    check_group,
    gathered,
    mean_metrics,
    rank_of,
    whole_world,
    working,
)
from mlo.double import double, in_double, in_float64
from mlo.errors import CheckpointError, DivergenceError, MloError
from mlo.graph import Graph
from mlo.optimizers import Update
from mlo.randomness import isolated
from mlo.replay import replay_solve
from mlo.script import Script
from mlo.sharding import find_group, is_sharded
from mlo.state import LevelState, check_generators, move_optimizer
from mlo.sweep import Context, Journal, Member, Partials, Solve, Step, StepGraph, Weights, World, sweep, values_of
from mlo.tracing import trace
from mlo.tracking import Callback, ProgressBar, RoundReport, check_callbacks, mean
from mlo.trees import are_equal_trees

_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """Solve a graph of levels.

    Args:
        graph: the levels and edges.
        seed: of all random draws and data orders; two engines with equal seeds do the same.
        device: "auto" (CUDA, else MPS, else CPU) or a torch device; the modules are moved there.
        precision: "fp32" casts nothing; "bf16" and "fp16" run first-order passes under autocast, fp16 with a loss
            scale.
        group: the processes that train the graph together, each on batches of its own, of which every loss is the mean:
            "auto" for all of `torch.distributed`, if it has been initialized; None for this process alone.
        rollback: put the lower levels back before each upper step, and solve them again after it.
        compile: let first-order passes call the modules of all levels, or of those named, under `torch.compile`; calls
            that second-order products go through, or that are kept for one, are made by the modules themselves.
        diagnostics_every: every so many rounds, compare the hypergradient of each level with the exact derivative of
            the steps taken, as metrics (`mlo.diagnostics`); costs an `Unroll` of all levels. None for never.

    Attributes:
        rounds_done: rounds played so far.
        total_rounds: that the run is meant to have; `levels.progress` is `rounds_done / total_rounds`.

    Raises:
        MloError: no graph, an unknown device or precision, a sharded level to be compiled, or an interval of
            diagnostics that is no positive number.
        GraphError: diagnostics, and a level whose optimizer's steps cannot be differentiated.

    Example:
        >>> import torch, mlo
        >>> w = torch.nn.Linear(1, 1, bias=False)
        >>> problem = mlo.Problem("w", w, lambda levels, batch: (levels.w.weight - 3).square().sum(),
        ...                       torch.optim.SGD(w.parameters(), lr=0.5), None)
        >>> engine = Engine(mlo.Graph([problem]), seed=0, device="cpu")
        >>> engine.run(1, progress=False)["w.loss"] > 0, round(w.weight.item(), 4)
        (True, 3.0)
    """

    def __init__(
        self,
        graph: Graph,
        *,
        seed: int = 0,
        device: str | torch.device = "auto",
        precision: str = "fp32",
        group: Group = "auto",
        rollback: bool = False,
        compile: bool | Collection[str] = False,  # noqa: A002 - PyTorch's word for it
        diagnostics_every: int | None = None,
    ) -> None:
        if not isinstance(graph, Graph):
            raise MloError(f"graph: expected an mlo.Graph; found {graph!r}")
        check_group(group)
        if not isinstance(precision, str) or precision not in _PRECISIONS:
            raise MloError(f"precision: expected one of {', '.join(_PRECISIONS)}; found {precision!r}")
        if not isinstance(rollback, bool):
            raise MloError(f"rollback: expected True or False; found {rollback!r}")
        self.graph = graph
        self.seed = seed
        self.rounds_done = 0
        self.total_rounds = 0
        self._rollback = rollback
        self._diagnostics_every = diagnostics_every
        check_interval(diagnostics_every, graph)
        self._diagnosing = False
        modules = [p.module for p in graph.levels]
        sharded = find_group(modules)
        if sharded is not None and precision == "fp16":
            raise MloError("precision: expected 'bf16' or 'fp32' with a sharded level; found 'fp16'")
        group = sharded or (whole_world() if group == "auto" else group)
        self._backend = Backend(find_device(device, modules), _PRECISIONS[precision], group)
        described = [(p.name, p.steps, p.micro_batches, type(p.optimizer), type(p.hypergradient)) for p in graph.levels]
        shapes = [[(name, tuple(p.shape)) for name, p in module.named_parameters()] for module in modules]
        if not are_alike((seed, precision, rollback, diagnostics_every, described, shapes), group):
            raise MloError(
                "expected the same graph, seed and settings in all processes; found others in one of them. Start all "
                "with the same command on the same files."
            )
        for problem in graph.levels:
            problem.module.to(self._backend.device)
            align(problem.module, group)
            move_optimizer(problem.optimizer, self._backend.device)
        calls = self._compiled(compile)
        self._levels = {
            p.name: Level(
                p.name,
                p.module,
                p.terms,
                graph.reads(p.name),
                graph.structure.reads[p.name],
                p.hyperparameters,
                calls.get(p.name),
                nested=bool(graph.structure.nested),
            )
            for p in graph.levels
        }
        self._states = {p.name: LevelState(p, self._levels[p.name], self._backend, seed) for p in graph.levels}
        self._context = Context(
            graph.structure,
            {p.name: p.hypergradient for p in graph.levels},
            replay_solve,
            {p.name: p.start for p in graph.levels if p.start is not None},
        )
        self._journal = Journal()
        self._tallies: dict[str, list[Tensor | float]] = {}
        self._script: Script | None = None  # of a check
        self._traced = self._resumed = False
        self._stopping = False

    def run(
        self,
        rounds: int,
        *,
        total_rounds: int | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        title: str = "mlo",
    ) -> dict[str, float]:
        """Play rounds.

        Args:
            rounds: how many more, at least 0.
            total_rounds: of the whole run, where it is made of several calls; tells losses their progress. By default
                what it was before, or `rounds_done + rounds` if that is more.
            callbacks: called after every round.
            progress: show a progress bar.
            title: of the progress bar.

        Returns:
            The metrics of the last round, "LEVEL.NAME" -> value; empty if none was played.

        Raises:
            MloError: no number of rounds, or something else than a callback.
            GraphError: a loss does not read what its edges declare (found before the first step).
            DivergenceError: a loss is no longer finite.
        """
        if not isinstance(rounds, int | np.integer) or rounds < 0:
            raise MloError(f"rounds: expected a whole number of at least 0; found {rounds!r}")
        check_callbacks(callbacks)
        if not are_alike((int(rounds), total_rounds), self._backend.group):
            raise MloError(f"rounds: expected the same number in all processes; found others than {rounds} in one")
        self._trace()
        self.total_rounds = max(total_rounds or self.total_rounds, self.rounds_done + rounds)
        metrics: dict[str, float] = {}
        with ExitStack() as stack:
            everyone = list(callbacks)
            if progress:
                everyone.append(stack.enter_context(ProgressBar(title, self.rounds_done, self.total_rounds)))
            stack.callback(self._go_on)
            stack.enter_context(self._at_work())
            for _ in range(rounds):
                if agreed(self._stopping, self._backend.group):
                    break
                metrics = self._play_round()
                for callback in everyone:
                    callback.on_round(RoundReport(self.rounds_done, self.total_rounds, metrics))
        return metrics

    def _compiled(self, which: bool | Collection[str]) -> dict[str, Callable[..., Any]]:
        """Return the modules of levels under `torch.compile`, which compiles when it is called."""
        if isinstance(which, str) or not isinstance(which, bool | Collection):
            raise MloError(f"compile: expected True, False or a list of levels' names; found {which!r}")
        names = (self.graph.structure.names if which else ()) if isinstance(which, bool) else which
        for name in names:
            self.graph.check_name(name, "compile")
            if is_sharded(self.graph[name].module):
                raise MloError(
                    f"compile: expected levels that are whole; found {name!r}, which is sharded. Leave it out."
                )
        return {name: compiled(self.graph[name].module) for name in names}

    def stop(self) -> None:
        """Let `run` return after the round it is in, or before its first; for a signal handler or a callback."""
        self._stopping = True

    def _go_on(self) -> None:
        self._stopping = False

    def hypergradient(self, name: str) -> dict[str, Tensor]:
        """Return the gradient that the next step of a level will use, and leave everything bit for bit as it was.

        Plays the steps of the next round that come before it, sweeps, and restores; drawn batches are served again.

        Args:
            name: of any level.

        Returns:
            Parameter name -> total derivative of the level's loss, for all parameters with `requires_grad`, zeros where
            the loss does not depend on it; without the level's own weight decay and clipping.

        Raises:
            GraphError: an unknown name, or a loss that does not read what its edges declare.
        """
        self.graph.check_name(name, "hypergradient")
        self._trace()
        with self._at_work(), self._restored(self.graph.structure.names):
            tops, journal = self.graph.structure.tops, self._journal
            habits = [(level.habits, level.habits.state_dict()) for level in self._levels.values()]
            self._journal = journal.copy()
            try:
                self._approach(name, tops)
                solve = self._solve(name, repeatable=False)
                found = self._sweep(name, solve, recorded=False, moves_buffers=True)[0]
            finally:
                self._journal = journal
                for own, before in habits:
                    own.load_state_dict(before)
        variables = self._levels[name].variables
        gradient = dense(found.of[name], variables.tensors)
        return {
            n: variables.like_parameter(i, g.detach().clone())
            for i, (n, g) in enumerate(zip(variables.names, gradient, strict=True))
        }

    def check(
        self,
        name: str | None = None,
        *,
        directions: int = 8,
        radii: tuple[float, float] = (1e-6, 1e-7),
        tolerance: float = 1e-4,
        seed: int = 0,
        progress: bool = True,
    ) -> Check:
        """Compare hypergradients with a black box, and leave everything bit for bit as it was.

        Moves the level's variables by +- h along random directions, lets the levels solved inside it really take the
        steps of the next round again, in float64, from the same start of every solve, on the same batches and random
        draws, and takes central differences of the level's loss. What is read through a detached edge stays what it
        was. Costs 4 solves a direction, and memory for every start.

        Args:
            name: of a level with levels solved inside it; None for all of them.
            directions: orthonormal random ones, at most as many as the level has variables: then the whole gradient is
                compared, otherwise its projection (the relative error is then that of the whole up to chance).
            radii: h, at most 1e-6, the larger first; where the two disagree the loss is not smooth, and not judged.
            tolerance: largest relative error of estimators that claim to be exact.
            seed: of the directions.
            progress: show a progress bar.

        Returns:
            What was found, level by level; print it.

        Raises:
            GraphError: an unknown name, or a level with nothing inside.
            MloError: a setting out of range, a device without float64, or a loss that cannot be repeated.
        """
        settings = Settings(directions, radii, tolerance, seed, progress)
        names = checkable(self.graph, name, self._backend.device)
        self._trace()
        with self._at_work(), self._restored(self.graph.structure.names), self._in_double():
            return Check(tuple(self._check_level(n, settings) for n in names))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically; a run resumed from it goes on bit for bit.

        Of several processes the first one writes. Where each has a data position of its own, such as that of a
        generator with a seed of its own, the checkpoint holds all of them, and is loaded by as many processes.

        Raises:
            CheckpointError: a level's data cannot be resumed, or the file cannot be written.
        """
        check_generators(self._states)
        levels = {name: own.state_dict() for name, own in self._states.items()}
        state = {
            "seed": self.seed,
            "rounds_done": self.rounds_done,
            "total_rounds": self.total_rounds,
            "levels": levels,
            "memory": self._journal.memory,
            "traced": self._traced or self._resumed,
        }
        streams = gathered({name: own["stream"] for name, own in levels.items()}, self._backend.group)
        if not all(are_equal_trees(own, streams[0]) for own in streams[1:]):
            state["streams"] = streams
        by_first(lambda: write_checkpoint(path, state), self._backend.group)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on where the run that wrote the checkpoint was, with its seed.

        Raises:
            CheckpointError: the file is damaged, or belongs to another graph; nothing has changed then.
            MloError: it holds the data positions of another number of processes; nothing has changed either.
        """
        saved = read_checkpoint(path)
        if streams := saved.get("streams"):
            group = self._backend.group
            num = 1 if group is None else torch.distributed.get_world_size(group)
            if num != len(streams):
                raise MloError(
                    f"{path}: expected {len(streams)} processes, each of which goes on with data of its own; found "
                    f"{num}. Start as many, or give all processes data that is drawn alike (mlo's own is)."
                )
            for name, own in streams[rank_of(group)].items():
                saved["levels"][name]["stream"] = own
        levels = saved.get("levels")
        found = sorted(map(str, levels)) if isinstance(levels, dict) else []
        if found != sorted(self._states):
            raise CheckpointError(
                f"{path}: expected a checkpoint of the levels {', '.join(self._states)}; found "
                f"{', '.join(found) or 'none'}"
            )
        absent = [key for key in ("seed", "rounds_done", "total_rounds", "memory", "traced") if key not in saved]
        if absent:
            raise CheckpointError(f"{path}: expected the state of an engine; found one without {', '.join(absent)}")
        for name, state in self._states.items():
            try:
                state.check_state_dict(saved["levels"][name])
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from error
            except (KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{path}: expected the state of level {name!r}; found one that lacks something ({error})"
                ) from error
        with isolated(self._backend.device):
            for name, state in self._states.items():
                state.load_state_dict(saved["levels"][name], saved["seed"])
        self._journal.memory = {
            pair: {key: t.to(self._backend.device) for key, t in memory.items()}
            for pair, memory in saved["memory"].items()
        }
        self.seed, self.rounds_done, self.total_rounds = saved["seed"], saved["rounds_done"], saved["total_rounds"]
        self._resumed = saved["traced"]

    # --- the algorithm ------------------------------------------------------------------------------------------------

    def _play_round(self) -> dict[str, float]:
        started = time.perf_counter()
        self._tallies = {}
        self._journal.figures.clear()  # of a round that was broken off
        self._diagnosing = self._diagnostics_every is not None and self.rounds_done % self._diagnostics_every == 0
        for name in self.graph.structure.tops:
            self._begin(name)
            self._take_steps(name)
        self.rounds_done += 1
        own = {name: mean(name, values) for name, values in self._tallies.items()}
        metrics = mean_metrics(own, self._backend.group, self._backend.device)
        self._check_finite(metrics)
        return metrics | {"round_seconds": time.perf_counter() - started}

    def _take_steps(self, name: str) -> None:
        """Take all steps of a level in one round, or in its warm-up solve the levels inside it as often."""
        for _ in range(self.graph[name].steps):
            if self.rounds_done < self.graph[name].warmup_rounds:
                self._solve(name, repeatable=False, recorded=False)
                self._drop_records()
            else:
                self._take_step(name)

    def _take_step(
        self,
        name: str,
        *,
        recorded: bool = False,
        repeatable: bool = False,
        reuses: bool = False,
        keeps_graph: bool = False,
        keeps_partials: bool = False,
    ) -> Step | None:
        """Step a level, after solving those inside it.

        Args:
            name: the level.
            recorded: return the record of the step.
            repeatable: the levels inside are recorded in full, so that the step's objective can be repeated.
            reuses: keep the calls of other levels' modules for the step's products.
            keeps_graph: keep the graph of the step's gradient for them.
            keeps_partials: keep the derivatives by the levels that the loss reads.
        """
        inside = self.graph.structure.inside[name]
        diagnosed = bool(inside) and self._diagnosing and f"{name}.hypergradient_cosine" not in self._tallies
        with self._restored(inside) if self._rollback else nullcontext():
            solve = self._solve(name, repeatable=repeatable or diagnosed)
            found, step = self._sweep(
                name,
                solve,
                recorded=recorded,
                moves_buffers=True,
                reuses=reuses,
                keeps_graph=keeps_graph,
                keeps_partials=keeps_partials,
                diagnosed=diagnosed,
            )
        state = self._states[name]
        average_buffers(state.problem.module, self._backend.group)
        self._tally(name, found)
        if name in self.graph.structure.tops:  # its sweep is done, and with it all records
            solve = None
            self._drop_records()
        if state.scale.admits(found.of[name]):
            state.take_step(found.of[name], step.graphs[0].copies if step is not None and step.graphs else None)
        elif state.scale.is_exhausted:
            raise DivergenceError(
                f"round {self.rounds_done + 1}, level {name!r}: expected a finite gradient at some scale of the loss "
                f"(fp16); found none down to a scale of {state.scale.value:.1e}, and no step was taken with any. Lower "
                f"the learning rate of a level that it reads, or choose precision='bf16' or 'fp32'."
            )
        else:
            step = None
        if self._rollback and inside:
            self._solve(name, repeatable=False)
        return step

    def _begin(self, name: str) -> Weights | None:
        """Put a level where its solve begins; return the variables of the level that it starts from, if any."""
        start = self.graph[name].start
        if start is None:
            return None
        began = self._world()[start]
        self._states[name].restart(began.tensors)
        return began

    def _solve(self, name: str, *, repeatable: bool, recorded: bool = True) -> Solve | None:
        structure = self.graph.structure
        if not structure.inside[name]:
            return None
        if self._script is not None:
            self._script.begin_solve([self._states[q].snapshot for q in structure.inside[name]])
        solve = Solve(name, self._world())
        for q in structure.members[name]:
            estimator, num = self.graph[q].hypergradient, self.graph[q].steps
            wanted = estimator.recorded_steps
            depth = num if repeatable or wanted is None else min(wanted, num)
            depth = depth if recorded else 0
            limits = (0 if structure.inside[q] else depth, wanted, estimator.kept_graphs)
            graphs = min(limit for limit in limits if limit is not None)
            if self._levels[q].buffers.has_others:  # which the next step may write into, even past autograd's eyes
                graphs = min(graphs, 1)
            segment = math.ceil(math.sqrt(depth)) if estimator.recomputes and depth else 1
            skips = self._states[q].scale.active and 0 < depth < num  # then the last steps may not be the last taken
            steps: list[Step] = []
            start = self._begin(q)
            for index in range(num):
                keeps = skips or index >= num - depth
                reuses = wanted != 0 and index == num - 1 and not structure.inside[q] and recorded
                step = self._take_step(
                    q,
                    recorded=keeps,
                    repeatable=keeps,
                    reuses=reuses,
                    keeps_graph=index >= num - graphs,
                    keeps_partials=reuses and estimator.keeps_partials and q not in structure.nested,
                )
                if step is not None:
                    steps.append(step.thinned() if len(steps) % segment and not skips else step)
            del steps[: max(0, len(steps) - depth)]
            final = self._solve(q, repeatable=repeatable, recorded=recorded)
            solve.members.append(Member(q, steps, final, start, depth == num))
        solve.end = self._world()
        return solve

    def _sweep(
        self,
        name: str,
        solve: Solve | None,
        *,
        recorded: bool,
        moves_buffers: bool,
        reuses: bool = False,
        keeps_graph: bool = False,
        keeps_partials: bool = False,
        diagnosed: bool = False,
    ) -> tuple[Gradients, Step | None]:
        state = self._states[name]
        world = self._world()
        call = self._next_call(name, world, recorded=recorded or diagnosed)
        habits = self._levels[name].habits
        full = self._backend.autocast is None  # as products are
        precise = full and len(call.parts) == 1
        reuses = reuses and precise and any(habits.keeps(q) for q in self.graph.structure.reads[name])
        read = self.graph.structure.reads[name]
        sharded = any(self._levels[q].variables.sharded for q in (name, *read))
        partial = keeps_partials and full and habits.keeps_graphs and not sharded
        calls = Calls(self._backend.device, habits, self._backend.group, marking=partial) if reuses else None
        graphs: list[StepGraph] = []
        found = sweep(
            self._context,
            call,
            solve,
            world,
            [name, *read] if partial else [name],
            moves_buffers=moves_buffers,
            autocast=True,
            record=calls,
            graphs=graphs if keeps_graph and precise else None,
            journal=self._journal,
            scale=state.scale.value,
        )
        if diagnosed and solve is not None:
            self._journal.figures += diagnose(self._context, call, solve, world, found)
        options = call.hyperparameters(values_of(world))
        state.set_hyperparameters(options)
        if self._script is not None:
            self._script.observe(self.graph[name], self._levels[name].variables.tensors, found.of[name])
        if not recorded:
            return found, None
        problem, gradient = self.graph[name], found.of[name]
        parameters = self._levels[name].variables.parameters
        update = Update.capture(problem.optimizer, parameters, gradient, problem.clip_norm, options)
        scale = state.scale.value
        return found, Step(
            self._context,
            call,
            world,
            gradient,
            update,
            solve,
            calls,
            scale=scale,
            graphs=graphs,
            partials=Partials.of(call, found) if partial else None,
        )

    def _next_call(self, name: str, world: World, *, recorded: bool) -> Call:
        """Return the loss of a level's next step: on a new batch, or the one that a script has written down."""
        if self._script is not None and self._script.repeating:
            return self._script.next_call()
        call = self._states[name].next_call(self._levels, self._progress(), self._backend, recorded=recorded)
        if self._script is not None:
            self._script.record(call, world)
        return call

    def _approach(self, name: str, members: Sequence[str]) -> None:
        """Play the steps that come before the next step of `name`; the solve inside it comes next."""
        for q in members:
            self._begin(q)
            if q == name:
                return
            if name in self.graph.structure.inside[q]:
                self._approach(name, self.graph.structure.members[q])
                return
            self._take_steps(q)
            if q not in self.graph.structure.tops:
                self._solve(q, repeatable=False)

    def _check_level(self, name: str, settings: Settings) -> LevelCheck:
        """Sweep once, and play the same solve again and again."""
        observed = [q for q in self.graph.structure.inside[name] if self.graph[q].hypergradient.implicit]
        with self._restored(self.graph.structure.names):
            self._approach(name, self.graph.structure.tops)
            journal, script = self._journal.copy(), Script(observed)
            self._script = script

            def play() -> float:
                self._drop_records()
                self._journal = journal.copy()
                script.rewind()
                self._solve(name, repeatable=False, recorded=False)
                return float(script.next_call().gradients(values_of(self._world()), [name]).loss)

            try:
                solve = self._solve(name, repeatable=False)
                found = self._sweep(name, solve, recorded=False, moves_buffers=False)[0]
                assert solve is not None
                return check_level(
                    self.graph,
                    name,
                    self._levels[name].variables,
                    found,
                    asymmetries={q: float(value) for q, value in asymmetries(self._context, solve).items()},
                    script=script,
                    play=play,
                    settings=settings,
                )
            finally:
                self._script = None
                self._drop_records()

    @contextmanager
    def _in_double(self) -> Iterator[None]:
        """Compute everything in float64 within the block, with a journal of its own."""
        levels, backend, journal = self._levels, self._backend, self._journal
        self._levels = {
            name: level.computing(
                terms=tuple(map(in_float64, level.terms)),
                hyperparameters={key: in_float64(f) for key, f in level.hyperparameters.items()},
                compiled=None,
            )
            for name, level in levels.items()
        }
        self._backend, self._journal = replace(backend, autocast=None), journal.copy()
        for memory in self._journal.memory.values():
            memory.update({key: double(t) for key, t in memory.items()})
        try:
            with in_double([(p.module, p.optimizer) for p in self.graph.levels]):
                yield
        finally:
            self._levels, self._backend, self._journal = levels, backend, journal

    def _drop_records(self) -> None:
        """Let no version of any variables be kept for the records made so far."""
        for state in self._states.values():
            state.weights.recorded = False

    # --- state --------------------------------------------------------------------------------------------------------

    def _world(self) -> World:
        """Return the present version of every level's variables, kept from now on until the records are dropped."""
        for state in self._states.values():
            state.weights.recorded = True
        return {name: state.weights for name, state in self._states.items()}

    @contextmanager
    def _restored(self, names: Sequence[str]) -> Iterator[None]:
        """Put levels back to where they were before the block."""
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(self._states[name].stream.rewound())
                stack.callback(self._states[name].snapshot())
            yield

    def _progress(self) -> float:
        return self.rounds_done / self.total_rounds if self.total_rounds else 0.0

    def _tally(self, name: str, found: Gradients) -> None:
        def note(level: str, metric: str, value: Tensor | float) -> None:
            self._tallies.setdefault(f"{level}.{metric}", []).append(value)

        note(name, "loss", found.loss)
        for metric, value in found.metrics.items():
            note(name, metric, value)
        rate = self.graph[name].optimizer.param_groups[0].get("lr", math.nan)
        note(name, "learning_rate", rate.clone() if isinstance(rate, Tensor) else rate)  # a scheduler writes into it
        for level, metric, value in self._journal.figures:
            note(level, metric, value.detach() if isinstance(value, Tensor) else value)
        self._journal.figures.clear()

    def _check_finite(self, metrics: dict[str, float]) -> None:
        if self._backend.autocast == torch.float16:
            return  # a step whose gradient is not finite is not taken, and its loss need not be finite either
        for name in self.graph.structure.names:
            loss = metrics.get(f"{name}.loss", 0.0)
            if not math.isfinite(loss):
                raise DivergenceError(
                    f"round {self.rounds_done}, level {name!r}: expected a finite loss; found {loss}. Lower the "
                    f"learning rate of the level or of one that it reads, or set clip_norm. The weights are spoilt; a "
                    f"checkpoint, if there is one, is from before."
                )

    def _trace(self) -> None:
        """Find out, once, whether the losses read what the edges declare; and whether variables are still the same."""
        for name, level in self._levels.items():
            if not is_sharded(level.module):  # those are laid out anew by FSDP
                level.variables.check_unchanged(name, level.module)
            level.variables.reshard()
            level.look_over()
        if not self._traced:
            known = {name: replace(level.habits) for name, level in self._levels.items() if self._resumed}
            with self._at_work():
                trace(self.graph, self._levels, self._states, self._progress(), self._backend)
            for name, habits in known.items():  # of other batches than when the run that was saved began
                self._levels[name].habits.misses, self._levels[name].habits.draws = dict(habits.misses), habits.draws
            for state in self._states.values():
                state.renew()  # FSDP may have laid out the shards anew
        self._traced = True

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Whatever modes the caller is in, compute with gradients; give the caller's generators back unchanged."""
        device = self._backend.device
        modes = (torch.inference_mode(False), torch.enable_grad(), without_autocast(device), isolated(device))
        with ExitStack() as stack:
            for mode in (*modes, working(self._backend.group)):
                stack.enter_context(mode)
            yield
