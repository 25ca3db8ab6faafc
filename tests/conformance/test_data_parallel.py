"""Two processes, each with half of every batch, are one process with the whole: every estimator, at any depth."""

import random
from itertools import chain
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mlo
from mlo.distributed import drawn_alike, from_first, mean_everywhere, replicate, whole_world
from problems.search_spaces import Architecture, Supernet
from problems.search_spaces.cells import SearchCell
from problems.search_spaces.fused import FusedCell

from .processes import in_two_processes
from .quadratics import relative_error
from .random_graphs import fit, flat

pytestmark = [
    pytest.mark.filterwarnings("ignore:level .* Penalty. its solves are far"),
    pytest.mark.filterwarnings("ignore:level .* Neumann. the terms of the series grow"),
]

GRAPHS = {
    "bilevel": {"low": ("top",), "top": ("low",)},
    "teaching": {"low": ("top",), "middle": ("low",), "top": ("low", "middle")},
    "nest": {"low": ("middle", "top"), "middle": ("low", "top"), "top": ("low", "middle")},
}
ESTIMATORS = (
    mlo.FirstOrder(),
    mlo.FiniteDifference(1e-4, last=None),
    mlo.FiniteDifference(1e-4, last=None, one_sided=True),
    mlo.Unroll(),
    mlo.Unroll(checkpoint=True),
    mlo.Neumann(terms=3),
    mlo.ConjugateGradient(iterations=3, damping=0.1),
    mlo.Nystrom(rank=4, damping=0.1),
    mlo.SAMA(),
    mlo.Penalty(steps=2),
)
CASES = [(graph, estimator) for graph in ("teaching", "nest") for estimator in ESTIMATORS]
CASES += [("bilevel", mlo.FiniteDifference()), ("bilevel", mlo.Unroll())]
OPTIMIZERS = {
    "low": lambda weights: torch.optim.Adam(weights, lr=0.05, weight_decay=0.1),
    "middle": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "top": lambda weights: torch.optim.AdamW(weights, lr=0.02),
}


def build(case, rank=None, **options):
    """Build an engine; `rank` None for the whole of every batch."""
    graph, estimator = case
    reads = GRAPHS[graph]
    torch.manual_seed(0)
    modules = {name: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double() for name in reads}
    data = {name: torch.randn(3, 2, 2, 3, 4, dtype=torch.float64) for name in reads}
    problems = []
    for name, module in modules.items():
        if rank == 1:
            nn.init.zeros_(module[0].weight)  # it gets those of the first process
        batches = [pair.flatten(1, 2).unbind() if rank is None else pair[:, rank].unbind() for pair in data[name]]
        own = OPTIMIZERS[name](module.parameters())
        problems.append(
            mlo.Problem(
                name, module, fit(name, reads[name]), own, batches, hypergradient=estimator, steps=2, clip_norm=0.5
            )
        )
    edges = [mlo.Edge(source, target) for target in reads for source in reads[target]]
    return mlo.Engine(mlo.Graph(problems, edges), seed=0, device="cpu", **options)


def results(engine):
    """What is to be equal: hypergradients, losses, and the weights after two rounds."""
    found = {"first": engine.hypergradient("top")}
    metrics = engine.run(2, progress=False)
    found["metrics"] = {name: torch.tensor(value) for name, value in metrics.items() if name.endswith(".loss")}
    found["after"] = engine.hypergradient("top")
    found["weights"] = {
        f"{p.name}.{n}": w.detach() for p in engine.graph.levels for n, w in p.module.named_parameters()
    }
    return {key: flat(tensors.values()) for key, tensors in found.items()}


