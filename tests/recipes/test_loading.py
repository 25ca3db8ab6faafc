"""Loading as a whole: overrides, every error message, and the way back to text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlo.errors import RecipeError
from mlo.hypergradients import FiniteDifference, Unroll
from mlo.recipes import Recipe, dump_recipe, installed_problems, load_recipe, loading

Write = Callable[[str, str], Path]
Schemas = dict[str, type[Recipe]]

VALID = """\
problem: toy
levels:
  teacher:
    optimizer: {kind: sgd, learning_rate: 0.1}
"""
HYPERGRADIENT = "levels.teacher.hypergradient"


def message_of(path: Path, schemas: Schemas, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, schemas=schemas)
    return str(caught.value)


def test_a_valid_recipe(toy: Path, schemas: Schemas) -> None:
    recipe: Any = load_recipe(toy, schemas=schemas)
    assert type(recipe).__name__ == "ToyRecipe"
    assert (recipe.problem, recipe.description, recipe.seed, recipe.device, recipe.precision) == (
        ("toy", "", 0, "auto", "fp32")
    )
    assert recipe.levels.teacher.hypergradient.build() == FiniteDifference(radius=0.02)


def test_a_bundled_recipe(tmp_path: Path, write: Write, schemas: Schemas) -> None:
    write("toys/small.yaml", VALID)
    assert load_recipe("toys/small", ["seed=4"], schemas=schemas, folders=[tmp_path]).seed == 4
    with pytest.raises(RecipeError) as caught:
        load_recipe("toys/small", ["seed=-4"], schemas=schemas, folders=[tmp_path])
    assert str(caught.value).startswith(f"recipe toys/small ({tmp_path / 'toys/small.yaml'}) is not valid:\n  seed: ")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("seed: -1", "seed: found -1, expected a number greater than or equal to 0"),
        ("seed: 1.0", "seed: found 1.0, expected a whole number"),
        ("seed: true", "seed: found true, expected a whole number"),
        ("seed: '1'", 'seed: found "1", expected a whole number'),
        ("batch_size:", "batch_size: found null, expected a whole number"),
        ("noise: much", 'noise: found "much", expected a number'),
        ("noise: .nan", "noise: found NaN, expected a finite number"),
        ("shuffle: yes", 'shuffle: found "yes", expected true or false'),
        ("device: 0", "device: found 0, expected a string"),
        ("widths: 8", "widths: found 8, expected a list"),
        ("widths: [8, big, 16]", 'widths.1: found "big", expected a whole number'),
        ("groups: {a: {size: 1}}", "groups.a.size: found an unknown key with the value 1, expected one of weight"),
        (
            "groups: {a: {weight: auta}}",
            "groups.a.weight: found \"auta\", expected a number or 'auto'; did you mean 'auto'?",
        ),
        ("precision: fp31", "precision: found \"fp31\", expected 'fp32', 'bf16' or 'fp16'; did you mean 'fp32'?"),
        (
            "batchsize: 3",
            (
                "batchsize: found an unknown key with the value 3, expected one of problem, description, seed, device, "
                "precision, rounds, rollback, compile, engine, diagnostics_every, checkpoint_every, "
                "synchronize_batch_norm, threads, levels, batch_size, noise, lambda, shuffle, widths, groups; "
                "did you mean 'batch_size'?"
            ),
        ),
    ],
)
def test_errors_at_the_top(write: Write, schemas: Schemas, lines: str, expected: str) -> None:
    path = write("toy.yaml", f"{VALID}{lines}\n")
    assert message_of(path, schemas) == f"recipe {path} is not valid:\n  {expected}"


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("{}", "optimizer: found nothing, expected a value"),
        ("{optimizer: sgd}", 'optimizer: found "sgd", expected a mapping'),
        ("{optimizer: {}}", "optimizer.kind: found nothing, expected one of sgd, adam, adamw"),
        (
            "{optimizer: {kind: sdg}}",
            "optimizer.kind: found \"sdg\", expected one of sgd, adam, adamw; did you mean 'sgd'?",
        ),
        ("{optimizer: {kind: [1]}}", "optimizer.kind: found [1], expected one of sgd, adam, adamw"),
        ("{optimizer: {kind: sgd}}", "optimizer.learning_rate: found nothing, expected a value"),
        (
            "{optimizer: {kind: sgd, learning_rate: 0}}",
            "optimizer.learning_rate: found 0, expected a number greater than 0",
        ),
        (
            "{optimizer: {kind: sgd, learning_rate: 0.1, momentum: 1}}",
            "optimizer.momentum: found 1, expected a number less than 1",
        ),
        (
            "{optimizer: {kind: adam, learning_rate: 0.1, beta: [0, 0]}}",
            (
                "optimizer.beta: found an unknown key with the value [0, 0], "
                "expected one of kind, learning_rate, betas, eps, weight_decay; did you mean 'betas'?"
            ),
        ),
        (
            "{optimizer: {kind: sgd, learning_rate: 0.1, nesterov: true}}",
            (
                'optimizer: found {"kind": "sgd", "learning_rate": 0.1, "nesterov": true}, '
                "nesterov needs a momentum greater than 0 and a dampening of 0"
            ),
        ),
        (
            "{optimizer: {kind: sgd, learning_rate: 0.1}, hypergradient: {kind: finite_difference, radius: -1}}",
            'hypergradient: found {"kind": "finite_difference", "radius": -1}, ',
        ),
    ],
)
def test_errors_in_a_level(write: Write, schemas: Schemas, teacher: str, expected: str) -> None:
    path = write("toy.yaml", f"problem: toy\nlevels: {{teacher: {teacher}}}")
    assert f"\n  levels.teacher.{expected}" in message_of(path, schemas)


def test_all_errors_are_reported_at_once(write: Write, schemas: Schemas) -> None:
    path = write("toy.yaml", "problem: toy\nsede: 3\nnoise: x\nlevels: {teacher: {optimizer: {kind: sgd}, steps: 0}}")
    first, *lines = message_of(path, schemas).splitlines()
    assert first == f"recipe {path} is not valid:"
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "levels.teacher.optimizer.learning_rate",
        "levels.teacher.steps",
        "noise",
        "sede",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("problem: toi", "problem: found \"toi\", expected one of toy, tower; did you mean 'toy'?"),
        ("problem: [1]", "problem: found [1], expected one of toy, tower"),
        ("seed: 3", "problem: found nothing, expected one of toy, tower"),
    ],
)
def test_an_unknown_problem(write: Write, schemas: Schemas, text: str, expected: str) -> None:
    path = write("toy.yaml", text)
    assert message_of(path, schemas) == f"recipe {path}: {expected}"


def test_overrides_apply_in_order_with_the_rules_of_yaml(toy: Path, schemas: Schemas) -> None:
    overrides = ["noise=0.5", "noise = 3e-4", "widths=[1, 2]", "description=a=b", "levels.teacher.clip_norm=5"]
    recipe: Any = load_recipe(toy, overrides, schemas=schemas)
    assert (recipe.noise, recipe.widths, recipe.description, recipe.levels.teacher.clip_norm) == (
        (3e-4, (1, 2), "a=b", 5.0)
    )


def test_setting_a_kind_replaces_the_object(toy: Path, schemas: Schemas) -> None:
    kind = f"{HYPERGRADIENT}.kind=unroll"
    recipe: Any = load_recipe(toy, [kind], schemas=schemas)
    assert recipe.levels.teacher.hypergradient.build() == Unroll()
    recipe = load_recipe(toy, [kind, f"{HYPERGRADIENT}.last=2"], schemas=schemas)
    assert recipe.levels.teacher.hypergradient.build() == Unroll(last=2)
    message = message_of(toy, schemas, (f"{HYPERGRADIENT}.last=2", kind, f"{HYPERGRADIENT}.radius=2"))
    assert f"{HYPERGRADIENT}.radius: found an unknown key with the value 2, expected one of kind, last" in message


def test_an_override_may_set_a_field_of_a_default(write: Write, schemas: Schemas) -> None:
    path = write("toy.yaml", VALID)
    recipe: Any = load_recipe(path, [f"{HYPERGRADIENT}.radius=0.5"], schemas=schemas)
    assert recipe.levels.teacher.hypergradient.build() == FiniteDifference(radius=0.5)


def test_an_override_may_complete_a_recipe(write: Write, schemas: Schemas) -> None:
    path = write("toy.yaml", "problem: toy")
    overrides = ["levels.teacher.optimizer.kind=sgd", "levels.teacher.optimizer.learning_rate=1e-2"]
    recipe: Any = load_recipe(path, overrides, schemas=schemas)
    assert recipe.levels.teacher.optimizer.learning_rate == pytest.approx(1e-2)
    student = ["levels.student.optimizer={kind: adam, learning_rate: 1}", "levels.student.steps=2"]
    recipe = load_recipe(path, overrides + student, schemas=schemas)
    assert recipe.levels.student.steps == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("levels.teacher.steps=0", "levels.teacher.steps: found 0, expected a number greater than 0"),
        ("levels.teachr.steps=2", 'levels.teachr: found an unknown key with the value {"steps": 2}, expected one of'),
        ("levels.teacher.step=2", "levels.teacher.step: found an unknown key with the value 2, expected one of"),
        (f"{HYPERGRADIENT}.kind=unrol", f'{HYPERGRADIENT}.kind: found "unrol", expected one of'),
        (
            "levels.teacher.optimizer.kind=adam",
            "levels.teacher.optimizer.learning_rate: found nothing, expected a value",
        ),
        ("levels=3", "levels: found 3, expected a mapping"),
    ],
)
def test_an_error_of_an_override_says_so(toy: Path, schemas: Schemas, override: str, expected: str) -> None:
    message = message_of(toy, schemas, ("seed=3", override))
    assert message.startswith(f"recipe {toy} is not valid:\n  {expected}")
    assert message.endswith(f" (from --set {override})")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("levels.teachr.steps=2", "teacher"),
        ("levels.teacher.step=2", "steps"),
        (f"{HYPERGRADIENT}.kind=unrol", "unroll"),
    ],
)
def test_an_error_of_an_override_gives_the_nearest_name(
    toy: Path, schemas: Schemas, override: str, nearest: str
) -> None:
    assert f"did you mean '{nearest}'?" in message_of(toy, schemas, (override,))


def test_an_error_that_the_recipe_has_by_itself_is_not_blamed_on_an_override(write: Write, schemas: Schemas) -> None:
    path = write("toy.yaml", "problem: toy\nlevels: {teacher: {optimizer: {kind: sgd}, steps: two}}")
    message = message_of(path, schemas, ("levels.teacher.clip_norm=-1", "levels.teacher.optimizer.momentum=0.9"))
    assert message.splitlines()[1:] == [
        "  levels.teacher.optimizer.learning_rate: found nothing, expected a value",
        '  levels.teacher.steps: found "two", expected a whole number',
        (
            "  levels.teacher.clip_norm: found -1, expected a number greater than 0 "
            "(from --set levels.teacher.clip_norm=-1)"
        ),
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "expected key.path=value, such as levels.teacher.steps=3"),
        ("=3", "expected key.path=value"),
        ("levels..steps=3", "expected key.path=value"),
        ("problem=tower", "'problem' can be set in a recipe's file only"),
        ("extends=lbt/base", "'extends' can be set in a recipe's file only"),
        ("seed.x=3", "seed is 0, which has no keys; set all of it by --set seed=..."),
        ("widths.0=3", "widths is [], which has no keys; set all of it by --set widths=..."),
    ],
)
def test_an_override_that_cannot_be_applied(toy: Path, schemas: Schemas, override: str, expected: str) -> None:
    assert message_of(toy, schemas, (override,)).startswith(f"recipe {toy}: --set {override}: {expected}")


@pytest.mark.parametrize("value", ["[1, 2", "{a: 1, a: 2}"])
def test_an_override_that_is_not_yaml(toy: Path, schemas: Schemas, value: str) -> None:
    message = message_of(toy, schemas, (f"widths={value}",))
    assert message.startswith(f"recipe {toy}: --set widths={value}, line 1, column ")


def test_the_dump_is_complete_and_in_the_order_of_the_schema(toy: Path, schemas: Schemas) -> None:
    text = dump_recipe(load_recipe(toy, ["levels.teacher.optimizer.learning_rate=3e-4"], schemas=schemas))
    assert text == (
        "problem: toy\n"
        "description: ''\n"
        "seed: 0\n"
        "device: auto\n"
        "precision: fp32\n"
        "rounds: 10\n"
        "rollback: false\n"
        "compile: false\n"
        "engine: mlo\n"
        "diagnostics_every: null\n"
        "checkpoint_every: 50\n"
        "synchronize_batch_norm: true\n"
        "threads: null\n"
        "levels:\n"
        "  teacher:\n"
        "    optimizer:\n"
        "      kind: sgd\n"
        "      learning_rate: 0.0003\n"
        "      momentum: 0.0\n"
        "      weight_decay: 0.0\n"
        "      nesterov: false\n"
        "      dampening: 0.0\n"
        "    scheduler:\n"
        "      kind: constant\n"
        "      warmup_steps: 0\n"
        "      warmup_epochs: 0.0\n"
        "    hypergradient:\n"
        "      kind: finite_difference\n"
        "      radius: 0.02\n"
        "      last: 1\n"
        "      one_sided: false\n"
        "    steps: 1\n"
        "    clip_norm: null\n"
        "    warmup_rounds: 0\n"
        "    micro_batches: 1\n"
        "  student: null\n"
        "batch_size: 64\n"
        "noise: 0.0\n"
        "lambda: 1.0\n"
        "shuffle: true\n"
        "widths: []\n"
        "groups: {}\n"
    )


def test_the_dump_of_an_extending_recipe_stands_alone(toy: Path, write: Write, schemas: Schemas) -> None:
    recipe = load_recipe(write("mine.yaml", "extends: toy.yaml\nseed: 3"), schemas=schemas)
    assert "extends" not in dump_recipe(recipe)
    assert load_recipe(write("alone/mine.yaml", dump_recipe(recipe)), schemas=schemas) == recipe


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(
    noise=st.floats(allow_nan=False, allow_infinity=False),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    description=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_round_trip(
    *, toy: Path, tmp_path: Path, schemas: Schemas, noise: float, rate: float, description: str
) -> None:
    overrides = [f"noise={noise!r}", f"levels.teacher.optimizer.learning_rate={rate!r}"]
    recipe: Any = load_recipe(toy, overrides, schemas=schemas)
    assert (recipe.noise, recipe.levels.teacher.optimizer.learning_rate) == (noise, rate)
    recipe = recipe.model_copy(update={"description": description})
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(dumped, schemas=schemas) == recipe


def declare(monkeypatch: pytest.MonkeyPatch, **problems: Callable[[], object]) -> None:
    declared = [SimpleNamespace(name=name, value=f"there:{name}", load=load) for name, load in problems.items()]
    monkeypatch.setattr(loading, "entry_points", lambda *, group: declared if group == "mlo.problems" else [])


def test_installed_problems_are_found_by_name(monkeypatch: pytest.MonkeyPatch, schemas: Schemas) -> None:
    problem = SimpleNamespace(recipe_type=schemas["toy"])
    declare(monkeypatch, zoo=lambda: problem, toy=lambda: problem)
    assert installed_problems() == {"toy": problem, "zoo": problem}
    assert list(installed_problems()) == ["toy", "zoo"]


def test_a_problem_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> object:
        raise ImportError("no module named 'gone'")

    declare(monkeypatch, toy=load)
    with pytest.raises(RecipeError, match="'toy', declared by an installed package as 'there:toy', cannot be loaded"):
        installed_problems()


def test_a_problem_without_a_schema_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, toy=lambda: SimpleNamespace(recipe_type=dict))
    with pytest.raises(RecipeError, match=r"'toy', .*expected a subclass of mlo's Recipe as its recipe_type"):
        installed_problems()
