"""What a recipe says about a search: the space, the supernet, the student, and when to stop.

A space's recipe part makes the `Stage`s of its search, one after the other: DARTS and PC-DARTS have one, P-DARTS three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import nn

from mlo.recipes import Buildable, RecipePart, kind_union
from problems.evaluation import memory_format
from problems.search_spaces import DARTS_PRIMITIVES, RELAXATIONS, Architecture, Relaxation, SearchSpace, Supernet
from problems.search_spaces.cells import MixedOperation
from problems.search_spaces.p_darts import SkipDropout, prune
from problems.search_spaces.pc_darts import PartialOperation
from problems.search_spaces.stems import Stem
from problems.students import StudentResNet

if TYPE_CHECKING:
    RelaxationRecipe: TypeAlias = Buildable[Relaxation]
else:
    RelaxationRecipe = kind_union(RELAXATIONS)

Probability = Annotated[float, Field(ge=0, lt=1)]


class SupernetRecipe(RecipePart):
    """The relaxed network.

    Attributes:
        channels: of the first cells.
        num_cells: cells; P-DARTS has its own numbers.
        stem: for small images (`cifar`) or large ones (`imagenet`).
        channels_last: keep the channels of a pixel next to each other in memory, which is faster.
        checkpointing: keep the inputs of the cells only, and compute what is in them again in each backward pass, which
            is slower.
    """

    channels: PositiveInt
    num_cells: PositiveInt
    stem: Stem = "cifar"
    channels_last: bool = True
    checkpointing: bool = False


class StudentRecipe(RecipePart):
    """The student's network.

    Attributes:
        depth: of the ResNet.
        width: channels of its first stage.
        small_images: the stem for small images.
        channels_last: keep the channels of a pixel next to each other in memory, which is faster; from width 8 on, as
            PyTorch's convolutions of stride 2 fail in this layout with fewer channels (torch 2.14, CPU).
    """

    depth: Literal[18, 50] = 18
    width: PositiveInt = 64
    small_images: bool = True
    channels_last: bool = True

    def build(self, num_classes: int, in_channels: int) -> StudentResNet:
        """Make the network."""
        network = StudentResNet(self.depth, num_classes, in_channels, width=self.width, small_images=self.small_images)
        network.to(memory_format=memory_format(self.channels_last and self.width >= 8))
        return network


@dataclass(frozen=True)
class Stage:
    """One search from scratch: which primitives compete, in how deep a supernet, and how they are relaxed."""

    space: SearchSpace
    relaxation: Relaxation
    num_cells: int | None = None
    edge_normalization: bool = False
    operation: Callable[..., nn.Module] = MixedOperation
    skip_dropout: Callable[[float], float] | None = None

    def architecture(self) -> Architecture:
        """Make the architecture."""
        return Architecture(
            self.space,
            relaxation=self.relaxation,
            edge_normalization=self.edge_normalization,
            skip_dropout=self.skip_dropout,
        )

    def supernet(self, recipe: SupernetRecipe, num_classes: int, in_channels: int) -> Supernet:
        """Make the supernet."""
        supernet = Supernet(
            num_classes,
            recipe.channels,
            self.num_cells or recipe.num_cells,
            in_channels,
            space=self.space,
            operation=self.operation,
            auxiliary_skip=self.relaxation.has_auxiliary_skip,
            stem=recipe.stem,
            checkpointing=recipe.checkpointing,
        )
        return supernet.to(memory_format=memory_format(recipe.channels_last))


class _SpaceRecipe(RecipePart):
    """What the spaces have in common.

    Attributes:
        primitives: that compete on every edge.
        num_nodes: nodes of a cell besides its inputs.
        relaxation: how alpha weights them.
        max_skips: the most skip-connections that the found normal cell may have, or None.
    """

    primitives: tuple[str, ...] = DARTS_PRIMITIVES
    num_nodes: PositiveInt = 4
    relaxation: RelaxationRecipe = Field(default={"kind": "softmax"}, validate_default=True)
    max_skips: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _check_space(self) -> _SpaceRecipe:
        self.space()
        self._check_skips(set(self.primitives))
        return self

    def _check_skips(self, primitives: set[str]) -> None:
        if (
            self.max_skips is not None
            and self.max_skips < 2 * self.num_nodes
            and primitives <= {"none", "skip_connect"}
        ):
            raise ValueError(
                f"max_skips: expected at least {2 * self.num_nodes}, or null, where an edge may have skip_connect "
                f"alone; found {self.max_skips}"
            )

    def space(self) -> SearchSpace:
        """Make the declaration of the space."""
        return SearchSpace.uniform(self.primitives, num_nodes=self.num_nodes)

    @property
    def num_stages(self) -> int:
        """Searches, one after the other."""
        return 1

    def stage(self, index: int, previous: Architecture | None) -> Stage:  # noqa: ARG002
        """Return a stage.

        Args:
            index: of it.
            previous: the architecture that the stage before it ended with.
        """
        return Stage(self.space(), self.relaxation.build())


class DARTSRecipe(_SpaceRecipe):
    """The space of DARTS (Liu et al. 2019)."""

    kind: Literal["darts"] = "darts"


class PCDARTSRecipe(_SpaceRecipe):
    """Partial channels and edge normalization (PC-DARTS, Xu et al. 2020).

    Attributes:
        k: one in k channels is operated on.
        edge_normalization: whether edges have weights of their own.
    """

    kind: Literal["pc_darts"] = "pc_darts"
    k: PositiveInt = 4
    edge_normalization: bool = True

    def stage(self, index: int, previous: Architecture | None) -> Stage:  # noqa: ARG002
        """Return the only stage."""
        return Stage(
            self.space(),
            self.relaxation.build(),
            edge_normalization=self.edge_normalization,
            operation=partial(PartialOperation, k=self.k),
        )


class PDARTSRecipe(_SpaceRecipe):
    """Three searches, deeper and deeper, among fewer and fewer primitives (P-DARTS, Chen et al. 2019).

    Attributes:
        num_cells: of the supernet in each stage.
        num_primitives: that compete on an edge in each stage, the first as many as there are.
        skip_dropout: of identities at the beginning of each stage.
        epochs: of a stage, in the schedule of that dropout.
        frozen_epochs: in which alpha stands still, in the same schedule (`levels.architecture.warmup_rounds` is what
            makes it stand still).
    """

    kind: Literal["p_darts"] = "p_darts"
    num_cells: tuple[PositiveInt, ...] = (5, 11, 17)
    num_primitives: tuple[PositiveInt, ...] = (8, 5, 3)
    skip_dropout: tuple[Probability, ...] = (0.0, 0.4, 0.7)
    epochs: PositiveInt = 25
    frozen_epochs: NonNegativeInt = 10
    max_skips: NonNegativeInt | None = 2

    @model_validator(mode="after")
    def _check_stages(self) -> PDARTSRecipe:
        lengths = {len(self.num_cells), len(self.num_primitives), len(self.skip_dropout)}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(
                f"expected one number a stage in num_cells, num_primitives and skip_dropout; found "
                f"{len(self.num_cells)}, {len(self.num_primitives)} and {len(self.skip_dropout)}"
            )
        falling = sorted(self.num_primitives, reverse=True) == list(self.num_primitives)
        if self.num_primitives[0] != len(self.primitives) or not falling or self.num_primitives[-1] < 2:
            raise ValueError(
                f"num_primitives: expected {len(self.primitives)}, all primitives, then fewer, at least 2; found "
                f"{list(self.num_primitives)}"
            )
        if self.num_primitives[-1] == 2 and {"none", "skip_connect"} <= set(self.primitives):
            self._check_skips({"none", "skip_connect"})  # which may be the two
        if self.frozen_epochs > self.epochs:
            raise ValueError(f"frozen_epochs: expected at most epochs = {self.epochs}; found {self.frozen_epochs}")
        return self

    @property
    def num_stages(self) -> int:
        """Searches, one after the other."""
        return len(self.num_cells)

    def stage(self, index: int, previous: Architecture | None) -> Stage:
        """Return a stage, whose space is that of the one before it, pruned."""
        space = self.space() if previous is None else prune(previous, self.num_primitives[index])
        dropout = SkipDropout(self.skip_dropout[index], self.epochs, self.frozen_epochs)
        return Stage(space, self.relaxation.build(), num_cells=self.num_cells[index], skip_dropout=dropout)


SpaceRecipe: TypeAlias = Annotated[DARTSRecipe | PCDARTSRecipe | PDARTSRecipe, Field(discriminator="kind")]
