"""Operators on distributed tensors: how a call is split over processes, each running the operator on its part.

Parts of a batch are independent; filters are then replicated, and their gradients summed over the processes. Parts of
the channels are independent if the operator mixes no channels. Everything else is gathered first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

#: Operators that mix no channels.
_BY_CHANNEL = ("depthwise_conv2d", "ffnified_attention")
_MAPS = ("x", "query", "residual")


def is_distributed(x: Any) -> bool:
    """Whether a map is a ``DTensor``, without importing that."""
    return isinstance(x, Tensor) and type(x).__module__.startswith("torch.distributed.tensor")


def run(operator: Any, arguments: tuple[Any, ...]) -> Tensor:
    """Runs an operator; the result is split like its map.

    Raises:
        ValueError: if only some of the tensors are distributed.
    """
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
    from torch.distributed.tensor.experimental import local_map

    given = {place: value for place, value in enumerate(arguments) if isinstance(value, Tensor)}
    plain = [place for place, value in given.items() if not isinstance(value, DTensor)]
    if plain:
        names = ", ".join(operator.names[place] for place in plain)
        raise ValueError(f"{operator.name}: expected all tensors as DTensor as the map is, got plain ones: {names}")
    x: Any = arguments[0]

    def split(dimension: int, placement: Placement) -> int | None:
        """The map dimension that a mesh dimension splits."""
        if placement.is_shard(0):
            return 0
        even = x.shape[1] % x.device_mesh.size(dimension) == 0  # otherwise their filters would be on other processes
        return 1 if placement.is_shard(1) and operator.name in _BY_CHANNEL and even else None

    splits = [split(dimension, placement) for dimension, placement in enumerate(x.placements)]
    is_map = [operator.names[place] in _MAPS for place in given]
    maps = [Replicate() if at is None else Shard(at) for at in splits]
    weights = [Shard(0) if at == 1 else Replicate() for at in splits]
    weight_grads = [Partial() if at == 0 else weight for at, weight in zip(splits, weights, strict=True)]

    def call(*tensors: Tensor) -> Tensor:
        local = dict(zip(given, tensors, strict=True))
        return operator.run(*(local.get(place, value) for place, value in enumerate(arguments)))

    mapped: Any = local_map(
        call,
        out_placements=maps,
        in_placements=tuple(maps if m else weights for m in is_map),
        in_grad_placements=tuple(maps if m else weight_grads for m in is_map),
        device_mesh=x.device_mesh,
        redistribute_inputs=True,
    )
    return mapped(*given.values())
