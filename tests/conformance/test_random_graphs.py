"""`Unroll` on random, unconverged, warm-started graphs of two to four levels of tanh networks, nests included."""

import pytest
import torch

import mlo

from .random_graphs import draw_graph, flat

CASES = [
    (levels, nested, seed)
    for levels, nested in ((2, False), (3, False), (3, True), (4, False), (4, True))
    for seed in range(4)
]


@pytest.mark.parametrize("checkpoint", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(("num_levels", "nested", "seed"), CASES)
def test_unroll_is_the_derivative_of_the_steps_taken(num_levels, nested, seed, checkpoint):
    graph = draw_graph(seed, num_levels, nested=nested)
    if checkpoint:  # so that of every solve's steps some are recomputed
        graph.steps = {name: steps + 1 for name, steps in graph.steps.items()}
    engine = graph.engine(mlo.Unroll(checkpoint=checkpoint))
    engine.run(3, progress=False)
    top = graph.names[-1]
    lower_tops = [name for name in engine.graph.structure.tops if name != top]
    found = flat(engine.hypergradient(top).values())
    reference = graph.reference(engine)
    values = graph.values()
    counts, states = dict(reference.drawn), dict(reference.states)
    for name in lower_tops:  # these step first in the round
        for k in range(graph.steps[name]):
            values, counts, states = reference.step(name, values, counts, states, ("before", name, k))
    reference.drawn, reference.states = counts, states
    values = {name: [t.detach() for t in tensors] for name, tensors in values.items()}

    exact = flat(reference.hypergradient(top, values))
    assert float((found - exact).norm() / exact.norm()) < 1e-9

    # The black box: move the upper variables, take the lower steps again from the same starts.
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    own = values[top]
    pieces = [d.view_as(w) for d, w in zip(direction.split([w.numel() for w in own]), own, strict=True)]
    radius = 1e-6
    sides = [
        float(
            reference.total(
                top, values | {top: [w + s * radius * d for w, d in zip(own, pieces, strict=True)]}
            ).detach()
        )
        for s in (1, -1)
    ]
    slope = (sides[0] - sides[1]) / (2 * radius)
    assert float(found @ direction) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_finite_differences_converge_to_the_exact_products_in_a_nest(seed):
    graph = draw_graph(seed, 3, nested=True)
    graph.steps = {name: min(steps, 2) for name, steps in graph.steps.items()}
    state = {name: module.state_dict() for name, module in graph.modules.items()}
    exact = flat(graph.engine(mlo.Unroll()).hypergradient(graph.names[-1]).values())
    errors = []
    for radius in (1e-2, 1e-3):
        for name, module in graph.modules.items():
            module.load_state_dict(state[name])
        engine = graph.engine(mlo.FiniteDifference(radius=radius, last=None))
        found = flat(engine.hypergradient(graph.names[-1]).values())
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < 1e-5
    assert errors[1] < errors[0] / 20  # second order in the radius
