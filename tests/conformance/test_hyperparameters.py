"""Options of an optimizer that another level determines."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import mse_loss

import mlo
from tests.toys import assert_resumes

from .quadratics import Vector, relative_error

FUNCTIONS = {
    "lr": lambda levels: levels.rates.w[0].exp(),
    "weight_decay": lambda levels: levels.rates.w[1].exp(),
    "momentum": lambda levels: levels.rates.w[2].sigmoid(),
    "dampening": lambda levels: 0.2 * levels.rates.w[0].sigmoid(),
    "betas": lambda levels: levels.rates.w[1:3].sigmoid(),
    "eps": lambda levels: levels.rates.w[0].exp() / 100,
}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 9.0}, ["lr", "weight_decay"]),
    "momentum": (torch.optim.SGD, {"lr": 9.0, "momentum": 0.5}, ["lr", "weight_decay", "momentum", "dampening"]),
    "nesterov": (torch.optim.SGD, {"lr": 9.0, "momentum": 0.5, "nesterov": True}, ["lr", "weight_decay", "momentum"]),
    "adam": (torch.optim.Adam, {"lr": 9.0}, ["lr", "weight_decay", "betas", "eps"]),
    "adamw": (torch.optim.AdamW, {"lr": 9.0}, ["lr", "weight_decay", "betas"]),
}


def data(seed, num=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 6, 2, generator=generator, dtype=torch.float64).unbind() for _ in range(num)]


def tuned(estimator, optimizer="sgd", *, steps=4, functions=None, rates=(-2.0, -1.5, 0.3), clip=None, batches=3):
    """A network whose optimizer's options are functions of `rates`, which is also read by the network's loss."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    kind, arguments, names = OPTIMIZERS[optimizer]
    upper = Vector(list(rates))

    def train(levels, batch):
        return mse_loss(levels.net(batch[0]), batch[1] * (1 + 0.1 * levels.rates()[0]))

    def validate(levels, batch):
        return mse_loss(levels.net(batch[0]), batch[1])

    groups = [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters())}]
    lower = mlo.Problem(
        "net", net, train, kind(groups, **arguments), data(0, batches), hypergradient=estimator, steps=steps,
        clip_norm=clip,
        hyperparameters=functions if functions is not None else {name: FUNCTIONS[name] for name in names},
    )  # fmt: skip
    top = mlo.Problem("rates", upper, validate, torch.optim.SGD(upper.parameters(), lr=0.1), data(1))
    graph = mlo.Graph([lower, top], [mlo.Edge("rates", "net"), mlo.Edge("net", "rates")])
    return mlo.Engine(graph, seed=0, device="cpu")


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_black_box_agrees(optimizer, clip):
    engine = tuned(mlo.Unroll(), optimizer, clip=clip)
    for _ in range(2):
        found = engine.check(progress=False)
        assert found.levels[0].verdict == "exact", found
        assert found.levels[0].error < 1e-6
        engine.run(1, progress=False)


@pytest.mark.parametrize("estimator", [mlo.Unroll(), mlo.Unroll(checkpoint=True), mlo.FiniteDifference(1e-4, None)])
def test_a_learning_rate_written_out(estimator):
    engine = tuned(estimator, functions={"lr": FUNCTIONS["lr"]})
    net, rates = engine.graph["net"].module, engine.graph["rates"].module
    w = dict(net.named_parameters())
    upper = rates.w.detach().clone().requires_grad_()
    for step in range(4):
        x, y = data(0)[step % 3]
        loss = mse_loss(functional_call(net, w, (x,)), y * (1 + 0.1 * upper[0]))
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        w = {n: p - upper[0].exp() * g for (n, p), g in zip(w.items(), grads, strict=True)}
    x, y = data(1)[0]
    expected = torch.autograd.grad(mse_loss(functional_call(net, w, (x,)), y), upper)[0]
    assert relative_error(engine.hypergradient("rates")["w"], expected) < 1e-7


def test_the_optimizer_steps_with_the_values_in_force():
    engine = tuned(mlo.Unroll(), "adam")
    engine.run(1, progress=False)
    group = engine.graph["net"].optimizer.param_groups[1]
    assert group["lr"] == pytest.approx(math.exp(-2.0), rel=1e-12)
    assert group["betas"] == pytest.approx([1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-0.3))], rel=1e-12)
    before = engine.graph["rates"].module.w.detach().clone()
    metrics = engine.run(1, progress=False)
    assert metrics["net.learning_rate"] == pytest.approx(float(before[0].exp()), rel=1e-12)
    assert not torch.equal(before, engine.graph["rates"].module.w)


