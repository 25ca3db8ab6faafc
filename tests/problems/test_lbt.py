"""LBT as a graph: its sweep, and what a round of it costs."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mlo
from problems.lbt import LearningByTeaching
from problems.search_spaces import Architecture, SearchSpace, Supernet
from problems.students import StudentResNet

SPACE = SearchSpace.uniform(("none", "skip_connect", "sep_conv_3x3"), num_nodes=2)


def count_passes(module):
    """Count forward passes, and backward passes by the gradients that arrive at the outputs."""
    counts = Counter()

    def forward_hook(module, args, output):
        counts["forward"] += 1
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.update(["backward"]))

    module.register_forward_hook(forward_hook)
    return counts


def batches(num, *kinds, generator):
    def one():
        return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)

    return [tuple(one() for _ in range(kinds[0])) if kinds else one() for _ in range(num)]


def lbt_engine(estimator, *, complete=False, rollback=False):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    teacher, student, architecture = (
        Supernet(10, 2, 3, 1, space=SPACE),
        StudentResNet(18, 10, 1, width=2),
        Architecture(SPACE),
    )
    lbt = LearningByTeaching(complete_gradient=complete)
    sgd = {"lr": 0.05, "momentum": 0.9, "weight_decay": 3e-4}
    graph = mlo.Graph(
        [
            mlo.Problem("teacher", teacher, lbt.teacher_loss, torch.optim.SGD(teacher.parameters(), **sgd),
                        batches(3, generator=generator), hypergradient=estimator, clip_norm=5.0),
            mlo.Problem("student", student, lbt.student_loss, torch.optim.SGD(student.parameters(), **sgd),
                        batches(3, 2, generator=generator), hypergradient=estimator, clip_norm=5.0),
            mlo.Problem("architecture", architecture, lbt.architecture_loss,
                        torch.optim.Adam(architecture.parameters(), lr=0.01), batches(3, 2, generator=generator)),
        ],
        lbt.edges,
    )  # fmt: skip
    return mlo.Engine(graph, seed=0, device="cpu", rollback=rollback)


@pytest.mark.parametrize("complete", [False, True])
def test_a_round_costs_no_more_passes_than_the_sweep_needs(complete):
    engine = lbt_engine(mlo.FiniteDifference(), complete=complete)
    teacher = count_passes(engine.graph["teacher"].module)
    student = count_passes(engine.graph["student"].module)
    engine.run(1, progress=False)
    teacher.clear()
    student.clear()
    engine.run(1, progress=False)
    assert teacher == {"forward": 5, "backward": 5}
    assert student == {"forward": 5, "backward": 3}


def test_the_counts_hold_on_another_distillation_graph():
    """Other names, other losses, a teacher that is called by keyword: nothing in the engine knows LBT."""
    torch.manual_seed(0)
    tutor, pupil, taste = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Linear(3, 4), nn.Linear(1, 3)

    def tutor_loss(levels, batch):
        x, y = batch
        return F.cross_entropy(levels.tutor(x + levels.taste(torch.ones(1, 1))), y)

    def pupil_loss(levels, batch):
        x, _ = batch
        target = levels.tutor(input=x) / 2.0
        return F.mse_loss(levels.pupil(x), target) + F.kl_div(
            levels.pupil(x).log_softmax(-1), target.softmax(-1), reduction="batchmean"
        )

    def taste_loss(levels, batch):
        x, y = batch
        return F.cross_entropy(levels.tutor(x), y) + F.cross_entropy(levels.pupil(x), y)

    data = [(torch.randn(5, 3), torch.randint(4, (5,)))]
    graph = mlo.Graph(
        [
            mlo.Problem("tutor", tutor, tutor_loss, torch.optim.SGD(tutor.parameters(), lr=0.1), data),
            mlo.Problem("pupil", pupil, pupil_loss, torch.optim.AdamW(pupil.parameters(), lr=0.1), data),
            mlo.Problem("taste", taste, taste_loss, torch.optim.SGD(taste.parameters(), lr=0.1), data),
        ],
        [
            mlo.Edge("taste", "tutor"),
            mlo.Edge("tutor", "pupil"),
            mlo.Edge("tutor", "taste"),
            mlo.Edge("pupil", "taste"),
        ],
    )
    engine = mlo.Engine(graph, seed=0, device="cpu")
    counts, pupil_counts = count_passes(tutor), count_passes(pupil)
    engine.run(1, progress=False)
    counts.clear()
    pupil_counts.clear()
    engine.run(1, progress=False)
    assert counts == {"forward": 5, "backward": 5}
    assert pupil_counts == {"forward": 7, "backward": 3}


def test_the_complete_gradient_differs_from_the_papers_by_the_direct_dependence():
    paper = lbt_engine(mlo.Unroll()).hypergradient("architecture")
    complete = lbt_engine(mlo.Unroll(), complete=True).hypergradient("architecture")
    change = torch.cat([(complete[n] - paper[n]).flatten() for n in paper])
    assert change.norm() > 0


def test_edges_put_teacher_and_student_inside_the_architecture():
    graph = lbt_engine(mlo.FiniteDifference()).graph
    assert graph.inside("architecture") == {"teacher", "student"}
    assert graph.structure.responds_to["student"] == ("teacher",)
    assert graph.structure.sweep_order["architecture"] == ("student", "teacher")
