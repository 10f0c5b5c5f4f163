"""The ops: each has the name and arguments of its twin in :mod:`mendfast.reference`, and a ``backend``."""

from ._common import all_finite, checking, non_finite
from .editor_mlp import editor_mlp
from .kl_divergence import kl_divergence, kl_divergence_rows
from .least_squares import least_squares, least_squares_change, least_squares_statistics, wanted_changes
from .lowrank_linear import lowrank_linear
from .rank1_update import check_finite, rank1_update_, rank1_update_group_
from .running_stats import running_stats_
from .token_nll import token_nll, token_nll_rows

__all__ = [
    "all_finite",
    "check_finite",
    "checking",
    "editor_mlp",
    "kl_divergence",
    "kl_divergence_rows",
    "least_squares",
    "least_squares_change",
    "least_squares_statistics",
    "lowrank_linear",
    "non_finite",
    "rank1_update_",
    "rank1_update_group_",
    "running_stats_",
    "token_nll",
    "token_nll_rows",
    "wanted_changes",
]
