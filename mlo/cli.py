"""The command line: list, run, evaluate, resume, graph, check, sweep, report.

A user's mistake ends with one message on standard error and exit status 2; an interrupted run with 128 + the signal's
number; a check that finds a wrong hypergradient with 1.
"""

from __future__ import annotations

import errno
import json
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from mlo.campaign import (
    Campaign,
    Outcome,
    Status,
    check_folder,
    format_outcomes,
    parse_cluster,
    parse_seeds,
    parse_varied,
    plan_runs,
    prepare,
    run_here,
    submit,
)
from mlo.comparison import find_runs, published, write_comparison
from mlo.devices import find_device
from mlo.distributed import from_first, rank_of, whole_world
from mlo.drawing import describe_graph, draw_graph
from mlo.engine import Engine
from mlo.errors import InteropError, MloError, RecipeError
from mlo.files import alone
from mlo.graph import Graph
from mlo.launching import check_variables, is_launched, joined, start_processes
from mlo.recipes import Recipe, installed_problems, list_recipes, load_recipe
from mlo.runs import Experiment, Interrupted, Run, check_engine, check_processes, recipe_name, resume
from mlo.version import __version__


class _Commands(click.Group):
    """Ends a command that raised an error of ours with its message."""

    def invoke(self, context: click.Context) -> Any:
        try:
            with joined(), _warnings_told_once():
                return super().invoke(context)
        except MloError as error:
            raise _Mistake(str(error)) from error
        except (FileNotFoundError, NotADirectoryError, PermissionError, FileExistsError) as error:
            raise _Mistake(f"{error.filename}: {error.strerror}; choose another place") from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise _Mistake(f"{error.strerror}; make room, and go on with mlo resume") from error


@contextmanager
def _warnings_told_once() -> Iterator[None]:
    """Show what is warned of without a place in the source, and in the first of several processes alone."""
    before = warnings.formatwarning
    with warnings.catch_warnings():
        if rank_of(whole_world()):
            warnings.simplefilter("ignore")
        warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
        try:
            yield
        finally:
            warnings.formatwarning = before


class _Mistake(click.ClickException):
    exit_code = 2


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mlo")
@click.pass_context
def main(context: click.Context) -> None:
    """Multi-level optimization on PyTorch: run recipes, resume runs, look at graphs.

    \b
    Example:
        mlo run lbt/digits --set levels.teacher.hypergradient.kind=finite_difference
    """  # noqa: D301 - click's marker
    if context.invoked_subcommand in ("run", "resume", "evaluate"):
        check_variables()
    elif is_launched():
        raise MloError(
            f"mlo {context.invoked_subcommand}: expected a single process; found one of several. Start it without "
            f"torchrun."
        )


@main.command("list")
def list_command() -> None:
    """List the bundled recipes.

    \b
    Example:
        mlo list
    """  # noqa: D301
    recipes = list_recipes()
    width = max((len(name) for name, _ in recipes), default=0)
    for name, description in recipes:
        click.echo(f"{name:<{width}}  {description}")


@main.command()
@click.argument("recipe")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override one value; may be repeated.")
@click.option("--seed", type=click.IntRange(min=0), help="Of all random draws; short for --set seed=N.")
@click.option("--device", help="auto, cpu, cuda, cuda:1, mps; short for --set device=D.")
@click.option("--rounds", type=click.IntRange(min=1), help="Of the search; short for --set rounds=N.")
@click.option("--engine", type=click.Choice(["mlo", "betty"]), help="Of the search; short for --set engine=E.")
@click.option("--launch", metavar="N", type=click.IntRange(min=1), help="In so many processes, which share each batch.")
@click.option("--output", type=click.Path(path_type=Path), help="New folder of the run  [default: runs/RECIPE/TIME]")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def run(
    *,
    recipe: str,
    overrides: tuple[str, ...],
    seed: int | None,
    device: str | None,
    rounds: int | None,
    engine: str | None,
    launch: int | None,
    output: Path | None,
    quiet: bool,
) -> None:
    """Run RECIPE, a bundled one (see mlo list) or the path of a YAML file.

    \b
    Example:
        mlo run lbt/digits --seed 1 --output runs/first
        mlo run lbt/digits --set levels.teacher.hypergradient.kind=finite_difference
        mlo run darts/digits-first --engine betty
    """  # noqa: D301
    short = {"seed": seed, "device": device, "rounds": rounds, "engine": engine}
    _begin(recipe, overrides, short, output, launch, quiet=quiet)


