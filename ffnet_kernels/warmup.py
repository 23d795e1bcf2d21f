"""Compiles the kernels that a model needs ahead of its first timed or captured call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves


def warmup(model: nn.Module, example: Tensor | tuple) -> None:
    """Runs ``model`` once, and its backward pass if it is in training mode, so that every kernel needed for these
    shapes is compiled, and waits for completion. Kernels are compiled in their first call, which takes seconds and
    cannot be captured in a CUDA graph.

    There are no side effects: parameters and their gradients, buffers (running statistics included), the training mode,
    and torch's random state on the CPU and the devices in use are as before. Hooks do run, as does anything else in the
    model's ``forward``.

    Args:
        model: in the mode, dtype, memory format and on the device in which it will be used. Autocast contexts around
            this call count as they would around a call of the model.
        example: the input, or a tuple of all positional inputs. Kernels are compiled for its shapes and strides: one
            example for each that will be used. The values do not matter.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.
        Exception: whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warmup: expected an nn.Module, got {type(model).__name__}")
    inputs = example if isinstance(example, tuple) else (example,)
    buffers = dict(model.named_buffers())
    devices = {
        t.device for t in (*model.parameters(), *buffers.values(), *tree_leaves(inputs)) if isinstance(t, Tensor)
    }
    devices = {device for device in devices if device.type in ("cuda", "xpu")}
    with _same_random_state(devices), torch.set_grad_enabled(model.training):
        outputs = functional_call(model, {name: buffer.clone() for name, buffer in buffers.items()}, inputs)
        if model.training:
            _run_backward(outputs, (*model.parameters(), *inputs))
    for device in devices:
        torch.get_device_module(device).synchronize(device)


def _run_backward(outputs: object, inputs: tuple) -> None:
    """Computes gradients without touching any ``grad``."""
    results = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    wanted = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad]
    if results and wanted:
        torch.autograd.grad(results, wanted, [torch.ones_like(t) for t in results], allow_unused=True)


@contextlib.contextmanager
def _same_random_state(devices: set[torch.device]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        yield
