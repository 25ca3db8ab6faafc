"""Layer normalization that can be differentiated any number of times.

The third derivative of PyTorch's is wrong, without a word (torch 2.14): what its second derivative saves of the mean
and the variance counts as constant. Called by `mlo.autodiff` in graphs with nests, whose sweeps take third derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class LayerNormInSteps(TorchFunctionMode):
    """Lets `torch.nn.functional.layer_norm`, and so `torch.nn.LayerNorm`, be computed step by step within the block."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or what takes its place."""
        function = layer_norm if func in (functional.layer_norm, torch.layer_norm) else func
        return function(*args, **(kwargs or {}))


def layer_norm(  # noqa: PLR0917 - those of torch.layer_norm
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Tensor:
    """As `torch.layer_norm` (Ba et al. 2016, eq. 4)."""
    axes = tuple(range(-len(normalized_shape), 0))
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    centred = x - x.mean(axes, keepdim=True)
    y = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(input.dtype)