@main.command()
@click.argument("subject", metavar="GENOTYPE_OR_RUN")
@click.option(
    "--recipe", required=True, help="How to train: a bundled recipe, such as evaluate/cifar10, or a YAML file."
)
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override one value; may be repeated.")
@click.option("--seed", type=click.IntRange(min=0), help="Of all random draws; short for --set seed=N.")
@click.option("--device", help="auto, cpu, cuda, cuda:1, mps; short for --set device=D.")
@click.option("--launch", metavar="N", type=click.IntRange(min=1), help="In so many processes, which share each batch.")
@click.option("--output", type=click.Path(path_type=Path), help="New folder of the run  [default: runs/RECIPE/TIME]")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(
    *,
    subject: str,
    recipe: str,
    overrides: tuple[str, ...],
    seed: int | None,
    device: str | None,
    launch: int | None,
    output: Path | None,
    quiet: bool,
) -> None:
    """Train the network of a genotype from scratch, and test it.

    GENOTYPE_OR_RUN is the folder of a run that found one, its genotype.json, or the name of a published one (DARTS_V2,
    PDARTS, PC_DARTS_cifar, ...).

    \b
    Example:
        mlo evaluate runs/first --recipe evaluate/digits
        mlo evaluate PC_DARTS_cifar --recipe evaluate/cifar10 --seed 1
    """  # noqa: D301
    short = {"genotype": _find_genotype(subject), "seed": seed, "device": device}
    _begin(recipe, overrides, short, output, launch, quiet=quiet)


@main.command("resume")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--launch", metavar="N", type=click.IntRange(min=1), help="In so many processes, which share each batch.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def resume_command(folder: Path, launch: int | None, quiet: bool) -> None:
    """Go on with the interrupted run in FOLDER, exactly where its newest checkpoint is.

    \b
    Example:
        mlo resume runs/first
    """  # noqa: D301
    found = resume(folder, _load, progress=not quiet)
    if found.finished:
        if found.is_first:
            _experiment(found.recipe).report(found)
            click.echo(f"{folder}: this run is finished; nothing to do.")
            _show(found.result(), folder)
        return
    start_processes(launch)
    _execute(found, _experiment(found.recipe))


@main.command()
@click.argument("recipe")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override one value; may be repeated.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="graph.png",
    show_default=True,
    help="Picture to write: .png, .svg or .pdf.",
)
def graph(recipe: str, overrides: tuple[str, ...], output: Path) -> None:
    """Draw the level graph of RECIPE: levels, edges, and how each best response is differentiated.

    \b
    Example:
        mlo graph lbt/digits --output lbt.svg
    """  # noqa: D301
    built = _experiment(_load(recipe, overrides)).graph()
    click.echo(describe_graph(built))
    draw_graph(built, output)
    click.echo(f"\nPicture: {output}")


@main.command()
@click.argument("recipe")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override one value; may be repeated.")
@click.option("--directions", type=click.IntRange(min=1), default=8, show_default=True, help="Random directions tried.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the recipe and of the directions.")
@click.option("--level", help="Check this one  [default: all with levels solved inside them]")
def check(*, recipe: str, overrides: tuple[str, ...], directions: int, seed: int | None, level: str | None) -> None:
    """Compare the hypergradients of RECIPE, as it begins, with a black box: the lower steps taken again in float64.

    Exits with 1 if an estimator that claims to be exact is not. Solves the lower levels 4 times a direction: override
    sizes to make it faster.

    \b
    Example:
        mlo check lbt/digits --set levels.teacher.hypergradient.kind=finite_difference
        mlo check lbt/digits --directions 2 --set supernet.channels=2 --set student.width=2 --set batch_size=16
    """  # noqa: D301
    loaded = _load(recipe, (*overrides, *((f"seed={seed}",) if seed is not None else ())))
    if loaded.threads is not None:
        torch.set_num_threads(loaded.threads)
    device = loaded.device
    if device == "auto" and find_device(device, []).type == "mps":
        device = "cpu"  # for its float64
    if loaded.engine != "mlo":
        raise InteropError(f"engine: expected 'mlo', whose hypergradients are checked; found {loaded.engine!r}")
    graph = _checked_graph(loaded, _experiment(loaded))
    engine = Engine(graph, seed=loaded.seed, device=device, rollback=loaded.rollback)
    found = engine.check(level, directions=directions, seed=loaded.seed)
    click.echo(str(found))
    sys.exit(0 if found.passed else 1)


