"""Gradient accumulation: every micro-batch counts, in first and in second derivatives."""

import pytest
import torch
from torch.nn import functional as F

import mlo
from tests.toys import assert_resumes, assert_same_state, network, noisy_images, state_of

from .quadratics import relative_error
from .random_graphs import fit, flat


def batches(num, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(num * size, 3, generator=generator, dtype=torch.float64) for _ in "xy")
    return list(zip(x.split(size), y.split(size), strict=True))


def levels(estimator, *, size, micro_batches, nested=False):
    """Equal data in batches of `size`; a network, its weight and, if nested, one more network in between."""
    torch.manual_seed(0)

    def net():
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()

    modules = {"low": net(), "middle": net(), "top": net()}
    reads = {"low": ("middle", "top"), "middle": ("low",) if nested else (), "top": ("low", "middle")}

    problems = [
        mlo.Problem(
            name,
            module,
            fit(name, reads[name]),
            torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5, weight_decay=1.0),
            batches(24 // size, size),
            hypergradient=estimator,
            steps=2,
            micro_batches=micro_batches,
        )
        for name, module in modules.items()
    ]
    edges = [mlo.Edge(source, target) for target in reads for source in reads[target]]
    return mlo.Engine(mlo.Graph(problems, edges), seed=0, device="cpu")


ESTIMATORS = [
    mlo.FirstOrder(), mlo.FiniteDifference(1e-3, last=None), mlo.Unroll(), mlo.Unroll(checkpoint=True),
    mlo.ConjugateGradient(), mlo.Neumann(terms=3, scale=0.3), mlo.Nystrom(rank=100), mlo.SAMA(), mlo.Penalty(steps=3),
]  # fmt: skip


CASES = [(e, nested) for e in ESTIMATORS for nested in (False, True) if not (nested and isinstance(e, mlo.Nystrom))]


@pytest.mark.filterwarnings("ignore:level .* Penalty. its solves are far")
@pytest.mark.parametrize(("estimator", "nested"), CASES, ids=repr)  # 31 products at each of 31 products: too many
def test_micro_batches_do_what_their_union_does(estimator, nested):
    whole = levels(estimator, size=6, micro_batches=1, nested=nested)
    parts = levels(estimator, size=2, micro_batches=3, nested=nested)
    for _ in range(2):
        a, b = (flat(engine.hypergradient("top").values()) for engine in (parts, whole))
        assert relative_error(a, b) < 1e-7
        parts.run(1, progress=False)
        whole.run(1, progress=False)
    for p, q in zip(parts.graph.levels, whole.graph.levels, strict=True):
        assert relative_error(*(flat(level.module.parameters()).detach() for level in (p, q))) < 1e-9


def test_metrics_and_losses_are_means():
    module = torch.nn.Linear(1, 1)

    def loss(levels, batch):
        return mlo.Output(levels.only(torch.ones(1, 1)).sum() * 0 + batch, {"tensor": batch, "number": float(batch)})

    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    data = [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(6.0)]
    engine = mlo.Engine(mlo.Graph([mlo.Problem("only", module, loss, sgd, data, micro_batches=3)]), device="cpu")
    metrics = engine.run(1, progress=False)
    assert metrics["only.loss"] == metrics["only.tensor"] == metrics["only.number"] == 3.0


def with_buffers(estimator):
    """Batch normalization, dropout and a buffer that every pass moves and reads."""
    torch.manual_seed(0)
    lower, upper = network().double(), torch.nn.Linear(1, 3).double()
    data = [(x.double(), y) for x, y in torch.utils.data.DataLoader(noisy_images(), batch_size=8)]

    def train(levels, batch):
        return F.cross_entropy(levels.lower(batch[0]) + levels.upper(torch.ones(1, 1, dtype=torch.float64)), batch[1])

    def validate(levels, batch):
        return F.cross_entropy(levels.lower(batch[0]), batch[1])

    problems = [
        mlo.Problem("lower", lower, train, torch.optim.SGD(lower.parameters(), lr=0.1, momentum=0.9), data,
                    hypergradient=estimator, steps=4, micro_batches=3),
        mlo.Problem("upper", upper, validate, torch.optim.Adam(upper.parameters(), lr=0.1), data),
    ]  # fmt: skip
    edges = [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")]
    return mlo.Engine(mlo.Graph(problems, edges), seed=0, device="cpu")


@pytest.mark.parametrize("estimator", [mlo.Unroll(), mlo.Unroll(checkpoint=True)], ids=repr)
def test_each_part_is_repeated_with_its_own_buffers_and_draws(estimator):
    engine = with_buffers(estimator)
    before = state_of(engine)
    found = engine.check(progress=False)
    assert found.levels[0].verdict == "exact", found
    assert_same_state(before, state_of(engine))


def test_a_run_resumes_bit_for_bit(tmp_path):
    assert_resumes(lambda: with_buffers(mlo.Unroll()), tmp_path)


def test_a_wrong_number_is_refused():
    with pytest.raises(mlo.GraphError, match="micro_batches must be a whole number of at least 1; found 0"):
        levels(mlo.Unroll(), size=2, micro_batches=0)
