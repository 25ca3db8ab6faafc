"""Levels that start each solve at another level's variables: MAML's initialization."""

import copy

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import mse_loss

import mlo
from tests.toys import assert_resumes

from .quadratics import relative_error
from .random_graphs import flat

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, eps=1e-3),
}


def network():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()


def data(seed, num=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 6, 2, generator=generator, dtype=torch.float64).unbind() for _ in range(num)]


def loss_of(name):
    return lambda levels, batch: mse_loss(getattr(levels, name)(batch[0]), batch[1][:, :1])


def maml(estimator, optimizer="sgd", steps=3, tasks=2):
    """Every task is a level that starts at `initial`, whose loss is the sum of theirs on other data."""
    torch.manual_seed(0)
    initial = network()
    names = [f"task{i}" for i in range(tasks)]
    problems = []
    for i, name in enumerate(names):
        module = network()
        problems.append(
            mlo.Problem(name, module, loss_of(name), OPTIMIZERS[optimizer](module.parameters()), data(i),
                        hypergradient=estimator, steps=steps, start="initial")
        )  # fmt: skip

    def loss(levels, batch):
        return sum(loss_of(name)(levels, batch) for name in names) / tasks

    top = mlo.Problem("initial", initial, loss, torch.optim.SGD(initial.parameters(), lr=0.1), data(9))
    edges = [edge for name in names for edge in (mlo.Edge("initial", name), mlo.Edge(name, "initial"))]
    return mlo.Engine(mlo.Graph([*problems, top], edges), seed=0, device="cpu")


def by_hand(engine, steps=3, tasks=2):
    """MAML with plain SGD, written out."""
    initial = engine.graph["initial"].module
    meta = {n: p.detach().clone().requires_grad_() for n, p in initial.named_parameters()}
    x, y = data(9)[0]
    total = 0.0
    for i in range(tasks):
        w = meta
        for step in range(steps):
            a, b = data(i)[step % 2]
            grads = torch.autograd.grad(mse_loss(functional_call(initial, w, (a,)), b[:, :1]), list(w.values()),
                                        create_graph=True)  # fmt: skip
            w = {n: v - 0.1 * g for (n, v), g in zip(w.items(), grads, strict=True)}
        total = total + mse_loss(functional_call(initial, w, (x,)), y[:, :1]) / tasks
    return flat(torch.autograd.grad(total, list(meta.values())))


@pytest.mark.parametrize("estimator", [mlo.Unroll(), mlo.Unroll(checkpoint=True), mlo.FiniteDifference(1e-4, None)])
def test_maml_written_out(estimator):
    engine = maml(estimator)
    expected = by_hand(engine)
    assert relative_error(flat(engine.hypergradient("initial").values()), expected) < 1e-7
    engine.run(2, progress=False)
    assert relative_error(flat(engine.hypergradient("initial").values()), by_hand(engine)) < 1e-7


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_black_box_agrees(optimizer):
    engine = maml(mlo.Unroll(), optimizer)
    engine.run(1, progress=False)
    found = engine.check(progress=False)
    assert [level.verdict for level in found.levels] == ["exact"], found


def test_first_order_maml_is_the_gradient_at_the_adapted_weights():
    engine = maml(mlo.FirstOrder(), tasks=1)
    found = flat(engine.hypergradient("initial").values())
    engine.run(1, progress=False)
    adapted = copy.deepcopy(engine.graph["task0"].module)
    x, y = data(9)[0]
    loss = mse_loss(adapted(x), y[:, :1])
    assert relative_error(found, flat(torch.autograd.grad(loss, list(adapted.parameters())))) < 1e-12


def test_every_solve_begins_anew():
    """The steps of the second round are those of the first, from the moved initialization and an empty state."""
    engine = maml(mlo.Unroll(), "momentum", tasks=1)
    engine.run(1, progress=False)
    start = {n: p.detach().clone() for n, p in engine.graph["initial"].module.named_parameters()}
    engine.graph["task0"].module[0].weight.data.fill_(100.0)  # forgotten
    engine.run(1, progress=False)
    module = network()
    module.load_state_dict(start)
    optimizer = OPTIMIZERS["momentum"](module.parameters())
    for step in range(3):
        x, y = data(0)[(3 + step) % 2]
        optimizer.zero_grad()
        mse_loss(module(x), y[:, :1]).backward()
        optimizer.step()
    for a, b in zip(module.parameters(), engine.graph["task0"].module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-14)


