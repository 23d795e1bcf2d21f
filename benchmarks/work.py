"""The work that contenders compute: operators, layers, models and training steps, in the forms that contenders need."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffnet
import ffnet_kernels
from ffnet.layers import DropPath
from ffnet_kernels.selftest import error_limit

from .cases import OPERATORS, Case, LayerCase, OperatorCase, TrainingCase, make

SEED = 0
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
VOXEL_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last_3d}
#: Arguments of operators that are maps; other tensors are weights.
MAPS = ("x", "query", "residual")
#: Above so many taps, oneDNN compiles 16-bit depthwise code for minutes.
MOST_TAPS_IN_16_BITS = 100
Wrap = Callable[[Any], Any]


def as_is(function: Any) -> Any:
    return function


class Unsupported(Exception):
    """A contender cannot compute a work; the message says why."""


@dataclass(frozen=True)
class Program:
    """A function and its inputs; calling it runs the first input, which is timed.

    Attributes:
        inputs: one tuple of arguments a call.
        layout: of the maps it reads.
        detail: how it runs, e.g. the backend.
        judged: extracts from a result the tensors to check, if these are not just the result; not timed.
        hoards: whether it keeps memory for maps between calls, so that a call's memory cannot be measured.
    """

    function: Callable[..., Any]
    inputs: Sequence[tuple]
    layout: str
    detail: str = ""
    judged: Callable[[Any], list[Tensor]] | None = None
    hoards: bool = False

    def __call__(self) -> Any:
        return self.function(*self.inputs[0])

    def outputs(self) -> Tensor:
        """The results of all inputs, concatenated along the batch."""
        return torch.cat([self.function(*arguments) for arguments in self.inputs])

    def results(self) -> list[Tensor]:
        """The tensors that are checked."""
        return [self.outputs()] if self.judged is None else self.judged(self())


class Work:
    """The work that all contenders of a case compute.

    Attributes:
        dtype: of maps and weights.
        layout: layout of maps for contenders that accept any.
        inference: whether it runs in inference mode, without gradients.
    """

    dtype: torch.dtype
    layout: str
    inference: bool
    #: Factor on the error limit: rounding accumulates over layers, so equally good orders of summation differ by more.
    limits: ClassVar[int] = 1

    def plain(self, layout: str, wrap: Wrap = as_is) -> Program:
        """Plain PyTorch operators, with maps in that layout; ``wrap`` is applied to the function or module."""
        raise NotImplementedError

    def fused(self, layout: str | None = None) -> Program:
        """ffnet_kernels, with backend selection."""
        raise NotImplementedError

    def as_trained(self, layout: str) -> Program:
        """Like `plain`, without any folding."""
        raise Unsupported("it has no training-time form")

    def exportable(self) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
        """Like `plain`, for other runtimes: a module with constant weights, and a tuple of contiguous maps for each
        call.

        Always in float32: runtimes are told separately which precision to compute in.
        """
        raise Unsupported("only forward passes are run with it")

    def expected(self) -> Any:
        """The value of `Program.results` in float64; a single tensor need not be in a list."""
        raise NotImplementedError

    def error_limit(self, expected: Tensor, eager: Tensor) -> float:
        """The largest absolute error of a result that is accepted."""
        return self.limits * error_limit(expected, eager)


@dataclass(frozen=True)
class OperatorWork(Work):
    """An operator and the arguments of its public function, with contiguous maps and weights.

    With ``incoming``, the gradient of its result: the gradients of all tensors among the arguments, with filters laid
    out like trained parameters. The forward pass is run once beforehand and not timed.
    """

    operator: str
    arguments: dict[str, Any]
    layout: str = "channels_last"
    incoming: Tensor | None = None

    @property
    def inference(self) -> bool:  # type: ignore[override]
        return self.incoming is None

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return next(v.dtype for v in self.arguments.values() if isinstance(v, Tensor))

    def plain(self, layout: str, wrap: Wrap = as_is) -> Program:
        slow = too_large_for_onednn(self.arguments)
        detail = "without oneDNN" if slow else ""
        return self.program(self._defined.reference, self.checked(layout), layout, detail, wrap, slow=slow)

    def fused(self, layout: str | None = None) -> Program:
        layout = layout or self.layout
        arguments, slow, detail = laid_out(self.arguments, layout), too_large_for_onednn(self.arguments), ""
        if self.inference:
            # Filters with their channels innermost, which kernels need not reorder in every call.
            arguments = {n: channels_innermost(v) if is_filter(v) else v for n, v in arguments.items()}
            detail = ffnet_kernels.explain(self.operator, **arguments).backend
            slow &= detail == "reference"
        detail = f"{detail} without oneDNN".strip() if slow else detail
        return self.program(getattr(ffnet_kernels, self.operator), arguments, layout, detail, slow=slow)

    def program(
        self, function: Callable[..., Tensor], arguments: dict[str, Any] | tuple, layout: str, detail: str = "",
        wrap: Wrap = as_is, *, slow: bool = False,
    ) -> Program:  # fmt: skip
        """The program that is timed: a call of a function or, with ``incoming``, its backward pass."""
        around: Wrap = without_onednn if slow else as_is
        function = wrap(around(function))
        if self.incoming is None:
            if isinstance(arguments, dict):
                return Program(functools.partial(function, **arguments), [()], layout, detail)
            return Program(function, [arguments], layout, detail)
        _, backward = differentiated(function, arguments, self.incoming)
        return Program(around(backward), [()], layout, detail, list)

    def exportable(self) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
        if not self.inference:
            return super().exportable()
        single = mapped(Tensor.float, self.arguments)
        maps = [single[name] for name in MAPS if isinstance(single.get(name), Tensor)]
        return _Call(self._defined.reference, self._defined.defined.checked(**single), maps), [tuple(maps)]

    def expected(self) -> Any:
        double = self._defined.defined.checked(**mapped(Tensor.double, self.arguments))
        program = self.program(self._defined.reference, double, "nchw")
        return program() if self.inference else program.results()

    def checked(self, layout: str) -> tuple:
        """The arguments as in the operator's schema, in a layout."""
        return self._defined.defined.checked(**laid_out(self.arguments, layout))

    @property
    def _defined(self) -> Any:
        return ffnet_kernels.ops.OPERATORS[self.operator]


