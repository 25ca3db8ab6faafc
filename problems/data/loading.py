"""Loaders whose order and augmentation are repeatable, with any number of worker processes.

Everything random about an image is a function of the epoch's key and the image's index: the key is the one number that
a loader draws from torch's global generator when an epoch begins, which the engine has seeded from (its seed, the
level, the epoch). So equal runs draw equal images, a resumed run goes on exactly, and the number of workers changes
nothing but the speed; a worker's own generator, which goes on from epoch to epoch, is never read.
"""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from mlo import MloError
from mlo.distributed import rank_of, whole_world
from mlo.randomness import isolated, random_key, seed_generators
from problems.data.images import Batch

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Request:
    """A batch to make: `key` is the epoch's, `indices` are the images'."""

    key: int
    indices: list[int]


@dataclass
class _Requests:
    """The batches of an epoch, as the main process tells them to the workers.

    Attributes:
        size: images in the data set.
        batch_size: images.
        shuffle: in random order and without the last incomplete batch.
        share: which part of each batch this process loads, and how many parts there are.
        key: of the epoch.
    """

    size: int
    batch_size: int
    shuffle: bool
    share: tuple[int, int] = (0, 1)
    key: int = 0

    def __len__(self) -> int:
        return self.size // self.batch_size if self.shuffle else -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[_Request]:
        order = list(range(self.size))
        if self.shuffle:
            generator = torch.Generator().manual_seed(random_key(self.key, "order"))
            order = torch.randperm(self.size, generator=generator).tolist()
        index, num = self.share
        part = self.batch_size // num
        for number in range(len(self)):
            begin = number * self.batch_size + index * part
            yield _Request(self.key, order[begin : begin + part])


class _Batches(Dataset[Any]):
    """The data set of a `DataLoader`, which asks it for whole batches."""

    def __init__(self, images: Dataset[Batch]) -> None:
        self.images = images

    def __getitem__(self, request: _Request) -> Any:
        """Return the batch; or the error that says what is wrong with an image, for the main process to raise.

        A `DataLoader` would wrap the error of a worker in the text of its traceback.
        """
        items = []
        with isolated(_CPU):
            for index in request.indices:
                seed_generators(random_key(request.key, "image", index), _CPU)
                try:
                    items.append(self.images[index])
                except MloError as error:
                    return error
        return default_collate(items)


@dataclass(frozen=True)
class _Pool:
    """A `DataLoader` and its workers, for one iteration at a time, whose batches `requests` says."""

    requests: _Requests
    batches: DataLoader[Any]


class Loader:
    """Batches of a data set, made by `loader`. Each iteration is an epoch, and several may go on side by side.

    Args:
        images: items of one shape.
        batch_size: images.
        shuffle: in random order and without the last incomplete batch.
        num_workers: processes, or 0. They are started with the first epoch and kept for the later ones.
        share: which part of each batch this process loads, and how many parts there are.
    """

    def __init__(
        self,
        images: Dataset[Batch],
        batch_size: int,
        *,
        shuffle: bool,
        num_workers: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.images = images
        self.num_workers = num_workers
        self._requests = (len(cast("Sized", images)), batch_size, shuffle, share)
        self._pools: list[_Pool] = []  # one for each iteration that ever went on at a time
        self._idle: list[_Pool] = []
        # A pool that the garbage collector takes apart cannot tell its workers to stop, and waits seconds for each. The
        # finalizer keeps the pools out of any cycle that the loader is in, and lets go of them in good order.
        weakref.finalize(self, _release, self._pools, self._idle)

    def __len__(self) -> int:
        return len(_Requests(*self._requests))

    def __iter__(self) -> Iterator[Batch]:
        return self._epoch(int(torch.empty((), dtype=torch.int64).random_()))

    def _epoch(self, key: int) -> Iterator[Batch]:
        pool = self._idle.pop() if self._idle else self._start()
        pool.requests.key = key
        try:
            for batch in pool.batches:
                if isinstance(batch, MloError):
                    raise batch
                yield batch
        finally:  # also when the caller drops the iterator in the middle of the epoch
            self._idle.append(pool)

    def _start(self) -> _Pool:
        requests = _Requests(*self._requests)
        batches: DataLoader[Any] = DataLoader(
            _Batches(self.images),
            batch_size=None,  # an item of the data set is a batch
            sampler=requests,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_stand_aside,
            generator=torch.Generator(),  # for the workers' seeds, which nothing reads: leaves the global one alone
        )
        pool = _Pool(requests, batches)
        self._pools.append(pool)
        return pool


def _stand_aside(worker: int) -> None:  # noqa: ARG001
    """Let signals that are sent to all processes at once stop the main process alone, that still needs its batches.

    Ctrl-C goes to the group of a terminal's processes, and torchrun passes signals on to the group of each of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def _release(*pools: list[_Pool]) -> None:
    for some in pools:
        some.clear()


def loader(images: Dataset[Batch], batch_size: int, *, shuffle: bool = True, num_workers: int = 0) -> Loader:
    """Batch images; shuffled, the last incomplete batch is left out, in order it is kept.

    Where several processes train together (`torch.distributed` is initialized), each loads its part of every batch that
    is shuffled, and all of those in order, which are for tests.

    Args:
        images: items of one shape, such as `Splits.augmented` returns them.
        batch_size: images.
        shuffle: in random order.
        num_workers: processes that load, or 0 to load in the main process. The batches are the same.

    Raises:
        MloError: there are fewer images than a batch holds, or the processes cannot share a batch evenly.
    """
    size = len(cast("Sized", images))
    if shuffle and size < batch_size:
        raise MloError(
            f"batch_size: expected at least one batch in each part of the data; found batches of {batch_size} images "
            f"and a part of {size}"
        )
    world = whole_world()
    share = (rank_of(world), torch.distributed.get_world_size()) if world is not None and shuffle else (0, 1)
    if batch_size % share[1]:
        raise MloError(
            f"batch_size: expected a multiple of the {share[1]} processes, which share each batch; found {batch_size}"
        )
    return Loader(images, batch_size, shuffle=shuffle, num_workers=num_workers, share=share)


class Together:
    """Several loaders, drawn from side by side: a batch is a tuple of one batch each. As long as the longest.

    A loader that is exhausted before the longest begins again. The same loader may be there twice.
    """

    def __init__(self, *loaders: Loader) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return max(map(len, self.loaders))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        endless = [_cycle(one) for one in self.loaders]
        for _ in range(len(self)):
            yield tuple(next(one) for one in endless)


def _cycle(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches
