"""Compiled modules compute the same, and second-order products do without them."""

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional

import mlo
from mlo.cli import main
from mlo.compilation import compiled
from problems.search_spaces.evaluation import EvaluationNetwork
from problems.search_spaces.genotypes import PUBLISHED
from problems.search_spaces.recomputation import Recomputed

# The compiler's own warning.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def engine(which, estimator=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    gate = nn.Linear(1, 3).double()
    data = [(torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)) for _ in range(3)]

    def net_loss(levels, batch):
        return functional.mse_loss(levels.net(batch[0] * levels.gate(batch[0].new_ones(1))), batch[1])

    def gate_loss(levels, batch):
        return functional.mse_loss(levels.net(batch[0]), batch[1])

    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    adam = torch.optim.Adam(gate.parameters(), lr=0.01)
    levels = [
        mlo.Problem("net", net, net_loss, sgd, data, hypergradient=estimator or mlo.FiniteDifference(), steps=2),
        mlo.Problem("gate", gate, gate_loss, adam, data),
    ]
    graph = mlo.Graph(levels, [mlo.Edge("gate", "net"), mlo.Edge("net", "gate")])
    return mlo.Engine(graph, seed=0, device="cpu", compile=which)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Let modules be traced as they are for the compiler, but not compiled by it, which takes long."""
    compile_module, found = torch.compile, []

    def note(graph_module, inputs):
        found.append(graph_module)
        return graph_module.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda module, options: compile_module(module, backend=note))
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize("estimator", [mlo.FiniteDifference(radius=1e-4), mlo.Unroll()], ids=repr)
def test_the_same_rounds(estimator, calls):
    eager, compiled = engine(False, estimator), engine(True, estimator)
    expected = eager.run(3, progress=False)
    assert not calls
    found = compiled.run(3, progress=False)
    assert calls
    for name, value in expected.items():
        assert name == "round_seconds" or found[name] == pytest.approx(value, rel=1e-10)
    for name in ("net", "gate"):
        states = [e.graph[name].module.state_dict() for e in (eager, compiled)]
        torch.testing.assert_close(states[1], states[0], rtol=1e-9, atol=1e-12)


def test_levels_by_name(calls):
    engine(["gate"]).run(1, progress=False)
    assert {len(list(graph.parameters())) for graph in calls} <= {0, 2}
    with pytest.raises(mlo.GraphError, match="compile: expected one of the levels net, gate; found 'gat'"):
        engine(["gat"])


def test_an_evaluation_network_is_not_compiled_anew_for_each_drop_path_probability(calls):
    """It rises with every round."""
    network = EvaluationNetwork(PUBLISHED["PDARTS"], num_classes=3, channels=2, num_cells=3, in_channels=1)
    x, called = torch.randn(4, 1, 8, 8), compiled(network)
    counts = []
    for probability in (0.0, 0.1, 0.2, 0.3, 0.4):
        torch.manual_seed(0)
        found = called(x, probability).main
        torch.manual_seed(0)
        assert torch.equal(found, network(x, probability).main)
        counts.append(len(calls))
    assert counts[1] == counts[-1] > 0


def test_what_is_recomputed_is_not_compiled(calls):
    """Dynamo would warn of what it cannot trace."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return 2 * Recomputed(self.layer)(3 * x)

    module, x = Scaled(), torch.randn(4, 3)
    found, expected = compiled(module)(x), module(x)
    assert torch.equal(found, expected)
    assert calls
    assert not any(torch.nn.functional.linear is node.target for graph in calls for node in graph.graph.nodes)
    found.sum().backward()
    assert module.layer.weight.grad.abs().sum() > 0


def test_checks_do_without(calls):
    made = engine(True, mlo.Unroll())
    made.run(0, progress=False)  # which looks at the losses for the first time
    assert made.check(progress=False).passed
    assert not calls
    made.run(1, progress=False)
    assert calls


def test_levels_named_in_a_recipe_are_those_of_its_search(calls, tmp_path):
    """The evaluation that follows has other levels."""
    settings = [
        "batch_size=16", "supernet.channels=2", "student.width=2", "evaluation.epochs=1", "evaluation.channels=2",
        "evaluation.batch_size=128", "random_cell=false",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    for names, status in (("[pupil]", 2), ("[student]", 0)):
        arguments = ["run", "lbt/digits", "--quiet", "--rounds", "1", "--output", str(tmp_path / "run"), *words]
        done = CliRunner().invoke(main, [*arguments, "--set", f"compile={names}"])
        assert done.exit_code == status, done.output
        if status:
            assert "compile: expected one of the levels teacher, student, architecture; found 'pupil'" in done.output
            assert not (tmp_path / "run").exists()
    assert calls
    assert (tmp_path / "run" / "result.json").exists()


def test_random_draws_are_those_of_the_module_itself(monkeypatch):
    """The compiler's own would be others than those of a product, which the module itself is called for."""
    monkeypatch.undo()

    def hypergradient(compiled):
        torch.manual_seed(0)
        net, gate = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double(), nn.Linear(3, 1).double()
        x = torch.randn(8, 3, dtype=torch.float64)
        levels = [
            mlo.Problem(
                name, module, loss, torch.optim.SGD(module.parameters(), lr=0.1), [x], hypergradient=mlo.Unroll()
            )
            for name, module, loss in (
                ("net", net, lambda levels, batch: (levels.net(batch) - levels.gate(batch)).square().mean()),
                ("gate", gate, lambda levels, batch: levels.net(batch).square().mean()),
            )
        ]
        graph = mlo.Graph(levels, [mlo.Edge("gate", "net"), mlo.Edge("net", "gate")])
        return mlo.Engine(graph, seed=0, device="cpu", compile=compiled).hypergradient("gate")["weight"]

    torch.testing.assert_close(hypergradient(["net"]), hypergradient(False), rtol=1e-9, atol=1e-12)
