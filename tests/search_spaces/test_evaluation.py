import pytest
import torch
from torch import nn

from problems.search_spaces.evaluation import AuxiliaryHead, EvaluationNetwork
from problems.search_spaces.genotypes import PUBLISHED, Genotype

# Weights without the auxiliary head for CIFAR-10, CIFAR-100 (C36, L20) and ImageNet (C48, L14), then the multiply-adds
# of the last at 224 x 224, convolutions and linear layers, in millions.
PUBLISHED_SIZES = {
    "DARTS_V1": (3_169_414, 3_221_344, 4_510_432, 506),
    "DARTS_V2": (3_349_342, 3_401_272, 4_718_752, 530),
    "PDARTS": (3_433_798, 3_485_728, 4_944_352, 543),
    "PC_DARTS_cifar": (3_634_678, 3_686_608, 5_270_560, 571),
    "PC_DARTS_image": (3_721_510, 3_773_440, 5_342_464, 582),
    "NASNet": (3_830_950, 3_895_840, 5_564_320, 604),
    "AmoebaNet": (3_145_078, 3_184_048, 4_627_360, 527),
}
SKIPS = (("skip_connect", 0), ("skip_connect", 1))
SMALL = Genotype(SKIPS, (2,), (("max_pool_3x3", 0), ("sep_conv_3x3", 1)), (2,))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def num_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small(**options) -> EvaluationNetwork:
    return EvaluationNetwork(SMALL, 5, channels=4, num_cells=3, in_channels=1, **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_weights_for_cifar(name):
    network = EvaluationNetwork(PUBLISHED[name], num_classes=10)
    cifar10, cifar100, *_ = PUBLISHED_SIZES[name]
    assert num_weights(network) == cifar10
    # Only the classifier knows the number of classes.
    assert num_weights(network) + 90 * (network.classifier.in_features + 1) == cifar100


def test_number_of_weights_for_cifar100():
    network = EvaluationNetwork(PUBLISHED["PDARTS"], num_classes=100)
    assert num_weights(network) == PUBLISHED_SIZES["PDARTS"][1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_weights_and_multiply_adds_for_imagenet(name):
    network = EvaluationNetwork(PUBLISHED[name], 1000, channels=48, num_cells=14, stem="imagenet").eval()
    multiply_adds = []

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        # The network halves its images five times, so that every map is exactly 7 x 7 times as large at 224 as at 32.
        scale = 7 * 7 if isinstance(module, nn.Conv2d) else 1
        multiply_adds.append(scale * module.weight[0].numel() * out.numel())

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    network(torch.randn(1, 3, 32, 32))
    *_, weights, millions = PUBLISHED_SIZES[name]
    assert num_weights(network) == weights
    assert round(sum(multiply_adds) / 1e6) == millions


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_genotype_runs_on_small_images(name):
    network = EvaluationNetwork(PUBLISHED[name], 10, channels=4, num_cells=3, in_channels=1, auxiliary=True)
    logits = network(torch.randn(4, 1, 8, 8), 0.2)
    assert logits.main.shape == (4, 10)
    assert logits.auxiliary.shape == (4, 10)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("size", [(64, 64), (37, 51)])
def test_stems_and_odd_sizes(stem, size):
    assert small(stem=stem)(torch.randn(2, 1, *size)).main.shape == (2, 5)


def test_the_imagenet_stem_gives_the_first_cell_a_fourth_and_an_eighth_of_the_resolution():
    network = small(stem="imagenet")
    before_last, last = network.stem(torch.randn(2, 1, 64, 64))
    assert before_last.shape == (2, 4, 16, 16)
    assert last.shape == (2, 4, 8, 8)


def test_auxiliary_logits_come_from_the_head_in_train_mode_only():
    x = torch.randn(2, 1, 16, 16)
    assert small()(x).auxiliary is None
    network = small(auxiliary=True)
    assert network(x).auxiliary.shape == (2, 5)
    assert network.eval()(x).auxiliary is None


@pytest.mark.parametrize(("side", "stride", "final_norm"), [(8, 3, True), (7, 2, False)])
def test_the_auxiliary_head_is_the_published_one_at_the_published_sizes(side, stride, final_norm):
    head = AuxiliaryHead(6, 10, final_norm=final_norm)
    published = nn.Sequential(
        nn.ReLU(),
        nn.AvgPool2d(5, stride, padding=0, count_include_pad=False),
        head.features,
        nn.Flatten(),
        head.classifier,
    )
    x = torch.randn(4, 6, side, side)
    assert torch.allclose(head(x), published(x), atol=1e-6)
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d if final_norm else nn.Identity, nn.ReLU]
    assert [type(module) for module in head.features] == kinds
    assert num_weights(head) == 6 * 128 + 256 + 128 * 768 * 4 + 2 * 768 * final_norm + 768 * 10 + 10


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_head_stands_after_the_second_reduction(stem):
    maps = []
    network = small(auxiliary=True, stem=stem)
    network.auxiliary_head.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0].shape))
    side = 32 if stem == "cifar" else 224
    network(torch.randn(2, 1, side, side))
    assert maps == [(2, 16, side // 4, side // 4) if stem == "cifar" else (2, 16, 7, 7)]
    assert isinstance(network.auxiliary_head.features[4], nn.BatchNorm2d) == (stem == "cifar")


@pytest.mark.parametrize("side", range(2, 20))
def test_the_pool_of_the_head_reads_every_pixel(side):
    head = AuxiliaryHead(1, 2, final_norm=True).eval()
    pooled = []
    head.features.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    x = torch.ones(1, 1, side, side, requires_grad=True)
    head(x)
    assert pooled[0].shape == (1, 1, 2, 2)
    (gradient,) = torch.autograd.grad(pooled[0].sum(), x)
    assert (gradient > 0).all()


def test_the_head_refuses_a_single_pixel():
    network = small(auxiliary=True)
    with pytest.raises(ValueError, match="at least 2x2 pixels, got 1x2"):
        network(torch.randn(2, 1, 4, 8))
    assert network.eval()(torch.randn(2, 1, 4, 8)).main.shape == (2, 5)


def test_drop_path_is_random_in_train_mode_and_absent_in_eval_mode():
    network = small()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(network(x).main, network(x).main)
    assert not torch.equal(network(x, 0.5).main, network(x, 0.5).main)
    network.eval()
    assert torch.equal(network(x, 0.5).main, network(x).main)


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_a_drop_path_probability_that_is_none_is_refused(probability):
    with pytest.raises(ValueError, match="0 <= drop_path_probability < 1"):
        small()(torch.randn(2, 1, 8, 8), probability)


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="unknown stem 'mnist': expected 'cifar' or 'imagenet'"):
        small(stem="mnist")


def test_the_imagenet_stem_needs_two_channels():
    with pytest.raises(ValueError, match="expected channels >= 2, got 1"):
        EvaluationNetwork(SMALL, 5, channels=1, stem="imagenet")


def test_forward_makes_no_cpu_tensor_and_reads_no_value():
    # On the meta device either would raise.
    with torch.device("meta"):
        network = small(auxiliary=True)
        x = torch.empty(4, 1, 8, 8)
    logits = network(x, 0.3)
    torch.autograd.grad((logits.main + logits.auxiliary).sum(), list(network.parameters()))
    assert logits.main.device.type == "meta"


def test_float64_and_channels_last():
    network = small().double()
    x = torch.randn(4, 1, 8, 8).double()
    expected = network(x).main
    network.to(memory_format=torch.channels_last)
    assert torch.allclose(network(x.contiguous(memory_format=torch.channels_last)).main, expected)