def unused_and_random():
    """Weights that only one process uses or none does, and draws of each process' own."""

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.one, self.none = (nn.Parameter(torch.ones(2)) for _ in range(3))
            self.norm = nn.BatchNorm1d(2)

    module = Partly()
    rank = torch.distributed.get_rank()
    drawn = []

    def loss(levels, batch):
        drawn.append(torch.rand(()).item())
        term = levels.w.both.sum() + levels.w.norm(batch).square().mean()
        metrics = {"rank": float(rank), "second" if rank else "first": 3.0 + rank, "both": 1.0}
        return mlo.Output(term + levels.w.one.sum() if rank else term, metrics)

    sgd = torch.optim.SGD([module.both, module.one, module.none], lr=1.0, weight_decay=0.5)
    engine = mlo.Engine(
        mlo.Graph([mlo.Problem("w", module, loss, sgd, [torch.randn(4, 2) + 10 * rank])]), seed=0, device="cpu"
    )
    metrics = engine.run(1, progress=False)
    return {
        "weights": torch.stack((module.both, module.one, module.none)).detach(),
        "metrics": {name: metrics[f"w.{name}"] for name in ("rank", "first", "second", "both")},
        "drawn": drawn[-1],
        "running": module.norm.running_mean.clone(),
    }


def normalized(rank=None):
    """What a synchronized BatchNorm gives: outputs, first and second derivatives, running statistics."""
    torch.manual_seed(1)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    x = x.flatten(0, 1) if rank is None else x[rank]
    norm = nn.Sequential(nn.BatchNorm1d(3).double())
    nn.init.uniform_(norm[0].weight)
    module = norm if rank is None else mlo.synchronize_batch_norm(norm)

    def loss(levels, batch):
        y = levels.w(batch * levels.scale.weight.view(1, 3, 1))
        return (y.sin() * batch.square()).mean()

    scale = nn.Linear(1, 3, bias=False).double()
    low = mlo.Problem("w", module, loss, torch.optim.SGD(module.parameters(), 0.1), [x], hypergradient=mlo.Unroll())
    top = mlo.Problem("scale", scale, loss, torch.optim.SGD(scale.parameters(), 0.1), [x])
    engine = mlo.Engine(mlo.Graph([low, top], [mlo.Edge("scale", "w"), mlo.Edge("w", "scale")]), seed=0, device="cpu")
    engine.run(2, progress=False)
    return flat([scale.weight.detach(), *(p.detach() for p in module.parameters()), *module.buffers()])


def statistics(rank=None):
    """The output of a synchronized BatchNorm and three derivatives; one channel is far from 0, one always 0."""
    torch.manual_seed(3)
    x, slope, weights = torch.randn(3, 2, 6, 3, dtype=torch.float64).unbind()
    x[..., 0] += 1e7
    x[..., 1] = 0
    x, slope, weights = (t.flatten(0, 1) if rank is None else t[rank] for t in (x, slope, weights))
    own = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    if rank is None:
        z = x + own * slope  # torch's own has no third derivative
        y = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
        running, mean = 0.9 + 0.1 * z.var(0).detach(), (y * weights).mean(0)
        value = mean
    else:
        norm = mlo.synchronize_batch_norm(nn.BatchNorm1d(3, affine=False).double())
        (used,) = replicate((own,), whole_world(), "own")
        value = (norm(x + used * slope) * weights).mean(0)
        running, mean = norm.running_var, mean_everywhere(value, whole_world())
    found = [mean.detach(), running]
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), own, create_graph=True)
        found.append(value.detach())
    return found


