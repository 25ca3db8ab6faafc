"""Betty's engine on graphs of ours: where it is right it does what ours does, elsewhere what its source says."""

from __future__ import annotations

import pytest
import torch

import mlo
from mlo.interop.betty import betty_engine

from .graphs import AIM, C1, C2, H1, OTHER_AIM, bilevel, nest, networks, random, sgd, siblings, teaching

pytest.importorskip("betty", reason="an optional peer; docs/installation.md says how to install it, .ci/run does")
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def weights(graph, *names):
    names = names or graph.structure.names
    return [p.detach().clone() for n in names for p in graph[n].module.parameters()]


def without_times(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith("_seconds")}


# --- where Betty is right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"teacher_steps": 3},
        {"warmup_rounds": 2},
        {"teacher_steps": 2, "warmup_rounds": 1},
        {"micro_batches": 2, "scheduled": False},
    ],
    ids=str,
)
def test_without_indirect_parts_both_engines_do_the_same(options):
    """Batches, masks, momentum, groups, schedules, clipping, warm-up, micro-batches: all weights and figures."""
    ours, theirs = networks(mlo.FirstOrder(), **options), networks(mlo.FirstOrder(), **options)
    expected = mlo.Engine(ours, seed=3, device="cpu").run(4, progress=False)
    found = betty_engine(theirs, rounds=4, seed=3, device="cpu").run()
    assert without_times(found) == pytest.approx(without_times(expected), rel=1e-12)
    torch.testing.assert_close(weights(theirs), weights(ours), **TOLERANCE)


def test_gradients_that_were_left_behind_count_for_nothing():
    """Betty adds to what is in `.grad`, and its optimizers step frozen parameters that have something there."""
    graphs = [networks(mlo.FirstOrder()) for _ in range(2)]
    for graph in graphs:
        teacher = graph["teacher"].module
        list(teacher.parameters())[-1].requires_grad_(False)
        for p in teacher.parameters():
            p.grad = torch.ones_like(p)
    mlo.Engine(graphs[0], device="cpu").run(2, progress=False)
    betty_engine(graphs[1], rounds=2, device="cpu").run()
    torch.testing.assert_close(weights(graphs[1]), weights(graphs[0]), **TOLERANCE)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in graphs[1]["teacher"].module.parameters())


def test_parameters_frozen_after_the_engine_was_made_are_refused():
    graph = bilevel(mlo.FirstOrder())
    engine = betty_engine(graph, rounds=2, device="cpu")
    graph["w"].module.w.requires_grad_(False)
    with pytest.raises(mlo.MloError, match=r"level 'w': expected the trainable parameters .* Make a new mlo.Engine"):
        engine.run()


def test_rollback_does_the_same_without_dropout():
    ours, theirs = networks(mlo.FirstOrder(), dropout=False), networks(mlo.FirstOrder(), dropout=False)
    expected = mlo.Engine(ours, device="cpu", rollback=True).run(4, progress=False)
    found = betty_engine(theirs, rounds=4, device="cpu", rollback=True).run()
    assert without_times(found) == pytest.approx(without_times(expected), rel=1e-12)
    torch.testing.assert_close(weights(theirs), weights(ours), **TOLERANCE)


@pytest.mark.parametrize("estimator", [mlo.FiniteDifference(), mlo.SAMA()], ids=repr)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_lower_levels_of_the_first_round_agree(estimator, steps):
    ours, theirs = networks(estimator, teacher_steps=steps), networks(estimator, teacher_steps=steps)
    expected = mlo.Engine(ours, device="cpu").run(1, progress=False)
    found = betty_engine(theirs, rounds=1, device="cpu").run()
    assert without_times(found) == pytest.approx(without_times(expected), rel=1e-12)
    names = ("teacher", "student")
    torch.testing.assert_close(weights(theirs, *names), weights(ours, *names), **TOLERANCE)


