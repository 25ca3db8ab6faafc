"""A campaign: one recipe over seeds and over the product of some settings, as `mlo sweep` runs it.

The files of this package, in the order in which a campaign passes through them: `parsing` reads `--seeds` and `--vary`,
`plan` makes the runs out of them and checks all, `manifest` compares them with what the folder holds, `processes` runs
them here or `slurm` submits them, `worker` is one run from its first attempt to its last, and `outcomes` says what
became of each. (`mlo.sweep` is the reverse sweep of a hypergradient, and no relation.)
"""

from mlo.campaign.manifest import check_folder, prepare
from mlo.campaign.outcomes import Outcome, Status, format_outcomes
from mlo.campaign.parsing import Varied, parse_seeds, parse_varied
from mlo.campaign.plan import Campaign, PlannedRun, plan_runs
from mlo.campaign.processes import run_here
from mlo.campaign.slurm import parse_cluster, submit

__all__ = [
    "Campaign",
    "Outcome",
    "PlannedRun",
    "Status",
    "Varied",
    "check_folder",
    "format_outcomes",
    "parse_cluster",
    "parse_seeds",
    "parse_varied",
    "plan_runs",
    "prepare",
    "run_here",
    "submit",
]
