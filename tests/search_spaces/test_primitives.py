import pytest
import torch
from torch import nn

from problems.search_spaces.primitives import PRIMITIVES, FactorizedReduce, check_primitive

CHANNELS = 6
# Weights of each primitive at stride 1 with affine BatchNorms, for c channels.
NUM_WEIGHTS = {
    "none": lambda c: 0,
    "max_pool_3x3": lambda c: 0,
    "avg_pool_3x3": lambda c: 0,
    "skip_connect": lambda c: 0,
    "sep_conv_3x3": lambda c: 2 * (9 * c + c * c + 2 * c),
    "sep_conv_5x5": lambda c: 2 * (25 * c + c * c + 2 * c),
    "dil_conv_3x3": lambda c: 9 * c + c * c + 2 * c,
    "dil_conv_5x5": lambda c: 25 * c + c * c + 2 * c,
    "sep_conv_7x7": lambda c: 2 * (49 * c + c * c + 2 * c),
    "conv_7x1_1x7": lambda c: 14 * c * c + 2 * c,
}


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [child for child in module.modules() if isinstance(child, nn.Conv2d)]


def test_the_primitives_stand_in_the_published_order():
    assert list(PRIMITIVES) == list(NUM_WEIGHTS)


def test_the_mapping_is_frozen():
    with pytest.raises(TypeError):
        PRIMITIVES["none"] = PRIMITIVES["skip_connect"]


@pytest.mark.parametrize("name", PRIMITIVES)
def test_number_of_weights(name):
    module = PRIMITIVES[name](CHANNELS, 1, True)
    assert sum(p.numel() for p in module.parameters()) == NUM_WEIGHTS[name](CHANNELS)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_without_affine_only_convolutions_have_weights_and_they_have_no_bias(name):
    module = PRIMITIVES[name](CHANNELS, 2, False)
    assert [p.shape for p in module.parameters()] == [c.weight.shape for c in convolutions(module)]


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 6), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_side_of_n_becomes_ceil_n_over_stride(name, stride, size):
    out = PRIMITIVES[name](CHANNELS, stride, True)(torch.randn(2, CHANNELS, *size))
    assert out.shape == (2, CHANNELS, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize(
    ("name", "kernel", "dilation", "padding"), [("dil_conv_3x3", 3, 2, 2), ("dil_conv_5x5", 5, 2, 4)]
)
def test_dilated_convolutions_are_depthwise_and_strided_then_pointwise(name, kernel, dilation, padding):
    depthwise, pointwise = convolutions(PRIMITIVES[name](CHANNELS, 2, True))
    assert depthwise.kernel_size == (kernel, kernel)
    assert depthwise.dilation == (dilation, dilation)
    assert depthwise.padding == (padding, padding)
    assert depthwise.stride == (2, 2)
    assert depthwise.groups == CHANNELS
    assert (pointwise.kernel_size, pointwise.stride, pointwise.groups) == ((1, 1), (1, 1), 1)


@pytest.mark.parametrize(("name", "kernel"), [("sep_conv_3x3", 3), ("sep_conv_5x5", 5), ("sep_conv_7x7", 7)])
def test_separable_convolutions_stride_in_the_first_depthwise_one_only(name, kernel):
    found = convolutions(PRIMITIVES[name](CHANNELS, 2, True))
    assert [c.kernel_size[0] for c in found] == [kernel, 1, kernel, 1]
    assert [c.stride[0] for c in found] == [2, 1, 1, 1]
    assert [c.groups for c in found] == [CHANNELS, 1, CHANNELS, 1]
    assert [c.padding[0] for c in found] == [kernel // 2, 0, kernel // 2, 0]


def test_the_factorized_7x7_strides_each_axis_once():
    row, column = convolutions(PRIMITIVES["conv_7x1_1x7"](CHANNELS, 2, True))
    assert (row.kernel_size, row.stride) == ((1, 7), (1, 2))
    assert (column.kernel_size, column.stride) == ((7, 1), (2, 1))


def test_the_average_pool_does_not_count_the_padding():
    ones = torch.ones(1, 1, 5, 5)
    assert torch.equal(PRIMITIVES["avg_pool_3x3"](1, 1, True)(ones), ones)


def test_none_is_zero_whatever_its_input():
    x = torch.full((2, 3, 5, 5), float("nan"))
    assert torch.equal(PRIMITIVES["none"](3, 2, True)(x), torch.zeros(2, 3, 3, 3))


def test_skip_is_the_identity_and_at_stride_2_a_factorized_reduction():
    assert isinstance(PRIMITIVES["skip_connect"](CHANNELS, 1, True), nn.Identity)
    assert isinstance(PRIMITIVES["skip_connect"](CHANNELS, 2, True), FactorizedReduce)


@pytest.mark.parametrize("size", [(4, 6), (5, 4)])
def test_factorized_reduction_reads_even_and_odd_pixels(size):
    module = FactorizedReduce(1, 2, False).eval()
    nn.init.ones_(module.even.weight)
    nn.init.ones_(module.odd.weight)
    x = torch.randn(3, 1, *size)
    even, odd = module(x).unbind(1)
    scale = (1 + module.norm.eps) ** -0.5
    assert torch.allclose(even, x[:, 0, ::2, ::2].relu() * scale)
    expected = torch.zeros_like(even)
    inside = x[:, 0, 1::2, 1::2].relu() * scale
    expected[:, : inside.shape[1], : inside.shape[2]] = inside
    assert torch.allclose(odd, expected)


def test_factorized_reduction_refuses_a_single_channel():
    with pytest.raises(ValueError, match="out_channels >= 2, got 1"):
        FactorizedReduce(4, 1, True)


def test_an_odd_number_of_channels_is_split_unevenly():
    assert FactorizedReduce(4, 5, True)(torch.randn(2, 4, 4, 4)).shape == (2, 5, 2, 2)


def test_an_unknown_primitive_is_refused_with_the_nearest_names():
    check_primitive("skip_connect")
    with pytest.raises(ValueError, match=r"unknown primitive 'sep_conv3x3': did you mean 'sep_conv_3x3'"):
        check_primitive("sep_conv3x3")
    with pytest.raises(ValueError, match=r"unknown primitive 'qqq': The known primitives are none, max_pool_3x3"):
        check_primitive("qqq")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", [name for name in PRIMITIVES if name != "none"])
def test_second_derivatives(name, stride):
    torch.manual_seed(0)
    module = PRIMITIVES[name](2, stride, True).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    # A smooth, nonlinear function of the output, lest the second derivative of a pool be zero.
    assert torch.autograd.gradgradcheck(lambda x: module(x).square().mean(), (x,), fast_mode=True)
