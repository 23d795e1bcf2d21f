"""Estimates a training step for any number of GPUs: work, bytes, gradient exchange, and reading of pictures.

``python -m ffnet.train.scale`` prints the table of ``docs/training.md``; ``--anchor`` compares its formula for gradient
exchange with two processes on this machine.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..profile import count_macs, count_parameters
from ..registry import create_model

__all__ = ["Cluster", "Step", "Work", "anchor", "measure_work", "ring_seconds", "step_on"]

GRADIENT_BYTES = 4  # DDP sums gradients in float32
ADAMW_BYTES = 7 * 4  # a parameter's gradient, value and two moments read, the latter three written
EMA_BYTES = 3 * 4  # average read and written, value read
PASSES = 3  # the backward pass computes two products for each one of the forward pass
BUCKET_BYTES = 25 * 2**20  # bucket size of DDP's gradient exchange
MAP_TRIPS = 5  # a map is written and read; read again in the backward pass; its gradient is written and read


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the machines. Defaults are from data sheets, for nodes of eight H100 SXM.

    Attributes:
        node: GPUs of a node.
        flops: Of a GPU, dense bfloat16 on tensor cores.
        flops_share: Share of ``flops`` that convolutions reach. An assumption.
        memory: Bytes a second of a GPU's memory.
        memory_share: Share of ``memory`` that passes over maps reach. An assumption.
        inside: Bytes a second, in each direction, of a GPU to the others of its node (NVLink).
        between: Bytes a second, in each direction, of a GPU's share of the node's network (400 Gbit/s).
        latency: Seconds of one step of a ring. An assumption.
        launch: Seconds that Python and PyTorch take to start a kernel, the least a kernel can take. An assumption.
        overlap: Share of the backward pass under which gradients travel. An assumption.
        image_bytes: Of a stored picture; ImageNet's 1,281,167 take 148 GB.
        decoded: Pictures a second that a CPU core decodes, crops and augments. An assumption.
    """

    node: int = 8
    flops: float = 989e12
    flops_share: float = 0.35
    memory: float = 3.35e12
    memory_share: float = 0.8
    inside: float = 450e9
    between: float = 50e9
    latency: float = 10e-6
    launch: float = 5e-6
    overlap: float = 0.8
    image_bytes: float = 115e3
    decoded: float = 150.0


class Work(NamedTuple):
    """The work of a model for one image of a given size.

    Attributes:
        macs: Multiply–adds of a forward pass.
        map_bytes: Of the maps that layers write in it, in 16-bit numbers.
        parameters: Of the model, as trained.
        calls: Layers that run in it, each one a kernel.
    """

    macs: int
    map_bytes: int
    parameters: int
    calls: int


class Step(NamedTuple):
    """A training step on ``gpus`` GPUs, in seconds, bytes and FLOPs per GPU; ``images`` is for all of them.

    ``seconds`` is computing plus the part of the exchange that the backward pass does not hide. ``efficiency`` is the
    speed relative to as many GPUs without communication. The last three are what a node must read and decode.
    """

    gpus: int
    images: int
    flops: float
    memory_bytes: float
    compute: float
    exchanged_bytes: float
    exchange: float
    exposed: float
    seconds: float
    efficiency: float
    images_per_second: float
    node_images_per_second: float
    node_read_bytes: float
    node_cores: float


def measure_work(model: nn.Module, input_size: tuple[int, int, int]) -> Work:
    """Counts multiply–adds, and the bytes of what convolutions, norms, activations and linear layers write."""
    written = calls = 0

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        nonlocal written, calls
        written += output.numel() * 2
        calls += 1

    leaves = nn.Conv2d, nn.Linear, nn.GELU, nn.modules.batchnorm._BatchNorm, nn.LayerNorm
    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, leaves)]
    try:
        macs = count_macs(model, input_size)
    finally:
        for hook in hooks:
            hook.remove()
    return Work(macs, written, count_parameters(model), calls)