@pytest.mark.parametrize(
    "graph",
    [
        lambda: bilevel(mlo.FiniteDifference(), steps=3),
        lambda: teaching(mlo.FiniteDifference(), teacher_steps=2),
        lambda: nest(mlo.FiniteDifference(), steps=(2, 3, 2)),
        lambda: siblings(steps=(2, 2)),
    ],
    ids=["bilevel", "teaching", "nest", "siblings"],
)
def test_betty_takes_the_steps_that_were_foreseen(graph):
    taken = []
    built = graph()
    engine = betty_engine(built, rounds=2, device="cpu")
    for problem in engine.problems:
        problem.grad_callback = lambda name=problem.name: taken.append(name)  # Betty calls it once a step
    engine.run()
    asked = 2 * round_of(built, built.structure.tops)
    assert sorted(taken) == sorted(asked)
    for edge in built.edges:
        pair = (edge.source, edge.target)
        assert [n for n in taken if n in pair] == [n for n in asked if n in pair]


def round_of(graph, names):
    steps = []
    for name in names:
        for _ in range(graph[name].steps):
            steps += [*round_of(graph, graph.structure.members[name]), name]
    return steps


# --- what Betty computes otherwise ------------------------------------------------------------------------------------


def step_of(graph, name="a"):
    """The gradient that Betty uses in the first step of a level with learning rate 1, and the weights after it."""
    before = graph[name].module.w.detach().clone()
    betty_engine(graph, rounds=1, device="cpu").run()
    return before - graph[name].module.w.detach()


