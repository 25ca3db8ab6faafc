"""Several processes that train one graph, each on its part of every batch.

Each process has all variables and a part of the data; the loss of a level is the mean of what the processes find. What
is differentiated of it are *replicated* values (the variables, the same everywhere) and *local* ones (everything that
depends on a batch). Two linear maps lead from one kind to the other:

    replicate   a variable -> the same variable, as each process uses it
    mean        a local value of each process -> their mean

They are each other's transposes, with respect to the mean of the processes' inner products; so the pullback of the one
is the other, at every order of differentiation. A loss call binds `replicate(w)`; then every gradient, every cotangent
and every second-order product is the mean over the processes when it reaches w, and estimators need not know.

All processes must make the same calls in the same order. Called by `mlo.autodiff` and the engine.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mlo.errors import MloError, ProcessLostError
from mlo.randomness import seeded_apart

T = TypeVar("T")
Group = Any
"""A `torch.distributed.ProcessGroup`, or None for this process alone."""


def whole_world() -> Group:
    """Return all processes of `torch.distributed`, None if this is the only one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return distributed.group.WORLD


def check_group(group: Any) -> None:
    """Refuse what is no choice of processes.

    Raises:
        MloError: it is neither "auto" nor None nor a process group.
    """
    distributed = torch.distributed
    known = distributed.is_available() and isinstance(group, distributed.ProcessGroup)
    if not known and group is not None and not (isinstance(group, str) and group == "auto"):
        raise MloError(
            f"group: expected 'auto' for all processes, None for this one alone, or a torch.distributed.ProcessGroup; "
            f"found {group!r}"
        )


def rank_of(group: Group) -> int:
    """Return this process's number in the group, from 0."""
    return 0 if group is None else torch.distributed.get_rank(group)


def replicate(tensors: Sequence[Tensor], group: Group, what: str = "") -> tuple[Tensor, ...]:
    """Return variables as this process uses them, to be differentiated any number of times.

    Args:
        tensors: the same in all processes.
        group: the processes; they differentiate together.
        what: as for `average`.
    """
    return tuple(_Replicate.apply(group, what, *tensors)) if tensors else ()


def mean_everywhere(tensor: Tensor, group: Group) -> Tensor:
    """Return the mean of a real local value over the processes, to each of them, differentiable any number of times."""
    mean: Tensor = _MeanEverywhere.apply(group, tensor)
    return mean