def supernet(rank=None):
    """What a supernet of synchronized normalizations gives, in either kind of cell; how many messages they are."""
    torch.manual_seed(1)
    x = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    x = x.flatten(0, 1) if rank is None else x[rank]
    found, sent = [], []
    for cell in (SearchCell, FusedCell):
        torch.manual_seed(2)
        net, weights = Supernet(2, 4, 2, 3, cell=cell).double(), Architecture().double()
        if rank is not None:
            net = mlo.synchronize_batch_norm(net)

        def loss(levels, batch):
            return levels.net(batch, levels.weights()).sin().mean()

        low = mlo.Problem("net", net, loss, torch.optim.SGD(net.parameters(), 0.1), [x], hypergradient=mlo.Unroll())
        top = mlo.Problem("weights", weights, loss, torch.optim.SGD(weights.parameters(), 0.1), [x])
        graph = mlo.Graph([low, top], [mlo.Edge("weights", "net"), mlo.Edge("net", "weights")])
        with pytest.MonkeyPatch.context() as patch:
            counted = MagicMock(wraps=mlo.synchronized.mean_everywhere)
            patch.setattr(mlo.synchronized, "mean_everywhere", counted)
            mlo.Engine(graph, seed=0, device="cpu").run(2, progress=False)
            found.append(flat([*(p.detach() for p in (*weights.parameters(), *net.parameters())), *net.buffers()]))
            sent.append(counted.call_count)
            if rank is not None:  # parts of unequal size that alone would be computed in other portions
                patch.setattr("problems.search_spaces.fused._CACHED", 5 * 4 * 4 * 8 * 8)
                net(torch.randn(4 + rank, 3, 8, 8).double(), weights())
    return found, sent


def thresholds(rank=None, *, one_sided=False):
    """The weights where an argument of another level's call is made by threshold, now the same again and now not."""
    torch.manual_seed(0)
    low, up = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
    x, y = torch.randn(8, 2, 4, 3).double(), torch.randn(8, 2, 4, 2).double()
    data = [
        (a.flatten(0, 1), b.flatten(0, 1)) if rank is None else (a[rank], b[rank]) for a, b in zip(x, y, strict=True)
    ]

    def lower(levels, batch):
        z = levels.low(batch[0])
        return (z - batch[1]).square().mean() + (levels.up((z > 0).double().detach()) * z).mean()

    def upper(levels, batch):
        return (levels.low(batch[0]) - batch[1]).square().mean()

    levels = [
        mlo.Problem("low", low, lower, torch.optim.SGD(low.parameters(), 0.1), data,
                    hypergradient=mlo.FiniteDifference(0.1, one_sided=one_sided)),
        mlo.Problem("up", up, upper, torch.optim.SGD(up.parameters(), 0.1), data),
    ]  # fmt: skip
    mlo.Engine(mlo.Graph(levels, [mlo.Edge("up", "low"), mlo.Edge("low", "up")]), device="cpu").run(20, progress=False)
    return flat([p.detach() for p in (*low.parameters(), *up.parameters())])


def stopped(rank):
    """One process is asked to stop."""
    engine = build(CASES[0], rank)
    if rank == 1:
        engine.stop()
    engine.run(3, progress=False)
    return engine.rounds_done


def with_generators(rank):
    """An engine whose data each process draws by itself."""
    torch.manual_seed(0)
    module = nn.Linear(2, 2).double()
    generator = torch.Generator().manual_seed(100 + rank)
    data = torch.utils.data.DataLoader(
        torch.arange(16.0, dtype=torch.float64).view(8, 2), batch_size=2, shuffle=True, generator=generator
    )
    seen = []

    def loss(levels, batch):
        seen.append(batch.sum().item())
        return levels.w(batch).square().mean()

    sgd = torch.optim.SGD(module.parameters(), lr=1e-3)
    return mlo.Engine(mlo.Graph([mlo.Problem("w", module, loss, sgd, data)]), seed=0, device="cpu"), seen


def resumed(rank, folder):
    """The batches of a run, and of one that goes on from its checkpoint, in the middle of the second epoch."""
    engine, seen = with_generators(rank)
    engine.run(6, progress=False)
    engine.save(f"{folder}/generators.pt")
    engine.run(5, progress=False)
    other, again = with_generators(rank)
    other.load(f"{folder}/generators.pt")
    other.run(5, progress=False)
    weights = [flat([p.detach() for p in e.graph["w"].module.parameters()]) for e in (engine, other)]
    return seen[-5:], again[-5:], torch.equal(*weights)


