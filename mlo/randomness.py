"""Random draws that can be repeated: every loss call and every drawn batch is keyed, none depends on what ran before.

A key is made of the engine's seed and of what is computed (level, purpose, count). Before each computation the global
generators of Python, NumPy and torch are seeded from its key, so a recorded step is repeated with the same dropout
masks, and a resumed run goes on as if it had not stopped, without any generator state being saved. `isolated` gives the
caller back the generators as they were.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# The global generators are those that users' losses draw from. Looked up once, as they are seeded for every loss call.
_seed_python, _seed_numpy, _seed_torch = random.seed, np.random.seed, torch.default_generator.manual_seed


def random_key(*parts: int | str) -> int:
    """Return a 63-bit seed made of `parts`, the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def term_key(key: int, rank: int, term: int) -> int:
    """Return the key of one term of a loss in one of several processes, given that of the loss."""
    return random_key(key, rank, term) if rank or term else key


def seed_generators(key: int, device: torch.device) -> None:
    """Seed the global generators of Python, NumPy, torch on the CPU and torch on `device`."""
    _seed_python_and_numpy(key)
    _seed_torch_on(key, device)


def _seed_torch_on(key: int, device: torch.device) -> None:
    _seed_torch(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)
    elif device.type == "mps":
        torch.mps.manual_seed(key)


def _seed_python_and_numpy(key: int) -> None:
    _seed_python(key)
    _seed_numpy(key & 0xFFFFFFFF)


def were_drawn_from(key: int) -> bool:
    """Return whether Python's or NumPy's generator was drawn from since `seed_generators(key)`.

    To read their states takes ten times as long; but they have to be seeded again afterwards.
    """
    found = (random.random(), np.random.random())  # noqa: NPY002
    _seed_python_and_numpy(key)
    return found != (random.random(), np.random.random())  # noqa: NPY002


class GeneratorStates:
    """Where the global generators of Python, NumPy, torch on the CPU and torch on a device stand.

    Those of Python and NumPy are None where they were left out.
    """

    def __init__(self, python: Any, numpy: Any, torch_states: tuple[torch.Tensor, ...]) -> None:
        self.python = python
        self.numpy = numpy
        self.torch = torch_states

    def __eq__(self, other: object) -> bool:
        """Whether both would draw the same."""
        return (
            isinstance(other, GeneratorStates)
            and all(map(torch.equal, self.torch, other.torch))
            and self.python == other.python
            and (self.numpy is None) == (other.numpy is None)
            and (self.numpy is None or self.numpy[2:] == other.numpy[2:])
            and (self.numpy is None or np.array_equal(self.numpy[1], other.numpy[1]))
        )

    __hash__ = None  # type: ignore[assignment]


def generator_states(device: torch.device, *, only_torch: bool = False) -> GeneratorStates:
    """Return where the global generators stand, all or those of torch."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    if only_torch:
        return GeneratorStates(None, None, tuple(states))
    return GeneratorStates(random.getstate(), np.random.get_state(), tuple(states))  # noqa: NPY002


def set_generator_states(states: GeneratorStates, device: torch.device) -> None:
    """Put the global generators back to where they stood."""
    if states.numpy is not None:
        random.setstate(states.python)
        np.random.set_state(states.numpy)  # noqa: NPY002
    torch.set_rng_state(states.torch[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states.torch[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states.torch[1])


@contextmanager
def seeded_apart(key: int, device: torch.device) -> Iterator[None]:
    """Draw from torch's generators as if they had been seeded with `key`, and go on with them as they were."""
    states = generator_states(device, only_torch=True)
    _seed_torch_on(key, device)
    try:
        yield
    finally:
        set_generator_states(states, device)


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Give the caller's generators back unchanged, whatever is drawn in the block."""
    states = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(states, device)
