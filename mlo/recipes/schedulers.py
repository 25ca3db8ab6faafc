"""What a recipe says about a learning rate's schedule.

Every kind builds PyTorch's own schedulers, stepped once an optimizer step, so that checkpoints resume them exactly.
Used by `mlo.recipes.levels`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR, StepLR

from mlo.errors import RecipeError
from mlo.recipes.kinds import RecipePart


@dataclass(frozen=True)
class Span:
    """The time that a schedule has, in steps of the optimizer.

    Attributes:
        total_steps: of the training, at least 1.
        steps_per_epoch: in a pass over the data, which need not be whole; None where the problem counts no epochs.
    """

    total_steps: int
    steps_per_epoch: float | None = None

    def steps(self, epochs: float, what: str) -> int:
        """Return the optimizer steps in so many epochs, at least 1.

        Args:
            epochs: passes over the data, more than 0.
            what: the key that counts them.

        Raises:
            RecipeError: the problem counts no epochs.
        """
        if self.steps_per_epoch is None:
            raise RecipeError(
                f"scheduler: expected a schedule that counts optimizer steps, since this problem counts no epochs; "
                f"found {what}"
            )
        return max(1, round(epochs * self.steps_per_epoch))


class _Schedule(RecipePart, abc.ABC):
    """What all schedules have in common: the warm-up, in which the learning rate rises linearly to the optimizer's.

    Attributes:
        warmup_steps: optimizer steps of the warm-up; the schedule itself spans the rest of the training.
        warmup_epochs: the same in passes over the data, where the problem counts them.
    """

    kind: str
    warmup_steps: NonNegativeInt = 0
    warmup_epochs: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check_warmup(self) -> _Schedule:
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError("expected warmup_steps or warmup_epochs, not both")
        return self

    def build(self, optimizer: Optimizer, span: Span) -> LRScheduler | None:
        """Make the scheduler, to be stepped once after each step of `optimizer`; None where nothing would change.

        Raises:
            RecipeError: the warm-up is as long as the training, or epochs are not counted.
        """
        warmup = span.steps(self.warmup_epochs, "warmup_epochs") if self.warmup_epochs else self.warmup_steps
        if not warmup:
            return self._build(optimizer, span)
        if warmup >= span.total_steps:
            raise RecipeError(
                f"scheduler: expected a warm-up shorter than the training of {span.total_steps} steps; found one of "
                f"{warmup} steps. Lower {'warmup_epochs' if self.warmup_epochs else 'warmup_steps'}, or train longer."
            )
        rising = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
        rest = self._build(optimizer, Span(span.total_steps - warmup, span.steps_per_epoch))
        # SequentialLR needs something to go on with.
        return SequentialLR(optimizer, [rising, rest or ConstantLR(optimizer, factor=1.0)], milestones=[warmup])

    @abc.abstractmethod
    def _build(self, optimizer: Optimizer, span: Span) -> LRScheduler | None:
        """Make the schedule itself."""


class ConstantRecipe(_Schedule):
    """The learning rate stays what the optimizer says."""

    kind: Literal["constant"] = "constant"

    def _build(self, optimizer: Optimizer, span: Span) -> None:  # noqa: ARG002
        return None


class CosineRecipe(_Schedule):
    """The learning rate falls along half a cosine, from the optimizer's to `final_learning_rate`."""

    kind: Literal["cosine"] = "cosine"
    final_learning_rate: NonNegativeFloat = 0.0

    def _build(self, optimizer: Optimizer, span: Span) -> LRScheduler:
        return CosineAnnealingLR(optimizer, T_max=span.total_steps, eta_min=self.final_learning_rate)


class LinearRecipe(_Schedule):
    """The learning rate falls along a straight line, from the optimizer's to 0 at the end of the training."""

    kind: Literal["linear"] = "linear"

    def _build(self, optimizer: Optimizer, span: Span) -> LRScheduler:
        return LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=span.total_steps)


class ExponentialRecipe(_Schedule):
    """The learning rate is multiplied by `factor` after each epoch."""

    kind: Literal["exponential"] = "exponential"
    factor: Annotated[float, Field(gt=0, le=1)]

    def _build(self, optimizer: Optimizer, span: Span) -> LRScheduler:
        return StepLR(optimizer, step_size=span.steps(1, "exponential"), gamma=self.factor)


SchedulerRecipe: TypeAlias = Annotated[
    ConstantRecipe | CosineRecipe | LinearRecipe | ExponentialRecipe, Field(discriminator="kind")
]
