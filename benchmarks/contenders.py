"""The contenders that compute a work: ours and the baselines. To add one, add a `Contender` to `CONTENDERS`."""

from __future__ import annotations

import functools
import importlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

# Its parts are looked up where they are used, as `run --base` imports this module beside older packages.
import ffnet_kernels

from .results import OURS
from .work import OperatorWork, Program, Unsupported, Work, channels_innermost, is_filter

BACKENDS = ("cuda", "triton")
EAGER_NCHW, EAGER, CUDNN_NCHW, CUDNN, COMPILED, COPY = (
    "eager nchw", "eager channels-last", "cudnn nchw", "cudnn channels-last", "torch.compile channels-last", "copy",
)  # fmt: skip
OPSET = 20  # the first of ONNX with Gelu
#: The options of torch.compile(mode="max-autotune") without CUDA graphs, which would copy the inputs in every call.
MAX_AUTOTUNE = {"max_autotune": True, "coordinate_descent_tuning": True}


def is_ours(contender: str) -> bool:
    return contender == OURS or contender.split()[0] in BACKENDS


@dataclass(frozen=True)
class Contender:
    """One way to compute a work, with a unique name. ``layout``: that of its maps; by default the work's."""

    name: str
    layout: str | None = None

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None."""
        return None

    def prepare(self, work: Any) -> Program:
        """Does everything that is not timed: layout, weights, compilation."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ours(Contender):
    """ffnet_kernels, with backend selection."""

    name: str = OURS

    def prepare(self, work: Work) -> Program:
        return work.fused(self.layout)


@dataclass(frozen=True)
class Eager(Contender):
    """Plain PyTorch operators in eager mode; models are reparameterised."""

    def prepare(self, work: Work) -> Program:
        return work.plain(self.layout or work.layout)


@dataclass(frozen=True)
class AsTrained(Contender):
    """The training-time module tree in eval mode, with branches and batch norms run one by one."""

    name: str = "as trained"

    def prepare(self, work: Work) -> Program:
        return work.as_trained("channels_last")


@dataclass(frozen=True)
class TorchCompile(Contender):
    """What `Eager` runs, through torch.compile, with maps in the layout of the case.

    Attributes:
        arguments: of torch.compile.
        device: that it compiles for.
        gradients: whether it also takes part in work with gradients.
    """

    name: str = "torch.compile"
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    device: str = "cpu"
    gradients: bool = False

    def unavailable(self) -> str | None:
        return _why_compile_fails(self.device)

    def prepare(self, work: Work) -> Program:
        if not (work.inference or self.gradients):
            raise Unsupported("only forward passes are compiled here")
        # Without a reset, the compiler would generalise over the many shapes of a run, and give up after a few.
        torch._dynamo.reset()
        return work.plain(work.layout, functools.partial(torch.compile, dynamic=False, **self.arguments))


@functools.cache
def _why_compile_fails(device: str) -> str | None:
    """Compiles something tiny, as that is the only way to find out whether a compiler works."""
    x = torch.ones(8, device=device)
    try:
        compiled = torch.compile(lambda x: torch.relu(x) + 1, dynamic=False)
        right = torch.equal(compiled(x), x + 1)
    except Exception as error:  # the compiler stack may raise anything
        return f"does not compile on this machine: {first_line(error)}"
    finally:
        torch._dynamo.reset()
    return None if right else "compiles wrong code on this machine"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if there is none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


@functools.cache
def _why_missing(module: str, package: str = "") -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not installed (pip install {package or module}): {error}"
    return None


# ONNX Runtime and OpenVINO get contiguous NCHW maps, for which they were faster than after a transposition from
# channels-last, and write into preallocated tensors. By default their threads spin after a call; the runner waits for
# them.


@dataclass(frozen=True)
class OnnxRuntime(Contender):
    """ONNX Runtime with all graph optimisations, float32."""

    name: str = "onnxruntime"

    def unavailable(self) -> str | None:
        return _why_missing("onnx") or _why_missing("onnxruntime")

    def prepare(self, work: Work) -> Program:
        if work.dtype != torch.float32:
            raise Unsupported("its CPU provider has no 16-bit convolution")
        module, inputs = work.exportable()
        return Program(_onnx_session(module, inputs[0]), inputs, "nchw", hoards=True)


@dataclass(frozen=True)
class OpenVino(Contender):
    """OpenVINO's CPU plugin with the precision of the work as hint, one stream over all threads."""

    name: str = "openvino"

    def unavailable(self) -> str | None:
        return _why_missing("openvino")

    def prepare(self, work: Work) -> Program:
        module, inputs = work.exportable()
        narrow = [tuple(one.to(work.dtype) for one in maps) for maps in inputs]
        return Program(_openvino_request(module, inputs[0], work.dtype), narrow, "nchw", hoards=True)


