"""Loaders batch, repeat bit for bit with any number of workers, keep their workers, and tell of bad images plainly."""

import gc
import multiprocessing
import os
import signal
import time
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

import mlo
from mlo.streams import Stream
from problems.data import Images, Together, digits, loader
from problems.data.loading import Loader

CPU = torch.device("cpu")


class Noisy(Dataset):
    """Each item is its index and what a random augmentation would draw from torch's generator."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.tensor([float(index), float(torch.rand(()))]), torch.tensor(index)


class Broken(Noisy):
    def __getitem__(self, index):
        if index == 5:
            raise mlo.MloError("image five.jpg: cut off")
        return super().__getitem__(index)


def values(tree):
    """The tensors of nested tuples, in one flat list of numbers."""
    if isinstance(tree, torch.Tensor):
        return tree.double().flatten().tolist()
    return [number for branch in tree for number in values(branch)]


def served(stream, num):
    return [values(stream.next()) for _ in range(num)]


def side_by_side(num_workers):
    """Two data sets of different length, one of them twice: every case that LBT has."""
    longer = loader(Noisy(8), 2, num_workers=num_workers)
    return Together(longer, longer, loader(Noisy(5), 2, num_workers=num_workers))


def test_loaders_batch_and_shuffle():
    images = Images(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10))
    torch.manual_seed(0)
    batches = list(loader(images, 4))
    assert [len(y) for _, y in batches] == [4, 4]
    assert len(torch.cat([y for _, y in batches]).unique()) == 8
    ordered = list(loader(images, 4, shuffle=False))
    assert [len(y) for _, y in ordered] == [4, 4, 2]
    assert len(loader(images, 4)) == 2
    assert len(loader(images, 4, shuffle=False)) == 3
    assert torch.equal(torch.cat([y for _, y in ordered]), torch.arange(10))
    with pytest.raises(mlo.MloError, match="found batches of 11 images and a part of 10"):
        loader(images, 11)


def test_processes_share_a_batch():
    def epoch(*share):
        torch.manual_seed(3)
        return list(Loader(Noisy(9), 4, shuffle=True, num_workers=0, share=share))

    for whole, first, second in zip(epoch(0, 1), epoch(0, 2), epoch(1, 2), strict=True):
        assert values([torch.cat(halves) for halves in zip(first, second, strict=True)]) == values(whole)


def test_batches_that_processes_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr("problems.data.loading.whole_world", lambda: "a group")
    monkeypatch.setattr("problems.data.loading.rank_of", lambda group: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(mlo.MloError, match="expected a multiple of the 2 processes, which share each batch; found 3"):
        loader(Noisy(9), 3)
    assert len(next(iter(loader(Noisy(9), 4)))[1]) == 2
    assert len(next(iter(loader(Noisy(9), 3, shuffle=False)))[1]) == 3  # each process sees all test images


def test_together_is_as_long_as_the_longest():
    long = loader(Images(torch.zeros(8, 1, 1, 1), torch.arange(8)), 2, shuffle=False)
    short = loader(Images(torch.zeros(3, 1, 1, 1), torch.arange(3)), 2, shuffle=False)
    drawn = [(a[1].tolist(), b[1].tolist()) for a, b in Together(long, short)]
    assert drawn == [([0, 1], [0, 1]), ([2, 3], [2]), ([4, 5], [0, 1]), ([6, 7], [2])]


def test_order_and_augmentation_differ_between_epochs_and_between_loaders():
    longer = loader(Noisy(8), 2)
    torch.manual_seed(0)
    first, second = values(list(longer)), values(list(longer))
    assert first != second
    together = list(Together(longer, longer))
    assert values([a for a, _ in together]) != values([b for _, b in together])
    noise = torch.stack([x[:, 1] for x, _ in longer]).flatten()
    assert len(noise.unique()) == 8  # an item's draws are its own


def test_the_global_generator_is_drawn_from_once_an_epoch():
    """So the images of one loader do not depend on what another one's augmentations draw."""
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(loader(Noisy(8), 2))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("make", [lambda n: loader(Noisy(8), 2, num_workers=n), side_by_side], ids=["one", "together"])
def test_streams_are_equal_whatever_the_workers_and_wherever_they_are_resumed(make):
    """Two epochs and a half of four batches; from within the first epoch, at the end of one, and within the third."""
    streams = {num_workers: Stream("level", make(num_workers), 7, CPU) for num_workers in (0, 2)}
    expected = served(streams[0], 10)
    assert len({tuple(batch) for batch in expected}) == 10
    assert served(streams[2], 10) == expected
    assert served(Stream("level", make(0), 8, CPU), 10) != expected
    for num_workers, used in streams.items():
        for position in (1, 4, 9):
            stopped = Stream("level", make(0), 7, CPU)
            served(stopped, position)
            # The one has served ten batches and has its workers in the middle of an epoch, the other is fresh.
            for resumed in (used, Stream("level", make(num_workers), 7, CPU)):
                resumed.load_state_dict(stopped.state_dict())
                assert served(resumed, 10 - position) == expected[position:]


