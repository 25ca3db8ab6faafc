"""Levels sharded over two processes by FSDP2 against the same graph in one process, on the batches of both."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import mlo

from .processes import in_two_processes
from .quadratics import relative_error
from .random_graphs import fit, flat

pytestmark = [
    pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP on the CPU"),
    pytest.mark.filterwarnings("ignore:level .* Penalty. its solves are far"),
]

GRAPHS = {
    "bilevel": ({"low": ("top",), "top": ("low",)}, ("low",)),
    "start": ({"low": ("top",), "top": ("low",)}, ("low", "top")),
    "whole lower level": ({"low": ("top",), "top": ("low",)}, ("top",)),
    "teaching": ({"low": ("top",), "middle": ("low",), "top": ("low", "middle")}, ("low", "middle")),
    "nest": ({"low": ("middle", "top"), "middle": ("low", "top"), "top": ("low", "middle")}, ("low", "middle")),
}
CASES = [
    *(
        (graph, estimator)
        for graph in ("bilevel", "start", "whole lower level", "teaching")
        for estimator in (mlo.FirstOrder(), mlo.FiniteDifference(1e-4, last=None), mlo.SAMA(), mlo.Penalty(steps=4))
    ),
    ("nest", mlo.Penalty(steps=1)),
]
RESUMED = [i for i, (graph, estimator) in enumerate(CASES) if isinstance(estimator, mlo.FiniteDifference)]
OPTIMIZERS = {
    "low": lambda weights: torch.optim.Adam(weights, lr=0.05, weight_decay=0.1),
    "middle": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "top": lambda weights: torch.optim.AdamW(weights, lr=0.02),
}


class Network(nn.Sequential):
    """Its five hidden units do not divide by two."""

    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        self.double()


def build(case, rank=None):
    """Build an engine; `rank` None for the whole graph on the batches of both processes."""
    graph, estimator = case
    reads, sharded = GRAPHS[graph]
    torch.manual_seed(0)
    modules = {name: Network() for name in reads}
    data = {name: torch.randn(3, 2, 2, 6, 4, dtype=torch.float64) for name in reads}
    problems = []
    for name, module in modules.items():
        batches = [pair.flatten(1, 2).unbind() if rank is None else pair[:, rank].unbind() for pair in data[name]]
        if rank is not None and name in sharded:
            fully_shard(module[0])
            fully_shard(module)
        own = OPTIMIZERS[name](module.parameters())
        start = "top" if graph == "start" and name == "low" else None
        loss = fit(name, reads[name])
        problems.append(mlo.Problem(name, module, loss, own, batches, hypergradient=estimator, steps=2, start=start))
    edges = [mlo.Edge(source, target) for target in reads for source in reads[target]]
    return mlo.Engine(mlo.Graph(problems, edges), seed=0, device="cpu")


def results(engine):
    """Return what is to be equal: hypergradients, and the weights after two rounds."""
    found = {"first": engine.hypergradient("top")}
    metrics = engine.run(2, progress=False)
    found["metrics"] = {name: torch.tensor(value) for name, value in metrics.items() if name.endswith(".loss")}
    found["after"] = engine.hypergradient("top")
    found["weights"] = {
        f"{p.name}.{n}": w.detach() for p in engine.graph.levels for n, w in p.module.named_parameters()
    }
    return {
        key: flat(t.full_tensor() if isinstance(t, DTensor) else t for t in tensors.values())
        for key, tensors in found.items()
    }


def in_process(rank, folder):
    found = []
    for index, case in enumerate(CASES):
        engine = build(case, rank)
        found.append(results(engine))
        if index not in RESUMED:
            continue
        engine.save(f"{folder}/{index}.pt")
        resumed = build(case, rank)
        resumed.load(f"{folder}/{index}.pt")
        found[-1]["resumed"] = results(resumed)
        found[-1]["gone on"] = results(engine)
    return {
        "results": found,
        "messages": messages(rank),
        "between": [[called_between(rollback, called) for called in (False, True)] for rollback in (False, True)],
        "gradients": gradients_left(),
        "parts": parts_called(),
        "projections": projections(rank),
    }


def messages(rank):
    """Collect what is said where something cannot be done."""
    tried = {
        "estimator": lambda: build(("bilevel", mlo.Neumann()), rank),
        "nest": lambda: build(("nest", mlo.FiniteDifference()), rank).run(1, progress=False),
        "check": lambda: build(CASES[0], rank).check(),
        "tensor parallel": tensor_parallel,
        "fp16": lambda: mlo.Engine(build(CASES[0], rank).graph, device="cpu", precision="fp16"),
        "diagnostics": lambda: mlo.Engine(build(CASES[0], rank).graph, device="cpu", diagnostics_every=1),
        "file": lambda: build(CASES[0], rank).save("/proc/nothing.pt"),
        "clip_norm": clipped,
        "attribute": lambda: by_attribute(lambda low: low.weight.full_tensor().square().sum()).run(1, progress=False),
        "part": lambda: by_attribute(
            lambda low: low[0].weight.full_tensor().square().sum(), nn.Sequential(nn.Linear(4, 4))
        ).run(1, progress=False),
        "parameters": lambda: by_attribute(lambda low: sum(p.sum() for p in low.parameters())).run(1, progress=False),
    }
    found = {}
    for name, attempt in tried.items():
        with pytest.raises(mlo.MloError) as caught:
            attempt()
        found[name] = str(caught.value)
    return found


class Projecting(nn.Linear):
    """Has a buffer that each process has drawn for itself."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("projection", torch.randn(4, 4))

    def forward(self, x):
        return super().forward(x @ self.projection)


