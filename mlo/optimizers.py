"""Optimizer steps as differentiable functions, to unroll them and to pull cotangents back through them.

A `torch.optim` step modifies tensors in place and cannot be differentiated reliably (with `differentiable=True`
momentum SGD is silently wrong). Here each supported optimizer has an *update rule*: its formula, written as a pure
function of the weights, the gradient and the state, all flattened to one vector. The engine steps the user's real
optimizer; the rule is used to differentiate that step (`Update.pull_back`) and to repeat it (`Update.apply`).

Optimizers of one's own are taught by `register_optimizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from mlo.arithmetic import Gradient, Tensors, norm, scaled, summed
from mlo.autodiff import alias, aliases
from mlo.errors import MloError
from mlo.sharding import local

State = Mapping[str, Tensor]
UpdateRule = Callable[[Tensor, Tensor, State, Mapping[str, Any]], tuple[Tensor, dict[str, Tensor]]]
"""`rule(weights, gradient, state, options) -> (new weights, new state)`, differentiable, out of place.

`weights` and `gradient` are vectors of shape (n,). `state` holds the optimizer's per-parameter state tensors flattened
to the same shape, under the optimizer's own names; it lacks those that the optimizer has not made yet. `options` are
the parameter group's options (such as "lr"), and "step", the number of steps taken before this one.
"""

OptimizerState = tuple[Mapping[str, Tensor], ...]
"""The state tensors of each of a level's parameters, by name."""


