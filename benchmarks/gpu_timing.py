"""Operators and models on a GPU, forward and backward: checked against float64, and timed side by side."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn

import ffnet_kernels
from ffnet_kernels.backends.triton.tune import Clock, check_alive, describe
from ffnet_kernels.ops import OPERATORS
from ffnet_kernels.selftest import error_limit, incoming_gradient, poisoned_memory

from .cases import ModelCase, OperatorCase, itemsize
from .gpu_contenders import (
    BACKENDS,
    COMPILED,
    COPY,
    CUDNN,
    CUDNN_NCHW,
    EAGER,
    EAGER_NCHW,
    Copy,
    Cudnn,
    OnBackend,
    SubquadraticOps,
)
from .peers import Contender, Eager, Ours, TorchCompile
from .results import Measurement, Row
from .work import MEMORY_FORMATS, ModelWork, OperatorWork, Program, Work, build

WARM_UP = 3
#: Those of torch.compile(mode="max-autotune") but for CUDA graphs, which would copy an operator's inputs in every call.
MAX_AUTOTUNE = {"max_autotune": True, "coordinate_descent_tuning": True}


def operator_work(case: OperatorCase, device: torch.device) -> OperatorWork:
    """As `build` makes it, on the device; the numbers are the same in every dtype and layout but for rounding."""
    plain = _built(replace(case, dtype="float32", layout="nchw"))
    dtype = getattr(torch, case.dtype)
    return replace(plain, arguments=_mapped(lambda t: t.to(device, dtype), plain.arguments), layout=case.layout)


@functools.lru_cache(maxsize=1)  # random numbers take the CPU longer than all that is done with them takes the GPU
def _built(case: OperatorCase) -> OperatorWork:
    return build(case)  # type: ignore[return-value]


def _mapped(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """A dict or tuple of arguments with the function applied to the tensors among them."""
    if isinstance(values, dict):
        return {name: _mapped(function, value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_mapped(function, value) for value in values)
    return function(values) if isinstance(values, Tensor) else values


def check(backend: str, operator: str, args: tuple) -> dict[str, Any]:
    """A backend's kernels against float64: the output and the gradients of all tensors.

    Args:
        args: as in the operator's schema, on the device where it is to run.

    Returns:
        ``passed``, and for each result its largest absolute error and the limit of that.
    """
    ours, plain = functools.partial(OPERATORS[operator].on, backend), OPERATORS[operator].reference
    with torch.no_grad():
        grad = incoming_gradient(plain(*args))
    expected = _results(operator, plain, _mapped(Tensor.double, args), grad)
    eager = _results(operator, plain, args, grad)
    with poisoned_memory():
        got = _results(operator, ours, args, grad)
    errors = {name: _largest(got.pop(name) - result) for name, result in expected.items()}
    limits = {name: error_limit(result, eager[name]) for name, result in expected.items()}
    return {
        "passed": all(error <= limits[name] for name, error in errors.items()),  # NaN compares false
        "errors": {name: [_finite(error), _finite(limits[name])] for name, error in errors.items()},
    }


def _results(operator: str, function: Callable[..., Tensor], args: tuple, grad: Tensor) -> dict[str, Tensor]:
    names = [name for name, value in zip(OPERATORS[operator].names, args, strict=True) if isinstance(value, Tensor)]
    output, leaves = _differentiable(function, args)
    grads = torch.autograd.grad(output, leaves, _like(output, grad))
    return {"output": output.detach(), **dict(zip(names, grads, strict=True))}


def _differentiable(function: Callable[..., Tensor], args: tuple) -> tuple[Tensor, list[Tensor]]:
    """The output, and the tensors among the arguments, of which each requires a gradient."""
    args = _mapped(lambda t: t.detach().requires_grad_(), args)
    with torch.enable_grad():
        return function(*args), [a for a in args if isinstance(a, Tensor)]


def _like(output: Tensor, values: Tensor) -> Tensor:
    """The values in the dtype and layout of an output."""
    return torch.empty_like(output, requires_grad=False).copy_(values)


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def operator_row(case: OperatorCase, device: torch.device, clock: Clock, *, backward: bool, samples: int = 30) -> Row:
    """An operator, or all its gradients, beside baselines and a copy."""
    flops, moved = (2 * case.flops, backward_bytes(case)) if backward else (case.flops, case.bytes)
    work = operator_work(case, device)
    ours = [OnBackend(name, layout, stored=not backward) for name in BACKENDS for layout in ("nchw", "channels_last")]
    cudnn = [] if backward else [Cudnn(CUDNN_NCHW, "nchw"), Cudnn(CUDNN, "channels_last")]
    fourier = SubquadraticOps()
    contenders: list[Contender] = [
        *(one for one in ours if one.unavailable() is None), Eager(EAGER_NCHW, "nchw"), Eager(EAGER, "channels_last"),
        *(one for one in cudnn if one.differs(work)), TorchCompile(COMPILED, MAX_AUTOTUNE), Copy(moved, device),
        *([fourier] if not backward and fourier.takes(work) else []),
    ]  # fmt: skip
    name = f"{case.name.removesuffix(f' {case.layout}')} {'backward' if backward else 'forward'}"
    return measure(name, flops, moved, work, contenders, clock, samples, backward=backward, graphs=not backward)


def backward_bytes(case: OperatorCase) -> int:
    """The input and the incoming gradient read, the gradient of the input written, each parameter read and its gradient
    written. A residual costs nothing: its gradient is the incoming one."""
    one_map = case.batch * case.channels * case.size**2 * itemsize(case.dtype)
    maps = 2 if case.operator == "depthwise_conv2d" else 3
    return 3 * one_map + 2 * (case.bytes - maps * one_map)


def model_row(case: ModelCase, device: torch.device, clock: Clock, *, samples: int = 10) -> Row:
    """Inference of a model, on the backends that are chosen by themselves."""
    built: ModelWork = build(case)  # type: ignore[assignment]
    work = replace(built, model=built.model.to(device), batches=[batch.to(device) for batch in built.batches])
    compiled = TorchCompile(COMPILED, {**MAX_AUTOTUNE, "triton.cudagraphs": True})
    contenders: list[Contender] = [Ours(), Eager(EAGER_NCHW, "nchw"), Eager(EAGER, "channels_last"), compiled]
    return measure(f"{case.name} inference", case.flops, case.bytes, work, contenders, clock, samples)


def training_row(case: ModelCase, device: torch.device, clock: Clock, *, samples: int = 5) -> Row:
    """A training step without the optimizer, parameters in float32, autocast to the dtype of the case."""
    built: ModelWork = build(replace(case, dtype="float32"))  # type: ignore[assignment]
    work = TrainingWork(built.model.to(device).train(), built.batches[0].to(device), getattr(torch, case.dtype))
    contenders: list[Contender] = [Ours(), Eager(EAGER, "channels_last"), CompiledTraining()]
    return measure(f"{case.name} training step", 3 * case.flops, case.bytes, work, contenders, clock, samples)


@dataclass(frozen=True)
class TrainingWork:
    """Forward pass, loss and all gradients of a model. Programs return the logits: those are checked."""

    model: nn.Module
    batch: Tensor
    dtype: torch.dtype
    layout: str = "channels_last"

    def plain(self, layout: str) -> Program:
        return self.program(self.copy(layout), layout)

    def fused(self) -> Program:
        program = self.program(ffnet_kernels.optimize(self.copy(self.layout)), self.layout)
        program()  # its first step runs the modules, and is not what is judged
        return program

    def as_trained(self, layout: str) -> Program:
        return self.plain(layout)

    def copy(self, layout: str) -> nn.Module:
        return copy.deepcopy(self.model).to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]

    def program(self, model: Callable[..., Any], layout: str) -> Program:
        batch = self.batch.contiguous(memory_format=MEMORY_FORMATS[layout])
        labels = torch.arange(len(batch), device=batch.device)

        def step(batch: Tensor) -> Tensor:
            with torch.enable_grad():
                with torch.autocast(batch.device.type, self.dtype):
                    logits = model(batch)
                    loss = F.cross_entropy(logits, labels)
                torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)  # type: ignore[attr-defined]
            return logits.detach()

        return Program(step, [(batch,)], layout)

    def expected(self) -> Tensor:
        return self.copy("nchw").double()(self.batch.double())

    def error_limit(self, expected: Tensor, eager: Tensor) -> float:
        return 2 * error_limit(expected, eager)  # as for models in eval mode


@dataclass(frozen=True)
class CompiledTraining:
    """The model compiled, the step around it as it is."""

    name: str = COMPILED

    def unavailable(self) -> str | None:
        return None

    def prepare(self, work: Any) -> Program:
        torch._dynamo.reset()
        model = torch.compile(work.copy(work.layout), dynamic=False, options=dict(MAX_AUTOTUNE))
        return work.program(model, work.layout)


@torch.no_grad()
def measure(
    name: str, flops: int, moved: int, work: Work, contenders: Sequence[Contender], clock: Clock, samples: int, *,
    backward: bool = False, graphs: bool = False,
) -> Row:  # fmt: skip
    """The contenders in turn, each checked against float64 first. One that fails is kept, with the reason.

    ``backward``: the gradients of all tensors among the arguments, the forward pass being made once, before.
    ``graphs``: on a GPU as CUDA graphs, so that no gaps between a contender's kernels are timed.
    """
    plain = work.plain("nchw")
    grad = incoming_gradient(plain()) if backward else None
    device = plain.inputs[0][0].device
    eager = _runner(plain, grad)()
    if grad is None:
        expected = [work.expected()]
    else:
        expected = _runner(replace(plain, inputs=[_mapped(Tensor.double, plain.inputs[0])]), grad)()
    limits = [work.error_limit(*pair) for pair in zip(expected, eager, strict=True)]
    del plain, eager
    runs: dict[str, Callable[[], list[Tensor]]] = {}
    found: dict[str, Measurement] = {}
    with torch._functorch.config.patch(donated_buffer=not backward):  # so that compiled ones run more than once
        for contender in contenders:
            try:
                program, copies = contender.prepare(work), contender.name == COPY
                run = _runner(program, None if copies else grad)
                error, passed = (0.0, True) if copies else _judge(run(), expected, limits)
                for _ in range(WARM_UP):
                    clock(run)
                how = ""
                if graphs and device.type == "cuda":
                    run, how = captured(run, device)
            except Exception as failure:  # a contender may fail in any way; the others still count
                found[contender.name] = Measurement(contender.name, reason=describe(failure))
                check_alive(expected[0].device)
            else:
                runs[contender.name] = run
                found[contender.name] = Measurement(
                    contender.name, program.layout, program.detail + how, repeats=1, error=error, passed=passed
                )
        times: dict[str, list[float]] = {contender: [] for contender in runs}
        for sample in range(samples):
            order = list(runs)
            first = sample % max(1, len(order))
            for contender_name in order[first:] + order[:first]:
                times[contender_name].append(round(clock(runs[contender_name]), 6))
    measured = [replace(m, samples_ms=tuple(times.get(m.contender, ()))) for m in found.values()]
    return Row(name, flops, moved, tuple(measured))


def captured(run: Callable[[], list[Tensor]], device: torch.device) -> tuple[Callable[[], Any], str]:
    """A CUDA graph of what runs; or what runs, and why there is no graph of it."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize(device)
    except Exception as failure:  # such as one that synchronises
        check_alive(device)
        return run, f"; without a CUDA graph: {describe(failure)}"
    return graph.replay, ""


def _runner(program: Program, grad: Tensor | None) -> Callable[[], list[Tensor]]:
    """What is timed: the program or, for an incoming gradient, its backward pass."""
    if grad is None:
        return lambda: [program()]
    output, leaves = _differentiable(program.function, program.inputs[0])
    incoming = _like(output, grad)
    return lambda: list(torch.autograd.grad(output, leaves, incoming, retain_graph=True))


def _judge(outputs: Sequence[Tensor], expected: Sequence[Tensor], limits: Sequence[float]) -> tuple[float | None, bool]:
    """The largest error relative to the largest element, over all outputs, and whether all are within their limits."""
    errors = [_largest(output - result) for output, result in zip(outputs, expected, strict=True)]
    relative = [e / max(_largest(result), 1e-300) for e, result in zip(errors, expected, strict=True)]
    passed = all(error <= limit for error, limit in zip(errors, limits, strict=True))
    return _finite(max(relative, key=lambda r: math.inf if math.isnan(r) else r)), passed