class _Replicate(torch.autograd.Function):
    """The identity; its pullback is the mean."""

    @staticmethod
    def forward(ctx: Any, group: Group, what: str, *tensors: Tensor | None) -> Any:
        ctx.group, ctx.what = group, what
        ctx.like = tensors
        ctx.set_materialize_grads(False)
        return tuple(None if t is None else t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        return None, None, *_Mean.apply(ctx.group, ctx.what, ctx.like, *cotangents)


class _MeanEverywhere(torch.autograd.Function):
    """The mean over the processes, to each of them; its own transpose, and so its own pullback."""

    @staticmethod
    def forward(ctx: Any, group: Group, tensor: Tensor) -> Tensor:
        ctx.group = group
        return reduced(tensor.contiguous(), "SUM", group) / torch.distributed.get_world_size(group)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return None, _MeanEverywhere.apply(ctx.group, cotangent)


class _Mean(torch.autograd.Function):
    """The mean over the processes; its pullback is the identity."""

    @staticmethod
    def forward(ctx: Any, group: Group, what: str, like: Sequence[Tensor | None], *tensors: Tensor | None) -> Any:
        ctx.group, ctx.what = group, what
        ctx.present = [t is not None for t in tensors]
        ctx.set_materialize_grads(False)
        given = [(t, shape) for t, shape in zip(tensors, like, strict=True) if shape is not None]
        found = iter(average([t for t, _ in given], [shape for _, shape in given], group, what))
        return tuple(None if shape is None else next(found) for shape in like)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        wanted = [c if present else None for c, present in zip(cotangents, ctx.present, strict=True)]
        return None, None, None, *_Replicate.apply(ctx.group, ctx.what, *wanted)


_working: Group = None  # the processes of the engine that is at work


@contextmanager
def working(group: Group) -> Iterator[None]:
    """Let `drawn_alike` mean these processes within the block."""
    global _working  # noqa: PLW0603 - a loss, or a recomputed activation, has no other way to know
    before, _working = _working, group
    try:
        yield
    finally:
        _working = before


@contextmanager
def drawn_alike(device: torch.device) -> Iterator[None]:
    """Let the processes that evaluate a loss together draw the same numbers from torch within the block.

    For what belongs to variables rather than to a batch, such as a sampled architecture: of dropout masks and the like
    each process has its own. The numbers follow from one draw of the first process's generator, so that recomputed
    activations find them again. All processes come to the block together, as to all calls.

    Args:
        device: that is drawn on.
    """
    number = int(torch.randint(2**52, ()))
    if _working is not None:
        number = agreed(number if rank_of(_working) == 0 else 0, _working)
    with seeded_apart(number, device):
        yield


def average(
    tensors: Sequence[Tensor | None], likes: Sequence[Tensor], group: Group, what: str = ""
) -> tuple[Tensor | None, ...]:
    """Return the means over all processes of the group, which call it together; no derivatives.

    Args:
        tensors: None where a process has none; it counts as zero, and stays None where no process has one.
        likes: of the same shapes and types as the tensors.
        group: the processes.
        what: the gradient that it is, compared over the processes first; not compared where it is empty.

    Raises:
        MloError: the processes average different gradients.
    """
    if not tensors:
        return ()
    if what and not are_alike(what, group):
        raise MloError(
            f"several processes: expected all of them to take the same derivatives; found one at {what!r} that another "
            f"is not at. Let the loss be computed alike in all of them, whatever their batches: where one has nothing "
            f"to add, multiply by zero what the others add, rather than leave it out."
        )
    given = torch.tensor([float(t is not None) for t in tensors], device=likes[0].device)
    shapes = [_as_real(like) for like in likes]
    parts = [torch.zeros_like(like) if t is None else _as_real(t) for t, like in zip(tensors, shapes, strict=True)]
    flat = torch.cat([given, *(t.reshape(-1) for t in parts)])  # in the widest of their types
    _all_reduce(flat, "SUM", group)
    counts, *means = torch.split(flat, [len(parts), *(t.numel() for t in parts)])
    num = torch.distributed.get_world_size(group)
    found = [(mean / num).view_as(like).to(like.dtype) for mean, like in zip(means, shapes, strict=True)]
    return tuple(
        None if not count else torch.view_as_complex(mean) if like.is_complex() else mean
        for count, mean, like in zip(counts.tolist(), found, likes, strict=True)
    )


def _as_real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def reduced(tensor: Tensor, operation: str, group: Group) -> Tensor:
    """Return the "SUM" or "MAX" over all processes of the group; the tensor itself without one."""
    if group is not None:
        tensor = tensor.detach().clone()
        _all_reduce(tensor, operation, group)
    return tensor


def agreed(number: int, group: Group) -> int:
    """Return the largest of the processes' numbers, below 2^53."""
    return _largest([number], group)[0]


def are_equal(number: int, group: Group) -> bool:
    """Return whether all processes have the same number, below 2^53."""
    largest, of_negatives = _largest([number, -number], group)
    return largest == -of_negatives


def are_alike(value: Any, group: Group) -> bool:
    """Return whether the values of all processes read alike (by `repr`)."""
    return group is None or are_equal(zlib.crc32(repr(value).encode()), group)


def gathered(value: T, group: Group) -> list[T]:
    """Return the values of all processes of the group, in the order of their ranks."""
    if group is None:
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    with _Together():
        torch.distributed.all_gather_object(found, value, group)
    return found


def _largest(numbers: list[int], group: Group) -> list[int]:
    if group is None:
        return numbers
    device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
    return [int(n) for n in reduced(torch.tensor(numbers, dtype=torch.float64, device=device), "MAX", group).tolist()]


def mean_metrics(metrics: dict[str, float], group: Group, device: torch.device) -> dict[str, float]:
    """Return the mean of each metric over the processes that have it."""
    if group is None or not metrics:
        return metrics
    names = list(metrics)
    if not are_alike(names, group):
        names = list(dict.fromkeys(chain.from_iterable(gathered(names, group))))
    own = [[metrics.get(name, 0.0), float(name in metrics)] for name in names]
    numbers = torch.tensor(own, dtype=torch.float64, device=device)
    (means,) = average([numbers], [numbers], group)
    assert means is not None
    return {name: mean / share for name, (mean, share) in zip(names, means.tolist(), strict=True)}


@torch.no_grad()
def align(module: nn.Module, group: Group) -> None:
    """Give all processes the parameters and buffers of the first; what is sharded stays as it is."""
    if group is None:
        return
    source = torch.distributed.get_global_rank(group, 0)
    with _Together():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.numel() and not hasattr(tensor, "device_mesh"):  # a DTensor
                own = tensor.detach().reshape(-1).contiguous().view(torch.uint8)  # not every type can be sent
                content = own.clone()
                torch.distributed.broadcast(content, source, group)
                if not torch.equal(content, own):  # one that is expanded cannot be written into
                    tensor.copy_(content.view(tensor.dtype).view(tensor.shape))


@torch.no_grad()
def average_buffers(module: nn.Module, group: Group) -> None:
    """Let all processes have the means of their floating-point buffers, such as running statistics."""
    if group is None:
        return
    buffers = [b for b in module.buffers() if b.is_floating_point()]
    wide = [b.double() for b in buffers]  # in which what is the same everywhere stays what it is, however large
    for buffer, mean in zip(buffers, average(wide, wide, group), strict=True):
        assert mean is not None
        if not torch.equal(mean, buffer.double()):  # one that is expanded cannot be written into
            buffer.copy_(mean)


def by_first(action: Callable[[], None], group: Group) -> None:
    """Let one process act for all of the group, which call it together; as `from_first`."""
    from_first(action, group)


def from_first(make: Callable[[], T], group: Group) -> T:
    """Return what the first process of the group makes, to all of them.

    Raises:
        Exception: in the first process whatever it raised; in the others the same if that is an `MloError`, else one
            that quotes it.
    """
    if group is None:
        return make()
    made: list[Any] = [None, None]
    own: Exception | None = None
    if rank_of(group) == 0:
        try:
            made[0] = make()
        except Exception as error:  # noqa: BLE001 - the others wait to hear of any
            own = error
            made[1] = as_told(error)
    with _Together():
        torch.distributed.broadcast_object_list(made, torch.distributed.get_global_rank(group, 0), group)
    if own is not None:
        raise own
    if made[1] is not None:
        raise made[1]
    found: T = made[0]
    return found


def as_told(error: Exception) -> MloError:
    """Return what the other processes raise where the first one raised an error."""
    if isinstance(error, MloError):
        return error
    return MloError(f"the first process of the job failed, see what it says: {type(error).__name__}: {error}")


def _all_reduce(tensor: Tensor, operation: str, group: Group) -> None:
    with _Together():
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, operation), group=group)


class _Together:
    """Says what it means when processes no longer hear from each other."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # What gloo says names a place in its source, or the pair of processes; what it was given may be wrong, too.
        lost = isinstance(error, torch.distributed.DistError)
        if lost or (isinstance(error, RuntimeError) and any(said in str(error) for said in ("gloo/", "pair closure"))):
            raise ProcessLostError(
                f"expected to hear from all {torch.distributed.get_world_size()} processes of the job; found that one "
                f"has ended or hangs ({str(error).splitlines()[0]}). See what it said first; the newest checkpoint is "
                f"complete, and mlo resume goes on from it, with any number of processes."
            ) from error
