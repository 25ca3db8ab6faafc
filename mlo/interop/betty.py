"""Betty's engine on a graph of ours: what Betty (betty-ml 0.2.1) makes of the same levels, losses, data and seeds.

    engine = betty_engine(graph, rounds=10)
    metrics = engine.run()

For whoever comes from Betty and wants to compare before moving, for benchmarks, and for `mlo run RECIPE --engine
betty`. Only what Betty can express is accepted (`mlo.interop.betty_translation`); what it computes otherwise although
it can be expressed is listed in docs/betty.md.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import torch

from mlo.devices import find_device
from mlo.distributed import whole_world
from mlo.errors import InteropError, MloError
from mlo.graph import Graph
from mlo.interop.betty_translation import Options, Translation, translate

if TYPE_CHECKING:
    from mlo.interop.betty_problems import RoundEngine

PACKAGE = "betty-ml"
"""Of Betty on PyPI."""


def check_betty(
    graph: Graph,
    *,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    rollback: bool = False,
    diagnostics_every: int | None = None,
) -> Translation:
    """Refuse a graph that Betty cannot express, or a Python without Betty.

    Args:
        graph: the levels, and who reads whom.
        device: as for `mlo.Engine`, and so are the others.
        precision: "bf16" and "fp16" on CUDA only.
        rollback: for levels of one step.
        diagnostics_every: None.

    Returns:
        The graph in Betty's terms.

    Raises:
        InteropError: names everything that cannot be expressed, with the mend; or says how to install Betty; or that
            there are several processes.
        MloError: something else than a graph, an unknown device or precision.
    """
    if not isinstance(graph, Graph):
        raise MloError(f"graph: expected an mlo.Graph; found {graph!r}")
    if not isinstance(rollback, bool):
        raise MloError(f"rollback: expected True or False; found {rollback!r}")
    if whole_world() is not None:
        raise InteropError(
            "Betty's engine: expected a single process, as each would train by itself; found a job of several. Start "
            "one process, or take mlo.Engine."
        )
    if precision not in ("fp32", "bf16", "fp16"):
        raise MloError(f"precision: expected one of fp32, bf16, fp16; found {precision!r}")
    where = find_device(device, [p.module for p in graph.levels])
    translation = translate(graph, Options(where, precision, rollback, diagnostics_every))
    if translation.obstacles:
        lines = [f"  - {obstacle}" for obstacle in translation.obstacles]
        raise InteropError("\n".join(["Betty cannot express what this graph asks of it:", *lines]))
    if importlib.util.find_spec("betty") is None:
        raise InteropError(
            "Betty: expected the package to be installed; found no module betty. Install it with: pip install "
            f"{PACKAGE}==0.2.1 (on Python 3.11 and later: pip install --no-deps --ignore-requires-python "
            f"{PACKAGE}==0.2.1)"
        )
    return translation


def betty_engine(
    graph: Graph,
    *,
    rounds: int,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    rollback: bool = False,
    diagnostics_every: int | None = None,
) -> RoundEngine:
    """Build Betty's engine over the levels of a graph, which it will train in place.

    Each level becomes an `ImplicitProblem`, each edge a dependency (a detached one none), each estimator a `Config`.
    With the same seed the levels draw the batches, and in their own steps the random numbers, that they draw in
    `mlo.Engine`.

    Args:
        graph: the levels, and who reads whom.
        rounds: that the engine is to play, at least 1.
        seed: of all random draws and data orders.
        device: "auto" or a torch device; the modules are moved there.
        precision: "fp32" casts nothing; "bf16" and "fp16" on CUDA only.
        rollback: Betty's `roll_back`, for levels of one step.
        diagnostics_every: None; refused with the rest otherwise.

    Returns:
        A `betty.engine.Engine` whose `run(callbacks=..., progress=...)` plays the rounds and returns the metrics of the
        last one.

    Raises:
        InteropError: as `check_betty`.
        MloError: no round to play, an unknown device or precision.
    """
    if not isinstance(rounds, int | np.integer) or rounds < 1:
        raise MloError(f"rounds: expected a whole number of at least 1; found {rounds!r}")
    translation = check_betty(
        graph, device=device, precision=precision, rollback=rollback, diagnostics_every=diagnostics_every
    )
    from mlo.interop.betty_problems import RoundEngine  # noqa: PLC0415 - imports Betty

    where = find_device(device, [p.module for p in graph.levels])
    return RoundEngine(graph, translation, rounds, seed, Options(where, precision, rollback))
