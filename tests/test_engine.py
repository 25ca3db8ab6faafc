"""The loop: schedule, purity, rollback, and what a user is told."""

import math
import random
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mlo
from mlo.state import LossScale

from .conformance.quadratics import Vector
from .toys import assert_same_state, state_of, three_levels


@pytest.mark.parametrize("estimator", [mlo.FiniteDifference(), mlo.Unroll(), mlo.FirstOrder()], ids=repr)
@pytest.mark.parametrize("rollback", [False, True])
def test_queries_leave_no_trace(estimator, rollback):
    plain, queried = (three_levels(estimator=estimator, rollback=rollback) for _ in range(2))
    queried.hypergradient("gate")  # on a fresh engine too
    for _ in range(4):  # goes over the end of an epoch
        plain.run(1, progress=False)
        before = state_of(queried)
        first = queried.hypergradient("gate")
        queried.hypergradient("student")
        queried.hypergradient("teacher")
        second = queried.hypergradient("gate")
        assert all(torch.equal(first[n], second[n]) for n in first)
        assert_same_state(state_of(queried), before)
        queried.run(1, progress=False)
        assert_same_state(state_of(queried), state_of(plain))


def _replace(module):
    name, parameter = next(iter(module.named_parameters()))
    owner, _, key = name.rpartition(".")
    setattr(module.get_submodule(owner), key, nn.Parameter(parameter.detach().clone()))


@pytest.mark.parametrize("change", [_replace, lambda module: next(module.parameters()).requires_grad_(False)])
@pytest.mark.parametrize("use", ["run", "hypergradient", "check"])
def test_parameters_that_changed_after_the_engine_was_made_are_named(change, use):
    engine = three_levels()
    engine.run(1, progress=False)
    module = engine.graph["student"].module
    name = next(iter(module.named_parameters()))[0]
    change(module)
    calls = {
        "run": lambda: engine.run(1, progress=False),
        "hypergradient": lambda: engine.hypergradient("gate"),
        "check": lambda: engine.check("gate", progress=False),
    }
    with pytest.raises(mlo.MloError, match=rf"level 'student': .* found that {name} changed\. Make a new mlo.Engine"):
        calls[use]()


def test_a_module_in_the_place_of_another_is_named_though_it_holds_the_same_parameters():
    engine = three_levels()
    module = engine.graph["student"].module
    name, old = next((name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear))
    new = nn.Linear(old.in_features, old.out_features)
    new.weight, new.bias = old.weight, old.bias
    owner, _, key = name.rpartition(".")
    setattr(module.get_submodule(owner), key, new)
    with pytest.raises(mlo.MloError, match="level 'student': expected the modules that the engine was built with"):
        engine.hypergradient("gate")


