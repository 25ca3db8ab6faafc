"""The estimators: one file each, one abstract method."""

from collections.abc import Mapping
from types import MappingProxyType

from mlo.hypergradients.base import Claim, Hypergradient
from mlo.hypergradients.conjugate_gradient import ConjugateGradient
from mlo.hypergradients.finite_difference import FiniteDifference
from mlo.hypergradients.first_order import FirstOrder
from mlo.hypergradients.neumann import Neumann
from mlo.hypergradients.nystrom import Nystrom
from mlo.hypergradients.penalty import Penalty
from mlo.hypergradients.sama import SAMA
from mlo.hypergradients.unroll import Unroll

KINDS: Mapping[str, type[Hypergradient]] = MappingProxyType(
    {
        "first_order": FirstOrder,
        "finite_difference": FiniteDifference,
        "unroll": Unroll,
        "neumann": Neumann,
        "cg": ConjugateGradient,
        "nystrom": Nystrom,
        "sama": SAMA,
        "penalty": Penalty,
    }
)
"""The estimators by the name that recipes call them."""

__all__ = [
    "KINDS",
    "SAMA",
    "Claim",
    "ConjugateGradient",
    "FiniteDifference",
    "FirstOrder",
    "Hypergradient",
    "Neumann",
    "Nystrom",
    "Penalty",
    "Unroll",
]
