"""Seconds and memory of single passes of a recipe's networks at full size, on random images."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import mlo
from problems.data import Splits
from problems.data.images import Images
from problems.data.transforms import Preprocessing
from problems.lbt_experiment import LBTExperiment, LBTRecipe

from ..speed.memory import peak
from ..speed.timing import Method, Work, uncollected
from .cost import Network, Pass
from .counting import images_of, read

LOWER = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Subject:
    """One kind of pass of one network.

    Attributes:
        name: of the recipe that the network is from; it goes to other processes, which a recipe cannot.
        overrides: of the recipe.
        of: which network and precision; with `backward`, a forward and a backward pass together.
        device: where.
    """

    name: str
    overrides: tuple[str, ...]
    of: Pass
    device: torch.device

    @property
    def recipe(self) -> LBTRecipe:
        """The recipe."""
        return read(self.name, self.overrides)

    def build(self) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """Make the network, and a function of images (n, channels, side, side) that makes its forward pass."""
        recipe = self.recipe
        channels, _, classes = images_of(recipe)
        torch.manual_seed(0)
        if self.of.network == "student":
            network: nn.Module = recipe.student.build(classes, channels).to(self.device)
            return network, network
        stage = recipe.space.stage(0, None)
        supernet = stage.supernet(recipe.supernet, classes, channels).to(self.device)
        architecture = stage.architecture().to(self.device)
        return supernet, lambda images: supernet(images, architecture())

    def prepare(self, batch: int) -> Work:
        """Return the pass on so many random images."""
        network, forward = self.build()
        channels, side, _ = images_of(self.recipe)
        images, weights = torch.randn(batch, channels, side, side, device=self.device), list(network.parameters())
        lower = LOWER[self.recipe.precision] if self.of.lower else None

        def work(num: int) -> None:
            for _ in range(num):
                with torch.set_grad_enabled(self.of.backward):
                    with torch.autocast(self.device.type, lower) if lower is not None else nullcontext():
                        loss = forward(images).logsumexp(dim=1).mean()
                    if self.of.backward:
                        torch.autograd.grad(loss, weights)

        return work

    def mebibytes(self, batch: int) -> float | None:
        """Return the peak memory of the pass above what is there before; None where that cannot be measured."""
        if self.device.type == "cpu":
            found, error = peak(Method("", "", self.prepare), batch, 2)
            if error:
                raise mlo.MloError(f"{self.of.network}, {batch} images: {error}")
            return found
        if self.device.type != "cuda":
            return None
        work = self.prepare(batch)
        work(1)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work(1)
        return (torch.cuda.max_memory_allocated(self.device) - before) / MEBIBYTE

    def macs(self) -> float:
        """Return the billions of multiplications of a forward pass on one image."""
        _, forward = self.build()
        channels, side, _ = images_of(self.recipe)
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            forward(torch.randn(2, channels, side, side, device=self.device))  # one has no statistics
        return flops.get_total_flops() / 4e9


def clock(device: torch.device) -> float:
    """Return seconds: on the CPU those that this process has computed for, whatever else the machine does."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def timed(works: Mapping[Pass, Work], turns: int, device: torch.device) -> dict[Pass, float]:
    """Return the median seconds of each work, which take turns after a warm-up."""
    found: dict[Pass, list[float]] = {of: [] for of in works}
    for work in works.values():
        work(1)
    with uncollected():
        for _ in range(turns):
            for of, work in works.items():
                started = clock(device)
                work(1)
                found[of].append(clock(device) - started)
    return {of: statistics.median(values) for of, values in found.items()}


@dataclass(frozen=True)
class Rounds:
    """A recipe's own engine at full size, on batches of random images; to check the formula with.

    Attributes:
        name: of the recipe.
        overrides: of the recipe.
        device: where.
    """

    name: str
    overrides: tuple[str, ...]
    device: torch.device

    def prepare(self, batch: int) -> Work:
        """Return rounds after the warm-up."""
        recipe = read(self.name, [*self.overrides, f"batch_size={batch}", "levels.architecture.warmup_rounds=0"])
        channels, side, classes = images_of(recipe)
        images = Images(torch.randn(batch, channels, side, side), torch.arange(batch) % classes)
        same = v2.Identity()
        data = Splits(*[images] * 6, Preprocessing(same, same, same), tuple(map(str, range(classes))), channels, side)
        torch.manual_seed(0)
        graph = LBTExperiment(recipe).declare(recipe.space.stage(0, None), data)
        engine = mlo.Engine(graph, seed=0, device=self.device, precision=recipe.precision, rollback=recipe.rollback)
        return lambda num: engine.run(num, progress=False)

    def seconds(self, batch: int) -> float:
        """Return the seconds of a round."""
        work = self.prepare(batch)
        work(1)
        started = clock(self.device)
        work(1)
        return clock(self.device) - started


def measured(
    name: str, overrides: Sequence[str], batches: Sequence[int], device: torch.device, turns: int
) -> dict[str, Network]:
    """Measure both networks of a recipe, all kinds of passes in turns."""
    lowers = (False, True) if read(name, overrides).precision != "fp32" else (False,)
    subjects = {
        of: Subject(name, tuple(overrides), of, device)
        for of in (Pass(n, b, low) for n in ("teacher", "student") for b in (False, True) for low in lowers)
    }
    seconds: dict[Pass, list[float]] = {of: [] for of in subjects}
    for batch in batches:
        works = {of: subject.prepare(batch) for of, subject in subjects.items()}
        found = timed(works, turns, device)
        for of, median in found.items():
            seconds[of].append(median)
            print(f"{of}, {batch} images: {1000 * median:.4g} ms", file=sys.stderr, flush=True)
    networks = {}
    for network in ("teacher", "student"):
        whole = subjects[Pass(network, backward=True)]
        peaks = {
            low: [subjects[Pass(network, backward=True, lower=low)].mebibytes(n) for n in batches] for low in lowers
        }
        module, _ = whole.build()
        networks[network] = Network(
            tuple(batches),
            {of: own for of, own in seconds.items() if of.network == network},
            {low: [m for m in own if m is not None] for low, own in peaks.items() if None not in own},
            whole.macs(),
            sum(p.numel() * p.element_size() for p in module.parameters()) / MEBIBYTE,
        )
    return networks
