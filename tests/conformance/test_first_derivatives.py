"""Modules that cannot be differentiated twice: compiled ones, and kernels without a second derivative."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import mlo

from .quadratics import Vector, relative_error
from .random_graphs import fit, flat

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # by the compiler, of its inputs
    pytest.mark.filterwarnings("ignore:level .* Penalty. its solves are far"),
]

FIRST = [mlo.FirstOrder(), mlo.FiniteDifference(), mlo.SAMA(), mlo.Penalty(steps=4)]
MIXED = {"low": FIRST[1], "middle": FIRST[-1], "top": FIRST[0]}
SECOND = [mlo.Unroll(), mlo.ConjugateGradient(), mlo.Neumann(terms=2), mlo.Nystrom()]


class Once(torch.autograd.Function):
    """The hyperbolic tangent, as a kernel that has one derivative only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        (y,) = ctx.saved_tensors
        return cotangent * (1 - y * y)


class Network(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


def hypergradient(estimator, *, function=torch.tanh, nested=False, wrap=lambda module: module):
    torch.manual_seed(0)
    names = ("low", "middle", "top") if nested else ("low", "top")
    modules = {name: wrap(Network(function)).double() for name in names}
    reads = {"low": names[1:], "middle": ("low", "top"), "top": names[:-1]}
    data = [torch.randn(2, 6, 4, dtype=torch.float64).unbind() for _ in range(2)]

    problems = [
        mlo.Problem(
            name,
            module,
            fit(name, reads[name]),
            torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.1),
            data,
            hypergradient=estimator[name] if isinstance(estimator, dict) else estimator,
            steps=2,
        )
        for name, module in modules.items()
    ]
    edges = [mlo.Edge(source, target) for target in names for source in reads[target]]
    engine = mlo.Engine(mlo.Graph(problems, edges), seed=0, device="cpu")
    engine.run(1, progress=False)
    return flat(engine.hypergradient("top").values())


@pytest.mark.parametrize(
    ("estimator", "nested"), [*((e, False) for e in FIRST), (FIRST[-1], True), (MIXED, True)], ids=repr
)
def test_estimators_of_first_derivatives(estimator, nested):
    """`Penalty` at any depth; the differences of the others are replaced by exact products where levels are inside."""
    expected = hypergradient(estimator, nested=nested)
    assert relative_error(hypergradient(estimator, function=Once.apply, nested=nested), expected) < 1e-12


@pytest.mark.parametrize("estimator", FIRST, ids=repr)
def test_compiled_modules(estimator):
    expected = hypergradient(estimator)
    torch._dynamo.reset()
    compiled = hypergradient(estimator, wrap=lambda module: torch.compile(module, backend="aot_eager"))
    assert relative_error(compiled, expected) < 1e-9


@pytest.mark.parametrize("estimator", FIRST, ids=repr)
def test_flash_attention(estimator):
    """Its kernel has one derivative, that of the reference implementation many."""

    def attend(backend):
        def function(x):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*(x[None, :, None],) * 3)[0, :, 0].tanh()

        return function

    flash, reference = (
        hypergradient(estimator, function=attend(backend)) for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    )
    assert relative_error(flash, reference) < 1e-9


@pytest.mark.parametrize("estimator", SECOND, ids=repr)
def test_the_others_say_what_to_do(estimator):
    expected = r"level 'low': expected a loss that can be differentiated twice.*mlo.Penalty\(\), or outside a nest"
    torch._dynamo.reset()
    with pytest.raises(mlo.MloError, match=expected):
        hypergradient(estimator, wrap=lambda module: torch.compile(module, backend="aot_eager"))
    with pytest.raises(mlo.MloError, match=expected):
        hypergradient(estimator, function=Once.apply)


def test_what_is_said_of_batch_normalization_in_a_nest_helps():
    """In training mode it has two derivatives; unrolling within unrolling needs three."""

    def go(low, middle):
        estimators = {"low": low, "middle": middle, "top": mlo.FirstOrder()}
        return hypergradient(
            estimators, nested=True, wrap=lambda module: torch.nn.Sequential(module, torch.nn.BatchNorm1d(4))
        )

    expected = (
        r"level 'middle': .* three times; .*mlo.FiniteDifference\(\) for the levels inside \(low\), .*mlo.Penalty"
    )
    with pytest.raises(mlo.MloError, match=expected):
        go(mlo.Unroll(), mlo.Unroll())
    assert go(mlo.FiniteDifference(), mlo.Unroll()).isfinite().all()
    assert go(mlo.Unroll(), mlo.Penalty(steps=4)).isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_operation_without_a_second_derivative_may_be_the_last(scale):
    """As a fused loss is: its cotangent is a constant, and torch leaves its second derivative out silently."""
    lower, upper = Vector([0.3, -0.2]), Vector([0.5, 1.5])

    def fused(levels, batch):
        return scale * OnceSquared.apply(levels.lower().tanh() - levels.upper()) + levels.lower() @ levels.upper()

    problems = [
        mlo.Problem("lower", lower, fused, torch.optim.SGD(lower.parameters(), lr=0.1), None,
                    hypergradient=mlo.Unroll(), steps=3),
        mlo.Problem("upper", upper, lambda levels, batch: levels.lower().pow(2).sum(),
                    torch.optim.SGD(upper.parameters(), lr=0.1), None),
    ]  # fmt: skip
    engine = mlo.Engine(mlo.Graph(problems, [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")]), device="cpu")
    with pytest.raises(mlo.MloError, match="level 'lower': expected a loss that can be differentiated twice"):
        engine.hypergradient("upper")


class OnceSquared(torch.autograd.Function):
    """The sum of squares, as a kernel that has one derivative only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return 2 * x * cotangent
