"""Random or given graphs of small tanh networks, declared twice: for the package and for the reference."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import mlo

from .reference import Reference, ReferenceLevel

OPTIMIZERS = {
    "sgd": {"kind": "sgd", "lr": 0.3},
    "momentum": {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "dampening": 0.2},
    "nesterov": {"kind": "sgd", "lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    "adam": {"kind": "adam", "lr": 0.05, "weight_decay": 0.03, "eps": 1e-4},
    "adamw": {"kind": "adamw", "lr": 0.05, "weight_decay": 0.2, "eps": 1e-4},
}


def build_optimizer(options, module):
    options = dict(options)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.pop("kind")]
    return kind(module.parameters(), **options)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def fit(name, sources):
    """The loss of a level whose network fits targets at inputs to which the outputs of others are added."""

    def loss(levels, batch):
        x, y = batch
        return mse_loss(getattr(levels, name)(x + sum(getattr(levels, q)(x) for q in sources)), y)

    return loss


@dataclass
class RandomGraph:
    names: list[str]
    reads: dict[str, set[str]]
    modules: dict[str, nn.Module]
    options: dict[str, dict]
    steps: dict[str, int]
    clips: dict[str, float | None]
    batches: dict[str, list]

    def loss(self, name):
        sources = sorted(self.reads[name])

        def compute(call, batch):
            x, y = batch
            hidden = x
            for source in sources:
                hidden = hidden + call(source, x)
            return (call(name, hidden) - y).square().mean()

        return compute

    def engine(self, estimators, *, seed=0, **options) -> mlo.Engine:
        def declared(name):
            compute = self.loss(name)
            return lambda levels, batch: compute(lambda q, x: getattr(levels, q)(x), batch)

        problems = [
            mlo.Problem(
                name,
                self.modules[name],
                declared(name),
                build_optimizer(self.options[name], self.modules[name]),
                self.batches[name],
                hypergradient=estimators[name] if isinstance(estimators, dict) else estimators,
                steps=self.steps[name],
                clip_norm=self.clips[name],
            )
            for name in self.names
        ]
        edges = [mlo.Edge(source, target) for target in self.names for source in sorted(self.reads[target])]
        return mlo.Engine(mlo.Graph(problems, edges), seed=seed, device="cpu", **options)

    def reference(self, engine: mlo.Engine) -> Reference:
        """The reference, from the state that the engine is in."""
        levels, drawn, states = [], {}, {}
        for name in self.names:
            module, compute = self.modules[name], self.loss(name)

            def loss(values, batch, compute=compute):
                def call(q, x):
                    keys = [n for n, _ in self.modules[q].named_parameters()]
                    return functional_call(self.modules[q], dict(zip(keys, values[q], strict=True)), (x,))

                return compute(call, batch)

            levels.append(
                ReferenceLevel(name, loss, self.batches[name], self.options[name], self.steps[name], self.clips[name])
            )
            optimizer = engine.graph[name].optimizer
            names = {"momentum_buffer": "buf", "exp_avg": "m", "exp_avg_sq": "v"}
            states[name] = []
            for p in module.parameters():
                own = optimizer.state.get(p, {})
                state = {names[k]: v.detach().clone() for k, v in own.items() if k in names and v is not None}
                if "step" in own:
                    state["t"] = int(own["step"])
                states[name].append(state)
            drawn[name] = self.steps_taken(engine, name)
        return Reference(levels, self.reads, drawn, states)

    def values(self):
        return {n: [p.detach().clone() for p in m.parameters()] for n, m in self.modules.items()}

    @staticmethod
    def steps_taken(engine, name):
        return engine._states[name].steps_taken


def draw_graph(seed: int, num_levels: int, *, density: float = 0.6, nested: bool = False) -> RandomGraph:
    """Draw a valid graph; with `nested`, one in which some level is solved inside one that is solved inside another."""
    rng = random.Random(seed)
    names = [f"level{i}" for i in range(num_levels)]
    while True:
        reads = {t: {s for s in names if s != t and rng.random() < density} for t in names}
        probe = Reference([ReferenceLevel(n, lambda v, b: None, [], {}) for n in names], reads)
        influences = all(_reaches_above(names, reads, n) for n in names[:-1])
        has_nest = any(q in probe.inside(p) and probe.inside(q) for p in names for q in names)
        if influences and probe.inside(names[-1]) and has_nest == nested:
            break
    return build_graph(
        seed,
        reads,
        {n: rng.choice(tuple(OPTIMIZERS.values())) for n in names},
        {n: rng.choice((1, 2, 3)) if num_levels < 4 else rng.choice((1, 2)) for n in names},
        clips={n: rng.choice((None, 0.3)) for n in names},
        num_batches={n: rng.choice((1, 2, 3)) for n in names},
    )


def build_graph(seed, reads, options, steps, *, clips, num_batches) -> RandomGraph:
    """Build a graph of a given shape, with random networks and batches.

    Args:
        seed: of the networks and batches.
        reads: for each level, lowest first, the levels that it reads.
        options: of each level's optimizer.
        steps: of each level.
        clips: the norm that each level's gradient is clipped to, or None.
        num_batches: of each level.
    """
    generator = torch.Generator().manual_seed(seed)

    def network():
        net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7)
        return net

    def batch():
        x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
        return x, torch.randn(4, 2, generator=generator, dtype=torch.float64)

    modules = {n: network() for n in reads}
    batches = {n: [batch() for _ in range(num_batches[n])] for n in reads}
    return RandomGraph(list(reads), reads, modules, options, steps, clips, batches)


def _reaches_above(names, reads, start):
    found = {start}
    for _ in names:
        found |= {t for t in names if reads[t] & found}
    return any(names.index(n) > names.index(start) for n in found)
