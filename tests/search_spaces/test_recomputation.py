"""With activation checkpointing all numbers are the same, and memory goes down."""

import pytest
import torch
from torch import nn

import mlo
from problems.darts import ArchitectureSearch
from problems.search_spaces import Architecture, SearchSpace, Supernet
from problems.search_spaces.cells import SearchCell
from problems.search_spaces.fused import FusedCell
from problems.search_spaces.recomputation import Recomputed


def networks(cell=FusedCell, **options):
    made = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        made.append(Supernet(10, 4, 3, 1, cell=cell, checkpointing=checkpointing, **options).double())
    return made


@pytest.mark.parametrize("cell", [SearchCell, FusedCell])
def test_values_derivatives_of_two_orders_and_buffers(cell):
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    architecture = Architecture(skip_dropout=lambda progress: 0.3).double()
    found = []
    for network in networks(cell):
        torch.manual_seed(1)
        variables = [*network.parameters(), *architecture.parameters()]
        output = network(images, architecture(0.0))
        first = torch.autograd.grad(output.square().sum(), variables, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), variables, allow_unused=True)
        found.append([output, *first, *(g for g in second if g is not None), *network.buffers()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_module_that_holds_something_else_by_then():
    """The parameters bound in the forward pass count, and running statistics move once."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    found = []
    for call in (module, Recomputed(module)):
        own, other = module[0].weight, torch.full((3, 2), 0.5, dtype=torch.float64, requires_grad=True)
        module[1].reset_running_stats()
        module[0]._parameters["weight"] = other
        output = call(x)
        module[0]._parameters["weight"] = own
        module[1].track_running_stats = False
        found.append(
            [output, *torch.autograd.grad(output.square().sum(), [other]), *map(torch.clone, module.buffers())]
        )
        module[1].track_running_stats = True
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", [SearchCell, FusedCell])
@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_has_changed_by_then(training, cell):
    images, architecture = torch.randn(3, 1, 8, 8, dtype=torch.float64), Architecture().double()
    found = []
    for network in networks(cell):
        network.train(training)
        output = network(images, architecture())
        network.train(not training)
        gradients = torch.autograd.grad(output.square().sum(), [*network.parameters()])
        assert all(part.training != training for part in network.modules())
        found.append([output, *gradients, *network.buffers()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_each_backward_pass_finds_the_buffers_of_the_forward_pass():
    class Centred(nn.Linear):
        def __init__(self):
            super().__init__(2, 3)
            self.register_buffer("mean", torch.ones(3))

        def forward(self, x):
            y = super().forward(x) * self.mean
            self.mean.mul_(2)
            return y.tanh()

    module = Centred()
    output = Recomputed(module)(torch.ones(1, 2)).sum()
    first, second = (torch.autograd.grad(output, module.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(module.mean, torch.full((3,), 2.0))


def test_parameters_that_were_written_into_are_refused():
    module = nn.Linear(2, 2)
    output = Recomputed(module)(torch.ones(1, 2)).tanh()
    with torch.no_grad():
        module.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="expected parameters as the forward pass read them"):
        output.sum().backward()


@pytest.mark.parametrize(
    "estimator", [mlo.FiniteDifference(radius=1e-4), mlo.Unroll(), mlo.ConjugateGradient(iterations=3)], ids=repr
)
def test_hypergradients(estimator):
    found = []
    space = SearchSpace.uniform(("sep_conv_3x3", "dil_conv_3x3", "skip_connect"), num_nodes=2)
    for network in networks(space=space):
        torch.manual_seed(2)
        architecture, search = Architecture(space).double(), ArchitectureSearch()
        data = [(torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.randint(10, (4,))) for _ in range(4)]
        sgd = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        adam = torch.optim.Adam(architecture.parameters(), lr=0.01)
        levels = [
            mlo.Problem("network", network, search.network_loss, sgd, data, hypergradient=estimator, steps=2),
            mlo.Problem("architecture", architecture, search.architecture_loss, adam, data),
        ]
        engine = mlo.Engine(mlo.Graph(levels, search.edges), seed=0, device="cpu")
        found.append([*engine.hypergradient("architecture").values()])
        engine.run(1, progress=False)
        found[-1] += [*network.parameters(), *network.buffers(), *architecture.parameters()]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_fewer_tensors_are_kept():
    images, architecture = torch.randn(4, 1, 16, 16, dtype=torch.float64), Architecture().double()
    kept = []
    for network in networks():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            network(images, architecture())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4
