"""Random quadratic graphs of any depth, nests included, solved by linear algebra; shares no code with the package.

L_p = 1/2 w' Q_p w + b_p' w over the vector w of all levels' variables, of which Q_p touches p and what it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

import mlo

from .quadratics import Vector

GRAPHS = {  # level -> what it reads
    "bilevel": {0: {1}, 1: {0}},
    "chain": {0: {1}, 1: {0, 2}, 2: {1}},
    "diamond": {0: {3}, 1: {0, 3}, 2: {0, 3}, 3: {1, 2}},
    "lbt": {0: {2}, 1: {0}, 2: {0, 1}},
    "nest": {0: {1, 2}, 1: {0, 2}, 2: {0, 1}},
    "nest in a nest": {0: {1, 2, 3}, 1: {0, 2, 3}, 2: {0, 1, 3}, 3: {0, 1, 2}},
    "two nests side by side": {0: {1}, 1: {0, 4}, 2: {3, 4}, 3: {2, 4, 1}, 4: {1, 3}},
    "a lower level that responds to a later one": {0: {1, 3}, 1: {2, 3}, 2: {3}, 3: {0, 1, 2}},
    "the same inside a nest": {0: {1, 2}, 1: {2}, 2: {0, 1, 3}, 3: {0, 2}},
}


@dataclass
class ClosedForm:
    dims: list[int]
    reads: Mapping[int, set[int]]
    q: list[torch.Tensor]
    b: list[torch.Tensor]
    decay: list[float]

    def block(self, p):
        start = sum(self.dims[:p])
        return slice(start, start + self.dims[p])

    def inside(self, u):
        allowed = range(u + 1)
        reach = {(s, t) for t in allowed for s in self.reads[t] if s in allowed}
        for _ in allowed:
            reach |= {(a, d) for a, b in reach for c, d in reach if b == c}
        return [p for p in allowed if p != u and (p, u) in reach and (u, p) in reach]

    def objective(self, u):
        """F_u as (Q, b, c = affine map of the inner responses), after substituting the responses of E(u)."""
        n = sum(self.dims)
        q = self.q[u].clone()
        q[self.block(u), self.block(u)] += self.decay[u] * torch.eye(self.dims[u], dtype=torch.float64)
        matrix, shift = self.responses(u)
        assert matrix.shape == (n, n)
        return matrix.T @ q @ matrix, matrix.T @ (q @ shift + self.b[u])

    def responses(self, u):
        """The affine map w -> matrix w + shift that replaces w_E(u) by its best responses to the rest of w."""
        n, inner = sum(self.dims), self.inside(u)
        matrix, shift = torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        if not inner:
            return matrix, shift
        rows, right = [], []
        for p in inner:
            q, b = self.objective(p)
            rows.append(q[self.block(p)])
            right.append(b[self.block(p)])
        rows, right = torch.cat(rows), torch.cat(right)
        own = torch.cat([torch.arange(n)[self.block(p)] for p in inner])
        rest = torch.tensor([i for i in range(n) if i not in set(own.tolist())])
        response = -torch.linalg.solve(rows[:, own], rows[:, rest])
        matrix[own] = 0
        matrix[own[:, None], rest[None]] = response
        shift[own] = -torch.linalg.solve(rows[:, own], right)
        return matrix, shift

    def solution(self, w, u):
        """w with the levels inside u at their best responses."""
        matrix, shift = self.responses(u)
        return matrix @ w + shift

    def hypergradient(self, w, u):
        q, b = self.objective(u)
        found = (q @ w + b)[self.block(u)]
        return found - self.decay[u] * w[self.block(u)]  # without the level's own weight decay

    def engine(self, w, estimators, optimizer, steps=1, **options):
        def loss(p):
            read = sorted({p, *self.reads[p]})
            index = torch.cat([torch.arange(sum(self.dims))[self.block(r)] for r in read])
            q, b = self.q[p][index[:, None], index[None]], self.b[p][index]

            def value(levels, batch):
                v = torch.cat([getattr(levels, f"l{r}")() for r in read])
                return 0.5 * v @ q @ v + b @ v

            return value

        modules = [Vector(w[self.block(p)].tolist()) for p in range(len(self.dims))]
        problems = [
            mlo.Problem(f"l{p}", m, loss(p), optimizer(p, m), None, hypergradient=estimators[p], steps=steps)
            for p, m in enumerate(modules)
        ]
        edges = [mlo.Edge(f"l{s}", f"l{t}") for t in sorted(self.reads) for s in sorted(self.reads[t])]
        return mlo.Engine(mlo.Graph(problems, edges), seed=0, device="cpu", **options)


def draw(seed, dims, reads, decay=0.0):
    """A graph with these levels and edges, strongly convex in each level's own variables."""
    generator = torch.Generator().manual_seed(seed)
    n, q, b = sum(dims), [], []
    starts = [sum(dims[:p]) for p in range(len(dims))]
    for p, d in enumerate(dims):
        touched = torch.zeros(n)
        for r in {p, *reads[p]}:
            touched[starts[r] : starts[r] + dims[r]] = 1
        m = torch.randn(n, n, generator=generator, dtype=torch.float64) * 0.15
        m = (m + m.T) * touched[:, None] * touched[None]
        own = slice(starts[p], starts[p] + d)
        m[own, own] += 1.5 * torch.eye(d, dtype=torch.float64)
        q.append(m)
        b.append(torch.randn(n, generator=generator, dtype=torch.float64) * touched)
    return ClosedForm(list(dims), reads, q, b, [decay] * len(dims))
