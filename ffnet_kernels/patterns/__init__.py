"""Finds subgraphs that an operator computes, and replaces them by the operator.

Only what is computed matters, not which layers compute it. First, convolutions absorb the linear operations around
them: batch normalisation by running statistics, parallel branches that are summed, the map itself added to them, scales
per channel. Their weights are then computed from parameters by the functions of `folding`, as nodes of the graph. Then
operators are matched, the mixers first.

A pass is a function of a `Rewriter` and a node: it looks at the node and its neighbours, and may replace them.
"""

from __future__ import annotations

from torch import fx

from . import folds, lowering, mixers, norms
from .rewriter import Rewriter

__all__ = ["rewrite"]

FIRST = (folds.canonical, folds.activation_before_views)
FOLDING = (folds.fold_norm, folds.fold_head, folds.fold_sum, folds.fold_scale)
#: Instead of folding, when parameters are trained.
TRAINING = (norms.branched_depthwise, norms.depthwise_norm, norms.norm_activation)
MIXERS = (mixers.ffnified_attention, mixers.channel_mixer)


def rewrite(graph: fx.Graph, *, fold: bool = True) -> None:
    """Replaces subgraphs by operators, in place.

    Args:
        graph: normalised; ``meta["value"]`` of its nodes is their value without data.
        fold: whether weights may be folded; otherwise the result is differentiable with respect to the parameters.
    """
    last = mixers.norm_mixer if fold else mixers.feed_forward
    Rewriter(graph, fold).run(*FIRST, *(FOLDING if fold else TRAINING), *MIXERS, last, lowering.lower)
