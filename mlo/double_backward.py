"""Whether, and by which operations, what was computed can be differentiated more than once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlo.errors import MloError
from mlo.normalization import LayerNormInSteps


def check_twice_differentiable(gradient: Sequence[Tensor | None], *, thrice: bool) -> None:
    """Refuse a gradient that an operation had a part in whose further derivatives are wrong, without a word.

    The second one of what is marked `once_differentiable` is missing, the third one of PyTorch's layer normalization is
    wrong: only where it is called by its usual names can other operations take its place.

    Args:
        gradient: with its graph.
        thrice: whether third derivatives may be taken.

    Raises:
        RuntimeError: there is an operation of the first kind.
        MloError: one of the second.
    """
    for node in nodes_of(gradient):
        if thrice and node.name().startswith("NativeLayerNorm"):
            raise MloError(
                "expected layer normalization by torch.nn.LayerNorm or torch.nn.functional.layer_norm in a nest, where "
                "it is differentiated three times; found the operation itself (torch.jit, torch.ops), whose third "
                "derivative is wrong in PyTorch. Call it by those names."
            )
        if node.name().rpartition("::")[2] == "Error":
            raise RuntimeError("an operation has one derivative fewer than needed; once_differentiable marks such ones")


@contextmanager
def twice_differentiable(*, nested: bool) -> Iterator[None]:
    """Compute, and recompute activations, by operations with the derivatives that are needed, whose backward is right.

    Not every attention kernel has a second one, nor PyTorch's layer normalization a third.
    """
    with sdpa_kernel(SDPBackend.MATH), LayerNormInSteps() if nested else nullcontext():
        yield


def nodes_of(tensors: Sequence[Tensor | None]) -> Iterator[Any]:
    """Give the operations that tensors were made by, and those that their arguments were made by."""
    waiting: list[Any] = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
