"""Nothing in a forward pass is made on the CPU or waits for the device: on the meta device both raise."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from problems.search_spaces import PUBLISHED, Architecture, EvaluationNetwork, Supernet
from problems.search_spaces.p_darts import SkipDropout
from problems.search_spaces.pc_darts import PartialOperation
from problems.search_spaces.relaxations import AuxiliarySkip, GumbelSoftmax, Sigmoid, Softmax
from problems.students import StudentResNet

META = torch.device("meta")


def architecture_and_supernet(relaxation=Softmax(), *, edge_normalization=False, skip_dropout=None, **options):  # noqa: B008
    architecture = Architecture(relaxation=relaxation, edge_normalization=edge_normalization, skip_dropout=skip_dropout)
    supernet = Supernet(10, 4, 3, auxiliary_skip=relaxation.has_auxiliary_skip, **options)
    return architecture.to(META), supernet.to(META)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relaxation": GumbelSoftmax(hard=False)},
        {"relaxation": Sigmoid()},
        {"relaxation": AuxiliarySkip()},
        {"skip_dropout": SkipDropout(0.5)},
        {"operation": partial(PartialOperation, k=2), "edge_normalization": True, "stem": "imagenet"},
    ],
    ids=lambda options: ", ".join(options) or "darts",
)
def test_searches(options):
    architecture, supernet = architecture_and_supernet(**options)
    logits = supernet(torch.empty(4, 3, 32, 32, device=META), architecture(0.5))
    loss = functional.cross_entropy(logits, torch.empty(4, dtype=torch.int64, device=META)) + architecture.penalty()
    assert loss.device == META
    gradients = torch.autograd.grad(loss, [*architecture.parameters(), *supernet.parameters()])
    assert all(g.device == META for g in gradients)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_networks(training):
    network = EvaluationNetwork(PUBLISHED["DARTS_V2"], 10, 4, 6, auxiliary=True).to(META).train(training)
    logits = network(torch.empty(4, 3, 32, 32, device=META), 0.2)
    assert logits.main.device == META
    assert (logits.auxiliary is not None) == training


def test_students():
    assert StudentResNet(50, 10, width=4).to(META)(torch.empty(2, 3, 32, 32, device=META)).device == META


def test_hard_samples_wait_for_the_device_once_a_pass():
    """The exception that the docs name: the host must know which primitives to leave out."""
    architecture, supernet = architecture_and_supernet(GumbelSoftmax())
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        supernet(torch.empty(4, 3, 32, 32, device=META), architecture(0.5))
