"""The CUDA backend around its kernels, run on the processor: schedules, NaN and infinities, what torch sees of it."""

import importlib
import math

import cuda_cases
import parity
import pytest
import torch
from cuda_cases import BF16, DTYPES, F16, F32, HALVES, LAST, machine, one_thread  # noqa: F401  (a fixture)
from examples import Mixers, example
from native_build import ROOT

import ffnet_kernels as fk

pytestmark = cuda_cases.needs_host

every_operator = pytest.mark.parametrize("operator", parity.OPERATORS)
SCHEDULES = [("reverse", 0), *(("shuffled", seed) for seed in range(4))]
SPECIAL = (math.nan, math.inf, -math.inf)


def computed(case) -> list[torch.Tensor]:
    """The result and all gradients."""
    args = case.checked()
    with fk.use_backend("cuda"), parity.poisoned_memory():
        out = case.run()
        mask = [args[i] is not None for i in parity.OPERATORS_BY_NAME[case.operator].tensors]
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        return [out, *parity.backward_of("cuda", case.operator)(grad, *args, mask)]


# ---- schedules: the order in which threads run and copies land must not show ----

SCHEDULED = [
    *((operator, {"shape": (17, 2, 9, 8), "kernel": (3, 3)}) for operator in cuda_cases.CONVOLUTIONS),
    *((operator, {"shape": (2, 2, 9, 11), "kernel": (7, 7)}) for operator in cuda_cases.CONVOLUTIONS),
    *((operator, {"shape": (1, 2, 33, 72), "kernel": (5, 5)}) for operator in cuda_cases.CONVOLUTIONS),
    ("depthwise_conv2d", {"shape": (2, 2, 12, 16), "kernel": (9, 11), "stride": 2, "multiplier": 2}),
    ("depthwise_conv2d", {"shape": (2, 6, 12, 10), "kernel": (7, 7), "layout": LAST}),
    ("channel_mixer", {"shape": (2, 40, 9, 8), "kernel": (3, 3), "hidden": 96}),
    ("channel_mixer", {"shape": (2, 128, 5, 9), "kernel": (3, 3), "hidden": 72, "layout": LAST}),
    ("channel_mixer", {"shape": (1, 136, 5, 6), "kernel": (3, 3), "hidden": 40}),
]


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "options"), SCHEDULED)
def test_the_same_bits_in_every_schedule(operator, options, dtype, multiprocessors):
    case = example(operator, **options, dtype=dtype)
    with machine(multiprocessors=multiprocessors):
        expected, again = computed(case), computed(case)
    assert all(e.isfinite().all() for e in expected)
    assert all(map(torch.equal, again, expected))
    for schedule, seed in SCHEDULES:
        with machine(schedule, seed, multiprocessors=multiprocessors):
            assert all(map(torch.equal, computed(case), expected)), f"{schedule}, {seed}"


# ---- splits ----


