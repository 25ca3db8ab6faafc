"""The fused cell is the plain one, faster: values, derivatives of both orders, buffers and state dicts."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from problems.search_spaces import DARTS, Architecture, SearchSpace, Supernet, fused
from problems.search_spaces.cells import CellShape, EdgeState, MixedOperation, SearchCell
from problems.search_spaces.fused import FusedCell
from problems.search_spaces.pc_darts import PartialOperation
from problems.search_spaces.primitives import PRIMITIVES

ODD = SearchSpace.uniform(("none", "conv_7x1_1x7", "sep_conv_7x7", "skip_connect"), num_nodes=2)
PRUNED = tuple(DARTS.normal[0][shift : shift + 3] for shift in (0, 5, 1, 4, 2))
"""Each edge has primitives of its own, as in P-DARTS."""


def pair(shape, primitives, operation, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    plain, fast = (cell(shape, primitives, operation).double() for cell in (SearchCell, FusedCell))
    fast.load_state_dict(plain.state_dict())
    return plain, fast.to(memory_format=memory_format)


def found(cell, inputs, weights, edge_weights, states):
    """What a pass gives, its gradients, and gradients of those."""
    output = cell(*inputs, weights, edge_weights, states)
    variables = [*cell.parameters(), weights] + ([] if edge_weights is None else [edge_weights])
    first = torch.autograd.grad(output.square().sum(), variables, create_graph=True, allow_unused=True)
    first = [torch.zeros_like(v) if g is None else g for g, v in zip(first, variables, strict=True)]
    second = torch.autograd.grad(sum(g.square().sum() for g in first), variables)
    return output, first, second


@pytest.mark.parametrize(
    ("num_grouped", "memory_format"),
    [(1, torch.contiguous_format), (3, torch.channels_last), (8, torch.channels_last)],
    ids=["apart", "some together", "inputs joined"],
)
@pytest.mark.parametrize("primitives", [DARTS.normal, ODD.normal, PRUNED], ids=["darts", "other", "pruned"])
@pytest.mark.parametrize("reduces", [False, True])
@pytest.mark.parametrize(
    ("operation", "size"),
    [(MixedOperation, 6), (partial(MixedOperation, auxiliary_skip=True), 5), (PartialOperation, 4)],
    ids=["plain", "auxiliary skip", "partial"],
)
def test_values_derivatives_and_buffers(operation, size, reduces, primitives, memory_format, num_grouped, monkeypatch):  # noqa: PLR0917
    follows_reduction = size == 5
    monkeypatch.setattr(fused, "_CACHED", num_grouped * 2 * 8 * size * size)
    shape = CellShape((6, 6), 8, reduces, follows_reduction)
    plain, fast = pair(shape, primitives, operation, memory_format)
    before = 2 * size - 1 if follows_reduction else size
    inputs = torch.randn(2, 6, before, before).double(), torch.randn(2, 6, size, size).double()
    weights = torch.rand(len(primitives), len(primitives[0]), dtype=torch.float64, requires_grad=True)
    edge_weights = torch.rand(len(primitives), dtype=torch.float64, requires_grad=True)
    for factors in (None, edge_weights):
        states = [EdgeState(auxiliary_skip=0.7 if size == 5 else 0.0)] * len(primitives)
        expected, actual = (found(cell, inputs, weights, factors, states) for cell in (plain, fast))
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    for (name, a), b in zip(plain.named_buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


def test_supernets_are_fused_and_state_dicts_are_interchangeable():
    plain, fast = (Supernet(10, 4, 3, 1, cell=cell).double() for cell in (SearchCell, FusedCell))
    assert all(type(cell) is FusedCell for cell in Supernet(10, 4, 3, 1).cells)
    fast.load_state_dict(plain.state_dict())
    images, architecture = torch.randn(3, 1, 8, 8).double(), Architecture().double()
    torch.testing.assert_close(fast(images, architecture()), plain(images, architecture()))
    plain.load_state_dict(fast.state_dict())
    for network in (plain, fast):
        network.eval()
    assert torch.equal(fast(images, architecture()), plain(images, architecture()))


def test_running_statistics_stand_still_where_they_are_switched_off():
    _, fast = pair(CellShape((6, 6), 4, False, False), DARTS.normal, MixedOperation)
    for part in fast.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats = False
    before = [buffer.clone() for buffer in fast.buffers()]
    fast(*torch.randn(2, 2, 6, 4, 4).double(), torch.rand(14, 8).double())
    assert all(map(torch.equal, before, fast.buffers()))


def test_skips_are_dropped_element_by_element():
    primitives = (("skip_connect",),) * 2
    _, fast = pair(CellShape((4, 4), 4, False, False), primitives, MixedOperation)
    inputs = torch.randn(2, 2, 4, 50, 50).double()
    kept = fast(*inputs, torch.ones(2, 1).double())
    first, second = fast.preprocess(*inputs)
    torch.testing.assert_close(kept, first + second)
    torch.manual_seed(3)
    dropped = fast(*inputs, torch.ones(2, 1).double(), None, [EdgeState(skip_dropout=0.75), EdgeState()]) - second
    share = (dropped.abs() < 1e-12).double().mean()
    rectified = 0.75
    assert abs(share - rectified) < 5 * (rectified * (1 - rectified) / dropped.numel()) ** 0.5
    torch.testing.assert_close(dropped[dropped.abs() > 1e-12], (4 * first)[dropped.abs() > 1e-12])


def test_edges_of_another_class_and_other_normalizations_take_the_plain_way():
    class Doubled(MixedOperation):
        def forward(self, x, weights, state):
            return 2 * super().forward(x, weights, state)

    shape, inputs = CellShape((6, 6), 4, False, False), torch.randn(2, 2, 6, 4, 4).double()
    weights = torch.rand(14, 8).double()
    plain, fast = pair(shape, DARTS.normal, Doubled)
    assert torch.equal(fast(*inputs, weights), plain(*inputs, weights))
    plain, fast = pair(shape, DARTS.normal, MixedOperation)
    for cell in (plain, fast):
        cell.edges[0].operations["max_pool_3x3"][1] = nn.Identity()
        cell.edges[3].operations["sep_conv_3x3"][3] = nn.BatchNorm2d(4).double()
    assert torch.equal(fast(*inputs, weights), plain(*inputs, weights))


def test_what_a_cell_holds_is_used_and_not_what_it_was_built_with():
    plain, fast = pair(CellShape((4, 4), 4, False, False), DARTS.normal, MixedOperation)
    for cell in (plain, fast):
        torch.manual_seed(1)
        cell.edges[0].operations["sep_conv_3x3"] = PRIMITIVES["sep_conv_3x3"](4, 1, False).double()
        cell.edges[1] = MixedOperation(DARTS.normal[1], 4, 1).double()
    inputs = *torch.randn(2, 2, 4, 4, 4).double(), torch.rand(14, 8).double()
    torch.testing.assert_close(fast(*inputs), plain(*inputs), rtol=1e-9, atol=1e-9)


def _other(name, index, module):
    def change(cell):
        cell.edges[0].operations[name][index] = module()

    return change


def _new_edges(cell):
    cell.edges = nn.ModuleList(MixedOperation(DARTS.normal[0], 4, 1) for _ in range(14)).double()


def _another_order(cell):
    cell.edges[1] = MixedOperation(DARTS.normal[1][::-1], 4, 1).double()


def _hook(cell):
    cell.edges[0].operations["sep_conv_3x3"].register_forward_hook(lambda module, args, output: 2 * output)


def _longer(cell):
    cell.edges[0].operations["sep_conv_3x3"].append(nn.LeakyReLU(-0.5))


def _pruned(cell):
    conv = prune.random_unstructured(cell.edges[0].operations["sep_conv_3x3"][1], "weight", 0.5)
    conv.weight_orig.data.mul_(3)  # the weight is made of it when the convolution is called


class Halved(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


Halved.__name__ = "Conv2d"  # the text of a cell that holds it is that of a plain one


def _without_statistics(cell):
    for part in cell.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = part.running_var = None


def _without_counts(cell):
    for part in cell.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.num_batches_tracked = None


CHANGES = {
    "same name": _other("sep_conv_3x3", 1, lambda: Halved(4, 4, 3, padding=1, groups=4, bias=False).double()),
    "no statistics": _without_statistics,
    "no counts": _without_counts,
    "ReLU": _other("sep_conv_3x3", 0, lambda: nn.LeakyReLU(0.3)),
    "padding": _other("dil_conv_3x3", 1, lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False,
                                                           padding_mode="reflect").double()),
    "bias": _other("sep_conv_3x3", 2, lambda: nn.Conv2d(4, 4, 1).double()),
    "average": _other("avg_pool_3x3", 0, lambda: nn.AvgPool2d(3, 1, 1)),
    "new edges": _new_edges,
    "order": _another_order,
    "hook": _hook,
    "longer": _longer,
    "pruned": _pruned,
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_do_what_they_do_in_the_plain_cell(change, training):
    plain, fast = pair(CellShape((4, 4), 4, False, False), DARTS.normal, MixedOperation)
    inputs = *torch.randn(2, 2, 4, 6, 6).double(), torch.rand(14, 8).double()
    fast(*inputs)
    for cell in (plain, fast):
        torch.manual_seed(1)
        CHANGES[change](cell)
        cell.train(training)
    fast.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fast(*inputs), plain(*inputs), rtol=1e-9, atol=1e-9)


def test_hooks_on_all_modules_are_called():
    plain, fast = pair(CellShape((4, 4), 4, False, False), DARTS.normal, MixedOperation)
    inputs = *torch.randn(2, 2, 4, 6, 6).double(), torch.rand(14, 8).double()

    def doubled(module, args, output):
        return 2 * output if isinstance(module, nn.Conv2d) and module.groups > 1 else None

    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        torch.testing.assert_close(fast(*inputs), plain(*inputs), rtol=1e-9, atol=1e-9)
    finally:
        handle.remove()


def test_edges_that_are_not_alike_take_the_plain_way():
    def operation(primitives, channels, stride, **options):
        kind = partial(PartialOperation, k=2) if stride == 1 else MixedOperation
        return kind(primitives, channels, stride, **options)

    torch.manual_seed(0)
    plain, fast = (Supernet(3, 4, 3, operation=operation, cell=cell).double() for cell in (SearchCell, FusedCell))
    fast.load_state_dict(plain.state_dict())
    images, architecture = torch.randn(2, 3, 8, 8).double(), Architecture().double()
    torch.testing.assert_close(fast(images, architecture()), plain(images, architecture()), rtol=1e-9, atol=1e-9)


def test_autocast_leaves_float64_alone():
    plain, fast = pair(CellShape((4, 4), 4, False, False), DARTS.normal, MixedOperation)
    inputs = *torch.randn(2, 2, 4, 6, 6).double(), torch.rand(14, 8).double()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(*inputs), plain(*inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tracking", [True, False])
def test_weights_of_another_dtype(tracking):
    plain, fast = (cell.float() for cell in pair(CellShape((4, 4), 4, False, False), DARTS.normal, MixedOperation))
    for part in (*plain.modules(), *fast.modules()):
        if isinstance(part, nn.BatchNorm2d) and not tracking:
            part.track_running_stats = False
            part.running_mean = part.running_var = part.num_batches_tracked = None
    inputs = *torch.randn(2, 2, 4, 6, 6), torch.rand(14, 8, dtype=torch.float64), torch.rand(14, dtype=torch.float64)
    assert fast(*inputs).dtype == torch.float32
    torch.testing.assert_close(fast(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4)


def test_nothing_is_dropped_in_evaluation_mode():
    """Nor where there is nothing to normalize."""
    plain, fast = pair(CellShape((4, 4), 4, False, False), (("none", "skip_connect"),) * 5, MixedOperation)
    inputs = *torch.randn(2, 2, 4, 4, 4).double(), torch.rand(5, 2).double(), None, [EdgeState(skip_dropout=0.5)] * 5
    torch.testing.assert_close(fast.eval()(*inputs), plain.eval()(*inputs))


@pytest.mark.parametrize("num_grouped", [1, 4])
@pytest.mark.parametrize("primitives", [("max_pool_3x3", "sep_conv_3x3"), ("skip_connect", "sep_conv_3x3")], ids=str)
def test_auxiliary_skips_in_lower_precision(primitives, num_grouped, monkeypatch):
    """Whose scale is a constant, beside statistics in single precision."""
    monkeypatch.setattr(fused, "_CACHED", num_grouped * 4 * 4 * 8 * 8)
    operation = partial(MixedOperation, auxiliary_skip=True)
    shape, names = CellShape((4, 4), 4, True, False), (primitives,) * 5
    plain, fast = (cell.float() for cell in pair(shape, names, operation))
    inputs = *torch.randn(2, 4, 4, 8, 8), torch.rand(5, 2), None, [EdgeState(auxiliary_skip=0.5)] * 5
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fast(*inputs).float(), plain(*inputs).float()
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_replicas_use_their_own_modules():
    """As `nn.DataParallel` makes them."""
    cell = FusedCell(CellShape((4, 4), 4, False, False), DARTS.normal).double()
    replica = cell._replicate_for_data_parallel()
    other = FusedCell(CellShape((4, 4), 4, False, False), DARTS.normal).double()
    replica._modules = dict(other._modules)
    inputs = *torch.randn(2, 2, 4, 6, 6).double(), torch.rand(14, 8).double()
    torch.testing.assert_close(replica(*inputs), other(*inputs), rtol=1e-9, atol=1e-9)
    assert all(int(part.num_batches_tracked) == 0 for part in cell.modules() if isinstance(part, nn.BatchNorm2d))


def test_weights_that_do_not_fit_do_what_they_do_in_the_plain_cell():
    plain, fast = pair(CellShape((4, 4), 4, False, False), DARTS.normal, MixedOperation)
    inputs = torch.randn(2, 2, 4, 6, 6).double()
    for cell in (plain, fast):
        with pytest.raises(ValueError, match="zip"):
            cell(*inputs, torch.rand(14, 9).double())
    weights = torch.rand(14, 8).double(), torch.rand(14, 1).double()
    torch.testing.assert_close(fast(*inputs, *weights), plain(*inputs, *weights))