@main.command()
@click.argument("recipe")
@click.option("--seeds", required=True, metavar="N|A,B,...", help="How many (10: seeds 0 to 9), or which (0,3,7).")
@click.option("--vary", metavar="KEY=V1,V2,...", multiple=True, help="Values of one setting; repeated: all products.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override one value in all runs.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of all runs.")
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at a time  [default: 1; with --slurm: no limit]")
@click.option(
    "--slurm", metavar="KEY=VALUE", multiple=True, help="Submit to Slurm with this parameter; may be repeated."
)
@click.option("--retries", type=click.IntRange(min=0), default=1, show_default=True, help="Of each run that fails.")
def sweep(
    *,
    recipe: str,
    seeds: str,
    vary: tuple[str, ...],
    overrides: tuple[str, ...],
    output: Path,
    jobs: int | None,
    slurm: tuple[str, ...],
    retries: int,
) -> None:
    """Run RECIPE over seeds and over the product of settings; the same command again goes on.

    Exits with 1 if a run failed. A later command may add seeds and values to the same folder.

    \b
    Example:
        mlo sweep lbt/digits --seeds 10 --output runs/digits --jobs 2
        mlo sweep lbt/digits --seeds 0,3,7 --vary lambda=0.5,1,2 --output runs/lambda
        mlo sweep lbt/digits --seeds 10 --output runs/digits --slurm partition=gpu --slurm time=60
    """  # noqa: D301
    campaign = Campaign(
        recipe=recipe,
        name=recipe_name(recipe),
        settings=overrides,
        varied=tuple(parse_varied(text) for text in vary),
        seeds=parse_seeds(seeds),
    )
    campaign = check_folder(campaign, output)
    cluster = parse_cluster(slurm, jobs) if slurm else None
    runs = plan_runs(campaign, _load, lambda loaded: _checked_graph(loaded, _experiment(loaded)))
    output.mkdir(parents=True, exist_ok=True)
    with alone(
        output, f"{output}: expected no other sweep at work in this folder; found one. Wait for it, or stop it."
    ):
        folders = prepare(campaign, runs, output, _load)
        if cluster is not None:
            _summarize(submit(folders, output, cluster, retries=retries))
            return
        execution = run_here(folders, jobs=jobs or 1, retries=retries, say=click.echo)
    failed = _summarize(execution.outcomes)
    if execution.interruption is not None:
        words = ["mlo", "sweep", recipe, "--seeds", seeds, *(word for text in vary for word in ("--vary", text))]
        words += [word for text in overrides for word in ("--set", text)] + ["--output", str(output)]
        words += ["--jobs", str(jobs)] if jobs else []
        click.echo(f"\nStopped and saved. Go on with:\n\n    {shlex.join(words)}", err=True)
        sys.exit(128 + execution.interruption.signal_number)
    click.echo(f"\nCompare: mlo report {shlex.quote(str(output))}")
    sys.exit(1 if failed else 0)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write into  [default: comparison in RUN if it is one, else here]",
)
@click.option("--group-by", metavar="KEY", multiple=True, help="Only this setting tells groups apart; may be repeated.")
@click.option("--metrics", metavar="A,B,...", default="", help="More figures of result.json to show.")
def report(*, runs: tuple[Path, ...], output: Path | None, group_by: tuple[str, ...], metrics: str) -> None:
    """Compare RUNS: tables of means over seeds, one row for every recipe and every setting that differs.

    A RUN is the folder of a run, or one that contains runs, such as that of a sweep. Writes Markdown, LaTeX, CSV and
    one HTML page; where one number differs, also a curve over it.

    \b
    Example:
        mlo report runs/lambda
        mlo report runs/digits runs/lambda --group-by lambda --metrics alpha_change --output tables
    """  # noqa: D301
    folder = output or (runs[0] if len(runs) == 1 else Path()) / "comparison"
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    table, written = write_comparison(find_runs(runs), folder, group_by=group_by, metrics=names, references=published())
    click.echo(f"{table}\nWritten: {', '.join(map(str, written))}")


