import pytest
import torch
from torch import nn
from torch.nn import functional

from problems.search_spaces.darts import CellWeights, SearchSpace
from problems.search_spaces.relaxations import GumbelSoftmax, Sigmoid
from problems.search_spaces.supernet import Architecture, Supernet

TINY = SearchSpace.uniform(num_nodes=1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(num_cells: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Supernet, Architecture]:
    supernet = Supernet(3, channels=2, num_cells=num_cells, in_channels=1, space=TINY)
    return supernet.to(dtype), Architecture(TINY).to(dtype)


def test_number_of_weights_for_cifar10():
    supernet = Supernet(num_classes=10, channels=16, num_cells=8)
    assert sum(p.numel() for p in supernet.parameters()) == 1_930_618


def test_the_architecture_starts_small_and_its_weights_are_a_softmax():
    architecture = Architecture()
    assert {name: tuple(p.shape) for name, p in architecture.named_parameters()} == {
        "normal": (14, 8),
        "reduce": (14, 8),
    }
    assert 5e-4 < architecture.normal.std() < 2e-3
    weights = architecture()
    assert isinstance(weights, CellWeights)
    assert torch.allclose(weights.reduce, architecture.reduce.softmax(1))


def test_another_relaxation_plugs_in():
    architecture = Architecture(TINY, relaxation=Sigmoid())
    assert torch.equal(architecture().normal, architecture.normal.sigmoid())


def test_the_architecture_discretizes_the_softmax_of_alpha_whatever_the_relaxation():
    architecture = Architecture(TINY, relaxation=GumbelSoftmax())
    with torch.no_grad():
        architecture.normal[1, 3] = 2.0
        architecture.normal[0, 7] = 1.0
        architecture.reduce[0, 4] = 2.0
        architecture.reduce[1, 1] = 1.0
    genotype = architecture.discretize()
    assert genotype.normal == (("skip_connect", 1), ("dil_conv_5x5", 0))
    assert genotype.reduce == (("sep_conv_3x3", 0), ("max_pool_3x3", 1))


def test_batchnorms_are_affine_in_the_stem_only():
    supernet, _ = tiny()
    affine = {name for name, m in supernet.named_modules() if isinstance(m, nn.BatchNorm2d) and m.affine}
    assert len(affine) == 1
    assert affine.pop().startswith("stem")


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (7, 5), (1, 1)])
@pytest.mark.parametrize("num_cells", [1, 2, 3, 5])
def test_any_image_size_and_depth(num_cells, size):
    supernet, architecture = tiny(num_cells, torch.float32)
    assert supernet(torch.randn(2, 1, *size), architecture()).shape == (2, 3)


def test_each_cell_type_takes_its_own_weights():
    supernet, architecture = tiny(3)
    logits = supernet(torch.randn(4, 1, 8, 8).double(), architecture())
    normal, reduce = torch.autograd.grad(logits.square().sum(), list(architecture.parameters()))
    assert normal.abs().sum() > 0
    assert reduce.abs().sum() > 0
    only_reductions, _ = tiny(2)
    logits = only_reductions(torch.randn(4, 1, 8, 8).double(), architecture())
    assert torch.autograd.grad(logits.sum(), architecture.normal, allow_unused=True) == (None,)


@pytest.mark.parametrize("cell", ["normal", "reduce"])
def test_weights_of_another_space_are_refused(cell):
    supernet, architecture = tiny(1, torch.float32)
    weights = architecture()._replace(**{cell: torch.zeros(14, 8)})
    with pytest.raises(ValueError, match=rf"weights.{cell}: expected \(edges, primitives\) = \(2, 8\), got \(14, 8\)"):
        supernet(torch.randn(2, 1, 8, 8), weights)


def test_edges_may_keep_different_primitives():
    space = SearchSpace(
        normal=(("skip_connect", "none"), ("max_pool_3x3", "sep_conv_3x3")),
        reduce=(("dil_conv_3x3", "avg_pool_3x3", "none"), ("skip_connect", "max_pool_3x3", "none")),
    )
    supernet = Supernet(3, channels=2, num_cells=3, in_channels=1, space=space)
    assert supernet(torch.randn(2, 1, 8, 8), Architecture(space)()).shape == (2, 3)


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_alpha_is_the_numerical_one(training):
    supernet, architecture = tiny()
    x, y = torch.randn(4, 1, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    supernet.train(training)
    direction = [torch.randn_like(p) for p in architecture.parameters()]

    def loss(step: float) -> torch.Tensor:
        alphas = [p + step * d for p, d in zip(architecture.parameters(), direction, strict=True)]
        return functional.cross_entropy(supernet(x, CellWeights(*(a.softmax(-1) for a in alphas))), y)

    gradients = torch.autograd.grad(loss(0.0), list(architecture.parameters()))
    analytic = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    numerical = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert torch.allclose(analytic, numerical, rtol=1e-6)


def test_the_mixed_product_by_double_backward_is_the_numerical_one():
    supernet, architecture = tiny()
    x, y = torch.randn(4, 1, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    parameters = list(supernet.parameters())
    vector = [torch.randn_like(p) for p in parameters]
    direction = [torch.randn_like(p) for p in architecture.parameters()]

    def slope(step: float, *, create_graph: bool = False) -> torch.Tensor:
        alphas = [p + step * d for p, d in zip(architecture.parameters(), direction, strict=True)]
        loss = functional.cross_entropy(supernet(x, CellWeights(*(a.softmax(-1) for a in alphas))), y)
        gradients = torch.autograd.grad(loss, parameters, create_graph=create_graph)
        return sum((g * v).sum() for g, v in zip(gradients, vector, strict=True))

    mixed = torch.autograd.grad(slope(0.0, create_graph=True), list(architecture.parameters()))
    analytic = sum((m * d).sum() for m, d in zip(mixed, direction, strict=True))
    numerical = (slope(1e-6) - slope(-1e-6)) / 2e-6
    assert analytic.abs() > 1e-6
    assert torch.allclose(analytic, numerical, rtol=1e-5)


def test_forward_makes_no_cpu_tensor_and_reads_no_value():
    # On the meta device either would raise.
    with torch.device("meta"):
        supernet, architecture = tiny()
        x = torch.empty(4, 1, 8, 8, dtype=torch.float64)
    logits = supernet(x, architecture())
    torch.autograd.grad(logits.sum(), [*supernet.parameters(), *architecture.parameters()])
    assert logits.device.type == "meta"


def test_channels_last_changes_nothing():
    supernet, architecture = tiny()
    x = torch.randn(4, 1, 8, 8).double()
    expected = supernet(x, architecture())
    supernet.to(memory_format=torch.channels_last)
    assert torch.allclose(supernet(x.contiguous(memory_format=torch.channels_last), architecture()), expected)


def test_autocast():
    supernet, architecture = tiny(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = supernet(torch.randn(4, 1, 8, 8), architecture())
    assert logits.dtype == torch.bfloat16
    gradients = torch.autograd.grad(logits.float().sum(), list(architecture.parameters()))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_cell_may_be_replaced(checkpointing):
    torch.manual_seed(0)
    first, second = (Supernet(4, 4, 3, 1, checkpointing=checkpointing).double() for _ in range(2))
    x, weights = torch.randn(3, 1, 8, 8).double(), Architecture().double()()
    second.load_state_dict(first.state_dict() | {k: v for k, v in second.state_dict().items() if "cells.1." in k})
    first.cells[1] = second.cells[1]
    assert torch.equal(first(x, weights), second(x, weights))