def test_buffers_that_came_after_the_engine_was_made_are_held_still():
    """A module put in, and a buffer registered."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, -0.2]))
            self.act = nn.Identity()

        def forward(self, x):
            if hasattr(self, "calls"):
                self.calls += 1
            return self.act(x * self.w)

    low, up = Counting(), Counting()
    data = [torch.randn(4, 2, generator=torch.Generator().manual_seed(0))]
    graph = mlo.Graph(
        [
            mlo.Problem("low", low, lambda levels, batch: (levels.low(batch) - levels.up.w).square().mean(),
                        torch.optim.SGD(low.parameters(), lr=0.1), data, steps=3, hypergradient=mlo.Unroll()),
            mlo.Problem("up", up, lambda levels, batch: (levels.low(batch) - 1).square().mean(),
                        torch.optim.SGD(up.parameters(), lr=0.1), data),
        ],
        [mlo.Edge("up", "low"), mlo.Edge("low", "up")],
    )  # fmt: skip
    engine = mlo.Engine(graph, device="cpu")
    engine.run(1, progress=False)
    low.register_buffer("calls", torch.zeros(()))
    low.act = nn.BatchNorm1d(2, affine=False)
    engine.hypergradient("up")
    assert (int(low.calls), int(low.act.num_batches_tracked)) == (0, 0)
    engine.run(2, progress=False)
    assert (int(low.calls), int(low.act.num_batches_tracked)) == (6, 6)


def test_gradients_of_the_caller_survive_an_optimizer_that_fails():
    engine = three_levels()
    problem = engine.graph["student"]
    for p in problem.module.parameters():
        p.grad = torch.full_like(p, 7.0)

    def fail(*_):
        raise RuntimeError("no step")

    problem.optimizer.step = fail
    with pytest.raises(RuntimeError, match="no step"):
        engine.run(1, progress=False)
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in problem.module.parameters())


def test_figures_of_a_round_that_was_broken_off_are_not_those_of_the_next():
    engine = three_levels(estimator=mlo.FiniteDifference())
    engine.run(1, progress=False)
    engine._journal.figures.append(("student", "left_over", 1.0))
    assert "student.left_over" not in engine.run(1, progress=False)


def test_the_callers_generators_and_gradients_are_left_alone():
    engine = three_levels()
    for problem in engine.graph.levels:
        for p in problem.module.parameters():
            p.grad = torch.full_like(p, 7.0)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    engine.run(2, progress=False)
    engine.hypergradient("gate")
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]
    assert all((p.grad == 7.0).all() for problem in engine.graph.levels for p in problem.module.parameters())


def test_the_graph_of_a_loss_is_let_go_before_the_next_one_is_called():
    """When the edges are checked, too: of two big graphs only one is alive."""
    alive = weakref.WeakSet()

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            assert not alive
            alive.add(ctx)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    def fit(levels, batch):
        return Node.apply(levels.low(batch) - levels.up(batch)).square().sum()

    low, up = nn.Linear(3, 3), nn.Linear(3, 3)
    graph = mlo.Graph(
        [
            mlo.Problem("low", low, fit, torch.optim.SGD(low.parameters(), lr=0.01), [torch.ones(1, 3)], steps=2),
            mlo.Problem("up", up, lambda levels, batch: Node.apply(levels.low(batch)).square().sum(),
                        torch.optim.SGD(up.parameters(), lr=0.01), [torch.ones(1, 3)]),
        ],
        [mlo.Edge("up", "low"), mlo.Edge("low", "up")],
    )  # fmt: skip
    mlo.Engine(graph, device="cpu").run(2, progress=False)


def test_runs_do_not_depend_on_the_global_generators():
    torch.manual_seed(1)
    one = three_levels()
    torch.manual_seed(2)
    one.run(3, progress=False)
    other = three_levels()
    torch.manual_seed(99)
    other.run(3, progress=False)
    assert_same_state(state_of(one), state_of(other))
    different = three_levels(seed=1)
    different.run(3, progress=False)
    assert not torch.equal(state_of(one)["gate.weight"], state_of(different)["gate.weight"])


def test_only_a_levels_own_steps_move_its_buffers():
    engine = three_levels(steps=3)
    engine.run(2, progress=False)
    teacher, student = engine.graph["teacher"].module, engine.graph["student"].module
    assert teacher[1].num_batches_tracked == 6  # three steps a round, one call each
    assert teacher[5].calls == 6
    assert student[1].num_batches_tracked == 4  # one step a round, two calls each
    assert student[5].calls == 4


def test_the_next_step_uses_the_hypergradient():
    """A plain SGD step on the top level moves it by the learning rate times what the query returned."""
    engine = three_levels()
    gate = engine.graph["gate"].module
    before = {n: p.detach().clone() for n, p in gate.named_parameters()}
    engine.graph["gate"].optimizer.__class__ = torch.optim.SGD  # keeps the parameters and the learning rate
    engine.graph["gate"].optimizer.param_groups[0].update(
        momentum=0, dampening=0, nesterov=False, differentiable=False, foreach=None, fused=None
    )
    gradient = engine.hypergradient("gate")
    engine.run(1, progress=False)
    for name, p in gate.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.05 * gradient[name])


class Scalar(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self):
        return self.w


def traced_engine(log, edges, steps, **options):
    """An engine whose losses write down who was called, and on which batch."""
    names = [f"l{i}" for i in range(len(steps))]
    modules = {n: Scalar(float(i + 1)) for i, n in enumerate(names)}

    def loss_of(name):
        def loss(levels, batch):
            log.append((name, batch))
            reads = [name, *(s for s, t in edges if t == name)]
            return sum((getattr(levels, q)() - 1.0) ** 2 for q in reads) + sum(getattr(levels, q)() for q in reads) ** 2

        return loss

    problems = [
        mlo.Problem(n, modules[n], loss_of(n), torch.optim.SGD(modules[n].parameters(), lr=0.05), range(100),
                    hypergradient=mlo.FirstOrder(), steps=k)
        for n, k in zip(names, steps, strict=True)
    ]  # fmt: skip
    return mlo.Engine(mlo.Graph(problems, [mlo.Edge(s, t) for s, t in edges]), device="cpu", **options)


NEST = [("l0", "l1"), ("l1", "l0"), ("l0", "l2"), ("l2", "l0"), ("l1", "l2"), ("l2", "l1")]


def test_the_schedule_of_a_nest_is_that_of_the_design():
    log: list = []
    engine = traced_engine(log, NEST, [2, 3, 1])
    engine._trace()
    log.clear()
    engine.run(1, progress=False)
    assert "".join(name[1] for name, _ in log) == "001" * 3 + "00" + "2"
    assert [b for n, b in log if n == "l0"] == list(range(8))


def test_levels_inside_no_other_take_their_steps_once_a_round():
    log: list = []
    engine = traced_engine(log, [("l0", "l1"), ("l1", "l2"), ("l2", "l1")], [2, 3, 2])
    engine._trace()
    log.clear()
    engine.run(1, progress=False)
    assert "".join(name[1] for name, _ in log) == "00" + ("111" + "2") * 2


@pytest.mark.parametrize(("name", "played"), [("l0", "0"), ("l1", "001"), ("l2", "001" * 3 + "002")])
def test_a_query_plays_just_what_comes_before_the_levels_next_step(name, played):
    log: list = []
    engine = traced_engine(log, NEST, [2, 3, 1])
    engine._trace()
    log.clear()
    engine.hypergradient(name)
    assert "".join(n[1] for n, _ in log) == played


def test_rollback_steps_the_lower_level_again_from_where_it_was():
    """DARTS: virtual step, architecture step, and the real step on the same batch from the old weights."""
    log: list = []
    edges = [("l0", "l1"), ("l1", "l0")]
    engine = traced_engine(log, edges, [1, 1], rollback=True)
    w0, w1 = (engine.graph[n].module.w for n in ("l0", "l1"))
    start = w0.item()
    engine._trace()
    log.clear()
    engine.run(1, progress=False)
    assert log == [("l0", 0), ("l1", 0), ("l0", 0)]
    slope = 2 * (start - 1) + 2 * (start + w1.item())  # at the new upper variables
    assert w0.item() == pytest.approx(start - 0.05 * slope, rel=1e-12)


def test_progress_is_the_fraction_of_the_run():
    seen = []
    module = Scalar(1.0)

    def loss(levels, batch):
        seen.append(levels.progress)
        return levels.w() ** 2

    problem = mlo.Problem("w", module, loss, torch.optim.SGD(module.parameters(), lr=0.1), None)
    engine = mlo.Engine(mlo.Graph([problem]), device="cpu")
    engine.hypergradient("w")
    seen.clear()
    engine.run(2, total_rounds=4, progress=False)
    engine.run(2, progress=False)
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_metrics_are_means_over_the_steps_of_the_round_and_callbacks_hear_them():
    heard = []

    class Listener:
        def on_round(self, report):
            heard.append(report)

    engine = three_levels()
    metrics = engine.run(2, callbacks=[Listener()], progress=False)
    assert [r.round for r in heard] == [1, 2]
    assert heard[-1].total_rounds == 2
    assert heard[-1].metrics == metrics
    assert {"teacher.loss", "teacher.accuracy", "teacher.learning_rate", "gate.loss", "round_seconds"} <= metrics.keys()
    assert 0 <= metrics["teacher.accuracy"] <= 1
    assert metrics["teacher.learning_rate"] == pytest.approx((0.1 + 0.05) / 2)  # steps 3 and 4 of a StepLR(3, 0.5)


def test_stop_ends_the_run_after_the_round():
    engine = three_levels()

    class Stopper:
        def on_round(self, report):
            if report.round == 2:
                engine.stop()

    engine.run(5, callbacks=[Stopper()], progress=False)
    assert engine.rounds_done == 2


def test_a_loss_that_is_not_finite_ends_the_run_and_says_where():
    module = Scalar(1.0)
    problem = mlo.Problem(
        "w", module, lambda levels, batch: (levels.w() * 3) ** 4, torch.optim.SGD(module.parameters(), lr=1.0), None
    )
    engine = mlo.Engine(mlo.Graph([problem]), device="cpu")
    with pytest.raises(mlo.DivergenceError, match=r"round \d+, level 'w': expected a finite loss; found (inf|nan)"):
        engine.run(50, progress=False)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_and_stays_finite(precision):
    engine = three_levels(precision=precision)
    engine.run(3, progress=False)
    for problem in engine.graph.levels:
        for p in problem.module.parameters():
            assert p.dtype == torch.float32
            assert p.isfinite().all()
    exact, rough = three_levels().hypergradient("gate"), three_levels(precision=precision).hypergradient("gate")
    cosine = torch.cosine_similarity(exact["weight"].flatten(), rough["weight"].flatten(), dim=0)
    assert cosine > 0.9


def overflowing(factor):
    """A level whose loss, or its gradient alone, is not finite as long as `factor[0]` is too large."""
    module = nn.Linear(1, 1)
    problem = mlo.Problem(
        "w",
        module,
        lambda levels, batch: (levels.w(torch.ones(1, 1)).float() * factor[0]).sum(),
        torch.optim.SGD(module.parameters(), lr=0.1),
        None,
    )
    return mlo.Engine(mlo.Graph([problem]), device="cpu", precision="fp16"), module


def test_fp16_skips_a_step_that_overflows_and_lowers_the_scale():
    factor = [1e35]  # times the scale, this overflows float32
    engine, module = overflowing(factor)
    before = module.weight.item()
    engine.run(1, progress=False)
    assert module.weight.item() == before
    factor[0] = 1.0
    engine.run(1, progress=False)
    assert module.weight.item() == pytest.approx(before - 0.1)


@pytest.mark.parametrize("spoilt", [None, math.inf, -math.inf, math.nan])
def test_whether_a_gradient_is_finite_is_asked_of_the_device_once(spoilt):
    """However many parameters there are: on a GPU each question waits for all that was begun."""
    gradient = [torch.randn(3, 2) for _ in range(20)] + [None, torch.zeros(0), torch.tensor(1.0)]
    if spoilt is not None:
        gradient[7][1, 1] = spoilt
    asked = []

    class Asking(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            asked.append(function is torch.ops.aten._local_scalar_dense.default)
            return function(*args, **(kwargs or {}))

    scale = LossScale(active=True)
    with Asking():
        assert scale.admits(gradient) is (spoilt is None)
    assert sum(asked) <= 1
    assert scale.admits([None, torch.zeros(0)])


def test_fp16_skips_a_step_whose_loss_is_not_finite():
    factor = [1.0]
    engine, module = overflowing(factor)
    engine.run(1, progress=False)
    before = module.weight.item()
    factor[0] = math.inf
    engine.run(1, progress=False)
    assert module.weight.item() == before
    factor[0] = 1.0
    engine.run(1, progress=False)
    assert module.weight.item() == pytest.approx(before - 0.1)


def test_fp16_ends_where_no_scale_makes_a_gradient_finite():
    engine, _ = overflowing([math.nan])
    with pytest.raises(mlo.DivergenceError, match=r"round 35, level 'w': expected a finite gradient at some scale"):
        engine.run(100, progress=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_callers_autocast_does_not_matter(precision):
    """It would keep its casts of weights until its end."""
    inside, outside = (three_levels(precision=precision) for _ in range(2))
    outside.run(3, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        inside.run(3, progress=False)
    assert_same_state(state_of(inside), state_of(outside))


def test_the_reported_learning_rate_of_a_tensor_is_that_of_each_step():
    rates = []
    for rate in (0.1, torch.tensor(0.1)):
        module = nn.Linear(1, 1)
        sgd = torch.optim.SGD(module.parameters(), lr=rate)
        scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5)
        loss = lambda levels, batch: levels.w(torch.ones(1, 1)).sum()  # noqa: E731
        problem = mlo.Problem("w", module, loss, sgd, None, steps=3, scheduler=scheduler)
        metrics = mlo.Engine(mlo.Graph([problem]), device="cpu").run(1, progress=False)
        rates.append(metrics["w.learning_rate"])
    assert rates == pytest.approx([0.175 / 3] * 2)


def test_a_read_that_fails_is_tried_again():
    """Neither is the rest of the epoch lost, nor the level stuck."""

    class Failing:
        def __init__(self):
            self.failures = [(0, 3), (0, 1), (1, 0)]  # by epoch and index, each once
            self.epoch = -1

        def __iter__(self):
            for index in range(5):
                if (self.epoch, index) in self.failures:
                    self.failures.remove((self.epoch, index))
                    raise OSError("disk")
                yield torch.full((1, 1), float(10 * self.epoch + index))

        def set_epoch(self, epoch):
            self.epoch = epoch

    seen = []
    module = nn.Linear(1, 1)

    def loss(levels, batch):
        seen.append(int(batch))
        return levels.w(batch).sum()

    problem = mlo.Problem("w", module, loss, torch.optim.SGD(module.parameters(), lr=0.1), Failing())
    engine = mlo.Engine(mlo.Graph([problem]), device="cpu")
    failed = 0
    while engine.rounds_done < 12:
        try:
            engine.run(1, progress=False)
        except OSError:
            failed += 1
    assert failed == 3
    assert seen[1:] == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 20, 21]  # the first is looked at before the first step


def test_batches_keep_their_kinds():
    class Batch(dict):
        @property
        def x(self):
            return self["x"]

    class Items(list):
        @property
        def first(self):
            return self[0]

    class Closed(dict):
        def __setitem__(self, key, value):
            raise NotImplementedError

    module = nn.Linear(1, 1)
    batch = Items([Batch(x=torch.ones(1, 1)), Counter(a=3), Closed(x=torch.ones(1, 1))])

    def loss(levels, batch):
        assert batch[1] == Counter(a=3)
        return levels.w(batch.first.x + batch[2]["x"]).sum()

    problem = mlo.Problem("w", module, loss, torch.optim.SGD(module.parameters(), lr=0.1), [batch])
    mlo.Engine(mlo.Graph([problem]), device="cpu").run(1, progress=False)


def test_reentrant_checkpointing_is_refused():
    """`torch.autograd.grad` never gets to the parameters inside."""
    module = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))

    def loss(levels, batch):
        return checkpoint(levels.w[1], levels.w[0](batch), use_reentrant=True).sum()

    problem = mlo.Problem("w", module, loss, torch.optim.SGD(module.parameters(), lr=0.1), [torch.ones(1, 1)])
    with pytest.raises(mlo.GraphError, match=r"use_reentrant=True, .* Pass use_reentrant=False"):
        mlo.Engine(mlo.Graph([problem]), device="cpu").run(1, progress=False)


def test_float64_stays_float64_and_any_batch_will_do():
    module = Scalar(2.0)
    problem = mlo.Problem(
        "w", module, lambda levels, batch: levels.w() * batch, torch.optim.SGD(module.parameters(), lr=1.0), [3, 5]
    )
    engine = mlo.Engine(mlo.Graph([problem]), device="cpu")
    assert engine.hypergradient("w")["w"].dtype == torch.float64
    engine.run(3, progress=False)
    assert module.w.item() == 2.0 - 3 - 5 - 3


def test_unused_parameters_get_zeros_and_are_not_stepped():
    module = nn.ModuleDict({"used": Scalar(1.0), "unused": Scalar(5.0)})
    problem = mlo.Problem(
        "w",
        module,
        lambda levels, batch: levels.w["used"]() ** 2,
        torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.5),
        None,
    )
    engine = mlo.Engine(mlo.Graph([problem]), device="cpu")
    gradient = engine.hypergradient("w")
    assert list(gradient) == ["used.w", "unused.w"]
    assert gradient["unused.w"] == 0
    assert gradient["used.w"] == 2  # without the level's own weight decay
    engine.run(1, progress=False)
    assert module["unused"].w.item() == 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision: expected one of fp32, bf16, fp16; found 'fp8'"),
        ({"precision": ["fp16"]}, r"precision: expected one of fp32, bf16, fp16; found \['fp16'\]"),
        (
            {"group": 3},
            "group: expected 'auto' for all processes, None .* or a torch.distributed.Proces.*; found 3",
        ),
        ({"device": "gpu"}, "device: expected 'auto' or a torch device"),
        ({"device": None}, "device: expected 'auto' or a torch device"),
        ({"rollback": "no"}, "rollback: expected True or False; found 'no'"),
        ({"compile": "gate"}, "compile: expected True, False or a list of levels' names; found 'gate'"),
        ({"compile": None}, "compile: expected True, False or a list of levels' names; found None"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(mlo.MloError, match=message):
        three_levels().__class__(three_levels().graph, **options)


def test_what_is_no_graph_and_no_callback_is_refused():
    engine = three_levels()
    with pytest.raises(mlo.MloError, match=r"graph: expected an mlo\.Graph; found \["):
        mlo.Engine(list(engine.graph.levels))
    with pytest.raises(
        mlo.MloError, match=r"callbacks: expected objects with a method on_round\(report\); found <built"
    ):
        engine.run(1, callbacks=[print], progress=False)
    assert engine.rounds_done == 0


def test_unknown_level_of_a_query_names_the_nearest():
    with pytest.raises(mlo.GraphError, match=r"found 'gat'\. Did you mean 'gate'\?"):
        three_levels().hypergradient("gat")


def test_stop_before_the_first_round():
    engine = three_levels()
    engine.stop()
    assert engine.run(5, progress=False) == {}
    assert engine.rounds_done == 0
    engine.run(2, progress=False)
    assert engine.rounds_done == 2


def two_levels(lower, fit, estimator, *, optimizer=None, steps=3):
    upper = torch.nn.Linear(4, 1).double()
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if optimizer is None:
        optimizer = torch.optim.SGD(lower.parameters(), lr=0.1)
    return mlo.Engine(
        mlo.Graph(
            [
                mlo.Problem("lower", lower, fit, optimizer, [x], hypergradient=estimator, steps=steps),
                mlo.Problem(
                    "upper", upper, lambda levels, x: levels.lower(x).square().mean(),
                    torch.optim.SGD(upper.parameters(), lr=0.0), [x],
                ),
            ],
            [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")],
        ),
        device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize(
    "estimator", [mlo.FirstOrder(), mlo.FiniteDifference(last=None), mlo.Unroll(), mlo.ConjugateGradient(damping=1.0)]
)
@pytest.mark.parametrize("since", [0, 1])
def test_batch_normalization_whose_mode_the_loss_switches(estimator, since):
    """Its statistics move in the level's own steps alone, and a repeated step reads those of its time."""

    def fit(levels, x):
        weight = levels.upper(x).sigmoid()
        levels.lower.train()
        trained = levels.lower(x)
        if lower[1].num_batches_tracked >= since:
            levels.lower.eval()
        return ((trained - x.sum(1, keepdim=True)) ** 2 * weight).mean() + levels.lower(x).square().mean()

    torch.manual_seed(0)
    lower = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double().eval()
    engine = two_levels(lower, fit, estimator)
    engine._trace()
    assert lower[1].num_batches_tracked == 0
    engine.hypergradient("upper")
    assert lower[1].num_batches_tracked == 0
    recorded = []
    take_step = engine._take_step

    def spy(name, **options):
        step = take_step(name, **options)
        if step is not None:
            recorded.append(step)
        return step

    engine._take_step = spy
    engine.run(1, progress=False)
    assert lower[1].num_batches_tracked == 3
    assert recorded or estimator == mlo.FirstOrder()
    for step in recorded:  # what was recorded is what a repetition finds
        values = {name: weights.tensors for name, weights in step.world.items()}
        again = step.call.gradients(values, ["lower"])
        for a, b in zip(again.of["lower"], step.gradient, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_hypergradient_is_that_of_a_step_that_moves_and_reads_buffers(micro_batches):
    """The uppermost level's own; from the second round on it reads statistics that the same step has moved."""
    torch.manual_seed(0)
    upper = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double()
    lower = torch.nn.Linear(4, 1).double()

    def guide(levels, x):
        trained = levels.upper(x)
        upper.train(levels.progress == 0)
        read = levels.upper(x)
        upper.train()
        return (levels.lower(x) - trained - read).square().mean()

    def fit(levels, x):
        return (levels.lower(x) - levels.upper(x)).square().mean()

    batches = [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)]
    descend, rise = (torch.optim.SGD(module.parameters(), lr=0.1) for module in (lower, upper))
    levels = [
        mlo.Problem("lower", lower, fit, descend, batches, hypergradient=mlo.Unroll()),
        mlo.Problem("upper", upper, guide, rise, batches, micro_batches=micro_batches),
    ]
    graph = mlo.Graph(levels, [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")])
    engine = mlo.Engine(graph, device="cpu")
    engine.run(1, total_rounds=2, progress=False)
    before = {name: t.detach().clone() for name, t in upper.state_dict().items()}
    found = engine.hypergradient("upper")
    assert all(torch.equal(t, before[name]) for name, t in upper.state_dict().items())
    engine.run(1, total_rounds=2, progress=False)
    for name, p in upper.named_parameters():
        torch.testing.assert_close(found[name], (before[name] - p.detach()) / 0.1, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("estimator", [mlo.FirstOrder(), mlo.Unroll(), mlo.FiniteDifference()])
def test_a_module_may_return_aliases_that_the_loss_writes_through(estimator):
    class Twice(torch.nn.Linear):
        def forward(self, x):
            h = super().forward(x)
            return h, h

    def fit(levels, x):
        a, b = levels.upper(x)
        a.mul_(0.5)
        return ((levels.lower(x) - 1) ** 2 * b.sigmoid()).mean()

    torch.manual_seed(0)
    lower = torch.nn.Linear(4, 1).double()
    engine = two_levels(lower, fit, estimator, steps=1)
    upper = engine.graph["upper"].module
    upper.__class__ = Twice
    x = engine.graph["lower"].data[0]
    expected = ((lower(x) - 1) ** 2 * (upper(x)[0] * 0.5).sigmoid()).mean().item()
    assert engine.run(1, progress=False)["lower.loss"] == pytest.approx(expected, rel=1e-12)


def test_frozen_parameters_with_a_gradient_left_over_stay_where_they_are():
    lower = torch.nn.Linear(4, 1).double()
    lower.bias.requires_grad_(False)
    lower.bias.grad = torch.ones_like(lower.bias)
    before = lower.bias.clone()
    engine = two_levels(lower, lambda levels, x: (levels.lower(x) - levels.upper(x)).square().mean(), mlo.Unroll())
    engine.run(2, progress=False)
    assert torch.equal(lower.bias, before)
    assert torch.equal(lower.bias.grad, torch.ones_like(before))


def test_a_loss_without_a_gradient_is_refused():
    lower = torch.nn.Linear(4, 1).double()
    engine = two_levels(
        lower, lambda levels, x: (levels.lower(x) - levels.upper(x)).detach().square().mean(), mlo.Unroll()
    )
    with pytest.raises(mlo.GraphError, match=r"loss of level 'lower': expected a tensor that depends.*detach\(\)"):
        engine.run(1, progress=False)


def test_the_length_of_the_run_is_remembered():
    engine = three_levels()
    engine.run(2, total_rounds=10, progress=False)
    engine.run(2, progress=False)
    assert engine.total_rounds == 10


def test_a_metric_that_is_no_number_is_named():
    lower = torch.nn.Linear(4, 1).double()

    def fit(levels, x):
        return mlo.Output((levels.lower(x) - levels.upper(x)).square().mean(), {"shape": torch.zeros(2)})

    with pytest.raises(mlo.MloError, match=r"metric 'lower\.shape': expected a number"):
        two_levels(lower, fit, mlo.Unroll()).run(1, progress=False)


def test_a_zero_cotangent_gives_zeros_whatever_the_radius():
    lower = torch.nn.Linear(4, 1).double().float()
    x = torch.ones(2, 4)
    upper = torch.nn.Linear(4, 1)
    graph = mlo.Graph(
        [
            mlo.Problem(
                "lower", lower, lambda levels, x: (levels.lower(x) - levels.upper(x)).square().mean(),
                torch.optim.SGD(lower.parameters(), lr=0.1), [x], hypergradient=mlo.FiniteDifference(radius=5.0),
            ),
            mlo.Problem(
                "upper", upper, lambda levels, x: (levels.lower(x) * 0).sum() + levels.upper(x).sum(),
                torch.optim.SGD(upper.parameters(), lr=0.1), [x],
            ),
        ],
        [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")],
    )  # fmt: skip
    found = mlo.Engine(graph, device="cpu").hypergradient("upper")
    assert torch.equal(found["bias"], torch.full((1,), 2.0))


def test_a_learning_rate_that_is_a_tensor_is_put_back_too():
    lower, upper = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    rate = torch.tensor(0.1)
    sgd = torch.optim.SGD(lower.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1, 0.5)

    def loss(levels, batch):
        return (levels.lower.weight - levels.upper.weight).square().sum()

    problems = [
        mlo.Problem("lower", lower, loss, sgd, None, steps=3, scheduler=scheduler, hypergradient=mlo.Unroll()),
        mlo.Problem("upper", upper, lambda levels, batch: levels.lower.weight.square().sum(),
                    torch.optim.SGD(upper.parameters(), lr=0.1), None),
    ]  # fmt: skip
    edges = [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")]
    engine = mlo.Engine(mlo.Graph(problems, edges), device="cpu")
    first, second = (engine.hypergradient("upper")["weight"] for _ in range(2))
    assert torch.equal(first, second)
    assert sgd.param_groups[0]["lr"] is rate
    assert rate == torch.tensor(0.1)
    assert engine.check(progress=False).levels[0].verdict == "exact"


def test_in_its_warm_up_a_level_waits_for_those_inside_it():
    """They are trained as if it stood still."""
    warmed, frozen = three_levels(warmup=2), three_levels()
    frozen.graph["gate"].optimizer.param_groups[0]["lr"] = 0.0
    begin = warmed.graph["gate"].module.weight.detach().clone()
    metrics = warmed.run(2, progress=False)
    frozen.run(2, progress=False)
    assert not any(name.startswith("gate.") for name in metrics)
    for name in ("teacher", "student", "gate"):
        one, other = (e.graph[name].module.parameters() for e in (warmed, frozen))
        assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    assert not warmed.graph["gate"].optimizer.state
    assert "gate.loss" in warmed.run(1, progress=False)
    assert not torch.equal(warmed.graph["gate"].module.weight, begin)


def test_only_a_top_level_can_have_a_warm_up():
    lower, upper = (nn.Linear(1, 1) for _ in range(2))

    def loss(levels, batch):
        return (levels.lower.weight - levels.upper.weight).square().sum()

    problems = [
        mlo.Problem(name, m, loss, torch.optim.SGD(m.parameters(), lr=0.1), None, warmup_rounds=int(name == "lower"))
        for name, m in (("lower", lower), ("upper", upper))
    ]
    with pytest.raises(mlo.GraphError, match=r"'lower', warmup_rounds.*found one inside upper. Warm up 'upper'"):
        mlo.Graph(problems, [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")])
    with pytest.raises(mlo.GraphError, match="warmup_rounds must be a whole number of at least 0; found -1"):
        mlo.Problem("lower", lower, loss, torch.optim.SGD(lower.parameters(), lr=0.1), None, warmup_rounds=-1)


def test_a_query_of_a_later_top_level_is_what_its_next_step_uses():
    """An earlier one, with a level inside it, has stepped by then; what is inside is not solved again."""

    modules = {"a": Vector([0.3, -0.2]), "b": Vector([1.0, 0.5]), "c": Vector([0.7, 0.1])}
    losses = {
        "a": lambda levels, batch: (levels.a.w - levels.b.w).square().sum(),
        "b": lambda levels, batch: (levels.a.w - 2).square().sum() + levels.b.w.square().sum(),
        "c": lambda levels, batch: levels.c.w @ levels.a.w + levels.c.w.square().sum(),
    }
    levels = [
        mlo.Problem(name, modules[name], loss, torch.optim.SGD(modules[name].parameters(), lr=0.1), None,
                    steps=2 if name == "a" else 1)
        for name, loss in losses.items()
    ]  # fmt: skip
    edges = [mlo.Edge("b", "a"), mlo.Edge("a", "b"), mlo.Edge("a", "c")]
    engine = mlo.Engine(mlo.Graph(levels, edges), device="cpu")
    gradient, before = engine.hypergradient("c")["w"], modules["c"].w.detach().clone()
    engine.run(1, progress=False)
    torch.testing.assert_close((before - modules["c"].w.detach()) / 0.1, gradient, rtol=1e-12, atol=1e-12)


def test_a_loss_that_writes_into_variables_is_refused_before_the_first_step():
    engine = three_levels()
    problem = engine.graph["student"]

    def writing(levels, batch):
        next(levels.teacher.parameters()).detach().add_(1.0)
        return problem.loss(levels, batch)

    levels = [replace(p, loss=writing) if p is problem else p for p in engine.graph.levels]
    engine = mlo.Engine(mlo.Graph(levels, engine.graph.edges), device="cpu")
    with pytest.raises(mlo.GraphError, match=r"the loss of level 'student': .* it writes into those of 'teacher'"):
        engine.run(1, progress=False)