def _bound(bind: Callable[[int, Tensor], object], run: Callable[[], object], out: Tensor) -> Callable[..., Tensor]:
    """A function that binds maps if they differ from the previous call's, then runs."""
    bound: list[tuple[Tensor, ...]] = []

    def call(*maps: Tensor) -> Tensor:
        if not bound or any(a is not b for a, b in zip(bound[0], maps, strict=True)):
            for i, one in enumerate(maps):
                bind(i, one)
            bound[:] = [maps]
        run()
        return out

    return call


def _onnx_session(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    import numpy
    import onnxruntime

    names, file = [f"map{i}" for i in range(len(example))], io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about itself
        torch.onnx.export(
            module.eval(), example, file,  # type: ignore[arg-type]
            dynamo=False, opset_version=OPSET, input_names=names, output_names=["out"],
        )  # fmt: skip
        out = torch.empty(tuple(module(*example).shape))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_output("out", "cpu", 0, numpy.float32, tuple(out.shape), out.data_ptr())

    def bind(i: int, one: Tensor) -> None:
        binding.bind_input(names[i], "cpu", 0, numpy.float32, tuple(one.shape), one.data_ptr())

    return _bound(bind, lambda: session.run_with_iobinding(binding), out)


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
        shapes = [openvino.PartialShape(list(one.shape)) for one in example]
        model = openvino.convert_model(module.eval(), example_input=example, input=shapes)
        out = torch.empty(module(*example).shape, dtype=dtype)
    processor = PrePostProcessor(model)  # maps in the dtype of the work, as for the others
    for i in range(len(example)):
        processor.input(i).tensor().set_element_type(element)
    processor.output().tensor().set_element_type(element)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": hint,
        "ENABLE_CPU_PINNING": False,  # it would pin this thread to a core, which other contenders' threads inherit
    }
    request = _openvino_core().compile_model(processor.build(), "CPU", settings).create_infer_request()

    def shared(x: Tensor) -> Any:
        words = x.view(torch.int16) if dtype == torch.bfloat16 else x  # numpy has no bfloat16
        return openvino.Tensor(words.numpy(), openvino.Shape(list(x.shape)), element)

    request.set_output_tensor(shared(out))
    return _bound(lambda i, one: request.set_input_tensor(i, shared(one)), request.infer, out)


@functools.cache
def _openvino_core() -> Any:
    import openvino

    return openvino.Core()


#: All contenders on the CPU by name. The frozen form (constant, prepacked weights) takes longest to compile.
CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Ours(),
        Eager(EAGER_NCHW, "nchw"),
        Eager(EAGER, "channels_last"),
        TorchCompile(),
        TorchCompile("torch.compile frozen", arguments={"options": {"freezing": True}}),
        TorchCompile("torch.compile max-autotune", arguments={"options": {"max_autotune": True, "freezing": True}}),
        OnnxRuntime(),
        OpenVino(),
    )
}
#: The default contenders, if installed; those that compile for longer than they are measured have to be asked for
#: (``--baselines``).
DEFAULT_CONTENDERS = (OURS, EAGER_NCHW, EAGER, "torch.compile", "onnxruntime", "openvino")


# Operators on a GPU: each of our backends, and their baselines.


@dataclass(frozen=True)
class OnBackend(Contender):
    """An operator on a given backend's kernels. In a forward pass filters have their channels innermost, as `optimize`
    stores them; otherwise they are laid out like trained parameters."""

    backend: str = ""

    def unavailable(self) -> str | None:
        return ffnet_kernels.backends.choice.why_unavailable(self.backend)

    def prepare(self, work: OperatorWork) -> Program:
        layout = self.layout or work.layout
        args = work.checked(layout)
        if work.inference and layout == "channels_last":
            args = tuple(channels_innermost(a) if is_filter(a) else a for a in args)
        detail = ffnet_kernels.backends.choice.BACKENDS[self.backend].describe(work.operator, args)
        function = functools.partial(ffnet_kernels.ops.OPERATORS[work.operator].on, self.backend)
        return work.program(function, args, layout, detail)


