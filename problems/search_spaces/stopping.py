"""Rules that end a search before its time, asked before every round (`mlo.runs.Run.train(until=...)`)."""

from __future__ import annotations

from dataclasses import dataclass

from problems.search_spaces.supernet import Architecture


@dataclass(frozen=True)
class SkipLimit:
    """Stop as soon as the normal cell's genotype has so many skip-connections (DARTS+, Liang et al. 2019, section 3.3).

    Args:
        num_skips: At least 1.

    Raises:
        ValueError: It is less than 1.
    """

    num_skips: int = 2

    def __post_init__(self) -> None:
        if self.num_skips < 1:
            raise ValueError(f"expected num_skips >= 1, got {self.num_skips}")

    def __call__(self, architecture: Architecture) -> bool:
        """Return whether the search is to end."""
        return sum(name == "skip_connect" for name, _ in architecture.discretize().normal) >= self.num_skips
