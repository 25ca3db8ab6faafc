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

import numpy as np
import torch


def random_key(*parts: int | str) -> int:
    """Return a 63-bit seed made of `parts`, the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_generators(key: int, device: torch.device) -> None:
    """Seed the global generators of Python, NumPy, torch on the CPU and torch on `device`."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002 - the global generator is the one that users' losses draw from
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)
    elif device.type == "mps":
        torch.mps.manual_seed(key)


def torch_generator_states(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the states of torch's global generators on the CPU and on `device`."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return tuple(states)


def set_torch_generator_states(states: tuple[torch.Tensor, ...], device: torch.device) -> None:
    """Put back what `torch_generator_states` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Give the caller's generators back unchanged, whatever is drawn in the block."""
    python, numpy, states = random.getstate(), np.random.get_state(), torch_generator_states(device)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        set_torch_generator_states(states, device)
