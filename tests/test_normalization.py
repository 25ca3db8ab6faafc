"""Layer normalization of which all derivatives are right."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mlo.normalization import LayerNormInSteps, layer_norm


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
@pytest.mark.parametrize("affine", [False, True])
def test_values_and_two_derivatives_are_pytorchs(shape, affine):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, *shape, dtype=torch.float64) if affine else (None, None)
    assert torch.autograd.gradgradcheck(lambda x: layer_norm(x, shape, weight, bias), x)
    torch.testing.assert_close(layer_norm(x, shape, weight, bias, 0.1), torch.layer_norm(x, shape, weight, bias, 0.1))


def test_the_third_derivative():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def second(x):
        (g,) = torch.autograd.grad(layer_norm(x, (3,)).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x, create_graph=True)

    assert torch.autograd.gradcheck(second, x)


def test_it_takes_the_place_of_pytorchs_within_the_block_alone():
    x, module, attention = (
        torch.randn(2, 3, 4),
        nn.LayerNorm(4),
        nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
    )
    x.requires_grad_()
    for function in (
        module,
        attention,
        lambda x: functional.layer_norm(x, [4], eps=0.1),
        lambda x: torch.layer_norm(x, [4]),
    ):
        expected = function(x)
        with LayerNormInSteps():
            found = function(x)
        torch.testing.assert_close(found, expected)
        assert "NativeLayerNorm" in str(graph(expected))
        assert "NativeLayerNorm" not in str(graph(found))


def graph(tensor):
    """Return the names of all operations that a tensor comes from."""
    names, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [following for following, _ in node.next_functions if following is not None]
    return names


def test_lower_precision():
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    weight = torch.randn(8, dtype=torch.bfloat16)
    found, expected = layer_norm(x, (8,), weight), functional.layer_norm(x, (8,), weight)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