IMPLICIT = {
    "cg": (mlo.ConjugateGradient(iterations=60, tolerance=1e-13), 1e-7),
    "neumann": (mlo.Neumann(terms=500), 1e-6),
    "nystrom": (mlo.Nystrom(rank=100, damping=1e-12), 1e-7),
    "penalty": (mlo.Penalty(strength=1e3, steps=400), 1e-4),
}


@pytest.mark.parametrize("kind", IMPLICIT)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_a_weight_decay_is_part_of_the_objective(kind, optimizer):
    """The learning rate is not: where the level has converged it makes no difference."""
    estimator, tolerance = IMPLICIT[kind]
    functions = {"weight_decay": FUNCTIONS["weight_decay"], "lr": lambda levels: 0.5 + 0.0 * levels.rates.w[2]}
    options = {"functions": functions, "steps": 400, "rates": (0.5, -1.0, 0.0), "batches": 1}
    found, expected = (tuned(e, optimizer, **options).hypergradient("rates")["w"] for e in (estimator, mlo.Unroll()))
    assert relative_error(found, expected) < tolerance
    assert abs(float(expected[1])) > 1e-3


def nest(low, middle=None):
    """Three levels, the lowest inside the middle one; options of the optimizers of these two."""
    modules = {"low": Vector([0.3, -0.2]), "middle": Vector([0.5, 1.5]), "high": Vector([-2.0, 0.4])}
    losses = {
        "low": lambda levels, batch: (levels.low() - levels.middle().tanh()).pow(4).sum() + levels.low().square().sum(),
        "middle": lambda levels, batch: (levels.low() * levels.middle()).sum() + levels.middle().pow(4).sum(),
        "high": lambda levels, batch: (levels.low() - 1).pow(4).sum() + levels.middle().square().sum(),
    }
    options = {"low": low, "middle": middle or {}, "high": {}}
    problems = [
        mlo.Problem(
            name,
            module,
            losses[name],
            torch.optim.SGD(module.parameters(), lr=0.05),
            None,
            hypergradient=mlo.Unroll(),
            steps=3,
            hyperparameters=options[name],
        )
        for name, module in modules.items()
    ]
    edges = [("middle", "low"), ("low", "middle"), ("low", "high"), ("middle", "high")]
    if low:
        edges.append(("high", "low"))
    return mlo.Engine(mlo.Graph(problems, [mlo.Edge(*edge) for edge in edges]), seed=0, device="cpu")


def test_in_a_nest():
    """The step size of the lowest level belongs to the highest, and the middle level is differentiated through both."""
    engine = nest({"lr": lambda levels: levels.high()[0].exp()})
    found = engine.check(progress=False)
    assert [level.verdict for level in found.levels] == ["exact", "exact"], found
    assert abs(float(engine.hypergradient("high")["w"][0])) > 1e-3


def test_a_run_resumes_bit_for_bit(tmp_path):
    assert_resumes(lambda: tuned(mlo.Unroll(), "adam"), tmp_path)