def sampled():
    """The batches of two epochs of a `DistributedSampler`."""
    numbers = torch.arange(8.0).view(8, 1)
    sampler = torch.utils.data.DistributedSampler(numbers, shuffle=True)
    seen = []

    def loss(levels, batch):
        seen.append(batch.flatten().tolist())
        return levels.w(batch).square().mean()

    module = nn.Linear(1, 1)
    data = torch.utils.data.DataLoader(numbers, batch_size=2, sampler=sampler)
    problem = mlo.Problem("w", module, loss, torch.optim.SGD(module.parameters(), lr=1e-3), data)
    engine = mlo.Engine(mlo.Graph([problem]), device="cpu")
    engine.run(4, progress=False)
    return seen[-4:]


def buffers():
    """Buffers of all kinds after a step."""
    module = nn.Linear(2, 2)
    rank = torch.distributed.get_rank()
    module.register_buffer("mask", torch.tensor([torch.finfo(torch.float32).min, 0.1]))
    module.register_buffer("fp16", torch.tensor([torch.finfo(torch.float16).max], dtype=torch.float16))
    module.register_buffer("int16", torch.tensor([rank + 5], dtype=torch.int16))
    module.register_buffer("of_one", torch.ones(1).expand(3))
    module.register_buffer("of_complex", torch.tensor([1 + 2j * (1 - rank)]))
    problem = mlo.Problem("w", module, lambda levels, x: levels.w(x).mean(), torch.optim.SGD(module.parameters(), 0.1),
                          [torch.randn(4, 2)])  # fmt: skip
    mlo.Engine(mlo.Graph([problem]), device="cpu").run(1, progress=False)
    return dict(module.named_buffers())


def unlike(rank):
    """What each says when they have been started differently."""
    texts = []
    for start in (
        lambda: build(CASES[0], rank, rollback=bool(rank)),
        lambda: build(CASES[rank], 0),
        lambda: build(CASES[0], rank).run(1 + rank, progress=False),
    ):
        try:
            start()
        except mlo.MloError as error:
            texts.append(str(error).split(";")[0])
    return texts


def synchronized_twice():
    norm = nn.BatchNorm1d(2)
    module = mlo.synchronize_batch_norm(nn.Sequential(norm, nn.Tanh(), norm))
    alone = mlo.synchronize_batch_norm(nn.BatchNorm1d(2), group=None)
    alone(torch.full((4, 2), 10.0 * torch.distributed.get_rank()))
    return module[0] is module[2] and type(module[0]) is not nn.BatchNorm1d, alone.running_mean.clone()


def of_other_levels(rank):
    """What is said where each process's loss depends on another level, on two of one size."""
    a, b, top = (nn.Linear(2, 2) for _ in range(3))

    def loss(levels, batch):
        outputs = (levels.a(batch), levels.b(batch))  # the same calls
        return levels.top(batch).square().mean() + outputs[rank].square().mean()

    sgd = torch.optim.SGD
    fits = [
        lambda levels, x: (levels.a(x) - levels.top(x)).sum(),
        lambda levels, x: (levels.b(x) - levels.top(x)).sum(),
    ]
    problems = [
        mlo.Problem(name, module, fit, sgd(module.parameters(), 0.1), [torch.ones(4, 2)])
        for name, module, fit in zip(("a", "b", "top"), (a, b, top), (*fits, loss), strict=True)
    ]
    edges = [mlo.Edge("top", "a"), mlo.Edge("top", "b"), mlo.Edge("a", "top"), mlo.Edge("b", "top")]
    with pytest.raises(mlo.MloError) as caught:
        mlo.Engine(mlo.Graph(problems, edges), device="cpu").run(1, progress=False)
    return str(caught.value)


def of_other_norms(rank):
    """What is said where each process normalizes by another module."""
    norms = mlo.synchronize_batch_norm(nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)]))
    with pytest.raises(RuntimeError) as caught:
        norms[rank](torch.ones(4, 2))
    return str(caught.value)


