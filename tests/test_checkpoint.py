"""Saving and resuming: bit for bit, or a clear refusal."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mlo
from mlo.checkpoint import FORMAT, read_checkpoint, write_checkpoint
from mlo.streams import Stream

from .toys import assert_same_state, state_of, three_levels


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_rounds_and_resumed_rounds_equal_an_uninterrupted_run(tmp_path, rounds):
    """Epochs have two batches and a round draws two for the teacher, one for the others: all positions occur."""
    whole = three_levels(steps=3)
    metrics = whole.run(8, progress=False)
    first = three_levels(steps=3)
    first.run(rounds, total_rounds=8, progress=False)
    first.save(tmp_path / "a.pt")
    second = three_levels(steps=3, seed=7)  # the checkpoint's seed wins
    second.load(tmp_path / "a.pt")
    assert_same_state(state_of(second), state_of(first))
    resumed = second.run(8 - rounds, progress=False)
    assert_same_state(state_of(second), state_of(whole))
    assert {k: v for k, v in resumed.items() if k != "round_seconds"} == {
        k: v for k, v in metrics.items() if k != "round_seconds"
    }


def test_saving_after_a_query_saves_the_position_before_it(tmp_path):
    plain, queried = three_levels(), three_levels()
    for engine in (plain, queried):
        engine.run(2, progress=False)
    queried.hypergradient("gate")
    queried.save(tmp_path / "q.pt")
    resumed = three_levels()
    resumed.load(tmp_path / "q.pt")
    for engine in (plain, queried, resumed):
        engine.run(3, progress=False)
    assert_same_state(state_of(resumed), state_of(plain))
    assert_same_state(state_of(queried), state_of(plain))


def one_level(data):
    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    problem = mlo.Problem(
        "w", module, lambda levels, batch: levels.w(as_tensor(batch)).square().mean(), optimizer, data
    )
    return mlo.Engine(mlo.Graph([problem]), device="cpu")


def as_tensor(batch):
    return (batch[0] if isinstance(batch, (list, tuple)) else batch).float().reshape(-1, 2)


def own_generator():
    data = TensorDataset(torch.arange(20.0).reshape(10, 2))
    return DataLoader(data, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(3))


class Counter:
    """Data with a state of its own, like torchdata's StatefulDataLoader."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while True:
            self.position += 1
            yield torch.full((1, 2), float(self.position % 7))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("make", [own_generator, Counter], ids=["loader with a generator", "stateful data"])
@pytest.mark.parametrize("queried", [False, True])
def test_data_with_a_state_of_its_own_resumes_exactly(tmp_path, make, queried):
    whole = one_level(make())
    whole.run(9, progress=False)
    first = one_level(make())
    first.run(5, progress=False)
    if queried:
        first.hypergradient("w")
    first.save(tmp_path / "a.pt")
    second = one_level(make())
    second.load(tmp_path / "a.pt")
    second.run(4, progress=False)
    assert_same_state(state_of(second), state_of(whole))


class FailingOnce(torch.utils.data.Dataset):
    """Its third item cannot be read as long as a file is there."""

    def __init__(self, flag):
        self.flag = flag

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 3 and self.flag.exists():
            self.flag.unlink()
            raise OSError("disk")
        return index


@pytest.mark.parametrize("persistent", [False, True])
def test_a_worker_that_fails_to_read_leaves_the_order_of_the_epoch(tmp_path, persistent):
    def served(*, fails):
        flag, found = tmp_path / "flag", []
        if fails:
            flag.touch()
        data = DataLoader(FailingOnce(flag), shuffle=True, num_workers=1, persistent_workers=persistent)
        stream = Stream("w", data, 0, torch.device("cpu"))
        while len(found) < 20:
            try:
                found.append(int(stream.next()))
            except OSError:
                assert flag.exists() is False
        return found

    assert served(fails=True) == served(fails=False)


class Epochs(Counter):
    """Three batches an epoch."""

    def __iter__(self):
        while self.position < 3:
            self.position += 1
            yield self.position
        self.position = 0