@dataclass(frozen=True)
class Cudnn(Contender):
    """Like `Eager`, but with depthwise convolutions by cuDNN where PyTorch would use a kernel of its own."""

    def unavailable(self) -> str | None:
        return None if torch.backends.cudnn.is_available() else "there is no cuDNN"

    def prepare(self, work: OperatorWork) -> Program:
        def by_cudnn(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(*args: Any) -> Tensor:
                with mock.patch.object(ffnet_kernels.backends.reference, "convolve", _cudnn_convolve):
                    return function(*args)

            return run

        return work.plain(self.layout or work.layout, by_cudnn)

    def differs(self, work: OperatorWork) -> bool:
        """Whether PyTorch would not use cuDNN by itself for the operator's depthwise convolution."""
        if self.unavailable() or not work.inference or work.operator == "channel_mixer":
            return False
        x, weight = work.checked(self.layout or work.layout)[:2]
        pads = [(side - 1) // 2 for side in weight.shape[2:]]
        options = ([1, 1], pads, [1, 1], False, [0, 0], x.shape[1])
        return torch._C._select_conv_backend(x, weight, None, *options) != torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]


def _cudnn_convolve(x, weight, bias, stride, padding) -> Tensor:
    """Like `reference.convolve`, for symmetric padding."""
    top, _, left, _ = padding
    out = torch.cudnn_convolution(
        x, weight, (top, left), tuple(stride), (1, 1), x.shape[1], benchmark=True, deterministic=False, allow_tf32=False
    )
    return out if bias is None else out + bias[:, None, None]


@dataclass(frozen=True)
class SubquadraticOps(Contender):
    """Depthwise convolution by fast Fourier transform, by NVIDIA's subquadratic-ops, if installed.

    Its ``fft_conv2d(x, kernel)`` takes a kernel of the map's size [C, H, W] and returns H×W of their linear
    convolution, from (H // 2, W // 2) on, according to the tests of its version 0.1. So the filter is flipped and
    placed in a kernel of zeros where that crop makes it the cross-correlation of layers. Bias and activation follow, as
    in `Eager`.
    """

    name: str = "subquadratic-ops nchw"

    def takes(self, work: OperatorWork) -> bool:
        """Whether it can compute the work: one filter that fits into the map at its place, in float32 or float64."""
        if work.operator != "depthwise_conv2d" or work.dtype not in (torch.float32, torch.float64):
            return False
        x, weight, _, stride, padding, _ = work.checked("nchw")
        places = zip(x.shape[2:], weight.shape[2:], self._last(x, padding), strict=True)
        fits = all(taps - 1 <= last < side for side, taps, last in places)
        return work.inference and fits and tuple(stride) == (1, 1) and weight.shape[0] == x.shape[1]

    def unavailable(self) -> str | None:
        return _why_missing("subquadratic_ops_torch.fft_conv2d", "subquadratic-ops-torch-cu13")

    def prepare(self, work: OperatorWork) -> Program:
        convolve = importlib.import_module("subquadratic_ops_torch.fft_conv2d").fft_conv2d
        x, weight, bias, _, padding, activation = work.checked("nchw")
        (kh, kw), (bottom, right) = weight.shape[2:], self._last(x, padding)
        kernel = x.new_zeros(x.shape[1:])
        kernel[:, bottom - kh + 1 : bottom + 1, right - kw + 1 : right + 1] = weight[:, 0].flip(1, 2)

        def run(x: Tensor) -> Tensor:
            out = convolve(x, kernel)
            out = out if bias is None else out + bias[:, None, None]
            return ffnet_kernels.backends.activations.ACTIVATE[activation](out)

        return Program(run, [(x,)], "nchw")

    @staticmethod
    def _last(x: Tensor, padding: Any) -> tuple[int, int]:
        """The row and column in the kernel of the flipped filter's last element, its first tap."""
        top, _, left, _ = padding
        return x.shape[2] // 2 + top, x.shape[3] // 2 + left


@dataclass(frozen=True)
class Copy(Contender):
    """A plain copy that reads and writes as many bytes: the floor. It computes nothing, and is not checked."""

    name: str = COPY
    bytes: int = 0
    device: torch.device | str = "cpu"

    def prepare(self, work: Any) -> Program:
        source = torch.empty(self.bytes // 2, dtype=torch.uint8, device=self.device).random_()
        return Program(torch.empty_like(source).copy_, [(source,)], "")


def on_gpu(work: OperatorWork, device: torch.device) -> list[Contender]:
    """The contenders of an operator on a GPU: each of our backends, and the baselines that can compute it."""
    both = [Eager(EAGER_NCHW, "nchw"), Eager(EAGER, "channels_last")]
    compiled = TorchCompile(COMPILED, arguments={"options": MAX_AUTOTUNE}, device=device.type, gradients=True)
    layouts = {"nchw": "nchw", "channels-last": "channels_last"}
    ours = [OnBackend(f"{backend} {name}", layouts[name], backend) for backend in BACKENDS for name in layouts]
    cudnn, fourier = [Cudnn(CUDNN_NCHW, "nchw"), Cudnn(CUDNN, "channels_last")], SubquadraticOps()
    return [
        *(one for one in ours if one.unavailable() is None), *both, *(one for one in cudnn if one.differs(work)),
        compiled, *([fourier] if fourier.takes(work) else []),
    ]  # fmt: skip
