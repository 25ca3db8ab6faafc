"""What a recipe says about one level: its optimizer, its schedule, and how its best response is differentiated.

Used by the schemas of problems. The kinds of `scheduler` are those of `mlo.recipes.schedulers`, the kinds of
`hypergradient` those of `mlo.hypergradients.KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import nn

from mlo.errors import RecipeError
from mlo.hypergradients import KINDS, Hypergradient
from mlo.problem import Loss, Problem
from mlo.recipes.kinds import Buildable, RecipePart, kind_union
from mlo.recipes.schedulers import ConstantRecipe, SchedulerRecipe, Span

Decay = Annotated[float, Field(ge=0, lt=1)]
"""The factor that a running average keeps of itself in one step."""


class SGDRecipe(RecipePart):
    """`torch.optim.SGD`."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: PositiveFloat
    momentum: Decay = 0.0
    weight_decay: NonNegativeFloat = 0.0
    nesterov: bool = False
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _check_nesterov(self) -> SGDRecipe:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs a momentum greater than 0 and a dampening of 0")
        return self

    def build(self, parameters: Iterable[torch.Tensor]) -> torch.optim.SGD:
        """Make the optimizer of `parameters`."""
        return torch.optim.SGD(
            parameters,
            lr=self.learning_rate,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


class _AdamFamily(RecipePart):
    """What Adam and AdamW have in common."""

    kind: str
    learning_rate: PositiveFloat
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat
    optimizer_type: ClassVar[Any]

    def build(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        """Make the optimizer of `parameters`."""
        optimizer: torch.optim.Optimizer = self.optimizer_type(
            parameters, lr=self.learning_rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        return optimizer


class AdamRecipe(_AdamFamily):
    """`torch.optim.Adam`; `weight_decay` is coupled, which is to say added to the gradient."""

    kind: Literal["adam"] = "adam"
    weight_decay: NonNegativeFloat = 0.0
    optimizer_type: ClassVar[Any] = torch.optim.Adam


class AdamWRecipe(_AdamFamily):
    """`torch.optim.AdamW`; `weight_decay` is decoupled, and by default PyTorch's 0.01."""

    kind: Literal["adamw"] = "adamw"
    weight_decay: NonNegativeFloat = 0.01
    optimizer_type: ClassVar[Any] = torch.optim.AdamW


OptimizerRecipe: TypeAlias = Annotated[SGDRecipe | AdamRecipe | AdamWRecipe, Field(discriminator="kind")]
if TYPE_CHECKING:
    HypergradientRecipe: TypeAlias = Buildable[Hypergradient]
else:
    HypergradientRecipe = kind_union(KINDS)


class LevelRecipe(RecipePart):
    """One level.

    Attributes:
        optimizer: what moves the level's variables.
        scheduler: how its learning rate changes, per optimizer step.
        hypergradient: how the level's best response is differentiated; a top level's is ignored.
        steps: the optimizer steps that the level takes per step of the levels above it; of a top level, per round.
        clip_norm: the norm that its gradients are clipped to, or None.
        warmup_rounds: rounds in which a top level waits, while those inside it are trained.
        micro_batches: batches that a step's loss is the mean of, run one after the other (gradient accumulation).
    """

    optimizer: OptimizerRecipe
    scheduler: SchedulerRecipe = ConstantRecipe()
    hypergradient: HypergradientRecipe = Field(default={"kind": "finite_difference"}, validate_default=True)
    steps: PositiveInt = 1
    clip_norm: PositiveFloat | None = None
    warmup_rounds: NonNegativeInt = 0
    micro_batches: PositiveInt = 1

    def declare(
        self,
        name: str,
        module: nn.Module,
        loss: Loss,
        data: Iterable[Any] | None,
        *,
        total_steps: int,
        steps_per_epoch: float | None = None,
    ) -> Problem:
        """Declare the level, its optimizer and scheduler built over `module`.

        Args:
            name: the level's name.
            module: whose parameters are its variables.
            loss: `loss(levels, batch)`.
            data: its batches.
            total_steps: the optimizer steps that the scheduler is to span, those of the warm-up rounds included.
            steps_per_epoch: optimizer steps in a pass over the data; None where the problem counts no epochs.

        Raises:
            RecipeError: the schedule counts epochs and the problem does not, or its warm-up is too long.
        """
        optimizer = self.optimizer.build(p for p in module.parameters() if p.requires_grad)
        taken = max(1, total_steps - self.warmup_rounds * self.steps)
        try:
            scheduler = self.scheduler.build(optimizer, Span(taken, steps_per_epoch))
        except RecipeError as error:
            raise RecipeError(f"level {name!r}, {error}") from error
        return Problem(
            name,
            module,
            loss,
            optimizer,
            data,
            hypergradient=self.hypergradient.build(),
            steps=self.steps,
            scheduler=scheduler,
            clip_norm=self.clip_norm,
            micro_batches=self.micro_batches,
            warmup_rounds=self.warmup_rounds,
        )
