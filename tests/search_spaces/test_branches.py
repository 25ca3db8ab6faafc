"""What the fused cell is made of, against what it stands for."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from problems.search_spaces.branches import add_products, concatenate, pool

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(5, 5), (6, 4), (1, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [1, 2, 16])
def test_averages_leave_the_border_out(channels, stride, size, layout):
    """Also of the first channels of more, as in PC-DARTS."""
    x = torch.randn(2, channels + 2, *size, dtype=torch.float64).to(memory_format=layout)[:, :channels].requires_grad_()
    module = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    torch.testing.assert_close(pool(module, x), module(x), rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda x: pool(module, x), x)


@pytest.mark.parametrize(
    "module", [nn.MaxPool2d(3, 1, padding=1), nn.AvgPool2d(2), nn.AvgPool2d((3, 3), padding=(0, 1))]
)
def test_other_pools_are_left_as_they_are(module):
    x = torch.randn(2, 2, 6, 6).to(memory_format=torch.channels_last)
    assert torch.equal(pool(module, x), module(x))


@pytest.mark.parametrize("begun", [False, True])
def test_sums_of_products_have_derivatives_of_two_orders(begun):
    """The first factor is in both sums, the second one in the second sum alone, twice."""
    places = [(0, 0), (1, 0), (1, 1), (1, 1)]

    def sums(*tensors):
        before = [t * 1 for t in tensors[:2]] if begun else [None, None]
        return tuple(add_products(before, tensors[2:4], tensors[4:], places))

    shapes = [(2, 3, 2, 2)] * 4 + [()] * 4
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    a, b, x, y, *scales = tensors
    wanted = x * scales[0], x * scales[1] + y * scales[2] + y * scales[3]
    for found, right, first in zip(sums(*tensors), wanted, (a, b), strict=True):
        torch.testing.assert_close(found, first + right if begun else right)
    assert gradcheck(sums, tensors)
    assert gradgradcheck(sums, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_nodes_are_laid_out_as_the_nodes(layout):
    nodes = [torch.randn(2, 3, 4, 4).to(memory_format=layout).requires_grad_() for _ in range(2)]
    joined = concatenate(nodes)
    assert torch.equal(joined, torch.cat(nodes, dim=1))
    for g in torch.autograd.grad(functional.relu(joined), nodes, torch.ones_like(joined)):
        assert g.is_contiguous(memory_format=layout)
