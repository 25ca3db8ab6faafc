"""Whether the found cell is better than a random one: a paired comparison over seeds.

Called by `mlo.comparison.tables`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy import stats

from mlo.comparison.groups import Group

FOUND, RANDOM = "test_error", "random_cell_test_error"
_FEWEST_FOR_RANKS = 6  # with fewer pairs no ranks give a p-value below 0.05


def compare_with_random(group: Group) -> str | None:
    """Say by how much the found cell's test error is below the random cell's, and what a paired test makes of it.

    The test is Wilcoxon's signed-rank test for six pairs or more, and the paired t test for fewer; two-sided.

    Returns:
        A sentence, or None where no finished run has both errors.
    """
    errors, random_errors = group.figures(FOUND), group.figures(RANDOM)
    seeds = [seed for seed in errors if seed in random_errors]
    if not seeds:
        return None
    found, random = [errors[seed] for seed in seeds], [random_errors[seed] for seed in seeds]
    title = ", ".join(text for text in (group.recipe, group.label) if text)
    gain = statistics.fmean(random) - statistics.fmean(found)
    sentence = (
        f"{title}: the found cell errs {abs(gain):.2f} points {'less' if gain >= 0 else 'more'} than a random one"
    )
    return f"{sentence}; {_test(found, random)} (n = {len(found)} seed{'s' * (len(found) != 1)})"


def _test(found: Sequence[float], random: Sequence[float]) -> str:
    differences = [b - a for a, b in zip(found, random, strict=True)]
    if len(differences) < 2:
        return "one seed tests nothing"
    if max(differences) - min(differences) <= 1e-9 * max(map(abs, differences)):
        return "the same difference with every seed, which no test applies to"
    if len(differences) < _FEWEST_FOR_RANKS:
        return f"paired t test, p = {stats.ttest_rel(found, random).pvalue:.2g}"
    return f"Wilcoxon signed-rank test, p = {stats.wilcoxon(found, random).pvalue:.2g}"
