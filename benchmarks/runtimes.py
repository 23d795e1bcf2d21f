"""ONNX Runtime and OpenVINO as contenders, where they are installed: ``pip install '.[peers]'``.

Both get contiguous NCHW maps, for which they were faster than behind a transposition from channels-last, and write into
tensors that are there already. Their threads spin after a call, as by default; the runner waits for them.
"""

from __future__ import annotations

import functools
import importlib
import io
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .programs import CpuWork, Program, Unsupported

OPSET = 20  # the first with Gelu


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime, all graph optimisations, float32."""

    name: str = "onnxruntime"

    def unavailable(self) -> str | None:
        return _why_missing("onnx") or _why_missing("onnxruntime")

    def prepare(self, work: CpuWork) -> Program:
        if work.dtype != torch.float32:
            raise Unsupported("its CPU provider has no 16-bit convolution")
        module, inputs = work.exportable()
        return Program(_onnx_session(module, inputs[0]), inputs, "nchw", hoards=True)


@dataclass(frozen=True)
class OpenVino:
    """OpenVINO's CPU plugin, its precision hint that of the work, one stream over all threads."""

    name: str = "openvino"

    def unavailable(self) -> str | None:
        return _why_missing("openvino")

    def prepare(self, work: CpuWork) -> Program:
        module, inputs = work.exportable()
        narrow = [tuple(one.to(work.dtype) for one in maps) for maps in inputs]
        return Program(_openvino_request(module, inputs[0], work.dtype), narrow, "nchw", hoards=True)


@functools.cache
def _why_missing(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not installed (pip install {module}): {error}"
    return None


def _onnx_session(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    import numpy
    import onnxruntime

    names, file = [f"map{i}" for i in range(len(example))], io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's opinion of itself
        torch.onnx.export(
            module.eval(), example, file,  # type: ignore[arg-type]
            dynamo=False, opset_version=OPSET, input_names=names, output_names=["out"],
        )  # fmt: skip
        shape = tuple(module(*example).shape)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    binding, out = session.io_binding(), torch.empty(shape)
    binding.bind_output("out", "cpu", 0, numpy.float32, shape, out.data_ptr())
    bound: list[tuple[Tensor, ...]] = []

    def run(*maps: Tensor) -> Tensor:
        if not bound or any(a is not b for a, b in zip(bound[0], maps, strict=True)):
            for name, one in zip(names, maps, strict=True):
                binding.bind_input(name, "cpu", 0, numpy.float32, tuple(one.shape), one.data_ptr())
            bound[:] = [maps]
        session.run_with_iobinding(binding)
        return out

    return run


def _openvino_request(module: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype) -> Any:
    import openvino
    from openvino.preprocess import PrePostProcessor

    logging.getLogger("openvino").setLevel(logging.ERROR)
    hint = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype)
    if hint is None:
        raise Unsupported(f"computes in float32 or bfloat16 here, not in {dtype}")
    element = getattr(openvino.Type, hint)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(
            module.eval(), example_input=example, input=[openvino.PartialShape(list(one.shape)) for one in example]
        )
        shape = module(*example).shape
    processor = PrePostProcessor(model)  # maps in the dtype of the work, as everybody else has them
    for i in range(len(example)):
        processor.input(i).tensor().set_element_type(element)
    processor.output().tensor().set_element_type(element)
    compiled = _openvino_core().compile_model(
        processor.build(),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": hint,
            "ENABLE_CPU_PINNING": False,  # it binds this thread to a core, which threads of others inherit
        },
    )
    request, out = compiled.create_infer_request(), torch.empty(shape, dtype=dtype)

    def shared(x: Tensor) -> Any:
        words = x.view(torch.int16) if dtype == torch.bfloat16 else x  # numpy has no bfloat16
        return openvino.Tensor(words.numpy(), openvino.Shape(list(x.shape)), element)

    request.set_output_tensor(shared(out))
    bound: list[tuple[Tensor, ...]] = []

    def run(*maps: Tensor) -> Tensor:
        if not bound or any(a is not b for a, b in zip(bound[0], maps, strict=True)):
            for i, one in enumerate(maps):
                request.set_input_tensor(i, shared(one))
            bound[:] = [maps]
        request.infer()
        return out

    return run


@functools.cache
def _openvino_core() -> Any:
    import openvino

    return openvino.Core()
