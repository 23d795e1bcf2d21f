"""Finds in a graph what an operator computes, and puts the operator in its place: a graph in, the same graph with
operators in it out.

It goes by what is computed, whoever wrote the layers. First convolutions take in what is linear around them: batch
normalisations by running statistics, parallel branches that are summed, the map itself added to them, scales per
channel. Their weights then are computed from parameters by the functions of `folding`, as nodes of the graph. Then
operators are found, the mixers first.

A pass is a function of a `Rewriter` and a node: it looks at the node and what is around it, and may put something else
in their place.
"""

from __future__ import annotations

from torch import fx

from . import folds, lowering, mixers, norms
from .rewriter import Rewriter

__all__ = ["rewrite"]

FIRST = (folds.canonical, folds.activation_before_views)
FOLDING = (folds.fold_norm, folds.fold_head, folds.fold_sum, folds.fold_scale)
#: In place of folding, where parameters are trained.
TRAINING = (norms.branched_depthwise, norms.depthwise_norm, norms.norm_activation)
MIXERS = (mixers.ffnified_attention, mixers.channel_mixer)


def rewrite(graph: fx.Graph, *, fold: bool = True) -> None:
    """Puts operators into the graph, whose nodes carry ``meta["value"]``, what they are without data.

    Args:
        graph: a normalised one.
        fold: whether weights may be folded; else what is made can be differentiated by the parameters.
    """
    last = mixers.norm_mixer if fold else mixers.feed_forward
    Rewriter(graph, fold).run(*FIRST, *(FOLDING if fold else TRAINING), *MIXERS, last, lowering.lower)
