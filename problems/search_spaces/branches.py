"""What the fused cell is made of: images to convolve, statistics of the batch, sums of products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlo.synchronized import SynchronizedBatchNorm
from problems.search_spaces.depthwise import depthwise, is_channels_last

_VECTOR = 16
"""Numbers that a CPU computes with at once; PyTorch averages fewer channels one by one, several times as slowly."""


class Images(NamedTuple):
    """What a depthwise convolution reads, and how."""

    y: Tensor
    """(batch, channels, height, width)."""
    stride: int
    """Of the convolution."""
    dilation: int
    """Of the convolution."""
    in_quarters: bool = False
    """Whether the batch consists of the quarters of the images, all first ones, all second ones, and so on."""


Norm = nn.BatchNorm2d | SynchronizedBatchNorm


class Statistics:
    """BatchNorm with the statistics of the batch; running ones are written once for all modules.

    All modules are of the same number of channels.
    """

    def __init__(self) -> None:
        self._norms: list[Norm] = []
        self._places: list[int] = []
        """Of the statistics of each module."""
        self._num_places = 0
        self._means: list[Tensor] = []
        self._variances: list[Tensor] = []

    def normalize(self, x: Tensor, norms: Sequence[Norm], scales: Tensor | None) -> Tensor:
        """Normalize as many groups of channels as there are modules, and scale each channel.

        Args:
            x: (batch, modules * channels, height, width).
            norms: Of each group.
            scales: Of each channel, (modules * channels,), or None for 1.
        """
        return self._normalize(x, norms, scales, range(len(norms)))

    def normalize_alike(self, x: Tensor, norms: Sequence[Norm]) -> Tensor:
        """Do once what several modules would do to the same tensor."""
        return self._normalize(x, norms, None, [0] * len(norms))

    def _normalize(self, x: Tensor, norms: Sequence[Norm], scales: Tensor | None, places: Sequence[int]) -> Tensor:
        first = norms[0]
        mean = var = None
        tracks = first.track_running_stats
        if isinstance(first, SynchronizedBatchNorm) and group_of(first) is not None:
            y, mean, var = first.normalize(x)
            if tracks:
                mean, var = (t.to(first.running_mean.dtype) for t in (mean, var))  # type: ignore[union-attr]
            if scales is not None:
                y = (y * scales.view(1, -1, 1, 1)).to(x.dtype)
        else:
            if tracks:
                mean, var = (first.running_mean.new_zeros(x.shape[1]) for _ in range(2))  # type: ignore[union-attr]
            y = functional.batch_norm(x, mean, var, scales, None, training=True, momentum=1.0, eps=first.eps)
        if tracks:
            assert mean is not None
            assert var is not None
            self._means.append(mean)
            self._variances.append(var)
            self._norms += norms
            self._places += [self._num_places + place for place in places]
            self._num_places += max(places) + 1
        return y

    @torch.no_grad()
    def write(self) -> None:
        """Move the running statistics of all modules that track them."""
        norms = self._norms
        if not norms:
            return
        means, variances = (torch.cat(all_of).chunk(self._num_places) for all_of in (self._means, self._variances))
        momentum = norms[0].momentum
        # Through `.data`, as BatchNorm itself: earlier passes that remember these tensors do not need their values.
        for running, found in (("running_mean", means), ("running_var", variances)):
            moved = [getattr(norm, running).data for norm in norms]
            torch._foreach_lerp_(moved, [found[place] for place in self._places], momentum)  # type: ignore[arg-type]
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)  # type: ignore[misc]


def group_of(norm: nn.Module) -> Any:
    """Return the processes over whose batches a BatchNorm normalizes; None for this one alone."""
    return norm.group if isinstance(norm, SynchronizedBatchNorm) else None


def are_alike(norms: Sequence[Any]) -> bool:
    """Whether all are BatchNorms of the same kind and settings, in training mode, with statistics that they track."""
    group = group_of(norms[0]) if norms else None
    return all(
        type(norm) in (nn.BatchNorm2d, SynchronizedBatchNorm)
        and type(norm) is type(norms[0])
        and group_of(norm) is group
        and norm.training
        and not norm.affine
        and norm.momentum is not None
        and (norm.momentum, norm.eps, norm.track_running_stats)
        == (norms[0].momentum, norms[0].eps, norms[0].track_running_stats)
        and (not norm.track_running_stats or all(b is not None for b in norm._buffers.values()))
        for norm in norms
    )


def add_products(
    sums: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    scales: Sequence[Tensor],
    places: Sequence[tuple[int, int]],
) -> Sequence[Tensor]:
    """Add products of tensors and scalars to sums, in place, and return the sums.

    Args:
        sums: What there is already; one that is None begins with its first product.
        factors: Of the same shape as the sums.
        scales: Of each product, scalars.
        places: Of each product, its sum and its factor.
    """
    return _AddProducts.apply(places, len(sums), *sums, *factors, *scales)  # type: ignore[no-any-return]


def concatenate(nodes: Sequence[Tensor]) -> Tensor:
    """Return `torch.cat` of channels, whose gradients have the layout of what they are gradients of."""
    return _Concatenate.apply(*nodes)  # type: ignore[no-any-return]


class _AddProducts(torch.autograd.Function):
    """See `add_products`."""

    @staticmethod
    def forward(ctx: Any, places: Sequence[tuple[int, int]], num_sums: int, *tensors: Tensor | None) -> Any:
        first_scale = len(tensors) - len(places)
        sums, factors, scales = list(tensors[:num_sums]), tensors[num_sums:first_scale], tensors[first_scale:]
        ctx.mark_dirty(*(s for s in sums if s is not None))
        ctx.save_for_backward(*factors, *scales)
        ctx.places, ctx.num_factors, ctx.begun = places, len(factors), [s is not None for s in sums]
        for (row, column), scale in zip(places, scales, strict=True):
            before, factor = sums[row], factors[column]
            assert factor is not None
            assert scale is not None
            sums[row] = factor * scale if before is None else before.addcmul_(factor, scale)
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        saved = ctx.saved_tensors
        factors, scales = saved[: ctx.num_factors], saved[ctx.num_factors :]
        wanted = ctx.needs_input_grad[2 + len(gs) :]
        of_factors: list[Tensor | None] = [None] * len(factors)
        of_scales: list[Tensor | None] = [None] * len(scales)
        for index, ((row, column), scale) in enumerate(zip(ctx.places, scales, strict=True)):
            g, before = gs[row], of_factors[column]
            if wanted[column]:
                if before is None:
                    of_factors[column] = g * scale
                elif torch.is_grad_enabled():  # it will be differentiated itself
                    of_factors[column] = torch.addcmul(before, g, scale)
                else:
                    before.addcmul_(g, scale)
            if wanted[len(factors) + index]:
                of_scales[index] = (g * factors[column]).sum()
        of_sums = [g if begun else None for g, begun in zip(gs, ctx.begun, strict=True)]
        return None, None, *of_sums, *of_factors, *of_scales


class _Concatenate(torch.autograd.Function):
    """See `concatenate`."""

    @staticmethod
    def forward(ctx: Any, *nodes: Tensor) -> Tensor:
        ctx.sizes = [node.shape[1] for node in nodes]
        return torch.cat(nodes, dim=1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        memory_format = torch.channels_last if is_channels_last(g) else torch.contiguous_format
        return tuple(part.contiguous(memory_format=memory_format) for part in torch.split(g, ctx.sizes, dim=1))


def pool(module: Any, x: Tensor) -> Tensor:
    """Return what a pooling module returns.

    Few channels that lie next to each other are averaged by a depthwise convolution on a CPU, where it is faster.
    """
    few = x.device.type == "cpu" and 1 < x.shape[1] < _VECTOR and x.stride(1) == 1
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if not (few and exact) or not isinstance(module, nn.AvgPool2d) or settings_of(module) not in _AVERAGES:
        return module(x)  # type: ignore[no-any-return]
    stride = settings_of(module)[1]
    ones = x.new_ones(x.shape[1], 1, 3, 3)
    counts = functional.conv2d(x.new_ones(1, 1, *x.shape[2:]), ones[:1], stride=(stride, stride), padding=1)
    return depthwise(x, ones, stride) / counts


def settings_of(pool: nn.AvgPool2d) -> Any:
    """Return all that an average depends on; not all of it is part of the text of the module."""
    return pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad, pool.divisor_override


_AVERAGES = [(3, stride, 1, False, False, None) for stride in (1, 2)]
"""Settings of the averages of 3 x 3 pixels that leave the border out."""


def quarter(x: Tensor) -> Tensor:
    """Return the pixels of even rows and columns, of even rows and odd columns, and so on, one after the other.

    What slices would give; but their gradients would be laid out with the pixels of a channel next to each other.
    """
    count, channels, height, width = x.shape
    if is_channels_last(x):
        rows = x.permute(0, 2, 3, 1).reshape(count, height // 2, 2, width // 2, 2, channels)
        return rows.permute(2, 4, 0, 1, 3, 5).reshape(4 * count, height // 2, width // 2, channels).permute(0, 3, 1, 2)
    rows = x.reshape(count, channels, height // 2, 2, width // 2, 2)
    return rows.permute(3, 5, 0, 1, 2, 4).reshape(4 * count, channels, height // 2, width // 2)


def join(quarters: Tensor) -> Tensor:
    """Put images together from their quarters."""
    count, channels, height, width = quarters.shape
    if is_channels_last(quarters):
        rows = quarters.permute(0, 2, 3, 1).reshape(2, 2, count // 4, height, width, channels)
        return rows.permute(2, 3, 0, 4, 1, 5).reshape(count // 4, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
    rows = quarters.reshape(2, 2, count // 4, channels, height, width)
    return rows.permute(2, 3, 4, 0, 5, 1).reshape(count // 4, channels, 2 * height, 2 * width)