@pytest.mark.parametrize("resident", [1, 2, 4])
@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize("shape", [(17, 12, 16, 16), (65, 5, 8, 8), (9, 8, 7, 28), (40, 1, 2, 8)])
def test_splits_are_those_that_predictions_take(monkeypatch, shape, multiprocessors, resident):
    """tools/cuda_stall_model.py has the rule of stream.h once more."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    model = importlib.import_module("cuda_stall_model")
    n, channels, rows, columns = shape
    case = example("depthwise_conv2d", shape=shape, kernel=(7, 7), dtype=F16)
    cuda_cases.started_blocks("")
    with machine(multiprocessors=multiprocessors, resident_blocks=resident), fk.use_backend("cuda"):
        case.run()
    panels = -(-n // (2 * (8 // -(-columns // 8))))
    a_split = model.split(panels, channels, rows, 7 + model.START_ROWS, resident, multiprocessors)
    assert cuda_cases.started_blocks("depthwise_stream_kernel") == {len(model.block_panels(panels, channels, a_split))}


# ---- NaN and infinities: nothing is lost, and they spread no further than a window ----


def seen_by_windows(bad: torch.Tensor, above: int, below: int) -> torch.Tensor:
    """The results that read a bad value on tensor cores, if only as a factor of zero.

    A row of a window is a product with a band of 16 columns, the window's 8 and 4 of each neighbour, whose zeros turn
    infinity into NaN; so do the zeros above filters of fewer rows than a kernel is compiled for, 3 or 7.
    """
    width = bad.shape[3]
    rows = torch.nn.functional.pad(bad, (4, -width % 8 + 4, above, below)).to(torch.float32)
    rows = torch.nn.functional.max_pool2d(rows, (1 + above + below, 16), stride=(1, 8))
    return rows.repeat_interleave(8, 3)[..., :width] > 0


def reach(kernel: tuple[int, int]) -> tuple[int, int]:
    """How many rows above and below its own a result reads; see seen_by_windows."""
    height = kernel[0]
    return (height - 1) // 2 + (3 if height <= 3 else 7) - height, height // 2


PLANTED = [((2, 3, 21, 8), (3, 3)), ((2, 3, 21, 24), (7, 7)), ((2, 3, 21, 21), (5, 4)), ((2, 3, 21, 85), (2, 3))]


def planted(operator, shape, kernel, special, dtype=F16):
    """A case with special values in its map, activation none, and where its result is not finite in float64."""
    case = example(operator, shape=shape, kernel=kernel, dtype=dtype, activation="none")
    x = case.args[0]
    x[0, 0, 0, 0] = x[0, 2, 10, shape[3] // 2] = x[1, 2, 20, shape[3] - 1] = special
    expected, _ = parity.reference_of(operator, case.checked())
    bad = ~expected.isfinite()
    assert bad.any()
    assert not bad.all()
    return case, bad


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(("shape", "kernel"), PLANTED)
@pytest.mark.parametrize("operator", cuda_cases.CONVOLUTIONS)
@pytest.mark.parametrize("multiprocessors", [2, 132])
def test_planted_in_the_map_on_tensor_cores(operator, shape, kernel, special, dtype, multiprocessors):
    case, bad = planted(operator, shape, kernel, special, dtype)
    allowed = ~case.args[0].isfinite()
    for _ in range(2 if operator == "ffnified_attention" else 1):
        allowed = seen_by_windows(allowed, *reach(kernel))
    assert allowed[bad].all()
    with machine(multiprocessors=multiprocessors), fk.use_backend("cuda"), parity.poisoned_memory():
        got = ~case.run().isfinite()
    assert got[bad].all()
    assert allowed[got].all()


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(("options", "spreads"), [
    ({"kernel": (9, 9), "dtype": F16}, True),
    ({"kernel": (31, 31), "dtype": F16, "stride": 2}, True),
    ({"kernel": (5, 5), "dtype": F32}, False),
    ({"kernel": (5, 4), "dtype": F16, "layout": LAST}, False),
    ({"kernel": (7, 7), "dtype": BF16, "layout": LAST, "stride": 2}, False),
])  # fmt: skip
def test_planted_in_the_map_of_other_convolutions(options, spreads, special):
    """CUDA cores multiply no value with a zero that is not there; banded filters do, within a channel."""
    case = example("depthwise_conv2d", shape=(2, 4, 21, 40), activation="none", **options)
    case.args[0][0, 1, 10, 20] = special
    bad = ~parity.reference_of(case.operator, case.checked())[0].isfinite()
    with fk.use_backend("cuda"):
        got = ~case.run().isfinite()
    assert got[bad].all()
    channel = torch.zeros_like(bad)
    channel[0, 1] = spreads
    assert (bad | channel)[got].all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("layout", ["nchw", LAST])
@pytest.mark.parametrize("channels", [17, 128, 136])
def test_planted_in_the_map_of_a_channel_mixer(channels, layout, special, dtype):
    """One pixel of the depthwise convolution spreads to all outputs there, and to no other pixel."""
    case = example(
        "channel_mixer", shape=(2, channels, 9, 16), kernel=(1, 1), layout=layout, dtype=dtype, hidden=21
    )  # fmt: skip
    case.args[0][1, 2, 3, 5] = special
    bad = ~parity.reference_of(case.operator, case.checked())[0].isfinite()
    assert bad[1, :, 3, 5].all()
    with fk.use_backend("cuda"):
        got = ~case.run().isfinite()
    assert got[bad].all()
    pixels = ~case.args[0].isfinite()
    if layout == "nchw":  # the depthwise convolution of channels-last maps takes CUDA cores, which spread nothing
        pixels = seen_by_windows(pixels, *reach((1, 1)))
    assert pixels.any(1, keepdim=True).expand_as(got)[got].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", SPECIAL)
@every_operator
def test_planted_in_any_other_tensor(operator, special, dtype):
    """Nothing is lost; a filter's value may spread over its channel, where it meets padding. In float32, since
    conv2d of float64 multiplies padding too.
    """
    case = example(operator, dtype=dtype, activation="none", shape=(2, 5, 9, 11))
    for tensor in case.tensors()[1:]:
        place = tensor.view(-1)[:1]
        before = place.clone()
        place.fill_(special)
        single = (a.float() if isinstance(a, torch.Tensor) else a for a in case.checked())
        bad = ~parity.OPERATORS_BY_NAME[operator].reference(*single).isfinite()
        assert bad.any()
        with fk.use_backend("cuda"):
            got = ~case.run().isfinite()
        assert got[bad].all()
        if operator != "channel_mixer":
            image = slice(0, 1) if tensor.dim() == 4 and tensor.shape[1] > 1 else slice(None)  # the residual
            assert not got[image, 1:].any()
        place.copy_(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("kernel", [(3, 3), (9, 9)])
@every_operator
def test_planted_before_a_backward_pass(operator, kernel, special, dtype):
    """Where a gradient of the reference is not finite, ours is not; other channels of a convolution stay finite."""
    for place in (0, 1):  # the gradient of the result, the map
        case = example(operator, shape=(2, 5, 21, 19), kernel=kernel, dtype=dtype, activation="none")
        args = case.checked()
        grad = torch.randn_like(parity.reference_of(operator, args)[1])
        (grad, args[0])[place][1, 2, 8, 9] = special
        call = (grad, *args, [True] * len(parity.OPERATORS_BY_NAME[operator].tensors))
        expected, _ = parity.reference_of(f"{operator}_backward", call)
        assert not all(e.isfinite().all() for e in expected)
        for exact, got in zip(expected, parity.backward_of("cuda", operator)(*call), strict=True):
            bad = ~exact.isfinite()
            assert (~got.isfinite())[bad].all()
            if operator != "channel_mixer":
                channels = got.movedim(1, 0) if got.shape[0] == 2 else got
                assert channels[[0, 1, 3, 4]].isfinite().all()


# ---- what torch and users see ----


@pytest.mark.parametrize("operator", [parity.OPERATORS_BY_NAME[name] for name in parity.OPERATORS])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("layout", ["nchw", LAST])
@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(operator, layout, batch, dtype):
    args = example(operator.name, shape=(batch, 6, 6, 7), kernel=(3, 3), layout=layout, dtype=dtype).checked()
    args = tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
    forward = getattr(torch.ops.ffnet_kernels_cuda, operator.name).default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    # A traced graph brings gradients in another layout, which another kernel takes; second derivatives are plain sums.
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == F32 else {"atol": 0.01, "rtol": 0.01}
    torch.library.opcheck(forward, args, test_utils=tests, **tolerance)
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    grad = torch.randn_like(forward(*args))
    backward = getattr(torch.ops.ffnet_kernels_cuda, f"{operator.name}_backward").default
    call = (grad, *args, [i % 2 == 0 for i in range(len(operator.tensors))])
    torch.library.opcheck(backward, call, test_utils=tests, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_compiled_model_trains_the_same(dtype, memory_format):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Mixers().to(dtype)
    x = torch.randn(3, 8, 9, 10, dtype=dtype).contiguous(memory_format=memory_format)
    seen = set()

    def keep(graph, inputs):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def step(run):
        model.zero_grad()
        run(x).float().square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    with fk.use_backend("cuda"):
        expected = step(model)
        got = step(torch.compile(model, fullgraph=True, backend=keep))
    assert {target.split(".")[1] for target in seen if "ffnet_kernels_cuda" in target} == set(parity.OPERATORS)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
    torch._dynamo.reset()


@every_operator
def test_it_is_chosen_where_it_is_forced_only(operator):
    case = example(operator)
    decision = fk.explain(operator, *case.args, **case.kwargs)
    assert decision.backend != "cuda"
    assert decision.refused["cuda"] == "run on the processor, for tests"
    cuda_cases.started_kernels()
    case.run()
    assert not cuda_cases.started_kernels()
    with fk.use_backend("cuda"):
        case.run()
    assert cuda_cases.started_kernels()


STREAM, BANDED, CORES = "panels streamed down the planes", "banded filter in shared memory", "CUDA cores"
NAMED = [
    ("depthwise_conv2d", {"dtype": F16}, STREAM, "depthwise_stream_kernel<"),
    ("depthwise_conv2d", {"dtype": BF16, "kernel": (9, 3)}, BANDED, "banded_kernel<"),
    ("depthwise_conv2d", {"dtype": BF16, "stride": 2}, BANDED, "banded_kernel<"),
    ("depthwise_conv2d", {"dtype": F16, "kernel": (33, 3)}, CORES, "direct_kernel<"),
    ("depthwise_conv2d", {"dtype": F16, "layout": LAST}, CORES, "direct_kernel<"),
    ("depthwise_conv2d", {}, CORES, "direct_kernel<"),
    ("ffnified_attention", {"dtype": F16}, "both convolutions in one pass", "attention_forward_kernel<"),
    ("ffnified_attention", {"dtype": F16, "value_kernel": (9, 9)}, "two convolutions", "banded_kernel<"),
    ("ffnified_attention", {}, "two convolutions", "direct_kernel<"),
    ("channel_mixer", {"dtype": F16}, "both 1×1 convolutions in one kernel", "mixer_kernel<"),
    ("channel_mixer", {}, "1×1 convolutions by torch", "elementwise_kernel<"),
    ("channel_mixer", {"dtype": F16, "shape": (1, 130, 4, 5)}, "1×1 convolutions by torch", "elementwise_kernel<"),
]


@pytest.mark.parametrize(("operator", "options", "words", "kernel"), NAMED)
def test_explain_names_the_kernel(operator, options, words, kernel):
    case = example(operator, **options)
    cuda_cases.started_kernels()
    with fk.use_backend("cuda"):
        decision = fk.explain(operator, *case.args, **case.kwargs)
        assert not cuda_cases.started_kernels()
        case.run()
    assert decision.backend == "cuda"
    assert words in decision.variant
    assert any(name.startswith(kernel) for name in cuda_cases.started_kernels())


def test_explain_knows_older_gpus():
    case = example("depthwise_conv2d", dtype=F16)
    with fk.use_backend("cuda"), machine(architecture=75):
        assert CORES in fk.explain(case.operator, *case.args, **case.kwargs).variant


@every_operator
def test_a_call_that_it_does_not_take(operator):
    case = example(operator, dtype=torch.float64)
    message = "backend 'cuda' does not take this call: takes float32, bfloat16 and float16, got torch.float64"
    with fk.use_backend("cuda"), pytest.raises(fk.BackendError, match=message):
        case.run()
    meta = case._replace(args=tuple(a.to("meta") for a in case.args), kwargs={})
    with fk.use_backend("cuda"), pytest.raises(fk.BackendError, match="takes CPU tensors, got meta"):
        meta.run()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_of_every_float16(activation):
    """Of one filter tap that is 1: within a unit in the last place, where rounding alone takes half of one."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(F16)
    x = values[values.abs() < 100].unflatten(0, (-1, 2)).reshape(1, 1, -1, 2)
    weight = torch.ones(1, 1, 1, 1, dtype=F16)
    out = torch.ops.ffnet_kernels_cuda.depthwise_conv2d(x, weight, None, [1, 1], [0, 0, 0, 0], activation).double()
    exact = fk.ops.depthwise_conv2d.reference(x.double(), weight.double(), None, (1, 1), (0, 0, 0, 0), activation)
    unit = torch.finfo(F16).eps * 2.0 ** exact.abs().clamp(min=2.0**-14).log2().floor()
    assert ((out - exact).abs() / unit).max() < 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("padding", [(1, 3, 1, 1), (0, 5, 1, 3), (2, 7, 4, 0), (9, 0, 2, 2), (1, 0, 0, 9)])
