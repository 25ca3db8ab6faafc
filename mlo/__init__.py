"""mlo: multi-level optimization on PyTorch."""

from mlo.arithmetic import Tensors
from mlo.engine import Engine
from mlo.errors import CheckpointError, DivergenceError, GraphError, MloError, ProcessLostError, RecipeError
from mlo.graph import Edge, Graph
from mlo.hypergradients import (
    SAMA,
    Claim,
    ConjugateGradient,
    FiniteDifference,
    FirstOrder,
    Hypergradient,
    Neumann,
    Nystrom,
    Penalty,
    Unroll,
)
from mlo.levels import Levels, Output, Sum
from mlo.optimizers import register_optimizer
from mlo.problem import Problem
from mlo.sweep import Response, Step
from mlo.synchronized import synchronize_batch_norm
from mlo.version import __version__

__all__ = [
    "SAMA",
    "CheckpointError",
    "Claim",
    "ConjugateGradient",
    "DivergenceError",
    "Edge",
    "Engine",
    "FiniteDifference",
    "FirstOrder",
    "Graph",
    "GraphError",
    "Hypergradient",
    "Levels",
    "MloError",
    "Neumann",
    "Nystrom",
    "Output",
    "Penalty",
    "Problem",
    "ProcessLostError",
    "RecipeError",
    "Response",
    "Step",
    "Sum",
    "Tensors",
    "Unroll",
    "__version__",
    "register_optimizer",
    "synchronize_batch_norm",
]