def test_truncation_leaves_the_start_out():
    found = maml(mlo.Unroll(last=2)).hypergradient("initial")
    assert not flat(found.values()).any()


@pytest.mark.filterwarnings("ignore:level .* Penalty. its solves are far")
@pytest.mark.parametrize("estimator", [mlo.ConjugateGradient(), mlo.Nystrom(), mlo.Penalty(steps=3), mlo.SAMA()])
def test_an_implicit_response_forgets_its_start(estimator):
    assert not flat(maml(estimator).hypergradient("initial").values()).any()


def chain(estimator, *, nested):
    """hyper -> pretrained -> (start) finetuned -> hyper; nested: finetuned also starts a level inside it."""
    torch.manual_seed(1)
    modules = {name: network() for name in ("pretrained", "finetuned", "hyper")}

    def shaped(levels, batch):
        x, y = batch
        return mse_loss(levels.pretrained(x), y[:, :1] * levels.hyper(x))

    def finetuned(levels, batch):
        return loss_of("finetuned")(levels, batch) + (loss_of("pretrained")(levels, batch) if nested else 0.0)

    def problem(name, loss, seed, **more):
        sgd = torch.optim.SGD(modules[name].parameters(), lr=0.2, momentum=0.5)
        return mlo.Problem(name, modules[name], loss, sgd, data(seed), hypergradient=estimator, steps=2, **more)

    if nested:  # pretrained starts at finetuned, inside it
        problems = [problem("pretrained", shaped, 0, start="finetuned"), problem("finetuned", finetuned, 1)]
        edges = [("hyper", "pretrained"), ("finetuned", "pretrained"), ("pretrained", "finetuned")]
    else:
        problems = [problem("pretrained", shaped, 0), problem("finetuned", finetuned, 1, start="pretrained")]
        edges = [("hyper", "pretrained"), ("pretrained", "finetuned")]
    problems.append(problem("hyper", loss_of("finetuned"), 2))
    edges.append(("finetuned", "hyper"))
    return mlo.Engine(mlo.Graph(problems, [mlo.Edge(*edge) for edge in edges]), seed=0, device="cpu")


@pytest.mark.parametrize("nested", [False, True])
def test_starts_in_the_middle_of_a_graph_and_in_a_nest(nested):
    engine = chain(mlo.Unroll(), nested=nested)
    for _ in range(2):
        found = engine.check(progress=False)
        assert all(level.verdict == "exact" for level in found.levels), found
        assert float(flat(engine.hypergradient("hyper").values()).norm()) > 1e-6
        engine.run(1, progress=False)


def test_mistakes():
    def graph(module, edges, **more):
        a, b = network(), module
        sgd = torch.optim.SGD(b.parameters(), lr=0.1)
        return mlo.Graph(
            [
                mlo.Problem("b", b, lambda levels, batch: levels.b(batch[0]).sum(), sgd, data(0), **more),
                mlo.Problem("a", a, lambda levels, batch: levels.b(batch[0]).sum(),
                            torch.optim.SGD(a.parameters(), lr=0.1), data(0)),
            ],
            edges,
        )  # fmt: skip

    both = [mlo.Edge("a", "b"), mlo.Edge("b", "a")]
    with pytest.raises(mlo.GraphError, match=r"'b', start: expected an edge from 'a'.*mlo.Edge\('a', 'b'\)"):
        graph(network(), [mlo.Edge("b", "a")], start="a")
    with pytest.raises(mlo.GraphError, match="start: expected one of the levels b, a; found 'c'"):
        graph(network(), both, start="c")
    with pytest.raises(
        mlo.GraphError, match=r"as level 'a'; found weight of shape \(1, 2\) in float64 here and missing"
    ):
        graph(torch.nn.Linear(2, 1).double(), both, start="a")
    with pytest.raises(mlo.GraphError, match=r"start: expected an edge from 'a'.*found a detached one"):
        graph(network(), [mlo.Edge("a", "b", detached=True), mlo.Edge("b", "a")], start="a")
    with pytest.raises(mlo.GraphError, match="start: expected another level; found itself"):
        graph(network(), both, start="b")
    with pytest.raises(mlo.GraphError, match="start must be the name of a level"):
        graph(network(), both, start=3)


def test_a_run_resumes_bit_for_bit(tmp_path):
    assert_resumes(lambda: maml(mlo.Unroll(), "adam"), tmp_path)