def late_draws(rank):
    """The weights where one process's loss begins to draw from Python's generator, after calls have been kept."""
    torch.manual_seed(0)
    low, up = nn.Linear(3, 2), nn.Linear(3, 2)

    def lower(levels, batch):
        if rank == 1 and levels.progress > 0.4:
            random.random()
        return (levels.low(batch) - levels.up(batch)).square().mean()

    def upper(levels, batch):
        return levels.low(batch).square().mean()

    problems = [
        mlo.Problem("low", low, lower, torch.optim.SGD(low.parameters(), 0.1), [torch.randn(4, 3)]),
        mlo.Problem("up", up, upper, torch.optim.SGD(up.parameters(), 0.1), [torch.randn(4, 3)]),
    ]
    mlo.Engine(mlo.Graph(problems, [mlo.Edge("up", "low"), mlo.Edge("low", "up")]), device="cpu").run(4, progress=False)
    return flat([p.detach() for p in (*low.parameters(), *up.parameters())])


def unlike_calls(rank, estimator):
    """The weights where draws come up in both, and one process alone goes on to make a call that can be kept."""
    torch.manual_seed(0)
    low, up = nn.Linear(3, 3), nn.Linear(3, 3)

    def first(levels, batch):
        factor = random.random() if levels.progress else 0.5
        return (levels.low(batch) - factor * levels.up(batch)).square().mean()

    def second(levels, batch):
        return (levels.up(levels.low(batch) if rank else batch) * levels.low(batch)).mean()

    def upper(levels, batch):
        return levels.low(batch).square().mean()

    sgd = torch.optim.SGD
    problems = [
        mlo.Problem("low", low, mlo.Sum(first, second), sgd(low.parameters(), 0.1), [torch.randn(4, 3)],
                    hypergradient=estimator),
        mlo.Problem("up", up, upper, sgd(up.parameters(), 0.1), [torch.randn(4, 3)]),
    ]  # fmt: skip
    mlo.Engine(mlo.Graph(problems, [mlo.Edge("up", "low"), mlo.Edge("low", "up")]), device="cpu").run(4, progress=False)
    return flat([p.detach() for p in (*low.parameters(), *up.parameters())])


def alike():
    """What a loss draws with `drawn_alike`, and without."""
    drawn = []

    def loss(levels, batch):
        own = [torch.rand(())]
        with drawn_alike(torch.device("cpu")):
            shared = [torch.rand(())]
        own.append(torch.rand(()))
        with drawn_alike(torch.device("cpu")):
            shared.append(torch.rand(()))
        drawn.append((torch.stack(shared).tolist(), torch.stack(own).tolist()))
        return levels.w(batch).mean()

    w = nn.Linear(2, 2)
    problem = mlo.Problem("w", w, mlo.Sum(loss, loss), torch.optim.SGD(w.parameters(), 0.1), [torch.ones(4, 2)])
    mlo.Engine(mlo.Graph([problem]), device="cpu").run(2, progress=False)
    return drawn


def failed():
    """What each process raises when the first one fails, by a mistake in a program and by one of a user."""

    def fail(error):
        raise error

    texts = []
    for error in (ZeroDivisionError("by zero"), mlo.RecipeError("expected more")):
        try:
            from_first(lambda error=error: fail(error), whole_world())
        except Exception as found:  # noqa: BLE001 - that is the result
            texts.append(f"{type(found).__name__}: {found}")
    return texts


def in_process(rank, folder):
    found = []
    for index, case in enumerate(CASES):
        engine = build(case, rank)
        found.append(results(engine))
        if index % 4 == 1:
            engine.save(f"{folder}/{index}.pt")
            found[-1]["gone on"] = results(engine)
    other = unused_and_random()
    alone = results(build(CASES[1], rank, group=None))
    check = build(CASES[2], rank).check(directions=2, progress=False).passed
    return {
        "results": found,
        "other": other,
        "alone": alone,
        "check": check,
        "stopped": stopped(rank),
        "failed": failed(),
        "normalized": normalized(rank),
        "statistics": statistics(rank),
        "supernet": supernet(rank),
        "thresholds": [thresholds(rank, one_sided=one_sided) for one_sided in (False, True)],
        "resumed": resumed(rank, folder),
        "sampled": sampled(),
        "buffers": buffers(),
        "unlike": unlike(rank),
        "synchronized twice": synchronized_twice(),
        "other levels": of_other_levels(rank),
        "other norms": of_other_norms(rank),
        "late draws": late_draws(rank),
        "unlike calls": [unlike_calls(rank, mlo.FiniteDifference(one_sided=one)) for one in (False, True)],
        "alike": alike(),
    }


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data_parallel")
    return folder, in_two_processes(in_process, folder)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: f"{CASES[index][0]}, {CASES[index][1]!r}")
