"""Depthwise convolutions that can be differentiated any number of times at the cost of as many convolutions.

A depthwise convolution is bilinear in the images x and the kernels w, and so are its two pullbacks. With the cotangent
g of its output, the three

    y = convolve(x, w)        x^ = transpose(g, w)        w^ = correlate(x, g)

are each other's derivatives: <g, convolve(x, w)> = <transpose(g, w), x> = <correlate(x, g), w>. PyTorch's own double
backward goes through the channels of a depthwise convolution one at a time instead.

Called by the fused cell of a supernet.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Shape = tuple[int, ...]
How = tuple[int, int]
"""Stride and dilation."""


def depthwise(x: Tensor, kernels: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """Convolve each channel with a kernel of its own, padded so that stride 1 keeps the size.

    Args:
        x: (batch, channels, height, width).
        kernels: (channels, 1, k, k), k odd.
        stride: At least 1; a side of n pixels is mapped to ceil(n / stride).
        dilation: At least 1.

    Returns:
        (batch, channels, ceil(height / stride), ceil(width / stride)).
    """
    kind = x.device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):  # it does not reach what is below
        lower = torch.get_autocast_dtype(kind)
        x, kernels = (t if t.dtype == torch.float64 else t.to(lower) for t in (x, kernels))
    if kernels.is_leaf:  # see `_wanted`
        kernels = kernels.view_as(kernels)
    return _apply(_Convolve, x, kernels, (stride, dilation))


_has_autocast = cache(torch.amp.is_autocast_available)


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of a pixel lie next to each other in memory, and are more than one."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _Convolve(torch.autograd.Function):
    """y(x, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, how: How) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how = how
        (stride, dilation), padding = how, _padding(w.shape, how)
        return functional.conv2d(x, w, stride=stride, padding=padding, dilation=dilation, groups=w.shape[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        if not torch.is_grad_enabled():  # nobody will differentiate it
            return *_pullback(g, x, w, ctx.how, _wanted(ctx)), None
        return (
            _apply(_Transpose, g, w, x.shape, ctx.how) if ctx.needs_input_grad[0] else None,
            _apply(_Correlate, x, g, w.shape, ctx.how) if ctx.needs_input_grad[1] else None,
            None,
        )


class _Transpose(torch.autograd.Function):
    """x^(g, w)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, shape: Shape, how: How) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.how = how
        found = _pullback(g, _placeholder(g, shape), w, how, (True, False))[0]
        assert found is not None
        return found

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        g, w = ctx.saved_tensors
        return (
            _apply(_Convolve, v, w, ctx.how) if ctx.needs_input_grad[0] else None,
            _apply(_Correlate, v, g, w.shape, ctx.how) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _Correlate(torch.autograd.Function):
    """w^(x, g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, shape: Shape, how: How) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.how = how
        found = _pullback(g, x, _placeholder(x, shape), how, (False, True))[1]
        assert found is not None
        return found

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        x, g = ctx.saved_tensors
        return (
            _apply(_Transpose, g, u, x.shape, ctx.how) if ctx.needs_input_grad[0] else None,
            _apply(_Convolve, x, u, ctx.how) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _apply(function: Any, *args: Any) -> Tensor:
    found: Tensor = function.apply(*args)
    return found


def _wanted(ctx: Any) -> tuple[bool, bool]:
    """Return of which inputs this backward pass really goes on to use the gradient.

    `needs_input_grad` tells which inputs require one: of weights that are not differentiated this time, too.
    """

    def wants(index: int) -> bool:
        node = ctx.next_functions[index][0]
        return ctx.needs_input_grad[index] and (
            hasattr(node, "variable") or torch._C._will_engine_execute_node(node)  # which knows nothing of leaves
        )

    return wants(0), wants(1)


def _pullback(
    g: Tensor, x: Tensor, w: Tensor, how: How, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return x^(g, w) and w^(x, g), None for what is not wanted: of those tensors the shape alone counts."""
    (stride, dilation), padding = how, _padding(w.shape, how)
    of_x, of_w = wanted
    found_x = found_w = None
    if x.device.type == "cpu":  # there oneDNN is faster at what PyTorch does not ask it for
        if of_x and stride == 1:
            found_x = functional.conv2d(g, w.flip(2, 3), padding=padding, dilation=dilation, groups=w.shape[0])
            of_x = False
        if of_w and dilation == 1 and w.shape[-1] > _COLUMNS and x.dtype == torch.float32 and is_channels_last(x):
            found_w = _correlate_by_columns(x, g, w.shape[-1], stride)
            of_w = False
    if of_x or of_w:
        found = torch.ops.aten.convolution_backward(
            g, x, w, None, [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], w.shape[0], [of_x, of_w, False]
        )
        found_x, found_w = found[0] if of_x else found_x, found[1] if of_w else found_w
    return found_x, found_w


_COLUMNS = 3
"""Widest kernels that oneDNN has a fast weight gradient for; higher ones must not be higher than the images."""


def _correlate_by_columns(x: Tensor, g: Tensor, k: int, stride: int) -> Tensor:
    """Put w^(x, g) together from kernels of k rows and a few columns each, of the same parity; dilation is 1."""
    channels, height = x.shape[1:3]
    border = k // 2
    above = border if height <= k else 0  # zeros that are put there, not left to the convolution
    found = x.new_empty(channels, 1, k, k)
    for parity in range(stride):
        for first in range(parity, k, stride * _COLUMNS):
            columns = found[..., first : first + stride * _COLUMNS : stride]
            # What they meet: the columns of the images from number `first - border`, in strides.
            before = max(0, -((first - border) // stride))
            met = x[..., first - border + stride * before :: stride]
            width = g.shape[3] + columns.shape[3] - 1
            before = min(before, width)  # they meet none where the images are narrow
            images = functional.pad(met, (before, width - before - met.shape[3], above, above))
            padding = [border - above, 0]
            columns[...] = torch.ops.aten.convolution_backward(
                g, images, columns, None, [stride, 1], padding, [1, 1], False, [0, 0], channels, [False, True, False]
            )[1]
    return found


def _padding(shape: Shape, how: How) -> int:
    return how[1] * (shape[-1] - 1) // 2


def _placeholder(like: Tensor, shape: Shape) -> Tensor:
    """A tensor of the shape, of unspecified numbers, laid out as `like` is."""
    memory_format = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
