"""The Triton backend around its kernels: where it is available, what it says, what torch sees of it."""

import inspect
import math
import os
import sys
import threading

import numpy as np
import parity
import patience
import pytest
import torch
import triton_cases
from examples import example
from test_bad_input import CASES as BAD

import ffnet_kernels as fk
from ffnet_kernels.backends import triton
from ffnet_kernels.backends.activations import ACTIVATIONS
from ffnet_kernels.backends.triton import interpreter
from ffnet_kernels.backends.triton.launch import recording

interpreted = triton_cases.needs_interpreter
every_operator = pytest.mark.parametrize("operator", parity.OPERATORS)
TINY = {"shape": (1, 3, 3, 4), "kernel": (3, 3)}


def run(code: str, **environment: str | None) -> list[str]:
    """The lines that a process of its own prints; a variable that is None is not set."""
    merged = {**os.environ, "FFNET_KERNELS_BACKEND": "", **environment}
    environment = {name: value for name, value in merged.items() if value is not None}
    process = patience.run([sys.executable, "-c", code], env=environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


USE = """
import torch, ffnet_kernels as fk
x, w = torch.randn(1, 4, 6, 5), torch.randn(4, 1, 3, 3)
fk.depthwise_conv2d(x, w)
print("triton" in fk.available_backends(), fk.info()["backends"]["triton"])
print(fk.explain("depthwise_conv2d", x, w).refused["triton"])
try:
    fk.use_backend("triton").__enter__()
except fk.BackendError as error:
    print(error)
"""


def assert_unavailable(lines: list[str], reason: str):
    available, refused, error = lines
    assert available == f"False unavailable: {reason}"
    assert refused == reason
    assert error == f"backend 'triton' is not available: {reason}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@interpreted
def test_without_a_gpu_the_reason_says_how_to_interpret():
    how = "TRITON_INTERPRET=1 in the environment runs the kernels on CPU tensors, slowly, for tests"
    assert_unavailable(run(USE, TRITON_INTERPRET=None), f"there is no GPU; {how}")


def test_without_triton():
    code = f"import sys\nsys.modules['triton'] = None\n{USE}"
    assert_unavailable(run(code), "Triton is not installed; 3.5 or newer is needed")


@interpreted
def test_with_an_old_triton():
    patch = "import importlib.metadata\nimportlib.metadata.version = lambda name: '3.4.0'\n"
    assert_unavailable(run(patch + USE), "Triton 3.4.0 is installed; 3.5 or newer is needed")


@interpreted
@pytest.mark.parametrize(
    ("version", "enough"),
    [
        ("2.3.1", False),
        ("3.4", False),
        ("3.4.0+git1a2b", False),
        ("3.5.0", True),
        ("3.10.1+git1a2b", True),
        ("4.0", True),
    ],
)
def test_which_triton_is_enough(monkeypatch, version, enough):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert (inspect.unwrap(triton.unavailable)() is None) is enough


@interpreted
def test_where_triton_does_not_import_plain_pytorch_runs(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libcuda.so.1 is missing')")
    code = """
import logging; logging.basicConfig()
import torch, ffnet_kernels as fk
x, w = torch.randn(1, 4, 6, 5, requires_grad=True), torch.randn(4, 1, 3, 3)
with fk.use_backend("triton"):
    out = fk.depthwise_conv2d(x, w, activation="gelu")
    print(fk.explain("depthwise_conv2d", x, w).variant)
    grad = torch.autograd.grad(out.sum(), x)[0]
with fk.use_backend("reference"):
    expected = fk.depthwise_conv2d(x, w, activation="gelu")
print(torch.equal(out, expected), torch.equal(grad, torch.autograd.grad(expected.sum(), x)[0]))
"""
    assert run(code, PYTHONPATH=str(tmp_path)) == ["Triton does not import; plain PyTorch operators", "True True"]


def test_triton_is_imported_by_its_first_call():
    code = """
import sys
import torch, ffnet_kernels as fk
x, w = torch.randn(1, 4, 6, 5), torch.randn(4, 1, 3, 3)
fk.depthwise_conv2d(x, w)
fk.info(), fk.available_backends(), fk.explain("depthwise_conv2d", x, w)
print("triton" in sys.modules)
"""
    assert run(code) == ["False"]


def test_the_environment_forces_it():
    code = """
import torch, ffnet_kernels as fk
try:
    print(fk.explain("depthwise_conv2d", torch.ones(1, 4, 6, 5), torch.ones(4, 1, 3, 3)).backend)
except fk.BackendError as error:
    print(error)
"""
    (line,) = run(code, FFNET_KERNELS_BACKEND="triton")
    reason = triton.unavailable()
    assert line == ("triton" if reason is None else f"backend 'triton' is not available: {reason}")


KERNELS = {
    "depthwise_conv2d": "depthwise_conv2d_forward_kernel",
    "ffnified_attention": "ffnified_attention_forward_kernel",
    "channel_mixer": "pointwise_forward_kernel",
}


@interpreted
@every_operator
def test_explain_names_the_kernel_and_its_tile(operator):
    case = example(operator)
    automatic = fk.explain(operator, *case.args, **case.kwargs)
    assert automatic.refused["triton"] == "interpreted on the CPU, for tests"
    with fk.use_backend("triton"):
        decision = fk.explain(operator, *case.args, **case.kwargs)
    assert decision.backend == "triton"
    assert KERNELS[operator] in decision.variant
    assert "BLOCK_" in decision.variant
    assert "warps" in decision.variant
    assert str(decision).startswith(f"{operator} -> triton ({decision.variant})")


@interpreted
def test_explain_tells_the_paths_apart():
    """Filters that are fused and that are not; a hidden map on chip and in memory."""

    def kernels(operator, **options):
        case = example(operator, **options)
        with fk.use_backend("triton"):
            variant = fk.explain(operator, *case.args, **case.kwargs).variant
        return [kernel for kernel in (part.split(" ")[0] for part in variant.split("; ")) if kernel.endswith("_kernel")]

    two = ["depthwise_conv2d_forward_kernel"] * 2
    assert kernels("ffnified_attention") == ["ffnified_attention_forward_kernel"]
    assert kernels("ffnified_attention", value_kernel=(5, 5)) == two
    assert kernels("ffnified_attention", kernel=(9, 9)) == two
    assert kernels("channel_mixer") == [two[0], *["pointwise_forward_kernel"] * 2]
    assert kernels("channel_mixer", dtype=torch.float16) == [two[0], "channel_mixer_forward_kernel"]


@interpreted
def test_explain_in_one_thread_lets_the_kernels_of_another_run():
    """It records launches in place of running them: only its own."""
    case = example("depthwise_conv2d", **TINY)
    expected, out = case.run(), []

    @fk.use_backend("triton")
    def compute():
        out.append(case.run())

    with recording():
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    torch.testing.assert_close(out[0], expected)


@pytest.mark.long
@interpreted
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("new", [False, True], ids=["old flag", "new flag"])
def test_precision_of_products_follows_torch(new, precision):
    """A program may use torch's newer flag, after which torch refuses to read the older."""
    flag = f"conv.fp32_precision = {precision!r}" if new else f"allow_tf32 = {precision == 'tf32'}"
    code = f"""
import torch, ffnet_kernels as fk
from ffnet_kernels.backends.triton.launch import recording
torch.backends.cudnn.{flag}
x, w, matrix = torch.ones(1, 4, 3, 3), torch.ones(4, 1, 3, 3), torch.ones(4, 4)
with fk.use_backend("triton"), recording() as launches:
    fk.channel_mixer(x, w, None, matrix, None, matrix, None)
print(*(started.arguments["PRECISION"] for started in launches if "PRECISION" in started.arguments))
"""
    assert run(code) == [f"{precision} {precision}"]


@interpreted
@every_operator
def test_what_it_does_not_take(operator):
    with fk.use_backend("triton"):
        with pytest.raises(fk.BackendError, match=r"takes float32, bfloat16 and float16, got torch\.float64"):
            example(operator, dtype=torch.float64, **TINY).run()
        case = example(operator, **TINY)
        meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in case.args]
        with pytest.raises(fk.BackendError, match="takes GPU tensors, got meta"):
            getattr(fk, operator)(*meta)
        with pytest.raises(fk.BackendError, match="no forward-mode derivative"):
            torch.func.grad(lambda x: getattr(fk, operator)(x, *case.args[1:]).sum())(case.args[0])


@interpreted
@pytest.mark.parametrize(("function", "good", "name", "value", "error", "message"), BAD)
def test_bad_input_raises_what_it_raises_anywhere(function, good, name, value, error, message):
    with fk.use_backend("triton"), pytest.raises(error, match=message) as raised:
        function(**{**good, name: value})
    assert raised.type is error


def module_of(operator):
    torch.manual_seed(0)
    made = {
        "depthwise_conv2d": lambda: fk.DepthwiseConv2d(5, 3, stride=2, multiplier=2, activation="gelu"),
        "ffnified_attention": lambda: fk.FFNifiedAttention(5, 3, layer_scale=0.5),
        "channel_mixer": lambda: fk.ChannelMixer(5, 3, layer_scale=0.5),
    }
    return made[operator]()


@interpreted
@every_operator
def test_compiled_modules(operator):
    """One graph around the operator, which is in it as it is; the results and gradients of the eager module."""
    module, x = module_of(operator), torch.randn(2, 5, 4, 6, requires_grad=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    inputs = (x,) if operator == "depthwise_conv2d" else (x, x)
    with fk.use_backend("triton"):
        expected = module(*inputs)
        torch._dynamo.reset()
        out = torch.compile(module, fullgraph=True, backend=backend)(*inputs)
    assert [f"ffnet_kernels_triton.{operator}.default" in graph for graph in graphs] == [True]
    assert torch.equal(out, expected)
    grad = torch.randn(out.shape)
    tensors = [x, *module.parameters()]
    for ours, eager in zip(*(torch.autograd.grad(o, tensors, grad) for o in (out, expected)), strict=True):
        assert torch.equal(ours, eager)


@interpreted
@every_operator
def test_opcheck(operator):
    args = example(operator, layout="channels_last", **TINY).checked()
    args = tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
    namespace = torch.ops.ffnet_kernels_triton
    forward, backward = (getattr(namespace, name).default for name in (operator, f"{operator}_backward"))
    torch.library.opcheck(forward, args)
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    grad = torch.randn(forward(*args).shape, generator=torch.Generator().manual_seed(1))
    mask = [True] * len(parity.OPERATORS_BY_NAME[operator].tensors)
    torch.library.opcheck(backward, (grad, *args, mask))


def gradients(case, backend, grad):
    """Of every tensor, by autograd."""
    tensors = [t.requires_grad_() for t in case.tensors()]
    with fk.use_backend(backend):
        return torch.autograd.grad(case.run(), tensors, grad)


@interpreted
@every_operator
def test_same_bits_in_every_run_and_arguments_stay(operator):
    case = example(operator, shape=(2, 9, 5, 9), kernel=(3, 3))
    before = [t.clone() for t in case.tensors()]
    with fk.use_backend("triton"):
        first = case.run()
        assert torch.equal(first, case.run())
    grad = torch.randn_like(first)
    runs = [gradients(case, "triton", grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, case.tensors(), strict=True))


@interpreted
@every_operator
def test_autograd_gives_what_the_backward_operator_gives(operator):
    case = example(operator, **TINY)
    args = case.checked()
    grad = torch.randn(parity.reference_of(operator, args)[1].shape)
    mask = [True] * len(parity.OPERATORS_BY_NAME[operator].tensors)
    direct = parity.backward_of("triton", operator)(grad, *args, mask)
    for a, b in zip(gradients(case, "triton", grad), direct, strict=True):
        assert torch.equal(a, b.reshape(a.shape))


@interpreted
@every_operator
def test_second_derivatives(operator):
    args = example(operator, **TINY).checked()

    def penalty(function, args):
        args = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        first = torch.autograd.grad(function(*args).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    reference = fk.ops.OPERATORS[operator].reference
    expected = penalty(reference, [a.double() if isinstance(a, torch.Tensor) else a for a in args])
    eager = penalty(reference, args)
    got = penalty(getattr(torch.ops.ffnet_kernels_triton, operator), args)
    for g, e, f in zip(got, expected, eager, strict=True):
        assert (g.double() - e).abs().max().item() <= parity.error_limit(e, f)


@interpreted
@every_operator
def test_autocast(operator):
    case = example(operator, **TINY)
    with torch.autocast("cpu", torch.bfloat16), fk.use_backend("triton"):
        assert case.run().dtype == torch.bfloat16


@interpreted
@every_operator
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_special_numbers_of_a_map(operator, activation):
    case = example(operator, kernel=(3, 3), activation=activation, shape=(2, 3, 8, 9))
    x = case.args[0]
    x[0, 0, 0, 0], x[0, 1, 4, 5], x[1, 2, 7, 8] = math.nan, math.inf, -math.inf
    expected, _ = parity.reference_of(operator, case.checked())
    assert not parity.kinds(expected).all()
    with fk.use_backend("triton"), parity.poisoned_memory():
        parity.assert_same_kinds(case.run(), expected)


@interpreted
@every_operator
@pytest.mark.parametrize("special", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_special_numbers_of_any_other_tensor(operator, special):
    """Filters in their middle: what a tap that only meets padding gives is not laid down."""
    case = example(operator, shape=(1, 3, 3, 4), kernel=(3, 3), activation="none")
    for tensor in case.tensors()[1:]:
        middle = (0, 0, 1, 1) if tensor.dim() == 4 else (0,) * tensor.dim()
        before, tensor[middle] = tensor[middle].clone(), special
        expected, _ = parity.reference_of(operator, case.checked())
        assert parity.kinds(expected).any()
        with fk.use_backend("triton"), parity.poisoned_memory():
            parity.assert_same_kinds(case.run(), expected)
        tensor[middle] = before


def bits_of_bfloat16(numbers):
    return torch.from_numpy(numbers).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def test_rounding_to_bfloat16():
    """As torch rounds, bit by bit; of every NaN one."""
    random = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    halves = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000  # half way between two of them, and next to it
    special = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-40, 3.4e38, -3.4e38, 3.39e38]
    numbers = np.concatenate(
        [random, *(n.view(np.float32) for n in (halves, halves - 1, halves + 1)), np.array(special, np.float32)]
    )
    number = ~np.isnan(numbers)
    rounded = interpreter.to_bfloat16(numbers)
    assert rounded.dtype == np.uint16
    assert np.array_equal(rounded[number], bits_of_bfloat16(numbers[number]))
    assert np.isnan((rounded[~number].astype(np.uint32) << 16).view(np.float32)).all()


@interpreted
def test_the_interpreter_rounds_so():
    """Through a kernel: a 1×1 filter of one copies bfloat16, one of 1 + 2⁻⁷ rounds."""
    x = torch.randn(1, 16, 4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for value in (1.0, 1.0078125):
        weight = torch.full((16, 1, 1, 1), value, dtype=torch.bfloat16)
        with fk.use_backend("triton"):
            out = fk.depthwise_conv2d(x, weight)
        assert torch.equal(out, (x.float() * value).bfloat16())
