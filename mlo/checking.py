"""Does a hypergradient agree with a black box? What `Engine.check` measures, judges and prints.

The black box moves the variables of an upper level by +- h along a direction, lets the lower levels' optimizers really
take their steps again, and reads off the change of the upper loss. The engine plays, `Script` holds still what the
hypergradient counts as constant, and everything here is arithmetic on what was heard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mlo.arithmetic import Tensors, dense
from mlo.autodiff import Gradients
from mlo.errors import GraphError, MloError
from mlo.graph import Graph
from mlo.hypergradients import Claim
from mlo.levels import Variables
from mlo.randomness import random_key
from mlo.script import Script
from mlo.sharding import is_sharded

_ROUNDING = 10 * torch.finfo(torch.float64).eps  # of a loss, relative

_VERDICTS = {
    "exact": "exact, as claimed",
    "WRONG": "WRONG: the estimators claim to be exact here",
    "approximate": "not judged: approximate, see what is expected",
    "not smooth": "not judged: not smooth here",
    "flat": "not judged: the loss hardly changes, rounding hides the difference",
}


@dataclass(frozen=True)
class Differences:
    """Slopes of a function along directions, by differences.

    Attributes:
        central: (f(x + h d) - f(x - h d)) / 2h, of shape (radii, directions).
        jumps: the forward less the backward difference, of the same shape; proportional to h where f is smooth.
        value: f(x).
    """

    central: Tensor
    jumps: Tensor
    value: float


def random_directions(num_variables: int, num: int, generator: torch.Generator) -> Tensor:
    """Return orthonormal random directions, shape (num_variables, num), but at most a basis of the whole space."""
    drawn = torch.randn(num_variables, min(num, num_variables), generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis


def differences(
    function: Callable[[], float], variables: Tensors, directions: Tensor, radii: Sequence[float]
) -> Differences:
    """Measure a function of what `variables` hold; they are back at their values afterwards.

    Args:
        function: the value at the present variables.
        variables: to be moved, n entries in all.
        directions: shape (n, directions), in the order of the entries.
        radii: of the steps.
    """
    value = function()
    central = torch.zeros(len(radii), directions.shape[1], dtype=torch.float64)
    jumps = torch.zeros_like(central)
    for i, radius in enumerate(radii):
        for j in range(directions.shape[1]):
            above, below = (at(function, variables, directions[:, j], sign * radius) for sign in (1, -1))
            central[i, j] = (above - below) / (2 * radius)
            jumps[i, j] = (above - 2 * value + below) / radius
    return Differences(central, jumps, value)


@torch.no_grad()
def at(function: Callable[[], float], variables: Tensors, direction: Tensor, distance: float) -> float:
    """Return the value at variables moved by `distance` along a direction, and move them back."""
    kept = [v.clone() for v in variables]
    pieces = torch.split(direction, [v.numel() for v in variables])
    try:
        for v, d in zip(variables, pieces, strict=True):
            v.add_(d.view_as(v).to(v.device), alpha=distance)
        with torch.enable_grad():
            return function()
    finally:
        for v, old in zip(variables, kept, strict=True):
            v.copy_(old)


def remaining(before: Sequence[Tensor], after: Sequence[Tensor], steps: int) -> float:
    """Return how much of a disturbance is left when a level's steps end, at worst over its solves.

    Args:
        before: the level's gradients in the undisturbed play.
        after: the same when a level that it responds to was moved.
        steps: the level's steps in a solve.
    """
    moved = [float((a - b).norm()) for b, a in zip(before, after, strict=True)]
    solves = [moved[k : k + steps] for k in range(0, len(moved), steps)]
    return max((solve[-1] / solve[0] for solve in solves if solve[0] > 0), default=0.0)


@dataclass(frozen=True)
class LevelCheck:
    """How the hypergradient of one level compares with the black box.

    Attributes:
        level: the level.
        claims: what the estimator of each level solved inside it is expected to give.
        asymmetries: of each level inside that has levels inside it, how far from a Hessian its total curvature is, see
            `mlo.diagnostics.asymmetries`.
        remaining: of each of those that is differentiated implicitly, the part of a disturbance that its steps leave in
            its gradient; 0 if it converges within its steps.
        num_variables: entries of the level's variables.
        num_directions: orthonormal random directions tried; where there are as many as variables, error and cosine are
            those of the whole gradient, otherwise of its projection.
        num_smooth: of the directions in which both radii agree; the others are left out.
        error: norm of the difference over the norm of the black box's slopes; nan if there are no smooth directions.
        cosine: of the two vectors of slopes.
        verdict: "exact", "WRONG", "approximate", "not smooth" or "flat".
    """

    level: str
    claims: Mapping[str, Claim]
    asymmetries: Mapping[str, float]
    remaining: Mapping[str, float]
    num_variables: int
    num_directions: int
    num_smooth: int
    error: float
    cosine: float
    verdict: str

    @property
    def passed(self) -> bool:
        """Whether no claim was found wrong."""
        return self.verdict != "WRONG"


@dataclass(frozen=True)
class Check:
    """What `Engine.check` found; `str` of it is the table that `mlo check` prints.

    Attributes:
        levels: of each checked level.
    """

    levels: tuple[LevelCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether no estimator that claims to be exact was found wrong."""
        return all(level.passed for level in self.levels)

    def __str__(self) -> str:
        width = max(5, *(len(level.level) for level in self.levels))
        lines = [f"{'level':<{width}}  {'directions':<12}  {'relative error':<14}  {'cosine':<8}  verdict"]
        for found in self.levels:
            tried = f"{found.num_directions} of {found.num_variables}"
            lines.append(
                f"{found.level:<{width}}  {tried:<12}  {found.error:<14.1e}  {found.cosine:<8.5f}  "
                f"{_VERDICTS[found.verdict]}"
            )
            if found.num_smooth < found.num_directions:
                lines.append(
                    f"  {found.num_directions - found.num_smooth} of {found.num_directions} directions are not smooth "
                    f"here (the two radii disagree: kinks such as those of ReLU and max pooling) and are left out"
                )
            for level, claim in found.claims.items():
                lines.append(f"  {level}: {claim.text}")
                if level in found.asymmetries:
                    lines.append(f"    its total curvature is asymmetric by {found.asymmetries[level]:.1e}")
                if level in found.remaining:
                    lines.append(f"    of a disturbance its steps leave {found.remaining[level]:.1e} in its gradient")
        return "\n".join(lines)


