"""Plain DARTS, and LBT's variants, as graphs: what each level minimizes, and that the derivatives are right."""

import pytest
import torch
from torch.nn import functional

import mlo
from problems.darts import ArchitectureSearch
from problems.lbt import LearningByTeaching
from problems.search_spaces import Architecture, SearchSpace, Supernet
from problems.search_spaces.pc_darts import PartialOperation
from problems.search_spaces.relaxations import AuxiliarySkip, Sigmoid, Softmax
from problems.students import StudentResNet

SPACE = SearchSpace.uniform(("skip_connect", "sep_conv_3x3", "avg_pool_3x3"), num_nodes=2)


def images(num, *, pairs=False):
    generator = torch.Generator().manual_seed(num)

    def one():
        return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)

    return [(one(), one()) if pairs else one() for _ in range(3)]


def smooth(network):
    """Make ReLUs smooth, so that differences judge derivatives."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                module.register_module(name, torch.nn.Softplus())
    return network


def search(*, relaxation=Softmax(), estimator=mlo.Unroll(), **options):  # noqa: B008
    torch.manual_seed(0)
    network = smooth(Supernet(10, 4, 3, 1, space=SPACE, auxiliary_skip=relaxation.has_auxiliary_skip, **options))
    architecture = Architecture(SPACE, relaxation=relaxation, edge_normalization="operation" in options)
    problem = ArchitectureSearch()
    sgd = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    graph = mlo.Graph(
        [
            mlo.Problem("network", network, problem.network_loss, sgd, images(1), hypergradient=estimator, steps=2),
            mlo.Problem("architecture", architecture, problem.architecture_loss,
                        torch.optim.Adam(architecture.parameters(), lr=0.01), images(2)),
        ],
        problem.edges,
    )  # fmt: skip
    return mlo.Engine(graph, seed=0, device="cpu")


@pytest.mark.parametrize(
    ("relaxation", "options"),
    [(Softmax(), {}), (Sigmoid(), {}), (AuxiliarySkip(), {}), (Softmax(), {"operation": PartialOperation})],
    ids=["darts", "fair", "minus", "partial channels"],
)
def test_hypergradients_are_those_of_the_black_box(relaxation, options):
    engine = search(relaxation=relaxation, **options)
    engine.run(1, progress=False)
    found = engine.check("architecture", directions=2, progress=False)
    assert found.passed, str(found)
    assert found.levels[0].error < 1e-4


def test_first_order_leaves_the_networks_response_out():
    """Its hypergradient is the plain gradient of the validation loss."""
    engine = search(estimator=mlo.FirstOrder())
    network, architecture = (engine.graph[name].module for name in ("network", "architecture"))
    found = engine.hypergradient("architecture")
    engine.run(1, progress=False)  # the weights are now those that it was taken at
    x, y = images(2)[0]
    with torch.no_grad():
        for p, begin in zip(architecture.parameters(), search().graph["architecture"].module.parameters(), strict=True):
            p.copy_(begin)
    loss = functional.cross_entropy(network(x, architecture()), y)
    for name, g in zip(found, torch.autograd.grad(loss, list(architecture.parameters())), strict=True):
        assert torch.allclose(found[name], g, rtol=1e-4, atol=1e-7)


def test_the_penalty_is_part_of_the_upper_loss():
    weak, strong = (search(relaxation=Sigmoid(weight)).hypergradient("architecture") for weight in (0.0, 100.0))
    alpha = search(relaxation=Sigmoid()).graph["architecture"].module.normal.detach().requires_grad_()
    (expected,) = torch.autograd.grad(Sigmoid(100.0).penalty(alpha), alpha)
    assert torch.allclose(strong["normal"] - weak["normal"], expected, atol=1e-6)


def teaching(**options):
    torch.manual_seed(0)
    teacher, student = Supernet(10, 2, 3, 1, space=SPACE), StudentResNet(18, 10, 1, width=2)
    architecture, lbt = Architecture(SPACE), LearningByTeaching(**options)
    graph = mlo.Graph(
        [
            mlo.Problem("teacher", teacher, lbt.teacher_loss, torch.optim.SGD(teacher.parameters(), lr=0.05),
                        images(1), hypergradient=mlo.Unroll()),
            mlo.Problem("student", student, lbt.student_loss, torch.optim.SGD(student.parameters(), lr=0.05),
                        images(2, pairs=True), hypergradient=mlo.Unroll()),
            mlo.Problem("architecture", architecture, lbt.architecture_loss,
                        torch.optim.Adam(architecture.parameters(), lr=0.01), images(3, pairs=True)),
        ],
        lbt.edges,
    )  # fmt: skip
    return mlo.Engine(graph, seed=0, device="cpu")


def test_the_architecture_can_answer_for_the_student_alone():
    """Both validation losses make the hypergradient of either, added."""
    both, student, teacher = (
        teaching(**options).hypergradient("architecture")["normal"]
        for options in ({}, {"teacher_weight": 0.0}, {"gamma": 0.0})
    )
    assert student.abs().sum() > 0
    assert torch.allclose(both, student + teacher, rtol=1e-3, atol=1e-7)
    metrics = teaching(teacher_weight=0.0).run(1, progress=False)
    assert "architecture.student_accuracy" in metrics
    assert "architecture.teacher_accuracy" not in metrics


def test_the_student_can_learn_from_pseudo_labels_alone():
    metrics = teaching(labelled_weight=0.0).run(1, progress=False)
    assert metrics["student.loss"] == pytest.approx(metrics["student.pseudo_label_loss"])
    assert "student.accuracy" not in metrics
    twice = teaching(labelled_weight=0.0, lambda_=2.0).run(1, progress=False)
    assert twice["student.loss"] == pytest.approx(2 * metrics["student.loss"])
