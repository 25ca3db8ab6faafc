import pytest
import torch
from torch.nn import functional

from problems.search_spaces import RELAXATIONS, Architecture, SearchSpace, Supernet
from problems.search_spaces.cells import EdgeState
from problems.search_spaces.relaxations import AuxiliarySkip, GumbelSoftmax, Sigmoid, Softmax

SPACE = SearchSpace.uniform(("none", "skip_connect", "sep_conv_3x3", "max_pool_3x3"), num_nodes=2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(relaxation, **options):
    supernet = Supernet(3, 2, 3, 1, space=SPACE, auxiliary_skip=relaxation.has_auxiliary_skip).double()
    return supernet, Architecture(SPACE, relaxation=relaxation, **options).double()


@pytest.mark.parametrize("kind", RELAXATIONS)
def test_every_relaxation_can_be_searched_with(kind):
    supernet, architecture = build(RELAXATIONS[kind]())
    for progress in (0.0, 0.5, 0.99):
        logits = supernet(torch.randn(4, 1, 8, 8).double(), architecture(progress))
        loss = functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])) + architecture.penalty()
        gradients = torch.autograd.grad(loss, list(architecture.parameters()))
        assert all(g.abs().sum() > 0 for g in gradients)
    assert len(architecture.discretize().normal) == 4


def test_a_sharper_temperature_comes_with_the_progress():
    alpha = torch.randn(2000, 4)
    soft = GumbelSoftmax(hard=False)
    early, late = (soft.weights(alpha, progress).amax(dim=1).mean() for progress in (0.0, 0.999))
    assert early < 0.4
    assert late > 0.9
    assert torch.allclose(soft.weights(alpha, 0.3).sum(dim=1), torch.ones(2000))


def test_samples_follow_the_softmax_of_alpha():
    alpha = torch.tensor([[0.0, 1.0, -1.0, 0.5]]).expand(20000, 4)
    frequencies = GumbelSoftmax().weights(alpha, 0.7).mean(dim=0)
    assert torch.allclose(frequencies, alpha[0].softmax(dim=0), atol=0.02)


def test_a_hard_sample_computes_one_primitive_an_edge():
    """The same output as with all of them computed, and the derivative of the chosen ones alone."""
    supernet, architecture = build(GumbelSoftmax())
    calls = []
    for name, module in supernet.named_modules():
        if name.endswith(("sep_conv_3x3", "skip_connect", "max_pool_3x3")):
            module.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
    x = torch.randn(4, 1, 8, 8).double()
    weights = architecture()
    output = supernet(x, weights)
    chosen = torch.cat((weights.normal.argmax(1), *(weights.reduce.argmax(1),) * 2))
    assert len(calls) == int((chosen > 0).sum())
    assert torch.allclose(output, supernet(x, weights._replace(sampled=False)))
    (gradient,) = torch.autograd.grad(output.square().sum(), weights.normal)
    assert torch.equal(gradient.abs() > 0, (weights.normal > 0.5) & (torch.arange(4) > 0))


def test_the_zero_one_loss_of_the_sigmoid():
    architecture = Architecture(SPACE, relaxation=Sigmoid(penalty_weight=10.0))
    assert -1e-4 < architecture.penalty().item() < 0  # alpha is near 0
    with torch.no_grad():
        architecture.normal.fill_(30.0)
        architecture.reduce.fill_(-30.0)
    assert architecture.penalty().item() == pytest.approx(-5.0)
    assert Architecture(SPACE).penalty().item() == 0.0


def test_the_auxiliary_skip_is_added_beside_the_primitives_and_fades():
    supernet, architecture = build(AuxiliarySkip())
    assert [architecture(progress).auxiliary_skip for progress in (0.0, 0.25)] == [1.0, 0.75]
    edge, x = supernet.cells[0].edges[0], torch.randn(2, 2, 4, 4).double()  # of a normal cell
    state = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    plain, with_skip = edge(x, state), edge(x, state, EdgeState(auxiliary_skip=0.5))
    assert torch.allclose(with_skip - plain, 0.5 * x)


def test_a_supernet_without_the_skip_says_so():
    supernet, architecture = Supernet(3, 2, 3, 1, space=SPACE), Architecture(SPACE, relaxation=AuxiliarySkip())
    with pytest.raises(ValueError, match="expected auxiliary_skip=True"):
        supernet(torch.randn(2, 1, 8, 8), architecture())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GumbelSoftmax(final_temperature=0.0), "expected positive temperatures, got 10.0 and 0.0"),
        (lambda: Sigmoid(-1.0), "expected penalty_weight >= 0, got -1.0"),
        (lambda: AuxiliarySkip(1.0, -0.1), "expected weights >= 0, got 1.0 and -0.1"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_one_of_ones_own():
    class Sharp(Softmax):
        def weights(self, alpha, progress):
            return (alpha * (1 + 9 * progress)).softmax(dim=-1)

    architecture = Architecture(SPACE, relaxation=Sharp())
    assert torch.equal(architecture(1.0).normal, (10 * architecture.normal).softmax(-1))