def small(low=None, **options):
    """A sharded linear level below a whole one."""
    torch.manual_seed(0)
    low, top = fully_shard(low or nn.Linear(4, 4)), nn.Linear(4, 4)
    batch = torch.randn(6, 4)

    def fit(levels, batch):
        return (levels.low(batch) - levels.top(batch)).square().mean()

    def judge(levels, batch):
        return (levels.low(batch) - batch).square().mean()

    problems = [
        mlo.Problem("low", low, fit, torch.optim.SGD(low.parameters(), lr=0.1), [batch], steps=2),
        mlo.Problem("top", top, options.pop("judge", judge), torch.optim.SGD(top.parameters(), lr=0.1), [batch]),
    ]
    edges = [mlo.Edge("top", "low"), mlo.Edge("low", "top")]
    return mlo.Engine(mlo.Graph(problems, edges), device="cpu", **options)


def called_between(rollback, called):
    """The hypergradient after rounds, between which the user's code calls the sharded module, or does not."""
    engine = small(rollback=rollback)
    for _ in range(2):
        engine.run(1, progress=False)
        if called:
            with torch.no_grad():
                engine.graph["low"].module(torch.ones(1, 4))
    return flat(engine.hypergradient("top").values())


def by_attribute(read, low=None):
    return small(low, judge=lambda levels, batch: read(levels.low) + (levels.low(batch) - batch).square().mean())


def parts_called():
    """Parts of a sharded module are modules, which may be looked through and called after the whole."""
    low = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    fully_shard(low[0])

    def judge(levels, batch):
        whole = levels.low(batch)
        parts = [part for part in levels.low.children() if isinstance(part, nn.Linear)]
        return whole.square().mean() + parts[0](batch).square().mean() + isinstance(levels.low[1], nn.Tanh)

    return small(low, judge=judge).run(1, progress=False)["top.loss"]


def gradients_left():
    engine = small()
    engine.run(2, progress=False)
    return [p.grad for level in engine.graph.levels for p in level.module.parameters()]


def projections(rank):
    torch.manual_seed(rank)
    engine = small(Projecting())
    before = engine.graph["low"].module.projection.clone()
    engine.run(1, progress=False)
    return before, engine.graph["low"].module.projection.clone()


def tensor_parallel():
    net, mesh = nn.Linear(2, 2), torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), mesh))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    mlo.Graph([mlo.Problem("net", net, lambda levels, batch: levels.net(batch).sum(), sgd, None)])


def clipped():
    net = fully_shard(nn.Linear(2, 2))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    mlo.Graph([mlo.Problem("net", net, lambda levels, batch: levels.net(batch).sum(), sgd, None, clip_norm=1.0)])


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, in_two_processes(in_process, folder)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: f"{CASES[index][0]}, {CASES[index][1]!r}")
def test_two_processes_are_one(processes, index):
    """The same numbers as one process gets on the batches of both, and on both."""
    _, found = processes
    expected = results(build(CASES[index]))
    for of_rank in found:
        for key, value in expected.items():
            assert relative_error(of_rank["results"][index][key], value) < 1e-6, key
    assert torch.equal(found[0]["results"][index]["weights"], found[1]["results"][index]["weights"])


@pytest.mark.parametrize("index", RESUMED, ids=lambda index: CASES[index][0])
def test_checkpoints(processes, index):
    """A run goes on bit for bit, and also in one process, with levels that are whole."""
    folder, found = processes
    own = found[0]["results"][index]
    assert all(torch.equal(own["resumed"][key], value) for key, value in own["gone on"].items())
    engine = build(CASES[index])
    engine.load(folder / f"{index}.pt")
    assert all(relative_error(value, own["gone on"][key]) < 1e-6 for key, value in results(engine).items())


def test_messages(processes):
    _, found = processes
    assert found[0]["messages"] == found[1]["messages"]
    said = found[0]["messages"]
    assert "'low': expected an estimator of first derivatives, as level 'low' is sharded" in said["estimator"]
    assert "expected an estimator of first derivatives" in said["nest"]
    assert "Check without fully_shard" in said["check"]
    assert "'net': expected parameters that are whole, or all of them sharded by fully_shard" in said["tensor parallel"]
    assert "'bf16' or 'fp32' with a sharded level" in said["fp16"]
    assert "'low' is sharded. Leave the diagnostics out" in said["diagnostics"]
    assert "could not be written" in said["file"]
    assert "'net', clip_norm: expected none, as the level is sharded" in said["clip_norm"]
    assert (
        "reads .weight of a level that is sharded by fully_shard; expected it to call the module" in said["attribute"]
    )
    assert "reads .parameters of a level that is sharded" in said["parameters"]
    assert "reads a parameter of a level that is sharded" in said["part"]


def test_the_module_may_be_called_between_rounds(processes):
    """FSDP leaves it with whole parameters, whose memory it frees later."""
    for of_rank in processes[1]:
        assert all(torch.equal(*pair) for pair in of_rank["between"])


def test_no_gradients_are_left_behind(processes):
    assert all(of_rank["gradients"] == [None] * 4 for of_rank in processes[1])


def test_parts_of_a_sharded_module_are_modules(processes):
    assert all(of_rank["parts"] > 1 for of_rank in processes[1])


def test_buffers_are_those_of_the_first_process(processes):
    first, second = (of_rank["projections"] for of_rank in processes[1])
    assert all(torch.equal(t, first[0]) for t in (*first, *second))