def test_padding_of_any_side(padding, kernel, dtype):
    """The operator takes four numbers, of which the public function makes pairs only."""
    case = example("depthwise_conv2d", shape=(3, 2, 6, 8), kernel=(kernel, kernel), dtype=dtype)
    x, weight, bias = case.args
    args = (x, weight, bias, (1, 1), padding, "gelu")
    expected, eager = parity.reference_of("depthwise_conv2d", args)
    out = torch.ops.ffnet_kernels_cuda.depthwise_conv2d(*args)
    assert (out.double() - expected).abs().max() <= parity.limit_of("depthwise_conv2d", args, expected, eager)
    call = (torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype), *args, [True] * 3)
    exact, plain = parity.reference_of("depthwise_conv2d_backward", call)
    for got, e, p in zip(torch.ops.ffnet_kernels_cuda.depthwise_conv2d_backward(*call), exact, plain, strict=True):
        assert (got.double() - e).abs().max() <= parity.error_limit(e, p)


@pytest.mark.parametrize("operator", ["ffnified_attention", "channel_mixer"])
def test_gradients_of_a_layer_scale_as_training_begins_with(operator):
    """Of 1e-5: its products with weights would be what float16 has few digits for."""
    case = example(operator, shape=(2, 16, 9, 8), kernel=(3, 3), dtype=F16)
    case.kwargs["scale"] *= 1e-5
    parity.check_gradients(case, "cuda")