@dataclass(frozen=True)
class Settings:
    """How to check; the arguments of `Engine.check`.

    Raises:
        MloError: one is out of range.
    """

    directions: int
    radii: tuple[float, float]
    tolerance: float
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        if type(self.directions) is not int or self.directions < 1:
            raise MloError(f"check: directions must be a whole number of at least 1; found {self.directions!r}")
        pair = isinstance(self.radii, tuple | list) and len(self.radii) == 2
        if not pair or not 0 < self.radii[1] < self.radii[0] <= 1e-6:
            raise MloError(
                f"check: radii must be two positive numbers of at most 1e-6, the larger first (further out the kinks "
                f"of ReLU and max pooling spoil the differences); found {self.radii!r}"
            )
        if not 0 < self.tolerance < 1:
            raise MloError(f"check: tolerance must be a number between 0 and 1; found {self.tolerance!r}")


def checkable(graph: Graph, name: str | None, device: torch.device) -> tuple[str, ...]:
    """Return the levels to check: `name`, or all that have levels solved inside them.

    Raises:
        GraphError: an unknown name, or a level with nothing inside.
        MloError: a device without float64, or a sharded level.
    """
    inside = graph.structure.inside
    if name is not None:
        graph.check_name(name, "check")
    uppers = tuple(n for n in graph.structure.names if inside[n] and name in {None, n})
    if not uppers:
        where = "any level" if name is None else f"level {name!r}"
        raise GraphError(
            f"check: expected levels solved inside {where}; found none: its hypergradient is a plain gradient, and "
            f"there is nothing to check."
        )
    if any(is_sharded(problem.module) for problem in graph.levels):
        raise MloError("check: expected levels that are whole; found a sharded one. Check without fully_shard.")
    if device.type == "mps":
        raise MloError("check: expected a device with float64; found mps. Build the engine with device='cpu'.")
    return uppers


