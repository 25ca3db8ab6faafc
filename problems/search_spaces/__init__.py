"""The DARTS family of search spaces: primitives, cells, supernet, genotypes and evaluation network, each once."""

from problems.search_spaces.darts import (
    DARTS,
    DARTS_PRIMITIVES,
    CellWeights,
    SearchSpace,
    discretize,
    random_genotype,
)
from problems.search_spaces.evaluation import EvaluationNetwork, Logits
from problems.search_spaces.export import export_network, load_network
from problems.search_spaces.genotypes import PUBLISHED, Genotype, find_genotype
from problems.search_spaces.primitives import PRIMITIVES
from problems.search_spaces.relaxations import RELAXATIONS, Relaxation
from problems.search_spaces.supernet import Architecture, Supernet

__all__ = [
    "DARTS",
    "DARTS_PRIMITIVES",
    "PRIMITIVES",
    "PUBLISHED",
    "RELAXATIONS",
    "Architecture",
    "CellWeights",
    "EvaluationNetwork",
    "Genotype",
    "Logits",
    "Relaxation",
    "SearchSpace",
    "Supernet",
    "discretize",
    "export_network",
    "find_genotype",
    "load_network",
    "random_genotype",
]