def test_two_processes_are_one(processes, index):
    _, found = processes
    expected = results(build(CASES[index]))
    for of_rank in found:
        for key, value in expected.items():
            assert relative_error(of_rank["results"][index][key], value) < 1e-8, key
    for key in expected:
        assert torch.equal(found[0]["results"][index][key], found[1]["results"][index][key]), key


@pytest.mark.parametrize("index", [i for i in range(len(CASES)) if i % 4 == 1])
def test_one_process_goes_on_where_two_were(processes, index):
    folder, found = processes
    engine = build(CASES[index])
    engine.load(folder / f"{index}.pt")
    gone_on = found[0]["results"][index]["gone on"]
    assert all(relative_error(value, gone_on[key]) < 1e-8 for key, value in results(engine).items())


def test_weights_that_not_all_use(processes):
    """Zero counts where one process has no gradient; no gradient, and so no weight decay, where none has one."""
    for of_rank in processes[1]:
        both, one, none = of_rank["other"]["weights"][:, 0].tolist()
        assert (both, one, none) == (1 - 1 - 0.5, 1 - 0.5 - 0.5, 1.0)


def test_metrics_and_running_statistics_are_means_and_draws_are_not_shared(processes):
    first, second = (of_rank["other"] for of_rank in processes[1])
    assert first["metrics"] == second["metrics"] == {"rank": 0.5, "first": 3.0, "second": 4.0, "both": 1.0}
    assert first["drawn"] != second["drawn"]
    assert torch.equal(first["running"], second["running"])
    assert (first["running"] > 0.3).all()  # a tenth of the mean of 0 and 10


def test_synchronized_batch_normalization(processes):
    for of_rank in processes[1]:
        assert relative_error(of_rank["normalized"], normalized()) < 1e-10


