"""The cost of a search: the arithmetic by hand, the counts in real rounds, the measurements on small networks."""

from collections import Counter

import pytest
import torch

import mlo

from .passes.__main__ import main
from .passes.cost import Affine, Network, Pass, Search, activations, report, table
from .passes.counting import count, images_of, read
from .passes.measuring import Rounds, Subject
from .speed.memory import MEASURABLE

T, TB, S, SB = (Pass(n, backward=b) for n in ("teacher", "student") for b in (False, True))
CPU = torch.device("cpu")
DIFFERENCES = [f"levels.{level}.hypergradient.kind=finite_difference" for level in ("teacher", "student")]


def micro(number):
    return [f"levels.{level}.micro_batches={number}" for level in ("teacher", "student", "architecture")]


def networks(memory=True):
    """A forward pass of the teacher takes 1 + 2 n seconds, forward and backward 2 + 5 n; the student's 3 n and 7 n."""
    sizes = (1, 2, 4)
    teacher = Network(
        sizes,
        {T: [3.0, 5.0, 9.0], TB: [7.0, 12.0, 22.0]},
        {False: [20.0, 30.0, 50.0]} if memory else {},
        macs=0.5,
        weights=1024.0,
    )
    student = Network(
        sizes,
        {S: [3.0, 6.0, 12.0], SB: [7.0, 14.0, 28.0]},
        {False: [5.0, 10.0, 20.0]} if memory else {},
        macs=1.0,
        weights=512.0,
    )
    return {"teacher": teacher, "student": student}


def search(**changes):
    settings = {"keeps_graph": False, "labelled": True, "num_batches": 5, "image": 0.5, **changes}
    warmup, upper = Counter({T: 2, TB: 1, S: 2, SB: 2}), Counter({T: 7, TB: 6, S: 5, SB: 3})
    return Search(10, 30, 20, warmup, upper, {"teacher": 3, "student": 2}, **settings)


def test_lines_are_fitted():
    line = Affine.fit((1, 2, 4), (3.0, 5.0, 9.0))
    assert (line.fixed, line.per_image) == pytest.approx((1, 2))
    assert line(256) == pytest.approx(513)
    assert Affine.fit((4,), (2.0,)) == Affine(0.0, 0.5)
    least = Affine.fit((0, 1, 2), (0.0, 3.0, 3.0))
    assert (least.fixed, least.per_image) == pytest.approx((0.5, 1.5))


def test_seconds_of_a_search():
    found = search().seconds(networks())
    assert found["warm-up", "teacher"] == pytest.approx(20 * (2 * 21 + 1 * 31))  # backward: 1 + 3 n
    assert found["rest", "teacher"] == pytest.approx(10 * (7 * 21 + 6 * 31))
    assert found["warm-up", "student"] == pytest.approx(20 * (2 * 30 + 2 * 40))
    assert found["rest", "student"] == pytest.approx(10 * (5 * 30 + 3 * 40))
    assert search().round(networks()) == pytest.approx(333 + 270)
    shared = search().seconds(networks(), processes=5)  # two images each
    assert shared["rest", "teacher"] == pytest.approx(10 * (7 * 5 + 6 * 7))


def test_memory_of_a_search():
    found = search().mebibytes(networks())  # 10 images: 110 and 50
    assert found == pytest.approx(
        {
            "weights of the teacher, x 3": 3072,
            "weights of the student, x 2": 1024,
            "images, 5 batches": 25,
            "activations in the validation loss": 160,
        }
    )
    assert sum(search().mebibytes(networks(), 5).values()) == pytest.approx(4096 + 5 + 40)
    assert search().mebibytes(networks(memory=False)) is None


@pytest.mark.parametrize(
    ("teacher", "student", "product", "options", "expected"),
    [
        (3.0, 2.0, 3.0, (False, True), {"activations in the validation loss": 5.0}),
        (1.0, 2.0, 1.0, (False, True), {"activations in the student's loss": 4.0}),
        (1.0, 2.0, 1.0, (False, False), {"activations in the validation loss": 3.0}),
        (3.0, 2.0, 3.0, (True, True), {"activations in the validation loss": 5.0, "the teacher's kept graph": 3.0}),
        (3.0, 1.0, 6.0, (False, True), {"activations in a product of the teacher": 6.0}),
    ],
)
def test_the_worst_moment(teacher, student, product, options, expected):
    keeps_graph, labelled = options
    assert activations(teacher, student, product, keeps_graph=keeps_graph, labelled=labelled) == expected


