"""Work with gradients: the backward pass of an operator, and a training step of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffnet_kernels
from ffnet_kernels.selftest import error_limit

from . import reference
from .programs import MEMORY_FORMATS, Program, Unsupported, laid_out, too_large_for_onednn, without_onednn

NO_BACKWARD_PASS = "only forward passes are run with it"


@dataclass(frozen=True)
class BackwardWork:
    """The gradients of all tensors of an operator's call. The forward pass is made once, ahead, and not timed.

    Attributes:
        arguments: of the operator's public function, contiguous; filters lie as parameters that are trained.
        incoming: the gradient of the result.
    """

    operator: str
    arguments: dict[str, Any]
    incoming: Tensor
    layout: str = "channels_last"
    inference = False

    @property
    def dtype(self) -> torch.dtype:
        return self.incoming.dtype

    def plain(self, layout: str) -> Program:
        return self._program(self._reference, laid_out(self.arguments, layout), layout)

    def fused(self) -> Program:
        function = getattr(ffnet_kernels, self.operator)
        return self._program(function, laid_out(self.arguments, self.layout), self.layout)

    def as_trained(self, layout: str) -> Program:
        raise Unsupported("an operator has no training-time form")

    def exportable(self) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
        raise Unsupported(NO_BACKWARD_PASS)

    def expected(self) -> list[Tensor]:
        double = {name: v.double() if isinstance(v, Tensor) else v for name, v in self.arguments.items()}
        return list(self._program(self._reference, double, "nchw")())

    def error_limit(self, expected: Tensor, eager: Tensor) -> float:
        return error_limit(expected, eager)

    def _reference(self, **arguments: Any) -> Tensor:
        return reference.function(self.operator)(*reference.checked(self.operator, arguments))

    def _program(self, function: Callable[..., Tensor], arguments: dict[str, Any], layout: str) -> Program:
        slow = too_large_for_onednn(arguments)
        arguments = {n: v.detach().requires_grad_() if isinstance(v, Tensor) else v for n, v in arguments.items()}
        leaves = [v for v in arguments.values() if isinstance(v, Tensor)]
        output = (without_onednn(function) if slow else function)(**arguments)
        incoming = torch.empty_like(output, requires_grad=False).copy_(self.incoming)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, leaves, incoming, retain_graph=True)

        if slow:
            return Program(without_onednn(backward), [()], layout, "without oneDNN", list)
        return Program(backward, [()], layout, judged=list)


@dataclass(frozen=True)
class TrainingWork:
    """Forward pass, loss and all gradients of a model in train mode; no optimizer. With ``autocast``, forward pass and
    loss are under it, but not what is compared with, in float64.

    The logits are judged, and the gradients of all parameters as one vector.
    """

    model: nn.Module
    batch: Tensor
    layout: str = "channels_last"
    autocast: bool = False
    inference = False

    @property
    def dtype(self) -> torch.dtype:
        return self.batch.dtype

    def plain(self, layout: str) -> Program:
        return self._program(self._copy(layout), self.batch, layout)

    def fused(self) -> Program:
        program = self._program(ffnet_kernels.optimize(self._copy(self.layout)), self.batch, self.layout)
        program()  # its first step runs the modules, and is not what is judged
        return program

    def as_trained(self, layout: str) -> Program:
        return self.plain(layout)

    def exportable(self) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
        raise Unsupported(NO_BACKWARD_PASS)

    def expected(self) -> list[Tensor]:
        return self._program(self._copy("nchw").double(), self.batch.double(), "nchw").results()

    def error_limit(self, expected: Tensor, eager: Tensor) -> float:
        return 2 * error_limit(expected, eager)  # as for models in eval mode

    def _copy(self, layout: str) -> nn.Module:
        return copy.deepcopy(self.model).to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]

    def _program(self, model: nn.Module, batch: Tensor, layout: str) -> Program:
        batch = batch.contiguous(memory_format=MEMORY_FORMATS[layout])
        labels = torch.arange(len(batch))
        parameters = [parameter for _, parameter in sorted(model.named_parameters())]  # in one order for everybody

        def step() -> tuple[Tensor, ...]:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast and batch.dtype == torch.float32):
                logits = model(batch)
                loss = F.cross_entropy(logits, labels)
            return logits.detach(), *torch.autograd.grad(loss, parameters)

        return Program(step, [()], layout, judged=_logits_and_gradients)


def _logits_and_gradients(results: tuple[Tensor, ...]) -> list[Tensor]:
    logits, *gradients = results
    return [logits, torch.cat([gradient.flatten() for gradient in gradients])]
