"""The specification: every op in plain PyTorch, as the paper writes it, never optimised.

Each function here has the name and the arguments of its fast twin in :mod:`mendfast.ops`.
"""

from .editor_mlp import editor_mlp
from .kl_divergence import kl_divergence, kl_divergence_rows
from .least_squares import least_squares
from .lowrank_linear import lowrank_linear
from .rank1_update import rank1_update_, rank1_update_group_
from .running_stats import running_stats_
from .token_nll import token_nll, token_nll_rows

__all__ = [
    "editor_mlp",
    "kl_divergence",
    "kl_divergence_rows",
    "least_squares",
    "lowrank_linear",
    "rank1_update_",
    "rank1_update_group_",
    "running_stats_",
    "token_nll",
    "token_nll_rows",
]