def sgd(
    weights: Tensor, gradient: Tensor, state: State, options: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`torch.optim.SGD`: momentum, dampening, Nesterov and coupled weight decay (Sutskever et al. 2013)."""
    gradient = _coupled(weights, gradient, options)
    new_state = dict(state)  # a scheduler may turn momentum off for a while: the buffer stays
    if _acts(options["momentum"]):
        buffer = state.get("momentum_buffer")
        if buffer is not None:
            buffer = options["momentum"] * buffer + (1 - options["dampening"]) * gradient
        new_state["momentum_buffer"] = buffer = gradient if buffer is None else buffer
        gradient = gradient + options["momentum"] * buffer if options["nesterov"] else buffer
    return weights - options["lr"] * gradient, new_state


def adam(
    weights: Tensor, gradient: Tensor, state: State, options: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`torch.optim.Adam`: coupled weight decay, AMSGrad (Kingma and Ba 2015, Algorithm 1; Reddi et al. 2018)."""
    if options.get("decoupled_weight_decay", False):
        weights = weights * (1 - options["lr"] * options["weight_decay"])
        gradient = -gradient if options["maximize"] else gradient
    else:
        gradient = _coupled(weights, gradient, options)
    beta1, beta2 = options["betas"]
    step = options["step"] + 1
    zeros = torch.zeros_like(weights)
    mean = state.get("exp_avg", zeros) * beta1 + (1 - beta1) * gradient
    square = state.get("exp_avg_sq", zeros) * beta2 + (1 - beta2) * gradient * gradient
    new_state = {"exp_avg": mean, "exp_avg_sq": square}
    if options["amsgrad"]:
        square = torch.maximum(state.get("max_exp_avg_sq", zeros), square)
        new_state["max_exp_avg_sq"] = square
    # sqrt has no derivative at 0, where the mean is 0 too: the step's derivative there is that of mean / eps.
    positive = square > 0
    root = torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
    denominator = root / (1 - beta2**step) ** 0.5 + options["eps"]
    return weights - options["lr"] / (1 - beta1**step) * mean / denominator, new_state


def adamw(
    weights: Tensor, gradient: Tensor, state: State, options: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`torch.optim.AdamW`: Adam with decoupled weight decay (Loshchilov and Hutter 2019, Algorithm 2)."""
    return adam(weights, gradient, state, {**options, "decoupled_weight_decay": True})


_RULES: dict[type[Optimizer], UpdateRule] = {SGD: sgd, Adam: adam, AdamW: adamw}


def register_optimizer(optimizer: type[Optimizer], rule: UpdateRule) -> None:
    """Teach the estimators an optimizer's update, so that they can differentiate its steps.

    Args:
        optimizer: the class; subclasses are not covered, they may step differently.
        rule: the update as a differentiable function, see `UpdateRule`.

    Example:
        >>> import torch
        >>> class SignSGD(torch.optim.SGD): ...
        >>> def rule(weights, gradient, state, options):
        ...     return weights - options["lr"] * gradient.sign(), {}
        >>> register_optimizer(SignSGD, rule)
    """
    _RULES[optimizer] = rule


def registered_optimizers() -> tuple[str, ...]:
    """Return the names of the optimizers that have an update rule."""
    return tuple(kind.__name__ for kind in _RULES)


def has_update_rule(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's steps can be differentiated."""
    return type(optimizer) in _RULES and not _step_hooks(optimizer)


def _step_hooks(optimizer: Optimizer) -> bool:
    """Whether something of the user's own is done before or after each step, which no rule tells of."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


_DECOUPLED = tuple(getattr(torch.optim, name) for name in ("AdamW", "Adafactor", "Muon") if hasattr(torch.optim, name))
_COUPLED = (
    SGD, Adam, torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adamax, torch.optim.ASGD, torch.optim.NAdam,
    torch.optim.RAdam, torch.optim.RMSprop,
)  # fmt: skip


def coupled_weight_decay(optimizer: type[Optimizer], options: Mapping[str, Any]) -> float | Tensor:
    """Return the weight decay that an optimizer adds to the gradient, and so to the objective that it minimizes.

    Args:
        optimizer: the class.
        options: of a parameter group.

    Raises:
        MloError: the group decays weights, and it is not known how.
    """
    decay: float | Tensor = options.get("weight_decay", 0.0)
    if not _acts(decay) or options.get("decoupled_weight_decay") or issubclass(optimizer, _DECOUPLED):
        return 0.0
    if issubclass(optimizer, _COUPLED):
        return decay
    raise MloError(
        f"{optimizer.__name__}: expected an optimizer of torch.optim, or weight_decay=0; found "
        f"weight_decay={float(decay):g}, which may or may not be part of the objective. Write the "
        f"decay into the loss instead."
    )


def _no_rule(optimizer: type[Optimizer]) -> UpdateRule:
    def rule(*_: Any) -> Any:
        raise MloError(
            f"{optimizer.__name__}: expected one of {', '.join(registered_optimizers())} without hooks on its step, "
            f"whose steps can be differentiated. Teach its update with mlo.register_optimizer, or let the estimator "
            f"say needs_update_rule."
        )

    return rule


@dataclass(frozen=True)
class _Bucket:
    """Parameters that share options and step count, and so one flat update."""

    indices: tuple[int, ...]
    options: Mapping[str, Any]


class UpdateCotangents(NamedTuple):
    """Cotangents of what an optimizer step was given.

    Attributes:
        weights: of those before the step.
        gradient: of the gradient before clipping; None where there was none.
        state: of the optimizer state before the step.
        hyperparameters: of the options that other levels determine.
    """

    weights: Tensors
    gradient: Gradient
    state: OptimizerState
    hyperparameters: Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """One optimizer step of one level: clipping, then the optimizer's rule with the options in force at that step.

    A map from (weights, gradient, optimizer state) to (new weights, new state). Parameters without a gradient, or that
    the optimizer does not hold, stay as they are.

    Attributes:
        optimizer: the optimizer's class.
        state: the optimizer's state just before the step.
        hyperparameters: options of all parameter groups that other levels determine, to be differentiated.
    """

    optimizer: type[Optimizer]
    rule: UpdateRule
    buckets: tuple[_Bucket, ...]
    clip_norm: float | None
    state: OptimizerState
    hyperparameters: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def capture(
        cls,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        gradient: Gradient,
        clip_norm: float | None,
        hyperparameters: Mapping[str, Tensor] | None = None,
    ) -> Update:
        """Describe the step that `optimizer` is about to take with `gradient`; copies its state."""
        index = {id(p): i for i, p in enumerate(parameters)}
        buckets: list[_Bucket] = []
        state: list[dict[str, Tensor]] = [{} for _ in parameters]
        for group in optimizer.param_groups:
            options = {  # a scheduler may write into tensors
                key: value.detach().clone() if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key != "params"
            }
            by_kind: dict[tuple[Any, ...], list[int]] = {}
            for p in group["params"]:
                i = index.get(id(p))
                if i is None:
                    continue
                own, step = state[i], 0.0
                for key, value in optimizer.state.get(p, {}).items():
                    if key == "step":
                        step = float(value)
                    elif isinstance(value, Tensor) and value.shape == p.shape:
                        own[key] = local(value).clone()
                if gradient[i] is not None:
                    by_kind.setdefault((step, tuple(own), p.dtype), []).append(i)
            buckets += [_Bucket(tuple(ids), {**options, "step": kind[0]}) for kind, ids in by_kind.items()]
        own_class = type(optimizer)
        rule = _RULES[own_class] if has_update_rule(optimizer) else _no_rule(own_class)
        return cls(own_class, rule, tuple(buckets), clip_norm, tuple(state), hyperparameters or {})

    def apply(self, weights: Tensors, gradient: Gradient, state: OptimizerState) -> tuple[Tensors, OptimizerState]:
        """Take the step again, differentiably, from any weights, gradient and state."""
        gradient = clip(gradient, self.clip_norm)
        new_weights, new_state = list(weights), list(state)
        for bucket in self.buckets:
            flat = self._rule(bucket, weights, gradient, state)
            shapes = [weights[i].shape for i in bucket.indices]
            pieces = {name: _unflat(vector, shapes) for name, vector in flat[1].items()}
            for position, (i, w) in enumerate(zip(bucket.indices, _unflat(flat[0], shapes), strict=True)):
                new_weights[i] = w
                new_state[i] = {name: tensors[position] for name, tensors in pieces.items()}
        return tuple(new_weights), tuple(new_state)

    def following(self, num_steps: int = 1) -> Update:
        """Return the same update some steps later, from a state that this one left."""
        later = tuple(replace(b, options={**b.options, "step": b.options["step"] + num_steps}) for b in self.buckets)
        return replace(self, buckets=later)

    def pull_back(
        self,
        weights: Tensors,
        gradient: Gradient,
        cotangent: Tensors,
        state_cotangent: OptimizerState | None,
        *,
        create_graph: bool = False,
        before: bool = True,
    ) -> UpdateCotangents:
        """Pull cotangents of the new weights and the new state back through the step.

        Args:
            weights: just before the step.
            gradient: that the step was taken with, before clipping.
            cotangent: of the new weights.
            state_cotangent: of the new state, or None for zero.
            create_graph: keep the result differentiable.
            before: whether those of the weights and the state before the step are wanted; empty otherwise.
        """
        if self.rule is sgd and self.clip_norm is None and not self.hyperparameters:
            with torch.set_grad_enabled(create_graph):
                return self._pull_back_sgd(gradient, cotangent, state_cotangent, before=before)
        with torch.enable_grad():
            w = aliases(weights, create_graph=create_graph)
            g = tuple(None if t is None else alias(t, create_graph=create_graph) for t in gradient)
            s = tuple({name: alias(t, create_graph=create_graph) for name, t in own.items()} for own in self.state)
            h = {name: alias(t, create_graph=create_graph) for name, t in self.hyperparameters.items()}
            new_w, new_s = replace(self, hyperparameters=h).apply(w, g, s)
        outputs, cotangents = list(new_w), list(cotangent)
        for i, own in enumerate(state_cotangent or ()):
            outputs += [new_s[i][name] for name in own]
            cotangents += own.values()
        w, s = (w, s) if before else ((), ())
        inputs = [*w, *(t for t in g if t is not None), *(t for own in s for t in own.values()), *h.values()]
        found: Gradient = ()
        if inputs:  # a parameter that the step leaves alone is its own output
            found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, create_graph=create_graph)
        grads = iter(found)

        def following(like: Tensor) -> Tensor:
            found = next(grads)
            return torch.zeros_like(like) if found is None else found

        a_w = tuple(following(t) for t in w)
        a_g = tuple(None if t is None else following(t) for t in g)
        a_s = tuple({name: following(t) for name, t in own.items()} for own in s)
        return UpdateCotangents(a_w, a_g, a_s, {name: following(t) for name, t in h.items()})

    def _pull_back_sgd(
        self, gradient: Gradient, cotangent: Tensors, state_cotangent: OptimizerState | None, *, before: bool
    ) -> UpdateCotangents:
        """Pull back through `sgd`, which is linear, by its transpose: of the same numbers, without a graph."""
        a_w: list[Tensor] = list(cotangent)
        a_g: list[Tensor | None] = [None] * len(gradient)
        a_s: list[Mapping[str, Tensor]] = list(state_cotangent or ({},) * len(cotangent))
        for bucket in self.buckets:
            o, ids = bucket.options, bucket.indices
            momentum, decay = o["momentum"], o["weight_decay"]
            total = a = scaled([cotangent[i] for i in ids], -o["lr"])
            if _acts(momentum):
                total = scaled(a, momentum) if o["nesterov"] else a
                later = [a_s[i].get("momentum_buffer") for i in ids]
                total = [t if c is None else t + c for t, c in zip(total, later, strict=True)]
                has_buffer = bool(self.state[ids[0]])
                if before:
                    for i, t in zip(ids, scaled(total, momentum) if has_buffer else total, strict=True):
                        a_s[i] = {"momentum_buffer": t} if has_buffer else {}
                total = scaled(total, 1 - o["dampening"]) if has_buffer and o["dampening"] else total
                total = summed(a, total) if o["nesterov"] else total
            if before and _acts(decay):
                for i, t in zip(ids, summed([a_w[i] for i in ids], scaled(total, decay)), strict=True):
                    a_w[i] = t
            for i, t in zip(ids, scaled(total, -1.0) if o["maximize"] else total, strict=True):
                a_g[i] = t
        for i, g in enumerate(gradient):
            if a_g[i] is None and g is not None:  # the optimizer does not hold the parameter
                a_g[i] = torch.zeros_like(g)
        return UpdateCotangents(tuple(a_w) if before else (), tuple(a_g), tuple(a_s) if before else (), {})

    def signs(self) -> dict[int, float]:
        """Return, for each parameter that the step moves, 1, or -1 where the optimizer maximizes."""
        return {i: -1.0 if b.options.get("maximize") else 1.0 for b in self.buckets for i in b.indices}

    def decays(self) -> dict[int, float | Tensor]:
        """Return the coupled weight decay of each parameter that the step moves.

        With `signs` it makes the level's loss L_p the objective F_p that the step minimizes: see `total_gradient`.
        """
        return {
            i: coupled_weight_decay(self.optimizer, {**b.options, **self.hyperparameters})
            for b in self.buckets
            for i in b.indices
        }

    def total_gradient(self, weights: Tensors, gradient: Gradient) -> Gradient:
        """Return the gradient of F_p, sign * dL_p/dw + decay * w, given that of L_p; None for what does not move."""
        signs, decays = self.signs(), self.decays()
        return tuple(
            None if g is None or i not in signs else signs[i] * g + decays[i] * w
            for i, (w, g) in enumerate(zip(weights, gradient, strict=True))
        )

    def _rule(
        self, bucket: _Bucket, weights: Tensors, gradient: Gradient, state: OptimizerState
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ids = bucket.indices
        names = state[ids[0]].keys()
        flat_state = {name: _flat([state[i][name] for i in ids]) for name in names}
        grads = [g for i in ids if (g := gradient[i]) is not None]
        options = {**bucket.options, **self.hyperparameters}
        return self.rule(_flat([weights[i] for i in ids]), _flat(grads), flat_state, options)


def clip(gradient: Gradient, clip_norm: float | None) -> Gradient:
    """Scale a longer gradient down to norm `clip_norm`, as `torch.nn.utils.clip_grad_norm_` does, differentiably."""
    if clip_norm is None or all(g is None for g in gradient):
        return gradient
    factor = torch.clamp(clip_norm / (norm(gradient) + 1e-6), max=1.0)
    return tuple(None if g is None else (g * factor).to(g.dtype) for g in gradient)


def _coupled(weights: Tensor, gradient: Tensor, options: Mapping[str, Any]) -> Tensor:
    gradient = -gradient if options["maximize"] else gradient
    return gradient + options["weight_decay"] * weights if _acts(options["weight_decay"]) else gradient


def _acts(value: float | Tensor) -> bool:
    """Whether an option takes effect; one that is differentiated does, even at zero."""
    return isinstance(value, Tensor) or bool(value)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflat(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    pieces = torch.split(vector, [shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