class Shuffled(Counter):
    """Five batches an epoch, in an order keyed by the epoch that it is told."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < 5:
            self.position += 1
            yield order[self.position - 1]
        self.position = 0


@pytest.mark.parametrize("ahead", [0, 1, 4])
@pytest.mark.parametrize("served", range(12))
def test_stateful_data_are_told_the_epoch_that_they_go_on_in(served, ahead):
    stream, other = (Stream("w", Shuffled(), 0, torch.device("cpu")) for _ in range(2))
    for _ in range(served):
        stream.next()
    with stream.rewound():
        for _ in range(ahead):
            stream.next()
    other.load_state_dict(stream.state_dict())
    assert [other.next() for _ in range(12)] == [stream.next() for _ in range(12)]


class Lazy(DataLoader):
    """Draws an epoch's order when its state is asked for, if it has none yet, as torchdata's does."""

    order = None

    def __iter__(self):
        self._draw()
        while self.order:
            yield self.order.pop(0)
        self.order = None

    def _draw(self):
        if self.order is None:
            self.order = list(self.sampler)

    def state_dict(self):
        self._draw()
        return {"order": list(self.order), "generator": self.sampler.generator.get_state()}

    def load_state_dict(self, state):
        self.order = list(state["order"])
        self.sampler.generator.set_state(state["generator"])


@pytest.mark.parametrize("served", range(8))
def test_stateful_data_look_after_their_generators(served):
    def make():
        data = TensorDataset(torch.arange(4))
        sampler = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(5))
        return Stream("w", Lazy(data, sampler=sampler), 0, torch.device("cpu"))

    stream, other = make(), make()
    for _ in range(served):
        stream.next()
    other.load_state_dict(stream.state_dict())
    with other.rewound():
        pass
    assert [other.next() for _ in range(10)] == [stream.next() for _ in range(10)]


@pytest.mark.parametrize("ahead", range(5))
@pytest.mark.parametrize("served", range(5))
def test_batches_looked_at_over_the_end_of_an_epoch(ahead, served):
    def make():
        return Stream("w", Epochs(), 0, torch.device("cpu"))

    stream = make()
    stream.next()
    with stream.rewound():
        for _ in range(ahead):
            stream.next()
    found = [stream.next() for _ in range(served)]
    state = stream.state_dict()
    other = make()
    other.load_state_dict(state)
    found += [other.next() for _ in range(4)]
    assert found == [(1 + i) % 3 + 1 for i in range(served + 4)]


@pytest.mark.parametrize("queried", [False, True])
def test_going_back_to_before_the_first_batch(tmp_path, queried):
    engine = one_level(own_generator())
    if queried:
        engine.hypergradient("w")
    start = state_of(engine)
    engine.save(tmp_path / "a.pt")
    engine.run(5, progress=False)
    end = state_of(engine)
    engine.load(tmp_path / "a.pt")
    assert_same_state(state_of(engine), start)
    engine.run(5, progress=False)
    assert_same_state(state_of(engine), end)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (iter([torch.ones(1, 2)] * 9), "an iterator that cannot go back"),
        (
            DataLoader(TensorDataset(torch.ones(4, 2)), num_workers=1, persistent_workers=True),
            "a DataLoader with persistent_workers",
        ),
    ],
    ids=["iterator", "persistent workers"],
)
def test_data_that_cannot_be_resumed_is_refused_when_saving(tmp_path, data, found):
    engine = one_level(data)
    with pytest.raises(
        mlo.CheckpointError, match=f"data of level 'w': expected something that can be resumed .* {found}"
    ):
        engine.save(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_an_exhausted_iterator_says_what_to_pass_instead():
    engine = one_level(iter([torch.ones(1, 2)] * 3))
    with pytest.raises(
        mlo.MloError, match=r"data of level 'w': expected an iterable of batches that can be iterated again"
    ):
        engine.run(5, progress=False)


def test_a_damaged_checkpoint_is_noticed(tmp_path):
    engine = three_levels()
    path = tmp_path / "a.pt"
    engine.save(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(b ^ 0xFF for b in content[middle : middle + 40])
    path.write_bytes(content)
    before = state_of(engine)
    with pytest.raises(mlo.CheckpointError, match=r"damaged|cannot be read"):
        engine.load(path)
    assert_same_state(state_of(engine), before)
    path.write_bytes(content[:middle])
    with pytest.raises(mlo.CheckpointError, match="cannot be read"):
        engine.load(path)


def test_missing_and_foreign_files_are_told_apart(tmp_path):
    with pytest.raises(mlo.CheckpointError, match="found no file"):
        read_checkpoint(tmp_path / "none.pt")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(mlo.CheckpointError, match="found another torch file"):
        read_checkpoint(tmp_path / "other.pt")
    torch.save({"format": 99}, tmp_path / "later.pt")
    with pytest.raises(mlo.CheckpointError, match="expected checkpoint format 3; found 99"):
        read_checkpoint(tmp_path / "later.pt")


def test_a_checkpoint_of_another_graph_changes_nothing(tmp_path):
    other = one_level([torch.ones(1, 2)])
    other.save(tmp_path / "other.pt")
    engine = three_levels()
    before = state_of(engine)
    with pytest.raises(
        mlo.CheckpointError, match="expected a checkpoint of the levels teacher, student, gate; found w"
    ):
        engine.load(tmp_path / "other.pt")
    assert_same_state(state_of(engine), before)


def test_a_checkpoint_of_another_module_changes_nothing(tmp_path):
    engine = three_levels()
    engine.run(1, progress=False)
    engine.save(tmp_path / "a.pt")
    other = three_levels()
    other.graph["student"].module[6] = nn.Linear(64, 5)
    before = state_of(other)
    with pytest.raises(
        mlo.CheckpointError,
        match=r"level 'student': expected a checkpoint of the same module; 6.bias is \(5,\) here and \(3,\) there",
    ):
        other.load(tmp_path / "a.pt")
    assert_same_state(state_of(other), before)


def test_a_checkpoint_without_what_was_learned_of_a_loss_changes_nothing(tmp_path):
    engine = three_levels()
    engine.run(1, progress=False)
    engine.save(tmp_path / "run.pt")
    state = read_checkpoint(tmp_path / "run.pt")
    del state["levels"]["gate"]["habits"]
    write_checkpoint(tmp_path / "older.pt", state)
    other = three_levels()
    before = state_of(other)
    with pytest.raises(mlo.CheckpointError, match=r"older\.pt: expected the state of level 'gate'.*habits"):
        other.load(tmp_path / "older.pt")
    assert_same_state(state_of(other), before)


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"x": 1})

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(mlo.CheckpointError, match=r"disk full.*the one before it is untouched"):
        write_checkpoint(path, {"x": 2})
    monkeypatch.undo()
    assert read_checkpoint(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("levels", [3, {"teacher": {}, "student": {}, "gate": {}}, {"teacher": 1}])
def test_a_checkpoint_of_a_strange_shape_is_refused(tmp_path, levels):
    torch.save({"format": FORMAT, "levels": levels}, tmp_path / "strange.pt")
    with pytest.raises(mlo.CheckpointError, match=r"strange\.pt: expected"):
        three_levels().load(tmp_path / "strange.pt")


def test_a_checkpoint_has_the_permissions_of_any_other_file(tmp_path):
    three_levels().save(tmp_path / "run.pt")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "run.pt").stat().st_mode == (tmp_path / "other").stat().st_mode
