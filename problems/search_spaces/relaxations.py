"""Relaxations: how alpha weights the primitives, each an object that `supernet.Architecture` is given.

One of one's own is a subclass of `Relaxation` with `weights`; everything else has a default.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from mlo.distributed import drawn_alike


class Relaxation(abc.ABC):
    """Maps alpha, (edges, primitives), to the weights of the primitives.

    `progress`, in [0, 1), is the fraction of the search that is done, for what is annealed.
    """

    @abc.abstractmethod
    def weights(self, alpha: Tensor, progress: float) -> Tensor:
        """Return the weights, (edges, primitives), by which a supernet multiplies its primitives."""

    def scores(self, alpha: Tensor) -> Tensor:
        """Return what discretization compares, (edges, primitives): softmax(alpha), whatever is sampled."""
        return alpha.softmax(dim=-1)

    def penalty(self, alpha: Tensor) -> Tensor:
        """Return a scalar to add to the architecture's loss; zero."""
        return alpha.new_zeros(())

    def auxiliary_skip(self, progress: float) -> float:  # noqa: ARG002
        """Return the weight of a skip-connection added to every edge beside its primitives; zero."""
        return 0.0

    @property
    def has_auxiliary_skip(self) -> bool:
        """Whether a supernet must have that skip-connection."""
        return False

    @property
    def samples(self) -> bool:
        """Whether one primitive of each edge has all the weight, so that the others need not be computed."""
        return False


@dataclass(frozen=True)
class Softmax(Relaxation):
    """Softmax over the primitives of each edge (DARTS, Liu et al. 2019, eq. (2))."""

    def weights(self, alpha: Tensor, progress: float) -> Tensor:  # noqa: ARG002
        """Return softmax(alpha)."""
        return alpha.softmax(dim=-1)


SOFTMAX = Softmax()
"""The relaxation of DARTS."""


@dataclass(frozen=True)
class GumbelSoftmax(Relaxation):
    """Samples of the Gumbel-softmax, the temperature falling linearly with the progress.

    Hard: the sampled primitive alone is computed and has weight 1, and its derivative is that of its soft weight (GDAS,
    Dong and Yang 2019, eq. (5)-(7), whose temperatures are the defaults). Soft: the sample itself weights all of them
    (SNAS, Xie et al. 2019, eq. (4)).

    Processes that train together sample the same. Which primitives are sampled is needed on the host: a hard sample
    waits once a forward pass for the device.

    Args:
        initial_temperature: positive.
        final_temperature: positive.
        hard: whether samples are one-hot.

    Raises:
        ValueError: a temperature is not positive.
    """

    initial_temperature: float = 10.0
    final_temperature: float = 0.1
    hard: bool = True

    def __post_init__(self) -> None:
        if min(self.initial_temperature, self.final_temperature) <= 0:
            raise ValueError(
                f"expected positive temperatures, got {self.initial_temperature} and {self.final_temperature}"
            )

    @property
    def samples(self) -> bool:
        """Hard samples leave the other primitives out."""
        return self.hard

    def weights(self, alpha: Tensor, progress: float) -> Tensor:
        """Return a sample."""
        temperature = self.initial_temperature + progress * (self.final_temperature - self.initial_temperature)
        with drawn_alike(alpha.device):  # the statistics of batches are those of one architecture
            return functional.gumbel_softmax(alpha.log_softmax(dim=-1), tau=temperature, hard=self.hard, dim=-1)


@dataclass(frozen=True)
class Sigmoid(Relaxation):
    """A sigmoid of each entry: primitives collaborate instead of competing (FairDARTS, Chu et al. 2020, eq. (5)).

    Meant for spaces without `none`. The penalty -weight * mean((sigmoid(alpha) - 1/2)^2) drives the weights towards 0
    and 1 (the paper's zero-one loss, eq. (6)). A genotype keeps two edges a node, as elsewhere: the two strongest; the
    paper's threshold, which leaves out even those when they are weak, is not applied.

    Args:
        penalty_weight: at least 0.

    Raises:
        ValueError: the weight is negative.
    """

    penalty_weight: float = 10.0

    def __post_init__(self) -> None:
        if self.penalty_weight < 0:
            raise ValueError(f"expected penalty_weight >= 0, got {self.penalty_weight}")

    def weights(self, alpha: Tensor, progress: float) -> Tensor:  # noqa: ARG002
        """Return sigmoid(alpha)."""
        return alpha.sigmoid()

    def scores(self, alpha: Tensor) -> Tensor:
        """Return sigmoid(alpha)."""
        return alpha.sigmoid()

    def penalty(self, alpha: Tensor) -> Tensor:
        """Return the zero-one loss."""
        return -self.penalty_weight * (alpha.sigmoid() - 0.5).square().mean()


@dataclass(frozen=True)
class AuxiliarySkip(Relaxation):
    """Softmax, and beside it a skip-connection on every edge whose weight falls linearly (DARTS-, Chu et al. 2021).

    It takes over what skip-connections do for training the supernet, so that those of the search need not win for it.

    Args:
        initial: its weight at the beginning, at least 0.
        final: its weight at the end, at least 0.

    Raises:
        ValueError: a weight is negative.
    """

    initial: float = 1.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if min(self.initial, self.final) < 0:
            raise ValueError(f"expected weights >= 0, got {self.initial} and {self.final}")

    @property
    def has_auxiliary_skip(self) -> bool:
        """It has."""
        return True

    def weights(self, alpha: Tensor, progress: float) -> Tensor:  # noqa: ARG002
        """Return softmax(alpha)."""
        return alpha.softmax(dim=-1)

    def auxiliary_skip(self, progress: float) -> float:
        """Return its weight now."""
        return self.initial + progress * (self.final - self.initial)


RELAXATIONS: dict[str, type[Relaxation]] = {
    "softmax": Softmax,
    "gumbel_softmax": GumbelSoftmax,
    "sigmoid": Sigmoid,
    "auxiliary_skip": AuxiliarySkip,
}
"""Every relaxation by the name that a recipe gives it."""
