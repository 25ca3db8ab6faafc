"""The runs of a campaign as jobs of a Slurm cluster, submitted through submitit.

A job is one run. Some time before its limit, and when it is preempted, Slurm sends it a signal, upon which the run
saves and the job is queued again, as often as submitit's `max_num_timeout` says (3). Called by `mlo.cli`; submitit is
imported only here, since most never need it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlo.campaign.outcomes import Outcome, Status
from mlo.campaign.worker import Worker
from mlo.errors import MloError
from mlo.files import write_text
from mlo.recipes.strict_yaml import parse_yaml
from mlo.runs import is_finished

if TYPE_CHECKING:
    import submitit

_JOBS = "slurm"  # folder of what submitit writes, in that of the campaign
_KINDS = ("slurm", "local")


class Job:
    """One run as a job: a function that submitit pickles, calls on the cluster, and asks to save before time is up.

    Args:
        folder: of the run.
        retries: how often a run that failed is started again.
    """

    def __init__(self, folder: Path, retries: int) -> None:
        self._folder = folder
        self._retries = retries
        self._worker: Worker | None = None

    def __call__(self) -> None:
        """Run to the end.

        Raises:
            MloError: the run failed, or was stopped.
        """
        worker = self._worker = Worker(self._folder, self._retries)
        worker.start()
        while not worker.is_over():
            time.sleep(0.1)
        if not worker.succeeded:
            raise MloError(f"{self._folder}: {worker.error()}; log: {worker.log}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Save, and give what to submit in place of this job; called within a handler of a signal."""
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415 - see the module's docstring

        if self._worker is not None:
            self._worker.stop()
            self._worker.await_end()
        return DelayedSubmission(Job(self._folder, self._retries))


@dataclass(frozen=True)
class Cluster:
    """Where and how jobs are submitted.

    Attributes:
        kind: of submitit's executors; "slurm", or "local" to try the same on this machine.
        max_num_timeout: how often a job whose time is up is queued again.
        parameters: of the jobs, as submitit's `AutoExecutor` names them.
    """

    kind: str
    max_num_timeout: int
    parameters: Mapping[str, Any]


def parse_cluster(texts: Sequence[str], jobs: int | None) -> Cluster:
    """Read `--slurm key=value`.

    Args:
        texts: `key=value`, a key being one of sbatch (with underscores), `timeout_min` or another of those that
            submitit shares between clusters, `max_num_timeout`, or `cluster`; a value is YAML.
        jobs: at a time at most, or None for as many as the cluster gives.

    Raises:
        MloError: submitit is not installed, or a text is no `key=value`.
    """
    try:
        from submitit import AutoExecutor  # noqa: PLC0415
    except ImportError as error:
        raise MloError(
            "--slurm: expected submitit, which submits the jobs; it is not installed. Install it: pip install "
            "'mlo[slurm]', or pip install submitit"
        ) from error
    shared = AutoExecutor._valid_parameters()
    kind: Any = "slurm"
    max_num_timeout: Any = 3
    parameters: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise MloError(f"--slurm {text}: expected key=value, such as partition=gpu or time=60 (minutes)")
        read = parse_yaml(value, f"--slurm {text}")
        key = key.strip().replace("-", "_")
        if key == "cluster":
            kind = read
        elif key == "max_num_timeout":
            max_num_timeout = read
        else:
            parameters[key if key in shared else f"slurm_{key}"] = read
    if jobs is not None:
        parameters["slurm_array_parallelism"] = jobs
    if kind not in _KINDS:
        raise MloError(f"--slurm cluster={kind}: expected one of {', '.join(_KINDS)}")
    if not isinstance(max_num_timeout, int) or max_num_timeout < 0:
        raise MloError(f"--slurm max_num_timeout={max_num_timeout}: expected a whole number, 0 or more")
    return Cluster(kind, max_num_timeout, parameters)


def submit(folders: Mapping[str, Path], folder: Path, cluster: Cluster, *, retries: int) -> dict[str, Outcome]:
    """Submit what is not done and not submitted already.

    Args:
        folders: of the runs by their names, laid out.
        folder: of the campaign; must be seen by the cluster's machines.
        cluster: where to.
        retries: how often a job starts a run again that failed.

    Returns:
        The outcome of every run, in the order of `folders`.

    Raises:
        MloError: there is no such cluster here, or it does not know a parameter.
    """
    executor = _executor(folder, cluster)
    record = folder / _JOBS / "jobs.json"
    submitted: dict[str, str] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    found: dict[str, Outcome] = {}
    for name, run in folders.items():
        if is_finished(run):
            found[name] = Outcome(name, Status.SKIPPED)
        elif name in submitted:
            job = _earlier_job(cluster, executor, submitted[name])
            if not job.done(force_check=True):
                gone = f"; if it is gone, remove {record}" if job.state == "UNKNOWN" else ""
                note = f"job {job.job_id} of before, {job.state.lower()}{gone}"
                found[name] = Outcome(name, Status.SUBMITTED, note)
    missing = [name for name in folders if name not in found]
    if missing:
        with executor.batch():
            jobs = [executor.submit(Job(folders[name].resolve(), retries)) for name in missing]
    else:
        jobs = []
    for name, job in zip(missing, jobs, strict=True):
        submitted[name] = job.job_id
        found[name] = Outcome(name, Status.SUBMITTED, f"job {job.job_id}")
    write_text(record, json.dumps(submitted, indent=2) + "\n")
    return {name: found[name] for name in folders}


def _earlier_job(cluster: Cluster, executor: submitit.AutoExecutor, job_id: str) -> submitit.Job[None]:
    from submitit import LocalJob, SlurmJob  # noqa: PLC0415

    if cluster.kind == "local":
        return LocalJob(executor.folder, job_id)
    return SlurmJob(executor.folder, job_id)


def _executor(folder: Path, cluster: Cluster) -> submitit.AutoExecutor:
    from submitit import AutoExecutor  # noqa: PLC0415

    try:
        times = {f"{cluster.kind}_max_num_timeout": cluster.max_num_timeout}
        executor = AutoExecutor(folder=(folder / _JOBS).resolve(), cluster=cluster.kind, **times)
        executor.update_parameters(name="mlo", **cluster.parameters)
    except (ValueError, RuntimeError, NameError, AssertionError) as error:  # all that submitit raises
        raise MloError(f"--slurm: {error}") from error
    return executor
