"""The family of depthwise convolutions: PyTorch's values, and derivatives of every order."""

import pytest
import torch
from torch.nn import functional

from problems.search_spaces.depthwise import depthwise

CASES = [(3, 1, 1), (5, 2, 1), (3, 1, 2), (5, 2, 2)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), CASES)
@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_values_and_first_derivatives_are_pytorchs(kernel, stride, dilation, size, memory_format):
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    w = torch.randn(3, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    expected = functional.conv2d(x, w, stride=stride, padding=dilation * (kernel // 2), dilation=dilation, groups=3)
    found = depthwise(x, w, stride, dilation)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for create_graph in (False, True):
        torch.testing.assert_close(
            torch.autograd.grad(found, (x, w), direction, retain_graph=True, create_graph=create_graph),
            torch.autograd.grad(expected, (x, w), direction, retain_graph=True),
        )


@pytest.mark.parametrize(("kernel", "stride", "dilation"), CASES)
def test_second_and_third_derivatives(kernel, stride, dilation):
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)

    def found(x, w):
        return depthwise(x, w, stride, dilation).sin()

    assert torch.autograd.gradgradcheck(found, (x, w))

    def gradient(x, w):
        return torch.autograd.grad(found(x, w).square().sum(), (x, w), create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, (x, w))


def test_autocast():
    x, w = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = depthwise(x, w)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.float().sum(), (x, w))] == [torch.float32] * 2
