"""Everything about one level that changes while an engine runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mlo.arithmetic import Gradient, Tensors
from mlo.autodiff import Backend, Call, Level, LossCall, MeanCall
from mlo.calls import Habits
from mlo.errors import CheckpointError, DivergenceError, MloError
from mlo.optimizers import clip
from mlo.problem import Problem
from mlo.randomness import random_key
from mlo.sharding import distributed_like, whole
from mlo.streams import Stream, shared_generators
from mlo.sweep import Weights


class LossScale:
    """The dynamic loss scale of fp16 (Micikevicius et al. 2018, section 3.2); 1 and fixed in other precisions."""

    def __init__(self, *, active: bool) -> None:
        self.active = active
        self.value = 2.0**10 if active else 1.0
        self.good_steps = 0

    def admits(self, gradient: Gradient) -> bool:
        """Return whether to take the step, and adapt the scale: halved on overflow, doubled after 2000 good steps."""
        if not self.active:
            return True
        present = [g for g in gradient if g is not None and g.numel()]
        # One number: a GPU would be waited for at each of hundreds.
        finite = not present or bool(torch.stack(torch._foreach_norm(present, float("inf"))).isfinite().all())
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps == 2000:
            self.value, self.good_steps = self.value * 2, 0
        return finite

    @property
    def is_exhausted(self) -> bool:
        """Whether it has been halved so often that what overflows is not for want of a smaller one."""
        return self.value < 2.0**-24


class LevelState:
    """A level at work: the user's module, optimizer and scheduler, the data stream, and the counters.

    Attributes:
        problem: the declaration.
        level: the functional view of it.
        weights: the present version of its variables.
        stream: of its batches.
        steps_taken: optimizer steps so far; keys the random draws.
    """

    def __init__(self, problem: Problem, level: Level, backend: Backend, seed: int) -> None:
        self.problem = problem
        self.level = level
        self.weights = Weights(level.variables.tensors, live=True)
        self.stream = Stream(problem.name, problem.data, seed, backend.device)
        self.scale = LossScale(active=backend.autocast == torch.float16)
        self.steps_taken = 0

    def next_call(self, levels: Mapping[str, Level], progress: float, backend: Backend, *, recorded: bool) -> Call:
        """Draw a batch, or several, and return the loss on it, with the random draws of the level's next step.

        Args:
            levels: all levels.
            progress: fraction of the run.
            backend: device and precision.
            recorded: whether the call will be repeated, and must find the buffers as the step finds them.
        """

        def part(*index: int) -> LossCall:
            key = random_key(self.stream.seed, self.problem.name, "step", self.steps_taken, *index)
            return LossCall(self.problem.name, levels, self.stream.next(), key, progress, backend, recorded)

        num = self.problem.micro_batches
        return part() if num == 1 else MeanCall(tuple(part(index) for index in range(num)))

    def renew(self) -> None:
        """Let the present version of the variables be what the module holds now."""
        self.weights = Weights(self.level.variables.tensors, live=True)

    @torch.no_grad()
    def restart(self, tensors: Tensors) -> None:
        """Begin anew at other values of the variables, with a new optimizer state."""
        if self.weights.recorded:
            self.weights.materialize()
        for own, t in zip(self.level.variables.tensors, tensors, strict=True):
            own.copy_(t)
        self.problem.optimizer.state.clear()
        self.renew()

    def set_hyperparameters(self, values: Mapping[str, Tensor]) -> None:
        """Give the optimizer the options that other levels determine.

        Raises:
            DivergenceError: one is not finite.
        """
        for name, value in values.items():
            numbers = value.reshape(-1).tolist()
            option = tuple(numbers) if value.dim() else numbers[0]
            if not all(map(math.isfinite, numbers)):
                raise DivergenceError(
                    f"level {self.problem.name!r}, hyperparameter {name!r}: expected a finite number; found {option}"
                )
            for group in self.problem.optimizer.param_groups:
                group[name] = option

    def take_step(self, gradient: Gradient, copies: Tensors | None = None) -> None:
        """Step optimizer and scheduler with a gradient, clipped; keep the present version if a record needs it.

        Args:
            gradient: of the level's loss.
            copies: of the variables as they are now, if there are any.
        """
        if self.weights.recorded:
            self.weights.materialize(copies)
        parameters, like_parameter = self.level.variables.parameters, self.level.variables.like_parameter
        held = [p for group in self.problem.optimizer.param_groups for p in group["params"]]
        kept = [(p, p.grad) for p in (*parameters, *held) if p.grad is not None]
        for p, _ in kept:  # a frozen parameter may still have a gradient
            p.grad = None
        tensors = self.level.variables.tensors
        try:
            with torch.no_grad():  # copies: the record keeps the gradient, and an optimizer may write into its own
                for i, g in enumerate(clip(gradient, self.problem.clip_norm)):
                    if g is not None:
                        self._check_dense(i, g)
                        own = g.clone() if g.stride() == tensors[i].stride() else torch.empty_like(tensors[i]).copy_(g)
                        parameters[i].grad = like_parameter(i, own)
            self.problem.optimizer.step()
        finally:
            for p in parameters:
                p.grad = None
            for p, g in kept:
                p.grad = g
        if self.problem.scheduler is not None:
            self.problem.scheduler.step()
        self.renew()
        self.steps_taken += 1

    def _check_dense(self, index: int, gradient: Tensor) -> None:
        if gradient.layout is not torch.strided:
            raise MloError(
                f"level {self.problem.name!r}, {self.level.variables.names[index]}: expected a dense gradient; found "
                f"one of layout {gradient.layout}. Build the module with sparse=False."
            )

    def snapshot(self) -> Callable[[], None]:
        """Copy everything that a step changes (the stream apart); return a function that puts it back bit for bit."""
        self.level.variables.reshard()
        tensors = list(self.problem.module.parameters())
        copies = [t.detach().clone() for t in tensors]
        buffers = [
            (part._buffers, key, t, None if t is None else t.detach().clone())
            for part in self.problem.module.modules()
            for key, t in part._buffers.items()
        ]
        optimizer = self.problem.optimizer
        states = {p: {k: (v, _copy(v)) for k, v in own.items()} for p, own in optimizer.state.items()}
        groups = [{k: (v, _copy(v)) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        scheduler = copy.deepcopy(self.problem.scheduler.state_dict()) if self.problem.scheduler is not None else None
        counters = (self.steps_taken, self.scale.value, self.scale.good_steps)

        @torch.no_grad()
        def restore() -> None:
            if self.weights.recorded:
                self.weights.materialize()
            for t, saved in zip(tensors, copies, strict=True):
                t.copy_(saved)
            for container, key, buffer, kept in buffers:
                container[key] = None if buffer is None or kept is None else buffer.copy_(kept)
            optimizer.state.clear()
            for p, own in states.items():
                optimizer.state[p] = {
                    k: v.copy_(saved) if isinstance(v, Tensor) else saved for k, (v, saved) in own.items()
                }
            for group, options in zip(optimizer.param_groups, groups, strict=True):
                group.update({k: v.copy_(s) if isinstance(v, Tensor) else s for k, (v, s) in options.items()})
            if self.problem.scheduler is not None and scheduler is not None:
                self.problem.scheduler.load_state_dict(copy.deepcopy(scheduler))
            self.steps_taken, self.scale.value, self.scale.good_steps = counters
            self.renew()

        return restore

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs of this level."""
        scheduler = self.problem.scheduler
        return {
            "kinds": self._kinds(),
            "module": whole(self.problem.module.state_dict()),
            "loose_buffers": dict(_loose_buffers(self.problem.module)),
            "optimizer": whole(self.problem.optimizer.state_dict()),
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
            "stream": self.stream.state_dict(),
            "steps_taken": self.steps_taken,
            "scale": [self.scale.value, self.scale.good_steps],
            "habits": self.level.habits.state_dict(),
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Compare a state with the level, before anything is loaded.

        Raises:
            CheckpointError: it is of another module, optimizer or scheduler.
        """
        where = f"level {self.problem.name!r}: expected a checkpoint of the same"
        if state["kinds"] != self._kinds():
            raise CheckpointError(f"{where} optimizer and scheduler, {self._kinds()}; found {state['kinds']}")
        own = {**self.problem.module.state_dict(), **dict(_loose_buffers(self.problem.module))}
        saved = {**state["module"], **state["loose_buffers"]}
        for name in sorted(own.keys() | saved.keys()):
            shapes = [_shape(tensors.get(name)) for tensors in (own, saved)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(f"{where} module; {name} is {shapes[0]} here and {shapes[1]} there")
        here, there = (
            [len(group["params"]) for group in groups]
            for groups in (self.problem.optimizer.param_groups, state["optimizer"]["param_groups"])
        )
        if here != there:
            raise CheckpointError(f"{where} optimizer; its groups have {here} parameters here and {there} there")
        Habits().load_state_dict(state["habits"])

    def _distributed(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Give an optimizer's saved state the layout of sharded parameters."""
        parameters = [p for group in self.problem.optimizer.param_groups for p in group["params"]]
        order = [index for group in saved["param_groups"] for index in group["params"]]
        states = {
            index: {key: distributed_like(value, p) for key, value in saved["state"][index].items()}
            for index, p in zip(order, parameters, strict=True)
            if index in saved["state"]
        }
        return {**saved, "state": states}

    def _kinds(self) -> list[str]:
        return [type(self.problem.optimizer).__name__, type(self.problem.scheduler).__name__]

    def load_state_dict(self, state: dict[str, Any], seed: int) -> None:
        """Go on where `state_dict` was taken; the state has been checked."""
        own = self.problem.module.state_dict()
        self.problem.module.load_state_dict({key: distributed_like(t, own[key]) for key, t in state["module"].items()})
        self.problem.optimizer.load_state_dict(self._distributed(state["optimizer"]))
        if self.problem.scheduler is not None:
            self.problem.scheduler.load_state_dict(state["scheduler"])
        for name, buffer in _loose_buffers(self.problem.module):
            buffer.copy_(state["loose_buffers"][name])
        self.stream.seed = seed
        self.stream.load_state_dict(state["stream"])
        self.steps_taken = state["steps_taken"]
        self.scale.value, self.scale.good_steps = state["scale"]
        self.level.habits.load_state_dict(state["habits"])
        self.renew()


def check_generators(states: Mapping[str, LevelState]) -> None:
    """Refuse to save where two levels draw from one generator: neither could be brought back to its position.

    Raises:
        CheckpointError: they do.
    """
    for first, second in shared_generators({name: state.problem.data for name, state in states.items()}):
        raise CheckpointError(
            f"data of levels {first!r} and {second!r}: expected a generator for each; found one that both draw from. "
            f"Give each DataLoader a torch.Generator of its own, or none."
        )


def move_optimizer(optimizer: Optimizer, device: torch.device) -> None:
    """Move the state of an optimizer whose parameters were moved; step counters stay where the optimizer put them."""
    for own in optimizer.state.values():
        for key, value in own.items():
            if isinstance(value, Tensor) and key != "step":
                own[key] = value.to(device)


def _loose_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    saved = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name not in saved]


def _shape(value: Any) -> str:
    return "missing" if value is None else str(tuple(value.shape)) if isinstance(value, Tensor) else "not a tensor"


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
