"""Approximate solutions of H x = b, where H is known only by its products with vectors.

All solvers work on one interface, `operator(v) = H v` for vectors of shape (n,), and return a `Solution`. H is the
Hessian of a level's objective: symmetric, positive definite if the level is at a strict minimum, but neither is taken
on trust; what went wrong is in the solution's figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

LinearOperator = Callable[[Tensor], Tensor]
"""`operator(v)`: the product of a matrix with a vector of shape (n,)."""


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        x: of shape (n,).
        figures: how it went, by name.
    """

    x: Tensor
    figures: Mapping[str, float] = field(default_factory=dict)


_FAR = 10.0


def conjugate_gradient(
    operator: LinearOperator,
    b: Tensor,
    *,
    iterations: int,
    damping: float = 0.0,
    tolerance: float = 1e-6,
    preconditioner: LinearOperator | None = None,
    start: Tensor | None = None,
) -> Solution:
    """Solve (H + damping I) x = b by preconditioned conjugate gradients (Hestenes and Stiefel 1952).

    Stops early when the residual's norm is at most `tolerance` times that of b, at a direction of no positive curvature
    (there the quadratic has no minimum; Steihaug 1983), and before a product that is not finite. Then the iterate of
    the least residual is returned: along a direction of hardly any curvature the last one has gone far off. Zero, whose
    residual is 1, is returned if there is no other, or if all others have more than 10.

    Args:
        operator: H.
        b: the right-hand side; zero gives zero, without a product.
        iterations: at most; one product each (and one more for a start).
        damping: added to the diagonal.
        tolerance: relative to the norm of b.
        preconditioner: an approximate inverse, symmetric positive definite.
        start: a first guess.

    Returns:
        x, and the figures residual (norm(b - (H + damping I) x) / norm(b), as the recursion has it), iterations, and
        negative_curvature (1 if a direction of none or negative curvature ended it, else 0).
    """
    length = float(torch.linalg.vector_norm(b, dtype=None if b.is_mps else torch.float64))  # of 1e-30, too
    if length == 0:
        return Solution(torch.zeros_like(b), {"residual": 0.0, "iterations": 0, "negative_curvature": 0})

    def damped(v: Tensor) -> Tensor:
        return torch.add(operator(v), v, alpha=damping) if damping else operator(v)

    x, r = torch.zeros_like(b), b / length
    if start is not None:
        warm = r - damped(start / length)
        if bool(torch.linalg.vector_norm(warm) < 1):  # else zero is the better guess
            x, r = start / length, warm
    z = r if preconditioner is None else preconditioner(r)
    p, rz = z, torch.dot(r, z)
    residual, done, negative = float(torch.linalg.vector_norm(r)), 0, 0
    best = (residual, x) if start is not None else None
    while done < iterations and residual > tolerance:
        hp = damped(p)
        curvature = torch.dot(p, hp)
        if not float(curvature) > 0 or not bool(torch.isfinite(hp).all()):
            negative = int(float(curvature) <= 0)
            residual, x = best or (residual, x)
            if residual > _FAR:
                residual, x = 1.0, torch.zeros_like(b)
            break
        step = rz / curvature
        x, r = torch.addcmul(x, p, step), torch.addcmul(r, hp, step, value=-1)
        z = r if preconditioner is None else preconditioner(r)
        previous, rz = rz, torch.dot(r, z)
        p = torch.addcmul(z, p, rz / previous)
        residual, done = float(torch.linalg.vector_norm(r)), done + 1
        if best is None or residual < best[0]:
            best = (residual, x)
    return Solution(x * length, {"residual": residual, "iterations": done, "negative_curvature": negative})


