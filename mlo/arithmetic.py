"""Arithmetic on gradients: lists of tensors, one a parameter, None standing for zero.

Fused over all tensors of a list where it need not be differentiated. Used by `mlo.autodiff`, the sweep, the optimizers'
update rules and the estimators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from mlo.distributed import Group, reduced

Tensors = tuple[Tensor, ...]
"""A level's variables, or a cotangent of them: one tensor a parameter, in the order of `named_parameters()`."""

Gradient = tuple[Tensor | None, ...]
"""A gradient as autograd gives it: None where the loss does not depend on the parameter."""


def dense(gradient: Gradient, like: Sequence[Tensor]) -> Tensors:
    """Replace every None by zeros of the parameter's shape."""
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(gradient, like, strict=True))


def split(flat: Gradient, sizes: Mapping[str, int]) -> dict[str, Gradient]:
    """Cut a list of gradients into those of each level, given how many each has; what is left over is left out."""
    parts, begin = {}, 0
    for name, size in sizes.items():
        parts[name] = flat[begin : begin + size]
        begin += size
    return parts


_SINGLE = {torch.float32, torch.bfloat16, torch.float16}
_DOUBLE = {torch.float64, torch.complex128}
_SMALL = 1 << 14  # entries; to copy as many takes less time than one more operation
_PIECE = 1 << 17  # entries; in double precision a CPU copies them within its caches


def norm(tensors: Sequence[Tensor | None], group: Group = None) -> Tensor:
    """Return the Euclidean norm over all entries, a scalar tensor (at least one entry must not be None).

    Neither overflows nor underflows where the norm itself does not, and has derivative 0 at 0.

    Args:
        tensors: the entries.
        group: processes that hold shards of them; the result then has no derivative.
    """
    given = [t for t in tensors if t is not None]
    present = [t for t in given if t.numel()] or [given[0].new_zeros(1)]  # a shard may be empty
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in present)
    dtypes = {t.dtype for t in present}
    if not differentiable and dtypes <= _SINGLE and not present[0].is_mps:
        small: list[Tensor] = []
        large: list[Tensor] = []
        for t in present:
            if t.numel() <= _SMALL:
                small.append(t.reshape(-1))
            else:
                large += _pieces(t)
        lengths = list(torch._foreach_norm(large, 2, dtype=torch.float64)) if large else []
        if small:
            lengths.append(torch.linalg.vector_norm(torch.cat(small), dtype=torch.float64))
        if group is not None:
            total = reduced(torch.stack(lengths).square().sum(), "SUM", group).sqrt()
        else:
            total = torch.linalg.vector_norm(torch.stack(lengths)) if len(lengths) > 1 else lengths[0]
        return total.to(reduce(torch.promote_types, dtypes))
    with torch.no_grad():
        largest = reduced(torch.stack(torch._foreach_norm(present, float("inf"))).amax(), "MAX", group)
        unit = torch.where(largest > 0, largest, 1.0)
    if differentiable:
        squares = torch.stack([(t / unit).square().sum() for t in present])
    else:
        squares = torch.stack(torch._foreach_norm(torch._foreach_div(present, unit))).square()
    square = reduced(squares.sum(), "SUM", group)
    positive = square > 0  # the square root has no derivative at 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0) * unit


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return all entries, in the order of memory, in pieces that are cast one by one: no copy of the whole is made."""
    in_memory = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return torch.split(tensor.permute(in_memory).reshape(-1), _PIECE)


def add(a: Gradient, b: Gradient) -> Gradient:
    """Add two gradients entry by entry, None counting as zero."""
    return tuple(y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True))


def scaled(tensors: Sequence[Tensor], factor: Tensor | float) -> list[Tensor]:
    """Return tensors times a number, in their own dtypes."""
    if isinstance(factor, Tensor) and factor.dim():
        factor = factor.reshape(())  # an option of an optimizer may have its one entry in any shape
    if torch.is_grad_enabled():  # the derivatives of the fused operation fail where only some of its outputs are used
        return [t * (factor.to(t.dtype) if isinstance(factor, Tensor) else factor) for t in tensors]
    if not tensors:
        return []
    if not isinstance(factor, Tensor):  # several times faster on the CPU than with a number
        double = any(t.dtype in _DOUBLE for t in tensors)
        factor = torch.scalar_tensor(factor, dtype=torch.float64 if double else torch.float32)
    found = torch._foreach_mul(list(tensors), factor)  # of the factor's dtype where a tensor has no dimension either
    return [x if x.dtype == t.dtype else x.to(t.dtype) for x, t in zip(found, tensors, strict=True)]


def summed(a: Sequence[Tensor], b: Sequence[Tensor], sign: float = 1.0) -> list[Tensor]:
    """Return a + sign * b for pairs of tensors."""
    if torch.is_grad_enabled():
        return [x + sign * y for x, y in zip(a, b, strict=True)]
    return list(torch._foreach_add(list(a), list(b), alpha=sign)) if a else []


def accumulate(total: Mapping[str, Tensors], found: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Add cotangents level by level; a level that one of the two leaves out keeps those of the other."""
    both = {q: tuple(a + b for a, b in zip(own, found[q], strict=True)) for q, own in total.items() if q in found}
    return {**total, **found, **both}