def ring_seconds(size: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Time of a ring all-reduce: each rank sends 2·(n−1)/n of the bytes, in 2·(n−1) steps."""
    return 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * latency if ranks > 1 else 0.0


def exchange_seconds(size: float, gpus: int, cluster: Cluster) -> float:
    """Time of an all-reduce over nodes: half a ring inside each node before and after a ring between nodes, for 1/node
    of the bytes.

    Rings of many nodes become trees: latency then grows with their logarithm, twice, and the bytes stay a ring's.
    """
    buckets = math.ceil(size / BUCKET_BYTES)
    inside = ring_seconds(size, min(gpus, cluster.node), cluster.inside, buckets * cluster.latency)
    nodes = math.ceil(gpus / cluster.node)
    if nodes == 1:
        return inside
    steps = min(2 * (nodes - 1), 4 * math.ceil(math.log2(nodes)))
    part = size / cluster.node
    return inside + 2 * (nodes - 1) / nodes * part / cluster.between + buckets * steps * cluster.latency


def step_on(gpus: int, batch: int, work: Work, cluster: Cluster) -> Step:
    """A step of ``batch`` images a GPU.

    Raises:
        ValueError: If there are no GPUs or images.
    """
    if gpus < 1 or batch < 1:
        raise ValueError(f"expected at least one GPU and one image for each, got {gpus} and {batch}")
    flops = 2.0 * PASSES * work.macs * batch
    passes = MAP_TRIPS * work.map_bytes * batch
    update = (ADAMW_BYTES + EMA_BYTES) * work.parameters
    memory_bytes = float(passes + update)
    # Convolutions and elementwise passes alternate, so their times add up.
    arithmetic = flops / (cluster.flops * cluster.flops_share)
    busy = arithmetic + memory_bytes / (cluster.memory * cluster.memory_share)
    compute = max(busy, PASSES * work.calls * cluster.launch)
    size = GRADIENT_BYTES * work.parameters
    exchange = exchange_seconds(size, gpus, cluster)
    # There is no backward pass left to hide the last bucket.
    last = exchange * min(1.0, BUCKET_BYTES / size)
    exposed = max(exchange - cluster.overlap * compute * (PASSES - 1) / PASSES, last)
    seconds = compute + exposed
    images_per_second = gpus * batch / seconds
    node = images_per_second * min(cluster.node, gpus) / gpus
    return Step(
        gpus, gpus * batch, flops, memory_bytes, compute, 2 * (gpus - 1) / gpus * size, exchange, exposed, seconds,
        compute / seconds, images_per_second, node, node * cluster.image_bytes, node / cluster.decoded,
    )  # fmt: skip


def table(work: Work, counts: Sequence[int], cluster: Cluster, *, batch: int | None, total: int | None) -> str:
    """A row a number of GPUs: ``batch`` images for each, or ``total`` for all of them."""
    lines = [
        "| GPUs | images a step | computing ms | all-reduce ms | not hidden ms | efficiency | images/s | epoch | "
        "node: MB/s | node: cores |",
        "|-----:|-----:|-----:|-----:|-----:|-----:|-----:|-----:|-----:|-----:|",
    ]
    for gpus in counts:
        each = batch if batch is not None else (total or 0) // gpus
        if each < 1:
            continue
        step = step_on(gpus, each, work, cluster)
        epoch = 1_281_167 / step.images_per_second
        lines.append(
            f"| {gpus} | {step.images:,} | {1e3 * step.compute:.2f} | {1e3 * step.exchange:.2f} | "
            f"{1e3 * step.exposed:.2f} | {100 * step.efficiency:.0f} % | {step.images_per_second:,.0f} | "
            f"{epoch:.1f} s | {step.node_read_bytes / 1e6:,.0f} | {step.node_cores:,.0f} |"
        )
    return "\n".join(lines)


def _anchor_rank(rank: int, port: int, size: int, repeats: int, queue: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = []
    for numbers in (1, size // 8, size):
        tensor = torch.zeros(numbers)
        samples = []
        for _ in range(repeats):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            samples.append(time.perf_counter() - begin)
        found.append(min(samples))  # the least disturbed one
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


def anchor(parameters: int, repeats: int = 9) -> tuple[float, float]:
    """Measured and predicted seconds of a model's all-reduce between two processes of this machine, over gloo.

    Latency is that of one number, bandwidth that of an eighth of the gradients; `ring_seconds` predicts all of them.
    """
    import socket

    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.Queue()
    ranks = [context.Process(target=_anchor_rank, args=(r, port, parameters, repeats, queue)) for r in range(2)]
    for rank in ranks:
        rank.start()
    one, eighth, whole = queue.get()
    for rank in ranks:
        rank.join()
    latency = one / 2
    bandwidth = GRADIENT_BYTES * (parameters // 8) / max(eighth - one, 1e-9)  # a ring of two sends the bytes once
    return whole, ring_seconds(GRADIENT_BYTES * parameters, 2, bandwidth, latency)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ffnet.train.scale", description="A training step on paper.")
    parser.add_argument("--model", default="ffnet_2")
    parser.add_argument("--gpus", default="8,16,32,64,128,256,512,1024", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=128, help="images of a GPU (default: %(default)s)")
    parser.add_argument(
        "--total", type=int, default=4096, help="images of all in the second table (default: %(default)s)"
    )
    parser.add_argument("--anchor", action="store_true", help="compare with two processes here")
    options = parser.parse_args(argv)
    model = create_model(options.model, device="meta")
    size = model.config["input_size"]
    work, cluster = measure_work(model, size), Cluster()
    counts = [int(number) for number in options.gpus.split(",")]
    step = step_on(counts[0], options.batch, work, cluster)
    print(
        f"{options.model} at {size[-1]}×{size[-2]}: {work.parameters:,} parameters, {work.calls} layers, "
        f"{work.macs / 1e9:.3f} G multiply–adds and {work.map_bytes / 1e6:.1f} MB of maps an image. A GPU's step of "
        f"{options.batch} images: {step.flops / 1e12:.2f} TFLOP, {step.memory_bytes / 1e9:.1f} GB; gradients "
        f"{GRADIENT_BYTES * work.parameters / 1e6:.1f} MB.\n"
    )
    print(f"{options.batch} images a GPU:\n\n{table(work, counts, cluster, batch=options.batch, total=None)}\n")
    print(f"{options.total:,} images in all:\n\n{table(work, counts, cluster, batch=None, total=options.total)}")
    if options.anchor:
        measured, predicted = anchor(work.parameters)
        print(f"\ntwo processes here: all-reduce {1e3 * measured:.1f} ms, predicted {1e3 * predicted:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
