"""Arithmetic on gradients."""

import math

import pytest
import torch

from mlo.arithmetic import norm

LAYOUTS = {
    "contiguous": lambda: torch.randn(64, 96, 5, 7),
    "channels last": lambda: torch.randn(64, 96, 5, 7).to(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(64, 192, 7)[:, ::2, 1:],
    "expanded": lambda: torch.randn(500, 1).expand(500, 600),
    "long": lambda: torch.randn(400_003),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 2e-7), (torch.bfloat16, 4e-3)])
def test_the_norm_of_all_entries_in_any_layout(layout, dtype, rel):
    torch.manual_seed(0)
    tensors = [LAYOUTS[layout]().to(dtype), torch.randn(3, 4, dtype=dtype), torch.tensor(2.0, dtype=dtype)]
    found = norm([tensors[0], None, *tensors[1:]])
    expected = math.sqrt(sum(t.double().square().sum().item() for t in tensors))
    assert found.dtype == dtype
    assert found.item() == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("num", [5, 200_000])
def test_the_norm_neither_overflows_nor_underflows(size, num):
    assert norm([torch.full((num,), size)]).item() == pytest.approx(size * math.sqrt(num), rel=1e-6)


def test_the_norm_is_differentiable_and_has_derivative_zero_at_zero():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(norm([x]), x)[0], torch.tensor([0.6, 0.8]))
    zero = torch.zeros(2, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(norm([zero]), zero)[0], torch.zeros(2))
