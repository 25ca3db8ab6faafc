"""The public names are a promise: changing them is a decision, recorded here and in the changelog."""

import mlo
from mlo.cli import main
from mlo.hypergradients import KINDS


def test_exports():
    assert sorted(mlo.__all__) == [
        "CheckpointError", "Claim", "ConjugateGradient", "DivergenceError", "Edge", "Engine", "FiniteDifference",
        "FirstOrder", "Graph", "GraphError", "Hypergradient", "Levels", "MloError", "Neumann", "Nystrom", "Output",
        "Penalty", "Problem", "ProcessLostError", "RecipeError", "Response", "SAMA", "Step", "Sum", "Tensors",
        "Unroll", "__version__", "register_optimizer", "synchronize_batch_norm",
    ]  # fmt: skip
    assert all(hasattr(mlo, name) for name in mlo.__all__)


def test_recipe_kinds():
    assert sorted(KINDS) == [
        "cg",
        "finite_difference",
        "first_order",
        "neumann",
        "nystrom",
        "penalty",
        "sama",
        "unroll",
    ]


def test_command_line_flags():
    flags = {
        name: sorted(option for parameter in command.params for option in parameter.opts if option.startswith("--"))
        for name, command in main.commands.items()
    }
    assert flags == {
        "list": [],
        "run": ["--device", "--engine", "--launch", "--output", "--quiet", "--rounds", "--seed", "--set"],
        "evaluate": ["--device", "--launch", "--output", "--quiet", "--recipe", "--seed", "--set"],
        "resume": ["--launch", "--quiet"],
        "graph": ["--output", "--set"],
        "check": ["--directions", "--level", "--seed", "--set"],
        "report": ["--group-by", "--metrics", "--output"],
        "sweep": ["--jobs", "--output", "--retries", "--seeds", "--set", "--slurm", "--vary"],
    }