def test_the_report_has_the_totals():
    text = report(search(), networks())
    assert "| teacher | 4 | 9 | 22 | 50 |" in text
    assert "| teacher | 0.5 | 0.5 | 2000 | 3000 | 10 |" in text
    assert "| warm-up | 2 | 1 | 2 | 2 |" in text
    assert "| rest | 7 | 6 | 5 | 3 |" in text
    days = (20 * 73 + 10 * 333 + 20 * 140 + 10 * 270) / 86400
    assert f"| 1 | {days:.3g} | {(4096 + 25 + 160) / 1024:.3g} |" in text
    assert "GiB |" in text
    assert "| 1 | 0.119 | - |" in report(search(), networks(memory=False))
    assert table(["a", "b"], [[1, 1234.5]])[2] == "| 1 | 1234 |"


@pytest.mark.parametrize(
    ("overrides", "warmup", "upper"),
    [
        (micro(1), [2, 1, 2, 2], [5, 5, 5, 3]),
        (micro(2), [4, 2, 4, 4], [14, 12, 10, 6]),  # no graph is kept: two more passes of the teacher each
        ([*micro(1), "labelled_weight=0.0"], [2, 1, 1, 1], [5, 5, 4, 2]),
        ([*micro(1), "teacher_weight=0.0"], [2, 1, 2, 2], [4, 4, 5, 3]),
    ],
)
def test_passes_are_counted_in_real_rounds(overrides, warmup, upper):
    found = count("lbt/imagenet-rn18-pc-darts", overrides)
    assert [found.warmup[of] for of in (T, TB, S, SB)] == warmup
    assert [found.upper[of] for of in (T, TB, S, SB)] == upper
    assert (found.batch, found.rounds, found.warmup_rounds) == (256, 6250, 4375)
    assert found.keeps_graph == (overrides[:3] == micro(1))
    assert found.num_batches == 5 * int(overrides[0].rpartition("=")[2])
    assert found.image == pytest.approx(3 * 224 * 224 * 4 / 2**20)
    assert found.labelled == ("labelled_weight=0.0" not in overrides)
    assert min(found.copies.values()) >= 4  # weights, momentum, and what was recorded of both


def test_products_are_in_full_precision():
    found = count("lbt/imagenet-rn18-pc-darts", [*micro(1), "precision=bf16"])
    lower = {of: num for of, num in found.upper.items() if of.lower}
    assert lower == {
        Pass("teacher", backward=False, lower=True): 3,
        Pass("teacher", backward=True, lower=True): 2,
        Pass("student", backward=False, lower=True): 3,
        Pass("student", backward=True, lower=True): 3,
    }
    assert (found.upper[T], found.upper[TB], found.upper[S], found.upper[SB]) == (4, 4, 2, 0)
    assert found.lower
    assert not found.keeps_graph


def test_small_networks_are_measured():
    small = [*DIFFERENCES, "supernet.num_cells=1", "precision=bf16"]
    subject = Subject("lbt/digits", tuple(small), TB, CPU)
    assert images_of(subject.recipe) == (1, 8, 10)
    _, forward = subject.build()
    assert forward(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    torch.testing.assert_close(Subject("lbt/cifar10-rn18-darts", (), S, CPU).macs(), 0.5559, rtol=1e-3, atol=0)
    found = subject.mebibytes(32)  # in a process of its own: in this one, memory that others freed may do
    assert found is not None and found > 0 if MEASURABLE else found is None
    assert Rounds("lbt/digits", tuple(small), CPU).seconds(4) > 0


def test_the_command_writes_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Subject, "mebibytes", lambda self, batch: float(batch))
    file = tmp_path / "cost.md"
    main(
        ["lbt/digits", *DIFFERENCES, "supernet.num_cells=1", "--batch", "2", "4", "--turns", "1", "--output", str(file)]
    )
    text = file.read_text()
    assert text in capsys.readouterr().out
    assert "python -m tests.benchmarks.passes lbt/digits levels.teacher" in text
    assert "| student | 4 |" in text
    assert "| rest | 5 | 5 | 5 | 3 |" in text
    assert "A real round after the warm-up, with batches of 2 images" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("darts/digits-first", "expected a recipe of the problem lbt; found darts"),
        ("lbt/digits", r"level teacher: expected finite_difference or first_order.*found Unroll"),
        ("lbt/cifar10-rn18-p-darts", "expected a space of one stage; found p_darts"),
    ],
)
def test_other_recipes_are_refused(name, expected):
    with pytest.raises(mlo.MloError, match=expected):
        read(name, [])
