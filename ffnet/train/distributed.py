"""The processes of a run: joining them, and distributing a model over them by DDP or FSDP2."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..model import Block

__all__ = ["Ranks", "broadcast_buffers", "join_ranks", "only_last", "shard", "wrap_ddp"]


class Ranks(NamedTuple):
    """This process's place among those of the run; ``world`` is 1 for a single process."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor in place over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Gathers an object of each rank on every rank."""
        found = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    def from_first(self, value: Any) -> Any:
        """The first rank's object."""
        found = [value]
        if self.world > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]


@contextmanager
def join_ranks(device: str, timeout: float) -> Iterator[Ranks]:
    """Joins the ranks that torchrun started, or runs this process alone; NCCL on GPUs, gloo on the CPU.

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA if there is a GPU.
        timeout: Seconds after which a rank that does not respond is considered dead.

    Raises:
        ValueError: If the device is none of these, or not available.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"expected --device cpu, cuda or auto, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch finds no GPU")
    world, rank, local = (
        int(os.environ.get(name, default))
        for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    place = torch.device(device, local) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"rank {rank} needs GPU {local}, but there are {torch.cuda.device_count()}")
        torch.cuda.set_device(place)
    if world == 1:
        yield Ranks(0, 1, place)
        return
    # Objects are sent by gloo, also on GPU machines.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    silence = timedelta(seconds=timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=silence))
    # torchrun keeps one store across restarts: without a prefix, ranks would find the addresses of dead ones.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=silence)
    yield Ranks(rank, world, place)
    dist.destroy_process_group()  # not after an error, when the others wait in a collective


def wrap_ddp(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Wraps ``model`` so that gradients are averaged over the ranks.

    Each rank has its own running statistics, which training passes do not read; in the end those of the first rank are
    used (`broadcast_buffers`), as by DDP's default, which would send them in every step.
    """
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    apart: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }  # renamed in 2.13
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **apart)


def shard(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Shards parameters, gradients and optimizer state over the ranks, block by block (FSDP2); in place."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def only_last(model: nn.Module, is_last: bool) -> Any:
    """Context for a forward and backward pass in which ranks exchange gradients only in the last pass of a step."""
    if isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext() if is_last else model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    return contextlib.nullcontext()


def broadcast_buffers(module: nn.Module, ranks: Ranks) -> None:
    """Copies the first rank's buffers to all ranks."""
    if ranks.world > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