@pytest.mark.parametrize(
    ("estimator", "inverse"),
    [
        (mlo.FiniteDifference(1e-3), torch.eye(3, dtype=torch.float64)),
        (mlo.SAMA(1e-3), torch.eye(3, dtype=torch.float64)),
        (
            mlo.Neumann(terms=4, scale=0.2),
            0.2 * sum(torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - 0.2 * H1, k) for k in range(4)),
        ),
        (mlo.FirstOrder(), torch.zeros(3, 3, dtype=torch.float64)),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("lr", [0.1, 0.3])
def test_the_hypergradient_of_two_levels(estimator, inverse, lr):
    """- C1' M (w - AIM) at the weights after the step, whatever the learning rate."""
    graph = bilevel(estimator, optimizer=lambda module: sgd(module, lr))
    found = step_of(graph)
    w = graph["w"].module.w.detach()
    torch.testing.assert_close(found, -C1.T @ inverse @ (w - AIM), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("estimator", [mlo.FiniteDifference(1e-3), mlo.SAMA(1e-3)], ids=repr)
def test_the_hypergradient_of_learning_by_teaching(estimator):
    """The teacher's path and the student's, without learning rates; A's direct way into the labels is detached."""
    graph = teaching(estimator)
    found = step_of(graph)
    t, s = (graph[name].module.w.detach() for name in "ts")
    expected = -C1.T @ (t - AIM) + C1.T @ C2.T @ (s - OTHER_AIM)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_the_number_is_that_of_darts_divided_by_the_learning_rate_when_the_curvature_is_constant():
    ours, theirs = (bilevel(mlo.FiniteDifference(1e-3)) for _ in range(2))
    expected = mlo.Engine(ours, device="cpu").hypergradient("a")["w"]
    torch.testing.assert_close(0.1 * step_of(theirs), expected, rtol=1e-8, atol=1e-8)


def test_nests_lack_the_solve_after_a_step_and_the_paths_that_go_down_and_up_again():
    engine = betty_engine(nest(mlo.FiniteDifference()), rounds=1, device="cpu")
    paths = {p.name: sorted("-".join(q.name for q in path) for path in p.paths) for p in engine.problems}
    assert paths == {"l0": [], "l1": ["l1-l0-l1"], "l2": ["l2-l0-l2", "l2-l1-l0-l2", "l2-l1-l2"]}  # no l2-l0-l1-l2


def test_a_level_that_counts_as_constant_takes_no_part_in_a_path():
    graph = teaching(mlo.FiniteDifference(1e-3))
    levels = [
        mlo.Problem(p.name, p.module, p.loss, p.optimizer, None, hypergradient=estimator)
        for p, estimator in zip(
            graph.levels, [mlo.FiniteDifference(1e-3), mlo.FirstOrder(), mlo.FirstOrder()], strict=True
        )
    ]
    found = step_of(mlo.Graph(levels, graph.edges))
    torch.testing.assert_close(found, -C1.T @ (levels[0].module.w.detach() - AIM), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_conjugate_gradients_turn_the_direction_by_the_residual_before_the_step(iterations):
    """One iteration is right; the next directions are not conjugate."""
    graph = bilevel(mlo.ConjugateGradient(iterations=iterations))
    found = step_of(graph)
    v = graph["w"].module.w.detach() - AIM
    x, r, p = torch.zeros_like(v), v, v
    for _ in range(iterations):
        size = r @ r / (p @ H1 @ p)
        next_r = r - size * H1 @ p
        x, p, r = x + size * p, r + (next_r @ next_r) / (r @ r) * p, next_r
    torch.testing.assert_close(found, -C1.T @ x, rtol=1e-8, atol=1e-8)
    is_solution = torch.allclose(H1 @ x, v, rtol=1e-2)
    assert not is_solution  # three iterations of the right recursion solve a system of three variables


def test_conjugate_gradients_do_not_stop_at_an_exact_solution():
    """Betty divides 0 by 0: here one iteration solves the system of one variable."""
    w, a = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    graph = mlo.Graph(
        [
            mlo.Problem(
                "w",
                w,
                lambda levels, batch: (levels.w.weight - levels.a.weight).square().sum() / 2,
                sgd(w),
                None,
                hypergradient=mlo.ConjugateGradient(iterations=3),
            ),
            mlo.Problem("a", a, lambda levels, batch: levels.w.weight.square().sum() / 2, sgd(a), None),
        ],
        [mlo.Edge("a", "w"), mlo.Edge("w", "a")],
    )
    betty_engine(graph, rounds=1, device="cpu").run()
    assert torch.isnan(a.weight).all()


def test_auxiliary_passes_move_batch_normalization_and_draw_other_masks():
    counts, masks = {}, {}
    for kind in ("ours", "theirs"):
        graph = networks(mlo.FiniteDifference())
        teacher = graph["teacher"].module
        seen = masks[kind] = []
        teacher[3].register_forward_hook(lambda module, args, output, seen=seen: seen.append(output == 0))
        if kind == "ours":
            mlo.Engine(graph, device="cpu").run(1, progress=False)
        else:
            betty_engine(graph, rounds=1, device="cpu").run()
        counts[kind] = teacher[1].num_batches_tracked.item()
    assert counts["ours"] == 1  # the teacher's own step
    # Its own step, one pass in each other loss, two in the student's differences, two each in its own for two paths.
    assert counts["theirs"] == 9
    # The last two evaluations of Betty are a difference of the teacher's loss, with two masks.
    assert not torch.equal(masks["theirs"][-1], masks["theirs"][-2])


# --- manners ----------------------------------------------------------------------------------------------------------


def test_it_is_silent_and_leaves_modes_generators_and_optimizers_alone(capsys):
    graph = networks(mlo.FiniteDifference())
    graph["teacher"].module.eval()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    seen = []

    class Callback:
        def on_round(self, report):
            seen.append((report.round, report.total_rounds, report.metrics["teacher.progress"]))

    engine = betty_engine(graph, rounds=3, device="cpu")
    engine.run(callbacks=[Callback()])
    assert seen == [(1, 3, 0.0), (2, 3, pytest.approx(1 / 3)), (3, 3, pytest.approx(2 / 3))]
    assert engine.rounds_done == engine.total_rounds == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert not graph["teacher"].module.training
    assert [len(group["params"]) for group in graph["student"].optimizer.param_groups] == [1, 4]
    assert graph["student"].optimizer.param_groups[0]["lr"] == 0.05
    assert capsys.readouterr() == ("", "")


def test_it_stops_when_asked_and_goes_on():
    engine = betty_engine(bilevel(mlo.FiniteDifference()), rounds=5, device="cpu")

    class Callback:
        def on_round(self, report):
            if report.round == 2:
                engine.stop()

    engine.run(callbacks=[Callback()])
    assert engine.rounds_done == 2
    engine.run()
    assert engine.rounds_done == 5
    assert engine.run() == {}


def test_levels_may_have_any_name():
    w, a = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    graph = mlo.Graph(
        [
            mlo.Problem(
                "train", w, lambda levels, batch: (levels.train(x) - levels.config(x)).square().mean(), sgd(w), None
            ),
            mlo.Problem("config", a, lambda levels, batch: levels.train(x).square().mean(), sgd(a), None),
        ],
        [mlo.Edge("config", "train"), mlo.Edge("train", "config")],
    )
    assert betty_engine(graph, rounds=2, device="cpu").run()["config.loss"] > 0


def test_a_loss_that_grows_without_bound_is_an_error():
    with pytest.raises(mlo.DivergenceError, match="Betty's engine, level 'a': expected a finite loss; found inf"):
        betty_engine(bilevel(mlo.FirstOrder(), optimizer=lambda m: sgd(m, 1e200)), rounds=1, device="cpu").run()


def test_a_loss_may_read_only_what_its_edges_declare():
    graph = bilevel(mlo.FirstOrder())
    secret = [mlo.Problem(p.name, p.module, p.loss, p.optimizer, None) for p in graph.levels]
    with pytest.raises(mlo.GraphError, match=r"the loss of level 'w' reads levels\.a"):
        betty_engine(mlo.Graph(secret, graph.edges[1:]), rounds=1, device="cpu").run()


@pytest.mark.parametrize(
    ("loss", "declared", "message"),
    [
        (lambda levels, a: levels.w().square().sum(), True, r"edge 'a' -> 'w': .* one call of it read w\."),
        (lambda levels, a: levels.a().detach().sum(), True, "the loss of level 'w': .* found one without a gradient"),
        (lambda levels, a: levels.w() @ a.w, False, "depends on the variables of level 'a' without an edge"),
    ],
)
def test_a_loss_must_depend_on_what_its_edges_declare(loss, declared, message):
    graph = bilevel(mlo.FirstOrder())
    w, a = graph["w"], graph["a"]
    other = mlo.Problem("w", w.module, lambda levels, batch: loss(levels, a.module), w.optimizer, None)
    edges = [edge for edge in graph.edges if declared or edge.target != "w"]
    with pytest.raises(mlo.GraphError, match=message):
        betty_engine(mlo.Graph([other, a], edges), rounds=1, device="cpu").run()


@pytest.mark.parametrize("rounds", [0, 2.5])
def test_rounds_are_checked(rounds):
    with pytest.raises(mlo.MloError, match=f"rounds: expected a whole number of at least 1; found {rounds}"):
        betty_engine(bilevel(mlo.FirstOrder()), rounds=rounds, device="cpu")


def test_the_two_moments_of_adam_survive():
    """Betty would have built a new optimizer: the state that was there is used, and kept."""
    graph = bilevel(mlo.FirstOrder(), optimizer=lambda module: torch.optim.Adam(module.parameters(), lr=0.1))
    optimizer, w = graph["w"].optimizer, graph["w"].module.w
    w.grad = random(7, 3)
    optimizer.step()
    betty_engine(graph, rounds=2, device="cpu").run()
    assert optimizer.state[w]["step"].item() == 3


def test_the_terms_of_a_sum_draw_the_same():
    def end(play):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        gate = torch.nn.Linear(1, 1)
        x, y = torch.randn(8, 3), torch.randn(8, 1)

        def fit(levels, batch):
            return (levels.net(batch[0]) - batch[1]).square().mean()

        def weighted(levels, batch):
            return fit(levels, batch) * levels.gate.weight.exp().sum()

        def problem(name, module, loss):
            sgd = torch.optim.SGD(module.parameters(), lr=0.1)
            return mlo.Problem(name, module, loss, sgd, [(x, y)], hypergradient=mlo.FirstOrder())

        levels = [problem("net", net, mlo.Sum(fit, weighted)), problem("gate", gate, weighted)]
        play(mlo.Graph(levels, [mlo.Edge("gate", "net"), mlo.Edge("net", "gate")]))
        return net[0].weight.detach()

    ours = end(lambda graph: mlo.Engine(graph, seed=3, device="cpu").run(3, progress=False))
    theirs = end(lambda graph: betty_engine(graph, rounds=3, seed=3, device="cpu").run())
    torch.testing.assert_close(theirs, ours)
