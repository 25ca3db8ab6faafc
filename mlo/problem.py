"""What a user declares of one level: variables, loss, data, optimizer, and how its best response is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mlo.errors import GraphError
from mlo.hypergradients import FiniteDifference, Hypergradient
from mlo.levels import Levels, Output, Sum

Loss = Callable[[Levels, Any], Tensor | Output]
"""`loss(levels, batch)`: pure; reads the levels through `levels.NAME` and returns a scalar tensor or an `Output`."""


Hyperparameter = Callable[[Levels], Tensor]
"""`function(levels)`: an option of a level's optimizer, such as `lambda levels: levels.rates.log_lr.exp()`."""


@dataclass(frozen=True)
class Problem:
    """One level: a module's trainable parameters, chosen to minimize a loss.

    The module, the optimizer and its state stay the user's objects and are trained in place.

    Args:
        name: how losses and edges refer to the level; a Python identifier, `levels.NAME` in a loss.
        module: any `nn.Module`; the level's variables are its parameters with `requires_grad`.
        loss: `loss(levels, batch)`, a scalar tensor or an `Output`.
        optimizer: any `torch.optim` optimizer over parameters of `module` (one that takes no closure).
        data: an iterable of batches, re-iterated when exhausted; None for a loss without data, which then gets None.
        hypergradient: how this level's best response is differentiated when a level above needs it.
        steps: optimizer steps for each step of the levels above, at least 1.
        scheduler: a learning-rate scheduler over `optimizer`, advanced once per optimizer step.
        clip_norm: largest Euclidean norm of the gradient that the optimizer sees, as `clip_grad_norm_`; None for no
            limit.
        micro_batches: batches of `data` that make up one step's loss, which is the mean of theirs; each is run through
            the network on its own, so that a step needs the memory of one (gradient accumulation).
        start: name of a level whose variables are where this level begins: before the first of its `steps` its
            variables are set to them, and its optimizer is as new (MAML's initialization). The two modules have the
            same parameters, and an edge from that level to this one declares the dependency.
        warmup_rounds: rounds at the beginning of a run in which the level, one that is solved inside no other, takes no
            steps, and only the levels inside it are trained.
        hyperparameters: options of the optimizer that other levels determine: option name -> function of `levels`
            (those that this level reads) that returns it as a tensor of one number ("betas": of shape (2,)), for all
            parameter groups. Evaluated before every step, and differentiated.

    Raises:
        GraphError: an argument is of the wrong type or out of range.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> def loss(levels, batch):
        ...     return levels.model(batch).square().mean()
        >>> Problem("model", net, loss, sgd, [torch.ones(4, 2)]).steps
        1
    """

    name: str
    module: nn.Module
    loss: Loss
    optimizer: Optimizer
    data: Iterable[Any] | None
    _: KW_ONLY
    hypergradient: Hypergradient = field(default_factory=FiniteDifference)
    steps: int = 1
    scheduler: LRScheduler | None = None
    clip_norm: float | None = None
    micro_batches: int = 1
    start: str | None = None
    warmup_rounds: int = 0
    hyperparameters: Mapping[str, Hyperparameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        usable = isinstance(self.name, str) and self.name.isidentifier() and not self.name.startswith("_")
        if not usable or self.name == "progress":
            raise GraphError(
                f"a level's name must be a Python identifier other than 'progress' (losses read levels.NAME); "
                f"found {self.name!r}"
            )
        self._expect("module", "a torch.nn.Module", isinstance(self.module, nn.Module))
        self._expect("loss", "a callable loss(levels, batch)", callable(self.loss))
        self._expect(
            "optimizer", "a torch.optim.Optimizer built over module.parameters()", _is(self.optimizer, Optimizer)
        )
        self._expect("data", "an iterable of batches, or None", self.data is None or isinstance(self.data, Iterable))
        self._expect(
            "hypergradient",
            "an estimator object such as mlo.FiniteDifference()",
            _is(self.hypergradient, Hypergradient),
        )
        self._expect("steps", "a whole number of at least 1", type(self.steps) is int and self.steps >= 1)
        self._expect(
            "micro_batches", "a whole number of at least 1", type(self.micro_batches) is int and self.micro_batches >= 1
        )
        self._expect(
            "warmup_rounds", "a whole number of at least 0", type(self.warmup_rounds) is int and self.warmup_rounds >= 0
        )
        self._expect("start", "the name of a level, or None", _is(self.start, str, type(None)))
        self._check_hyperparameters()
        self._expect("scheduler", "a learning-rate scheduler, or None", _is(self.scheduler, LRScheduler, type(None)))
        self._expect("scheduler", "one that steps without a metric", not _is(self.scheduler, ReduceLROnPlateau))
        self._expect(
            "clip_norm",
            "a positive number, or None",
            self.clip_norm is None or (isinstance(self.clip_norm, (int, float)) and self.clip_norm > 0),
        )
        if self.scheduler is not None and self.scheduler.optimizer is not self.optimizer:
            raise GraphError(
                f"level {self.name!r}: its scheduler drives another optimizer; build it over this level's own"
            )

    @property
    def terms(self) -> tuple[Loss, ...]:
        """The losses that the level's loss is the sum of: itself alone, if it is no `Sum`."""
        return self.loss.terms if isinstance(self.loss, Sum) else (self.loss,)

    def _check_hyperparameters(self) -> None:
        self._expect(
            "hyperparameters",
            "a mapping of the optimizer's options to functions of `levels`",
            isinstance(self.hyperparameters, Mapping) and all(map(callable, self.hyperparameters.values())),
        )
        options = self.optimizer.param_groups[0]
        usable = [key for key, value in options.items() if key == "betas" or type(value) in (int, float, Tensor)]
        for name in self.hyperparameters:
            if name not in usable:
                raise GraphError(
                    f"level {self.name!r}, hyperparameter {name!r}: expected a number among the options of "
                    f"{type(self.optimizer).__name__}: {', '.join(usable)}"
                )
        if self.scheduler is not None and {"lr", "momentum", "betas"} & self.hyperparameters.keys():
            raise GraphError(
                f"level {self.name!r}: its scheduler and its hyperparameters both set the optimizer's options; let the "
                f"function read levels.progress instead of having a scheduler"
            )

    def _expect(self, argument: str, expected: str, holds: bool) -> None:
        if not holds:
            raise GraphError(f"level {self.name!r}: {argument} must be {expected}; found {getattr(self, argument)!r}")


def _is(value: object, *types: type) -> bool:
    return isinstance(value, types)
