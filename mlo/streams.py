"""A level's batches: re-iterated when exhausted, served again when a query took them, resumed exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mlo.errors import CheckpointError, MloError
from mlo.randomness import random_key, seed_generators
from mlo.trees import map_tensors


@runtime_checkable
class Stateful(Protocol):
    """Data that can tell and restore its own position, such as torchdata's `StatefulDataLoader`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a position."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate from the position."""


@dataclass(frozen=True)
class Position:
    """How far a stream has been served.

    Attributes:
        epoch: passes begun, counted from 0.
        index: batches served of this epoch.
        generators: states of the data's own torch generators when the epoch began.
    """

    epoch: int = 0
    index: int = 0
    generators: tuple[Tensor, ...] = ()


class Stream:
    """An endless stream of batches over an iterable.

    Every draw is keyed by (seed, level, epoch, index): the order of a shuffling `DataLoader` and augmentations in the
    main process do not depend on anything else (but on whether it loads in other processes, as it then draws its order
    earlier; `problems.data.loader` does not). A `DataLoader` with a generator of its own keeps it; data, or a
    sampler, with `set_epoch` is told each epoch before it is begun. Stateful data look after generators themselves.

    Args:
        name: the level's, for messages and keys.
        data: iterable of batches, or None for batches that are None.
        seed: of the engine.
        device: where tensors go.
    """

    def __init__(self, name: str, data: Any, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.position = Position()
        self._name, self._data, self._device = name, data, device
        self._iterator: Iterator[Any] | None = None
        self._drawn = Position()  # how far the data has been read; ahead of `position` after a rewind
        self._pending: deque[tuple[Position, Any]] = deque()
        self._log: list[tuple[Position, Any]] = []
        self._rewinds = 0
        self._base: dict[str, Any] | None = None  # of stateful data, from before the pending batches were drawn
        self._base_position = Position()
        self._served_since_base = 0

    def next(self) -> Any:
        """Return the next batch, its tensors on the device.

        Raises:
            MloError: the data is empty, or exhausted and cannot be iterated again.
        """
        if self._data is None:
            return None
        item = self._pending.popleft() if self._pending else self._draw()
        if self._rewinds:
            self._log.append(item)
        if self._base is not None:
            self._served_since_base += 1
        self.position = item[0]
        return item[1]

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Serve the batches that were drawn within the block again after it."""
        start, mark = self.position, len(self._log)
        if isinstance(self._data, Stateful) and not self._pending and not self._rewinds:
            self._base, self._base_position, self._served_since_base = self._data.state_dict(), start, 0
        served = self._served_since_base
        self._rewinds += 1
        try:
            yield
        finally:
            self._rewinds -= 1
            self._pending.extendleft(reversed(self._log[mark:]))
            del self._log[mark:]
            self.position, self._served_since_base = start, served

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on exactly here.

        Raises:
            CheckpointError: the data cannot be brought back to its position.
        """
        self._check_resumable()
        state: dict[str, Any] = {
            "epoch": self.position.epoch,
            "index": self.position.index,
            "generators": list(self._generator_states()),
        }
        if isinstance(self._data, Stateful):
            pending = bool(self._pending)
            state["data"] = self._base if pending else self._data.state_dict()
            state["skip"] = self._served_since_base if pending else 0
            began = self._base_position if pending else self.position
            state["began"] = [began.epoch, began.index]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream was when `state_dict` was called."""
        self._pending.clear()
        self._base, self._iterator = None, None
        position = Position(state["epoch"], state["index"], tuple(state["generators"]))
        if isinstance(self._data, Stateful):
            self._data.load_state_dict(state["data"])
            epoch, index = state["began"]
            self._drawn = Position(epoch, index, position.generators)
            if self._drawn.index:
                self._tell(epoch)
                self._iterator = iter(self._data)
            skip = state["skip"]
        else:
            self._drawn = Position(position.epoch, 0, position.generators)  # with which the epoch begins
            skip = position.index
            if skip:
                self._begin(position.epoch, position.generators)
        for _ in range(skip):
            self._draw()
        self.position = position

    def _draw(self) -> tuple[Position, Any]:
        assert self._data is not None
        restarted = False
        while True:
            if self._iterator is None:
                self._begin_again()
            assert self._iterator is not None
            if type(self._data) not in (list, tuple):  # which draw nothing
                seed_generators(self._key("batch", self._drawn.index), self._device)
            try:
                batch = next(self._iterator)
            except StopIteration:
                if restarted or self._drawn.index == 0:
                    raise MloError(
                        f"data of level {self._name!r}: expected an iterable of batches that can be iterated again "
                        f"when it is exhausted; found {type(self._data).__name__}, which gave no batch in epoch "
                        f"{self._drawn.epoch}. Pass a DataLoader or a list, not an iterator."
                    ) from None
                restarted = True
                self._iterator = None
                self._drawn = Position(self._drawn.epoch + 1)
                continue
            except BaseException:
                if not isinstance(self._data, Iterator):
                    self._iterator = None  # most are finished when they have failed
                raise
            self._drawn = Position(self._drawn.epoch, self._drawn.index + 1, self._drawn.generators)
            return self._drawn, to_device(batch, self._device)

    def _begin_again(self) -> None:
        """Begin an epoch, or go on in one in which a read has failed, where it failed."""
        failed = self._drawn
        if not failed.index:
            self._begin(failed.epoch, failed.generators)
            return
        if isinstance(self._data, Stateful):
            self._data.load_state_dict(self._data.state_dict())
            self._iterator = iter(self._data)
            return
        if isinstance(self._data, DataLoader) and self._data.persistent_workers:
            self._data._iterator = None  # one that begins anew draws otherwise than the first time
        self._begin(failed.epoch, failed.generators)
        try:
            for _ in range(failed.index):
                self._draw()
        except BaseException:
            self._iterator, self._drawn = None, failed
            raise

    def _generator_states(self) -> tuple[Tensor, ...]:
        """Return where the data's own generators stood when the epoch began, or where they stand if none has begun."""
        if self.position.generators:
            return self.position.generators
        if self._pending:
            return self._pending[0][0].generators
        return self._drawn.generators or tuple(g.get_state() for g in self._generators())

    def _begin(self, epoch: int, states: tuple[Tensor, ...]) -> None:
        """Begin an epoch, with the data's own generators as they are, or as they were when it was begun before."""
        assert self._data is not None
        generators = self._generators()
        for generator, state in zip(generators, states, strict=False):
            generator.set_state(state)
        self._drawn = Position(epoch, 0, tuple(g.get_state() for g in generators))
        self._tell(epoch)
        seed_generators(self._key("epoch", 0), self._device)
        self._iterator = iter(self._data)

    def _tell(self, epoch: int) -> None:
        """Tell the data and samplers which epoch is begun or gone on with: it keys a `DistributedSampler`'s order."""
        for owner in (self._data, *_samplers(self._data)):
            if callable(set_epoch := getattr(owner, "set_epoch", None)):
                set_epoch(epoch)

    def _generators(self) -> list[torch.Generator]:
        """Return the generators whose states belong to the position."""
        return [] if isinstance(self._data, Stateful) else _generators(self._data)

    def _key(self, purpose: str, index: int) -> int:
        return random_key(self.seed, self._name, purpose, self._drawn.epoch, index)

    def _check_resumable(self) -> None:
        data = self._data
        if isinstance(data, Stateful):
            return
        if isinstance(data, Iterator):
            found = f"a {type(data).__name__}, an iterator that cannot go back"
        elif isinstance(data, DataLoader) and data.persistent_workers:
            found = "a DataLoader with persistent_workers, whose workers' random draws cannot be repeated"
        else:
            return
        raise CheckpointError(
            f"data of level {self._name!r}: expected something that can be resumed exactly (a DataLoader, an iterable "
            f"that gives the same batches again, or an object with state_dict and load_state_dict); found {found}."
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors in (nested) tuples, lists and dictionaries to a device; leave everything else as it is."""
    return map_tensors(batch, lambda t: t if t.device == device else t.to(device, non_blocking=True))


def shared_generators(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Give the pairs of levels whose data draw from one torch generator, given the data of each."""
    owners: dict[int, str] = {}
    for name, own in data.items():
        for generator in _generators(own):
            first = owners.setdefault(id(generator), name)
            if first != name:
                yield first, name


def _generators(data: Any) -> list[torch.Generator]:
    """Return the torch generators that a `DataLoader` and its samplers draw from, each once."""
    found: dict[int, torch.Generator] = {}
    owners = (data, *_samplers(data)) if isinstance(data, DataLoader) else ()
    for owner in owners:
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


def _samplers(data: Any) -> tuple[Any, ...]:
    """Return the samplers of a `DataLoader`."""
    if not isinstance(data, DataLoader):
        return ()
    return data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", None)