class _Call(nn.Module):
    """A call of an operator in plain PyTorch; all arguments except maps are constants."""

    def __init__(self, function: Callable[..., Tensor], arguments: tuple, maps: list[Tensor]):
        super().__init__()
        self.function, self.arguments = function, arguments
        self.places = [next(i for i, a in enumerate(arguments) if a is one) for one in maps]

    def forward(self, *maps: Tensor) -> Tensor:
        arguments = list(self.arguments)
        for place, one in zip(self.places, maps, strict=True):
            arguments[place] = one
        return self.function(*arguments)


@dataclass(frozen=True)
class ModelWork(Work):
    """A model in eval mode, not reparameterised, and its contiguous input batches of one size.

    Attributes:
        reference: the dtype in which `expected` is computed; below float64 in channels-last, which is faster.
    """

    model: nn.Module
    batches: Sequence[Tensor]
    layout: str = "channels_last"
    reference: torch.dtype = torch.float64
    inference = True
    limits = 2

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.batches[0].dtype

    def plain(self, layout: str, wrap: Wrap = as_is) -> Program:
        return self._program(ffnet.reparameterize(self.model), layout, wrap)

    def fused(self, layout: str | None = None) -> Program:
        # Outside inference mode, as users do it, since tensors made in that mode behave differently.
        with torch.inference_mode(False), torch.no_grad():
            # Reparameterised, as for the other contenders.
            model = ffnet.reparameterize(self.model)
            return self._program(model, layout or self.layout, ffnet_kernels.optimize)

    def as_trained(self, layout: str, wrap: Wrap = as_is) -> Program:
        return self._program(copy.deepcopy(self.model), layout, wrap)

    def exportable(self) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
        model = ffnet.reparameterize(copy.deepcopy(self.model).float())
        return model, [(batch.float().contiguous(),) for batch in self.batches]

    def expected(self) -> Tensor:
        layout = "nchw" if self.reference == torch.float64 else "channels_last"
        model = formatted(copy.deepcopy(self.model).to(self.reference), layout)
        return torch.cat([model(laid_out(batch.to(self.reference), layout)) for batch in self.batches]).double()

    def _program(self, model: nn.Module, layout: str, wrap: Wrap) -> Program:
        return Program(wrap(formatted(model, layout)), [(laid_out(batch, layout),) for batch in self.batches], layout)


@dataclass(frozen=True)
class TrainingWork(Work):
    """Forward pass, loss and all gradients of a model in train mode; no optimizer. With ``autocast``, forward pass and
    loss are under it, except in the float64 reference.

    The logits are checked and, with ``gradients``, those of all parameters as one vector, which in float64 needs twice
    the memory of a step.
    """

    model: nn.Module
    batch: Tensor
    layout: str = "channels_last"
    autocast: bool = False
    gradients: bool = True
    inference = False
    limits = 2

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.batch.dtype

    def plain(self, layout: str, wrap: Wrap = as_is) -> Program:
        return self._program(wrap(self._copy(layout)), laid_out(self.batch, layout), layout)

    def fused(self, layout: str | None = None) -> Program:
        program = self.plain(layout or self.layout, ffnet_kernels.optimize)
        program()  # the first step runs the modules, and is not to be checked
        return program

    def expected(self) -> list[Tensor]:
        model, batch = self._copy("nchw").double(), self.batch.double()
        if self.gradients:
            return self._program(model, batch, "nchw").results()
        with torch.no_grad():
            return [model(batch)]

    def _copy(self, layout: str) -> nn.Module:
        return copy.deepcopy(self.model).to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]

    def _program(self, model: Any, batch: Tensor, layout: str) -> Program:
        labels = torch.arange(len(batch), device=batch.device)
        # In the same order for all contenders.
        parameters = [parameter for _, parameter in sorted(model.named_parameters())]

        def step() -> tuple[Tensor, ...]:
            autocast = self.autocast and batch.dtype == torch.float32
            with torch.enable_grad():
                with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
                    logits = model(batch)
                    loss = F.cross_entropy(logits, labels)
                return logits.detach(), *torch.autograd.grad(loss, parameters)

        return Program(step, [()], layout, judged=self._judged)

    def _judged(self, results: tuple[Tensor, ...]) -> list[Tensor]:
        logits, *gradients = results
        return [logits, torch.cat([gradient.flatten() for gradient in gradients])] if self.gradients else [logits]