def test_batches_drawn_for_a_query_are_served_again_with_workers():
    stream, plain = (Stream("level", loader(Noisy(8), 2, num_workers=n), 7, CPU) for n in (2, 0))
    expected = served(plain, 6)
    assert served(stream, 2) == expected[:2]
    with stream.rewound():
        assert served(stream, 3) == expected[2:5]
    assert served(stream, 4) == expected[2:]


def test_workers_are_started_once():
    batches = loader(Noisy(8), 2, num_workers=2)
    before = set(multiprocessing.active_children())
    list(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for _ in range(3):
        list(batches)
    next(iter(batches))  # an iteration that is dropped gives its workers back too
    list(batches)
    assert set(multiprocessing.active_children()) - before == workers
    del batches
    assert not set(multiprocessing.active_children()) & workers


@pytest.mark.parametrize("has_gpu", [False, True])
def test_batches_are_pinned_for_gpus(monkeypatch, has_gpu):
    made = MagicMock(return_value=[])
    monkeypatch.setattr("problems.data.loading.DataLoader", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert list(loader(Noisy(8), 2)) == []
    assert made.call_args.kwargs["pin_memory"] is has_gpu


def test_workers_leave_ctrl_c_to_the_main_process():
    """A run that is interrupted ends its round, for which it needs batches, and saves."""
    before = set(multiprocessing.active_children())
    torch.manual_seed(0)
    expected = values(list(loader(Noisy(40), 2)))
    torch.manual_seed(0)
    batches = iter(loader(Noisy(40), 2, num_workers=2))
    drawn = [next(batches), next(batches)]
    for worker in set(multiprocessing.active_children()) - before:
        os.kill(worker.pid, signal.SIGINT)
    assert values(drawn + list(batches)) == expected


def test_workers_stop_at_once_where_the_garbage_collector_finds_their_loader():
    """As in an engine whose objects refer to each other: PyTorch's own shutdown then waits five seconds a worker."""
    before = set(multiprocessing.active_children())
    batches = loader(Noisy(8), 2, num_workers=2)
    cycle = [batches, iter(batches)]
    cycle.append(cycle)
    next(cycle[1])
    assert len(set(multiprocessing.active_children()) - before) == 2
    began = time.monotonic()
    del cycle, batches
    gc.collect()
    assert not set(multiprocessing.active_children()) - before
    assert time.monotonic() - began < 8  # it would be ten


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_images_error_arrives_as_it_was_raised(num_workers):
    batches = loader(Broken(8), 2, shuffle=False, num_workers=num_workers)
    with pytest.raises(mlo.MloError, match=r"^image five\.jpg: cut off$"):
        list(batches)


def test_real_augmentations_are_equal_in_workers():
    splits = digits(0)
    augmented = splits.augmented(splits.test)
    torch.manual_seed(1)
    here = list(loader(augmented, 100))
    torch.manual_seed(1)
    there = list(loader(augmented, 100, num_workers=2))
    assert values(here) == values(there)
    torch.manual_seed(1)
    plain = list(loader(splits.plain(splits.test), 100))
    assert values([y for _, y in plain]) == values([y for _, y in here])
    assert isinstance(splits.preprocessing.search, v2.RandomCrop)
    assert values(plain) != values(here)


def test_an_engine_resumes_exactly_with_workers(tmp_path):
    """The promise of `mlo resume`, over an engine's own checkpoint."""

    def engine(num_workers):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        problem = mlo.Problem(
            "model",
            model,
            lambda levels, batch: (levels.model(batch[0]) ** 2).mean(),
            torch.optim.SGD(model.parameters(), lr=0.01),
            loader(Noisy(8), 2, num_workers=num_workers),
        )
        return mlo.Engine(mlo.Graph([problem]), seed=3, device="cpu")

    whole, half = engine(0), engine(2)
    whole.run(7, progress=False)
    half.run(3, progress=False)
    half.save(tmp_path / "half.pt")
    resumed = engine(2)
    resumed.load(tmp_path / "half.pt")
    resumed.run(4, progress=False)
    assert torch.equal(resumed.graph["model"].module.weight, whole.graph["model"].module.weight)