def _summarize(outcomes: Mapping[str, Outcome]) -> bool:
    """Print what became of a sweep's runs; returns whether one is neither finished nor on its way."""
    click.echo(f"\n{format_outcomes(list(outcomes.values()))}")
    return any(found.status in (Status.FAILED, Status.INTERRUPTED) for found in outcomes.values())


def _find_genotype(subject: str) -> str:
    """Return what a recipe's `genotype` is to be: what is in a run's folder or in a file, or a name."""
    path = Path(subject)
    if not path.exists() and ("/" in subject or path.suffix == ".json"):
        raise MloError(f"{subject}: expected a run's folder, a genotype.json or a published name; found no such file")
    if path.is_dir():
        is_run = (path / "recipe.yaml").is_file()
        path = path / "genotype.json"
        if not path.is_file() and not is_run:
            raise MloError(
                f"{path.parent}: expected the folder of a run; found no genotype.json and no recipe.yaml in it"
            )
        if not path.is_file():
            raise MloError(
                f"{subject}: expected the folder of a run that has found a genotype; found no genotype.json in it. "
                f"Go on with the run first: mlo resume {subject}"
            )
    if not path.is_file() and path.suffix != ".json":
        return subject
    try:
        return json.dumps(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, UnicodeDecodeError) as error:
        raise MloError(f"{path}: expected a genotype as JSON; found something else ({error})") from error


def _begin(
    recipe: str,
    overrides: tuple[str, ...],
    short: Mapping[str, object],
    output: Path | None,
    launch: int | None,
    *,
    quiet: bool,
) -> None:
    loaded = _load(recipe, (*overrides, *(f"{key}={value}" for key, value in short.items() if value is not None)))
    check_processes(loaded, launch is not None and launch > 1, launch)
    start_processes(launch)  # a mistake in the recipe has been found in one process, without a report of each
    name, experiment = recipe_name(recipe), _experiment(loaded)
    _checked_graph(loaded, experiment)  # a mistake that only this shows ends the command before anything is written
    folder = from_first(lambda: output or Path("runs", name, time.strftime("%Y-%m-%d_%H-%M-%S")), whole_world())
    _execute(Run.begin(folder, loaded, name, progress=not quiet), experiment)


def _load(recipe: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    return load_recipe(
        recipe, overrides, schemas={name: kind.recipe_type for name, kind in installed_problems().items()}
    )


def _experiment(recipe: Recipe) -> Experiment:
    kind = installed_problems()[recipe.problem]
    if not issubclass(kind, Experiment):
        raise RecipeError(f"problem {recipe.problem!r}: expected a subclass of mlo.runs.Experiment; found {kind!r}")
    return kind(recipe)


def _checked_graph(recipe: Recipe, experiment: Experiment) -> Graph:
    graph = experiment.graph()
    check_engine(recipe, graph)
    return graph


def _execute(run: Run, experiment: Experiment) -> None:
    try:
        result = run.execute(experiment)
    except Interrupted as interruption:
        if run.is_first:
            saved = "Stopped and saved. Go on"
            if run.recipe.engine == "betty":
                saved = "Stopped. Betty's engine has no checkpoints, so that what it trained begins anew. Go on"
            click.echo(f"\n{saved} with:\n\n    mlo resume {run.home}", err=True)
        sys.exit(128 + interruption.signal_number)
    if run.is_first:
        _show(result, run.home)


def _show(result: Mapping[str, Any], folder: Path) -> None:
    """Print the figures of a result, and where the rest is."""
    figures = {key: value for key, value in result.items() if isinstance(value, (int, float))}
    width = max(map(len, figures))
    for key, value in figures.items():
        click.echo(f"{key:<{width}}  {value:.4g}" if isinstance(value, float) else f"{key:<{width}}  {value}")
    page = folder / "report.html"
    click.echo(f"\n{'Report' if page.exists() else 'Folder'}: {page if page.exists() else folder}")