def build(case: Case) -> Any:
    """The work of a case, the same in every run."""
    if isinstance(case, OperatorCase):
        return _operator_work(case)
    dtype = getattr(torch, case.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = make(case.model)
        if isinstance(case, LayerCase):
            batch = torch.randn(case.batch, *case.shape).to(dtype)
            return ModelWork(ffnet.reparameterize(model.get_submodule(case.path)).to(dtype), [batch])
        model = model.to(dtype)
        # Stochastic depth would drop different blocks in float64 than in float32, and training steps could not be
        # checked.
        for module in model.modules():
            if isinstance(module, DropPath):
                module.rate = 0.0
        batch = torch.randn(case.batch, *case.shape).to(dtype)
    if isinstance(case, TrainingCase):
        return TrainingWork(model.train(), batch, autocast=case.autocast)
    return ModelWork(model, [batch], reference=getattr(torch, case.reference))


def _operator_work(case: OperatorCase) -> OperatorWork:
    generator = torch.Generator().manual_seed(SEED)
    dtype, channels, kernel = getattr(torch, case.dtype), case.channels, case.kernel
    hidden = OPERATORS[case.operator].expansion * channels

    def random(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, generator=generator) / fan_in**0.5).to(dtype)

    def a_map() -> Tensor:
        return random(*case.shape)

    def depthwise(weight: str, bias: str) -> dict[str, Tensor]:
        return {weight: random(channels, 1, kernel, kernel, fan_in=kernel**2), bias: random(channels)}

    arguments: dict[str, Any]
    if case.operator == "depthwise_conv2d":
        arguments = {"x": a_map(), **depthwise("weight", "bias"), "stride": 1, "padding": "same"}
    elif case.operator == "ffnified_attention":
        arguments = {"query": a_map(), **depthwise("key", "key_bias"), **depthwise("value", "value_bias")}
        arguments |= {"scale": None, "residual": a_map()}
    else:
        arguments = {"x": a_map(), **depthwise("weight", "bias")}
        arguments |= {"expand_weight": random(hidden, channels, fan_in=channels), "expand_bias": random(hidden)}
        arguments |= {"project_weight": random(channels, hidden, fan_in=hidden), "project_bias": random(channels)}
        arguments |= {"scale": None, "residual": a_map()}
    arguments["activation"] = case.activation
    return OperatorWork(case.operator, arguments, case.layout, a_map() if case.direction == "backward" else None)


def differentiated(
    function: Callable[..., Tensor], arguments: dict[str, Any] | tuple, incoming: Tensor
) -> tuple[Tensor, Callable[[], tuple[Tensor, ...]]]:
    """The output of a function, and a function that returns the gradients of all tensors among its arguments, in
    order."""
    arguments = mapped(lambda t: t.detach().requires_grad_(), arguments)
    positional, named = ((), arguments) if isinstance(arguments, dict) else (arguments, {})
    leaves = [v for v in (*positional, *named.values()) if isinstance(v, Tensor)]
    with torch.enable_grad():
        output = function(*positional, **named)
    gradient = torch.empty_like(output, requires_grad=False).copy_(incoming)
    return output, lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)


def mapped(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """Applies a function to a tensor, or to all tensors in a dict or tuple of arguments."""
    if isinstance(values, dict):
        return {name: mapped(function, value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(mapped(function, value) for value in values)
    return function(values) if isinstance(values, Tensor) else values


def laid_out(values: Any, layout: str) -> Any:
    """The arguments with maps and filters in a layout."""
    formats = {4: MEMORY_FORMATS[layout], 5: VOXEL_FORMATS[layout]}
    return mapped(lambda t: t.contiguous(memory_format=formats[t.dim()]) if t.dim() in formats else t, values)


def formatted(model: nn.Module, layout: str) -> nn.Module:
    """The model, its filters in a layout."""
    for parameter in model.parameters():
        parameter.data = laid_out(parameter.data, layout)
    return model


def is_filter(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 1


def channels_innermost(weight: Tensor) -> Tensor:
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def too_large_for_onednn(arguments: dict[str, Any]) -> bool:
    """Whether oneDNN would compile code for minutes before running the call."""
    return any(
        is_filter(v) and v.element_size() == 2 and v[0].numel() > MOST_TAPS_IN_16_BITS and v.device.type == "cpu"
        for v in arguments.values()
    )


def without_onednn(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with oneDNN turned off."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        enabled = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.set_flags(_enabled=False)
        try:
            return function(*arguments, **keywords)
        finally:
            torch.backends.mkldnn.set_flags(_enabled=enabled)

    return run