def test_mistakes():
    with pytest.raises(mlo.GraphError, match="hyperparameter 'rate': expected a number among the options of SGD: lr"):
        tuned(mlo.Unroll(), functions={"rate": FUNCTIONS["lr"]})
    with pytest.raises(mlo.GraphError, match="hyperparameter 'nesterov': expected a number among"):
        tuned(mlo.Unroll(), functions={"nesterov": FUNCTIONS["lr"]})
    with pytest.raises(mlo.GraphError, match="hyperparameters must be a mapping"):
        tuned(mlo.Unroll(), functions={"lr": 0.1})
    with pytest.raises(
        mlo.GraphError, match="hyperparameter 'lr': expected one floating-point number, as a tensor; found float"
    ):
        tuned(mlo.Unroll(), functions={"lr": lambda levels: 0.1}).run(1, progress=False)
    with pytest.raises(
        mlo.GraphError, match=r"hyperparameter 'lr': expected one floating-point number.*found shape \(3,\)"
    ):
        tuned(mlo.Unroll(), functions={"lr": lambda levels: levels.rates.w}).run(1, progress=False)
    with pytest.raises(mlo.GraphError, match=r"found shape \(\), torch.int64"):
        tuned(mlo.Unroll(), functions={"lr": lambda levels: torch.tensor(1)}).run(1, progress=False)
    with pytest.raises(mlo.GraphError, match=r"hyperparameters of level 'net' reads levels\.net; .* own variables"):
        tuned(mlo.Unroll(), functions={"lr": lambda levels: levels.net[0].weight.sum()}).run(1, progress=False)
    with pytest.raises(mlo.DivergenceError, match="level 'net', hyperparameter 'lr': expected a finite number"):
        tuned(mlo.Unroll(), functions={"lr": lambda levels: levels.rates.w[0].log()}).run(1, progress=False)
    net = torch.nn.Linear(1, 1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(mlo.GraphError, match="its scheduler and its hyperparameters both set"):
        mlo.Problem(
            "net",
            net,
            lambda levels, batch: levels.net.weight.sum(),
            sgd,
            None,
            scheduler=torch.optim.lr_scheduler.StepLR(sgd, 1),
            hyperparameters={"lr": lambda levels: levels.rates.w},
        )


def test_a_closure_over_a_module_without_an_edge_is_refused():
    foreign = []
    engine = nest({}, middle={"lr": lambda levels: foreign[0].w[0].exp() / 20})
    foreign.append(engine.graph["high"].module)
    with pytest.raises(mlo.GraphError, match="parameters of level 'middle' depends on the variables of level 'high'"):
        engine.run(1, progress=False)


def test_a_level_inside_cannot_set_the_pace():
    functions = {"lr": lambda levels: levels.low()[0].exp() / 20}
    with pytest.raises(mlo.GraphError, match=r"'middle': expected functions of levels outside it.*reads levels\.low"):
        nest({}, middle=functions).run(1, progress=False)


def test_a_check_computes_them_in_double_precision():
    layer = torch.nn.Linear(1, 1)
    lower = Vector([0.3, -0.2])
    problems = [
        mlo.Problem("lower", lower, lambda levels, batch: (levels.lower() - 1).pow(4).sum(),
                    torch.optim.SGD(lower.parameters(), lr=0.1), None, steps=2, hypergradient=mlo.Unroll(),
                    hyperparameters={"lr": lambda levels: levels.layer(torch.tensor([[levels.progress]])).exp() / 20}),
        mlo.Problem("layer", layer, lambda levels, batch: levels.lower().square().sum(),
                    torch.optim.SGD(layer.parameters(), lr=0.1), None),
    ]  # fmt: skip
    graph = mlo.Graph(problems, [mlo.Edge("layer", "lower"), mlo.Edge("lower", "layer")])
    found = mlo.Engine(graph, device="cpu").check(progress=False)
    assert found.levels[0].verdict == "exact", found


def test_what_is_read_through_a_detached_edge_is_a_constant_in_a_nest():
    """Although a level inside is attached to it."""

    def hypergradient(detach):
        a, b, c = Vector([0.3, -0.2]), Vector([0.5, 0.4]), Vector([-2.0, 0.3])

        def problem(name, module, loss, **options):
            sgd = torch.optim.SGD(module.parameters(), lr=0.1)
            return mlo.Problem(name, module, loss, sgd, None, hypergradient=mlo.Unroll(), **options)

        rate = {"lr": lambda levels: (levels.c.w.detach() if detach else levels.c.w)[0].exp()}
        levels = [
            problem("a", a, lambda levels, batch: (levels.a.w - levels.b.w - levels.c.w).square().sum(), steps=2),
            problem("b", b, lambda levels, batch: (levels.b.w - 1).square().sum() + levels.a.w.square().sum(), steps=2,
                    hyperparameters=rate),
            problem("c", c, lambda levels, batch: (levels.a.w - levels.b.w).square().sum()),
        ]  # fmt: skip
        pairs = [("b", "a"), ("a", "b"), ("c", "a"), ("a", "c"), ("b", "c")]
        edges = [*(mlo.Edge(*pair) for pair in pairs), mlo.Edge("c", "b", detached=True)]
        return mlo.Engine(mlo.Graph(levels, edges), device="cpu").hypergradient("c")["w"]

    torch.testing.assert_close(hypergradient(detach=False), hypergradient(detach=True), rtol=1e-12, atol=0)
