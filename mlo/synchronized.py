"""Batch normalization over the batches of all processes, differentiable any number of times.

`torch.nn.SyncBatchNorm` runs on GPUs only and has no second derivative. Called by the runs of recipes, and by users.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlo.distributed import Group, check_group, mean_everywhere, rank_of, whole_world
from mlo.errors import MloError

_MIXED = (
    "synchronized batch normalization: expected all processes to call the same modules in the same order; found "
    "different ones together. Let what is called not depend on a process's own batch or draws, or let each process "
    "have statistics of its own (in a recipe synchronize_batch_norm: false)."
)

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`torch.nn.BatchNorm1d`, `2d` or `3d`, with the statistics of equally large batches in all processes.

    Args:
        like: the module whose parameters, buffers and settings it takes over.
        group: the processes; "auto" for all of `torch.distributed`.
        number: the same in all processes, by which it is noticed that they call different modules.
    """

    def __init__(self, like: nn.modules.batchnorm._BatchNorm, group: Group = "auto", number: int = 0) -> None:
        super().__init__(like.num_features, like.eps, like.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats = like.affine, like.track_running_stats
        self._parameters, self._buffers = like._parameters, like._buffers
        self._group, self._number = group, number
        self.train(like.training)

    @property
    def group(self) -> Group:
        """The processes whose batches it normalizes over; None if there is this one alone."""
        return whole_world() if self._group == "auto" else self._group

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ValueError(f"expected an input of shape (batch, channels, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize an input of shape (batch, channels, ...)."""
        if self.group is None or not (self.training or self.running_mean is None):
            alone: Tensor = super().forward(input)
            return alone
        self._check_input_dim(input)
        y, mean, variance = self.normalize(input)
        if self.training and self.track_running_stats:
            self._track(mean, variance)
        if self.affine:
            shape = [1, -1] + [1] * (input.dim() - 2)
            y = (y * self.weight.view(shape) + self.bias.view(shape)).to(input.dtype)
        return y

    def normalize(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: A002
        """Normalize channels, of this or of several like modules, by the batches of all processes: one message.

        Returns:
            The output, without scale and shift, and of each channel the mean and the unbiased variance, without
            derivatives.
        """
        group, x = self.group, input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        shape = [1, -1] + [1] * (x.dim() - 2)
        own_variance, own_mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
        own_number, num = own_mean.new_tensor([self._number]), torch.distributed.get_world_size(group)
        places = [own_mean if rank == rank_of(group) else torch.zeros_like(own_mean) for rank in range(num)]
        found = mean_everywhere(torch.cat([own_variance, own_number, *places]), group)
        within, numbers, rest = torch.split(found, [len(own_mean), 1, num * len(own_mean)])
        torch._assert_async(numbers[0] == own_number[0], _MIXED)
        means = num * rest.view(num, -1)  # of each process
        mean = means.mean(0)
        variance = within + (means - mean).square().mean(0)  # no difference of large numbers, as of mean squares
        y = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        count = x.numel() // x.shape[1] * num
        return y.to(input.dtype), mean.detach(), variance.detach() * (count / max(count - 1, 1))

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        running: Any = self
        running.num_batches_tracked += 1
        momentum = 1 / float(running.num_batches_tracked) if self.momentum is None else self.momentum
        running.running_mean.lerp_(mean.to(running.running_mean.dtype), momentum)
        running.running_var.lerp_(variance.to(running.running_var.dtype), momentum)


def synchronize_batch_norm(module: nn.Module, group: Group = "auto") -> nn.Module:
    """Let a module normalize over the batches of all processes; parameters and buffers stay the same objects.

    Args:
        module: whose batch normalizations are replaced, in place, under each of their names.
        group: the processes, those of the engine: "auto" for all of `torch.distributed`.

    Returns:
        The module, or what replaces it.

    Raises:
        MloError: it is no module, or the group is none.
    """
    check_group(group)
    if not isinstance(module, nn.Module):
        raise MloError(f"synchronize_batch_norm: expected a torch.nn.Module; found {module!r}")
    return _replaced(module, group, {})


def _replaced(module: nn.Module, group: Group, known: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in known:
        norm: Any = module
        known[module] = SynchronizedBatchNorm(norm, group, len(known)) if type(module) in _PLAIN else module
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _replaced(child, group, known)
    return known[module]