def test_statistics_are_exact_far_from_zero_and_where_nothing_varies(processes):
    for of_rank in processes[1]:
        for found, expected in zip(of_rank["statistics"], statistics(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_synchronized_supernets(processes):
    (expected, _), _ = supernet()
    for of_rank in processes[1]:
        found, (edge_by_edge, fused) = of_rank["supernet"]
        assert all(relative_error(each, expected) < 1e-9 for each in found)
        assert 0 < fused < 0.6 * edge_by_edge


def test_kept_calls_are_given_back_in_both_or_in_none(processes):
    for of_rank in processes[1]:
        for one_sided, found in enumerate(of_rank["thresholds"]):
            assert relative_error(found, thresholds(one_sided=bool(one_sided))) < 1e-10
    for first, second in zip(*(of_rank["unlike calls"] for of_rank in processes[1]), strict=True):
        assert torch.equal(first, second)


def test_a_process_may_stay_alone(processes):
    _, found = processes
    assert not torch.equal(found[0]["alone"]["weights"], found[1]["alone"]["weights"])


def test_the_black_box_check_agrees(processes):
    assert all(of_rank["check"] for of_rank in processes[1])


def test_all_stop_when_one_is_asked_to(processes):
    assert [of_rank["stopped"] for of_rank in processes[1]] == [0, 0]


def test_each_goes_on_with_data_of_its_own(processes):
    folder, found = processes
    for of_rank in found:
        seen, again, same = of_rank["resumed"]
        assert seen == again
        assert same
    assert found[0]["resumed"][0] != found[1]["resumed"][0]
    with pytest.raises(mlo.MloError, match="expected 2 processes, each of which goes on with data of its own; found 1"):
        with_generators(0)[0].load(folder / "generators.pt")


def test_a_distributed_sampler_shuffles_anew_in_each_epoch(processes):
    first, second = (of_rank["sampled"] for of_rank in processes[1])
    for epoch in (slice(2), slice(2, 4)):
        assert sorted(chain.from_iterable(first[epoch] + second[epoch])) == list(range(8))
    assert first[:2] != first[2:]


def test_buffers_that_do_not_move_stay_what_they_are(processes):
    for of_rank in processes[1]:
        found = of_rank["buffers"]
        assert found["mask"].tolist() == torch.tensor([torch.finfo(torch.float32).min, 0.1]).tolist()
        assert found["fp16"].tolist() == [torch.finfo(torch.float16).max]
        assert (found["int16"].tolist(), found["of_one"].tolist()) == ([5], [1.0, 1.0, 1.0])
        assert found["of_complex"].tolist() == [1 + 2j]


def test_processes_that_were_started_differently_say_so(processes):
    graph = "expected the same graph, seed and settings in all processes"
    for of_rank in processes[1]:
        assert of_rank["unlike"] == [graph, graph, "rounds: expected the same number in all processes"]


def test_batch_normalization_is_synchronized_under_all_its_names_and_in_the_processes_named(processes):
    for rank, of_rank in enumerate(processes[1]):
        same, mean = of_rank["synchronized twice"]
        assert same
        assert mean.tolist() == pytest.approx([1.0 * rank] * 2)


def test_losses_that_depend_on_other_levels_in_each_process_are_refused(processes):
    """Else gradients of different levels would be averaged, or the job would be aborted."""
    for name, of_rank in zip(("a", "b"), processes[1], strict=True):
        assert f'found one at "top\'s loss, variables of {name}" that another is not at' in of_rank["other levels"]


def test_statistics_of_different_modules_are_never_averaged(processes):
    for of_rank in processes[1]:
        assert "expected all processes to call the same modules in the same order" in of_rank["other norms"]


def test_one_process_may_begin_to_draw_numbers(processes):
    assert torch.equal(*(of_rank["late draws"] for of_rank in processes[1]))


def test_what_belongs_to_variables_can_be_drawn_alike(processes):
    first, second = (of_rank["alike"] for of_rank in processes[1])
    alone = alike()
    assert first == alone
    for (shared, own), (other_shared, other_own) in zip(first, second, strict=True):
        assert shared == other_shared
        assert not set(own) & set(other_own)
        assert len({*shared, *own}) == 4
    assert len({shared[0] for shared, _ in first}) == len({own[0] for _, own in first})  # per term and step


def test_draws_alike_are_repeated_in_recomputed_activations_and_never_twice():
    """They follow from torch's generator, which `torch.utils.checkpoint` puts back."""
    device, gradients = torch.device("cpu"), []
    for recomputes in (False, True):
        drawn = []

        def noisy(x, drawn=drawn):
            with drawn_alike(device):
                drawn.append(torch.rand(3))
                with drawn_alike(device):
                    drawn.append(torch.rand(3))
            drawn.append(torch.rand(3))
            return (x * torch.stack(drawn[-3:])).sin()

        torch.manual_seed(0)
        x = torch.ones(3, requires_grad=True)
        for _ in range(2):
            (checkpoint(noisy, x, use_reentrant=False) if recomputes else noisy(x)).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    first = torch.stack(drawn)
    assert len(first.unique()) == 18  # of two passes, each made twice
    assert len(first) == 12


def test_all_hear_of_what_fails_in_the_first(processes):
    told = "MloError: the first process of the job failed, see what it says: ZeroDivisionError: by zero"
    assert [found["failed"] for found in processes[1]] == [
        ["ZeroDivisionError: by zero", "RecipeError: expected more"],
        [told, "RecipeError: expected more"],
    ]