@pytest.mark.parametrize(("kernel", "architecture"), [((7, 7), 75), ((7, 31), 75), ((31, 31), 75), ((7, 31), 90)])
def test_many_channels_of_tiny_maps_share_memory(kernel, architecture):
    """Host execution refuses a block with more shared memory than the smallest GPU has."""
    case = example("depthwise_conv2d", shape=(8, 256, 2, 2), kernel=kernel, dtype=F32)
    with machine(architecture=architecture, multiprocessors=1):
        parity.check(case, "cuda")
        parity.check_gradients(case, "cuda")


MAP, FILTER = torch.ones(1, 3, 8, 8), torch.ones(3, 1, 3, 3)
ONE, SAME, VECTOR = [1, 1], [1, 1, 1, 1], torch.ones(3)
HALF, EXPAND, PROJECT = MAP.half(), torch.ones(5, 3).half(), torch.ones(3, 5).half()
HALF_FILTER, HALF_VECTOR, HALF_LAST = FILTER.half(), VECTOR.half(), HALF.to(memory_format=torch.channels_last)
#: Good calls of the library's own operators, and what of them to replace: (place, value, message).
RAW = {
    "depthwise_conv2d": ((MAP, FILTER, None, ONE, SAME, "none"), [
        (0, MAP.double(), "the map's dtype"), (0, torch.ones(3, 8, 8), "x must have 4"),
        (0, torch.ones(1, 0, 8, 8), "channels"), (1, FILTER.half(), "the map's dtype"),
        (1, FILTER[:2], "filters a channel"),
        (1, torch.ones(3, 1, 11, 11), "smaller than the kernel"), (2, VECTOR[:2], "bias must have 3"),
        (3, [3, 1], "stride"), (4, [1, 1, -1, 1], "padding"), (5, "tanh", "unknown activation"),
        (5, "relu6", "no kernel for the activation"),
    ]),
    "depthwise_conv2d_activation_backward": ((MAP, MAP, FILTER, None, ONE, SAME, "gelu"), [
        (0, MAP[:, :, 1:], "wrong shape"), (0, MAP.half(), "the map's dtype"),
    ]),
    "depthwise_conv2d_dgrad": ((MAP, FILTER, MAP, ONE, SAME), [
        (0, MAP[:, :2], "wrong shape"), (0, MAP.bfloat16(), "the map's dtype"), (3, [2, 2], "wrong shape"),
    ]),
    "depthwise_conv2d_wgrad": ((MAP, MAP, [3, 3], ONE, SAME), [
        (0, MAP[..., 1:], "wrong shape"), (2, [0, 3], "kernel_size"), (2, [3, 5], "wrong shape"),
    ]),
    "depthwise_conv2d_gradients": ((HALF, HALF, HALF_FILTER, None, ONE, SAME, "gelu"), [
        (0, HALF[:, :2], "wrong shape"), (0, MAP, "the map's dtype"), (1, HALF_LAST, "does not take"),
        (2, FILTER, "the map's dtype"), (3, HALF_VECTOR[:2], "bias must have 3"), (4, [2, 2], "wrong shape"),
        (6, "relu6", "no kernel for the activation"),
    ]),
    "ffnified_attention_gradients": ((HALF, HALF, HALF_FILTER, None, HALF_FILTER, None, "gelu", None), [
        (0, HALF[:, :, :7], "wrong shape"), (1, HALF_LAST, "does not take"), (2, HALF_FILTER[:2], "key and value"),
        (3, HALF_VECTOR[:2], "key_bias must have 3"), (7, HALF_VECTOR[:1], "scale must have 3"),
    ]),
    "ffnified_attention": ((MAP, FILTER, None, FILTER, None, "gelu", None, None), [
        (1, FILTER[:2], "key and value"), (3, FILTER.half(), "the map's dtype"), (6, VECTOR[:1], "scale must have 3"),
        (7, MAP[..., :7], "wrong shape"),
    ]),
    "ffnified_attention_value_grads": ((MAP, MAP, FILTER, None, None), [
        (0, MAP[:, :, :7], "wrong shape"), (2, FILTER[:2], "value"), (4, VECTOR.half(), "the map's dtype"),
    ]),
    "channel_mixer_pointwise": ((HALF, EXPAND, None, PROJECT, None, "gelu", None, None, HALF.clone()), [
        (0, MAP, "the map's dtype"), (1, EXPAND[:4], "expand_weight must be"),
        (3, PROJECT[:, :4], "expand_weight must be"), (2, VECTOR.half(), "expand_bias must have 5"),
        (7, HALF[:, :2], "wrong shape"), (8, torch.cat([HALF, HALF]), "wrong shape"), (8, HALF.mT, "does not take"),
    ]),
    "bias_activation_": ((MAP.clone(), None, "gelu"), [
        (0, MAP[..., 1:], "dense"), (1, VECTOR[:2], "bias must have 3"),
    ]),
    "scale_residual_": ((MAP.clone(), None, VECTOR, MAP), [
        (2, VECTOR[:1], "scale must have 3"), (0, MAP[..., 1:], "dense"), (3, MAP[:, :, :1], "wrong shape"),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("operator", RAW)
def test_a_bad_argument_is_refused(operator):
    """Past the checks of the public functions: an error, never foreign memory."""
    good, bads = RAW[operator]
    run = getattr(torch.ops.ffnet_kernels_cuda, operator).default
    run(*good)
    for place, value, message in bads:
        with pytest.raises(RuntimeError, match=message):
            run(*good[:place], value, *good[place + 1 :])