def neumann(operator: LinearOperator, b: Tensor, *, terms: int, scale: float, start: Tensor | None = None) -> Solution:
    """Approximate H^(-1) b by scale * sum over k < terms of (I - scale H)^k b (Lorraine et al. 2020, Algorithm 3).

    Computed as the iteration x <- x + scale (b - H x), which can go on from a start. Converges where all eigenvalues of
    H lie between 0 and 2 / scale.

    Args:
        operator: H.
        b: the right-hand side.
        terms: iterations; `terms - 1` products, one more with a start.
        scale: the step size.
        start: the first x, zero by default.

    Returns:
        x, and the figures residual (norm(b - H x) / norm(b) before the last term) and growth (the largest factor by
        which a term was longer than the one before it: above 1 the sum diverges).
    """
    length = torch.linalg.vector_norm(b)
    x, r = torch.zeros_like(b), b
    if start is not None:
        x, r = start, b - operator(start)
    norms = [torch.linalg.vector_norm(r)]
    x = torch.add(x, r, alpha=scale)
    for _ in range(terms - 1):
        r = torch.sub(r, operator(r), alpha=scale)
        norms.append(torch.linalg.vector_norm(r))
        x = torch.add(x, r, alpha=scale)
    sizes = torch.stack([length, *norms]).tolist()
    if sizes[0] == 0:
        return Solution(x, {"residual": 0.0, "growth": 0.0})
    growth = max((b / a for a, b in pairwise(sizes[1:]) if a > 0), default=0.0)
    return Solution(x, {"residual": sizes[-1] / sizes[0], "growth": growth})


def largest_eigenvalue(
    operator: LinearOperator, start: Tensor, *, iterations: int = 20, tolerance: float = 0.02
) -> tuple[float, Tensor]:
    """Estimate the largest absolute eigenvalue of a symmetric H by power iteration.

    Args:
        operator: H.
        start: a vector with a part along the eigenvector, such as a random one or that of a similar matrix.
        iterations: products, at most.
        tolerance: relative change of the estimate at which to stop.

    Returns:
        The estimate (from below), and the unit vector that it was found with.
    """
    vector = start / torch.linalg.vector_norm(start)
    estimate = 0.0
    for _ in range(iterations):
        image = operator(vector)
        before, estimate = estimate, float(torch.linalg.vector_norm(image))
        if estimate == 0 or estimate - before < 0 or not estimate < float("inf"):
            break
        vector = image / estimate
        if estimate - before <= tolerance * estimate:
            break
    return estimate, vector


def nystrom(operator: LinearOperator, b: Tensor, *, rank: int, damping: float, generator: torch.Generator) -> Solution:
    """Approximate (H + damping I)^(-1) b with a Nystrom approximation of H (Hataya and Yamada 2023).

    H is approximated by C W^(-1) C^T with C = H Q, W = Q^T H Q symmetrized, Q random, orthonormal, of `rank` columns.
    In the orthonormal eigenbasis U of that approximation, with eigenvalues d, the inverse is
    U (d + damping)^(-1) U^T + (I - U U^T) / damping, where the second part is left out at full rank, which is exact.
    Directions in which d + damping vanishes are left out.

    Args:
        operator: H.
        b: the right-hand side.
        rank: products; clamped to the dimension.
        damping: positive, unless the rank is full.
        generator: of the random directions, on the CPU.

    Returns:
        x, and the figure negative_eigenvalues (how many d are negative beyond rounding).
    """
    n = b.numel()
    rank = min(rank, n)
    double = b.double()
    if rank == n:
        basis = torch.eye(n, dtype=torch.float64, device=b.device)
    else:
        drawn = torch.randn(n, rank, generator=generator, dtype=torch.float64).to(b.device)
        basis = torch.linalg.qr(drawn).Q
    image = torch.stack([operator(column.to(b.dtype)).double() for column in basis.unbind(1)], dim=1)
    core = basis.T @ image
    if not bool(core.isfinite().all()):  # the level diverges, as its loss will show
        return Solution(torch.full_like(b, torch.nan), {"negative_eigenvalues": 0})
    d, v = torch.linalg.eigh((core + core.T) / 2)
    noise = torch.finfo(b.dtype).eps * n * d.abs().amax()
    if rank < n:
        # C W^(-1) C^T = (C V |D|^(-1/2)) sign(D) (...)^T; its eigenbasis by a QR of the factor.
        kept = d.abs() > noise
        factor = image @ v[:, kept] / d[kept].abs().sqrt()
        q, r = torch.linalg.qr(factor)
        small = r @ torch.diag(d[kept].sign()) @ r.T
        d, v = torch.linalg.eigh((small + small.T) / 2)
        v = q @ v
    inverse = torch.where((d + damping).abs() > noise, 1 / (d + damping), 0.0)
    inside = v.T @ double
    x = v @ (inverse * inside)
    if rank < n:
        x = x + (double - v @ inside) / damping
    return Solution(x.to(b.dtype), {"negative_eigenvalues": int((d < -noise).sum())})
