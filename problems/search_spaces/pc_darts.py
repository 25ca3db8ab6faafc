"""PC-DARTS: partial channel connections and edge normalization.

A quarter of the channels (one in K) go through the mixed operation of an edge, the others pass it by; channels are then
shuffled, so that all of them take their turn. Which edges matter is learnt beside alpha, by `Architecture` with
`edge_normalization`: beta, a softmax over the edges into each node.

Source: PC-DARTS (Xu et al. 2020), sections 3.2 and 3.3 and its published code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from problems.search_spaces.cells import PLAIN, EdgeState, MixedOperation


class PartialOperation(MixedOperation):
    """The relaxed edge of PC-DARTS: `MixedOperation` on the first channels // k channels.

    Args:
        primitives: The competing primitives.
        channels: Channels of the input and of the output, a multiple of k.
        stride: 1 or 2; at stride 2 the channels that pass by are max-pooled.
        auxiliary_skip: As in `MixedOperation`, on the same channels.
        k: One in k channels is operated on.

    Raises:
        ValueError: `channels` is not a multiple of `k`.
    """

    def __init__(
        self, primitives: Sequence[str], channels: int, stride: int, *, auxiliary_skip: bool = False, k: int = 4
    ) -> None:
        if k < 1 or channels % k:
            raise ValueError(f"expected channels that are a multiple of k = {k}, got {channels}")
        super().__init__(primitives, channels // k, stride, auxiliary_skip=auxiliary_skip)
        self.k = k

    def forward(self, x: Tensor, weights: Tensor, state: EdgeState = PLAIN) -> Tensor:
        """Map (batch, channels, height, width) and weights of (primitives,) to the shuffled channels of both parts."""
        count = x.shape[1] // self.k
        operated = super().forward(x[:, :count], weights, state)
        if self.k == 1:
            return operated
        passing = x[:, count:]
        if self.stride == 2:
            passing = functional.max_pool2d(passing, 2, ceil_mode=True)
        return shuffle_channels(torch.cat((operated, passing), dim=1), self.k)


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave `groups` groups of channels (ShuffleNet, Zhang et al. 2018).

    Args:
        x: (batch, channels, height, width), channels a multiple of `groups`.
        groups: As many parts as the channels are cut into; one of each part in turn makes up the new order.
    """
    batch, channels, height, width = x.shape
    return x.reshape(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)
