"""A two-phase experiment that takes seconds, and can be told to be interrupted; also a script, to be killed for real.

`python toy_experiment.py FOLDER [PHASE ROUND SIGNAL]` begins or resumes a run; it sends itself SIGNAL during ROUND of
PHASE.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mlo
from mlo.recipes import Recipe
from mlo.runs import Experiment, Interrupted, Run, resume


class ToyRecipe(Recipe):
    rounds: int = 7
    checkpoint_every: int = 2


class ToyExperiment(Experiment):
    recipe_type = ToyRecipe

    def __init__(self, recipe, interrupt=None):
        self.recipe = recipe
        self.interrupt = interrupt  # (phase, round, signal)
        self.calls = 0

    def graph(self):
        return self._graph("search")

    def _graph(self, phase):
        torch.manual_seed(0)
        net, gate = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)), nn.Linear(1, 1)
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        seen = []

        def lower(levels, batch):
            return (levels.net(batch[0]) - levels.gate(torch.ones(1, 1))).square().mean()

        def upper(levels, batch):
            seen.append(levels.progress)
            if (
                self.interrupt and self.interrupt[0] == phase and len(seen) == self.interrupt[1] + 1
            ):  # the trace is one call
                os.kill(os.getpid(), self.interrupt[2])
            return (levels.net(batch[0]) + 1).square().mean()

        def data():
            return DataLoader(TensorDataset(x), batch_size=8, shuffle=True)

        sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        return mlo.Graph(
            [
                mlo.Problem("net", net, lower, sgd, data(), steps=2),
                mlo.Problem("gate", gate, upper, torch.optim.Adam(gate.parameters(), lr=0.1), data()),
            ],
            [mlo.Edge("gate", "net"), mlo.Edge("net", "gate")],
        )

    def run(self, run):
        first = run.train("search", self._graph("search"), self.recipe.rounds)
        second = run.train("evaluation", self._graph("evaluation"), 5)
        weights = [first.graph["gate"].module.weight.item(), second.graph["gate"].module.weight.item()]
        return {"weights": weights, "search_seconds": run.seconds("search")}

    def report(self, run):
        (run.folder / "report.txt").write_text(str(run.result()["weights"]))


def recipe_of(path):
    return ToyRecipe(problem="toy")


def main(folder, *interrupt):
    experiment = ToyExperiment(
        recipe_of(None), (interrupt[0], int(interrupt[1]), getattr(signal, interrupt[2])) if interrupt else None
    )
    begun = (Path(folder) / "recipe.yaml").exists()
    run = (
        resume(folder, recipe_of, progress=False)
        if begun
        else Run.begin(folder, recipe_of(None), "toy", progress=False)
    )
    try:
        run.execute(experiment)
    except Interrupted as interruption:
        sys.exit(128 + interruption.signal_number)


if __name__ == "__main__":
    main(*sys.argv[1:])
