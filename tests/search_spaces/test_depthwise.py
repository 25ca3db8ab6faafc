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


@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 13])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 6), (4, 9), (1, 2), (2, 1)])
def test_single_precision_by_columns(kernel, stride, size):
    x = torch.randn(3, 4, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(4, 1, kernel, kernel, requires_grad=True)
    expected = functional.conv2d(x.double(), w.double(), stride=stride, padding=kernel // 2, groups=4)
    direction = torch.randn(expected.shape)
    for create_graph in (False, True):
        found = torch.autograd.grad(depthwise(x, w, stride), (x, w), direction, create_graph=create_graph)
        exact = torch.autograd.grad(expected, (x, w), direction.double(), retain_graph=True)
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leaf", [True, False])
def test_gradients_that_nobody_asks_for_are_not_computed(leaf, monkeypatch):
    wanted = []
    monkeypatch.setattr(
        "problems.search_spaces.depthwise._pullback",
        lambda g, x, w, how, asked: wanted.append(asked) or (torch.zeros_like(x), torch.zeros_like(w)),
    )
    x, w = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(2, 1, 3, 3, requires_grad=True)
    y = depthwise(x.sin(), w if leaf else w.sin()).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    torch.autograd.grad(y, w, retain_graph=True)
    y.backward(inputs=[x], retain_graph=True)
    y.backward()
    assert wanted == [(True, False), (False, True), (True, False), (True, True)]
    assert x.grad is not None
    assert w.grad is not None