def check_level(
    graph: Graph,
    level: str,
    variables: Variables,
    found: Gradients,
    *,
    asymmetries: Mapping[str, float],
    script: Script,
    play: Callable[[], float],
    settings: Settings,
) -> LevelCheck:
    """Compare the hypergradient of one level with the black box.

    Args:
        graph: of the levels.
        level: the upper level.
        variables: its variables, in float64.
        found: its loss and hypergradient.
        asymmetries: of the levels inside.
        script: that was written down when it was computed.
        play: plays the script again, with whatever is in `variables`, and returns the level's loss.
        settings: how to check.
    """
    parameters = variables.parameters
    gradient = torch.cat([g.detach().reshape(-1).cpu() for g in dense(found.of[level], parameters)])
    generator = torch.Generator().manual_seed(random_key(settings.seed, level, "check"))
    directions = random_directions(len(gradient), settings.directions, generator)
    before = script.gradients
    total = 2 + 4 * directions.shape[1]
    with tqdm(desc=f"check {level}", total=total, unit="solve", disable=not settings.progress, leave=False) as bar:

        def counted() -> float:
            bar.update(1)
            return play()

        measured = differences(counted, parameters, directions, settings.radii)
        _check_repeats(level, float(found.loss), measured.value)
        at(counted, parameters, directions[:, 0], settings.radii[0])
    left = {
        q: remaining(gradients, script.gradients[q], graph[q].steps) for q, gradients in before.items() if gradients
    }
    claims = _claims(graph, level)
    judged = all(
        claim.exact and (not claim.converged or left.get(q, 1.0) <= settings.tolerance / 100)
        for q, claim in claims.items()
    )
    num_smooth, error, cosine, verdict = compare(
        gradient @ directions, measured, settings.radii, settings.tolerance, judged=judged
    )
    return LevelCheck(
        level, claims, asymmetries, left, len(gradient), directions.shape[1], num_smooth, error, cosine, verdict
    )


def _claims(graph: Graph, level: str) -> dict[str, Claim]:
    """Return what is expected of each level inside: of its pullback, where the sweep of `level` uses it."""
    structure = graph.structure
    pulled = set(structure.reads[level])
    claims: dict[str, Claim] = {}
    for q in structure.sweep_order[level]:
        problem = graph[q]
        if q in pulled or problem.hypergradient.implicit:
            sizes = [p.numel() for p in problem.module.parameters() if p.requires_grad]
            claims[q] = problem.hypergradient.claim(problem.steps, sum(sizes))
        else:
            claims[q] = Claim(
                f"{problem.hypergradient!r} is part of the steps taken by the levels around it", exact=True
            )
        if q in pulled:
            pulled |= set(structure.responds_to[q])
    return claims


def _check_repeats(level: str, first: float, again: float) -> None:
    """Refuse to measure what does not repeat."""
    if not abs(first - again) <= 1e-12 * max(abs(first), abs(again)):
        raise MloError(
            f"check of level {level!r}: expected the same loss when the same steps are taken again; found "
            f"{first!r}, then {again!r}. A loss must depend on nothing but its levels, its batch and the global "
            f"random generators."
        )


def compare(
    found: Tensor,
    measured: Differences,
    radii: Sequence[float],
    tolerance: float,
    *,
    judged: bool,
) -> tuple[int, float, float, str]:
    """Compare a hypergradient with measured slopes.

    Args:
        found: the hypergradient's slopes, shape (directions,).
        measured: those of the black box.
        radii: at which it measured, largest first.
        tolerance: largest relative error of what claims to be exact.
        judged: whether it does.

    Returns:
        The number of smooth directions, relative error, cosine, and verdict.
    """
    num = len(found)
    rounding = [_ROUNDING * abs(measured.value) / radius for radius in radii]
    large, small = measured.central[0], measured.central[-1]
    scale = max(float(large.norm()), float(found.norm())) / math.sqrt(num)
    limit = tolerance * scale + rounding[-1]
    kink = (measured.jumps[-1].abs() > limit) & (measured.jumps[-1].abs() > measured.jumps[0].abs() / 2)
    smooth = ((large - small).abs() <= limit) & ~kink
    num_smooth = int(smooth.sum())
    if num_smooth == 0:
        return 0, math.nan, math.nan, "not smooth"
    a, b = found[smooth], large[smooth]
    distance, length = float((a - b).norm()), float(b.norm())
    error = distance / length if length > 0 else math.inf if distance > 0 else 0.0
    norms = float(a.norm()) * length
    cosine = float(a @ b) / norms if norms > 0 else math.nan
    if num_smooth < num / 2:
        verdict = "not smooth"
    elif not judged:
        verdict = "approximate"
    elif error <= tolerance:
        verdict = "exact"
    else:
        verdict = "flat" if distance <= rounding[0] * math.sqrt(num_smooth) + tolerance * length else "WRONG"
    return num_smooth, error, cosine, verdict
