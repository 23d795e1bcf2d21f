"""The Triton kernels, interpreted on the CPU, against the float64 reference: results and all gradients."""

import collections
import importlib

import parity
import pytest
import triton_cases
from examples import example
from hypothesis import given, settings

from ffnet_kernels.backends import choice
from ffnet_kernels.backends.activations import ACTIVATIONS
from ffnet_kernels.backends.triton import configs, launch

pytestmark = triton_cases.needs_interpreter

CASES = [(operator, name) for operator, cases in triton_cases.OPTIONS.items() for name in cases]
LONG = [pytest.param(*case, marks=[] if "3x3" in case[1] else pytest.mark.long) for case in CASES]
SMALL = {"shape": (1, 3, 4, 5), "kernel": (3, 3)}


def check(case, **options):
    assert choice.BACKENDS["triton"].refusal(case.operator, case.checked()) is None
    parity.check(case, "triton")
    parity.check_gradients(case, "triton", **options)


@pytest.mark.parametrize(("operator", "name"), LONG)
def test_case(operator, name):
    case, layout = triton_cases.made(operator, triton_cases.OPTIONS[operator][name])
    check(case, layout=layout)


BOTH = {False, True}
MAPS = {"MAP_UNIT": {1, 3}, "ALIGN": {1, 8}}
CUT = {"strips": BOTH, "column_tiles": BOTH}  # whether there is more than one
FILTER = {"TAPS": set(range(9)), "CHUNKED": BOTH, "chunks": BOTH}
FUSED = {"ACTIVATION": set(ACTIVATIONS), "TAPS": {3, 5, 7}, "HALO": BOTH, "splits": BOTH}
PRODUCT = {"ACTIVATION": set(ACTIVATIONS), "MATRIX_UNIT": {0, 1}, **MAPS}
VARIANTS = {
    "depthwise_conv2d_forward_kernel": {
        "ACTIVATION": set(ACTIVATIONS), "DERIVATIVE": BOTH, "STRIDE_H": {1, 2}, "STRIDE_W": {1, 2},
        "OUTPUTS": {1, 2}, "INPUTS": {1, 2}, **FILTER, **CUT, **MAPS,
    },
    "depthwise_conv2d_backward_kernel": {**FILTER, **CUT, **MAPS, "splits": BOTH},
    "depthwise_conv2d_backward_weight_kernel": {
        **FILTER, **CUT, **MAPS, "STRIDE_H": {1, 2}, "STRIDE_W": {1, 2}, "OUTPUTS": {1, 2}, "splits": BOTH,
        "TAPS": {0, 1, 2, 3, 4, 5},
    },
    "ffnified_attention_forward_kernel": {**FUSED, **CUT, **MAPS},
    "ffnified_attention_backward_kernel": {**FUSED, **CUT, **MAPS},
    "pointwise_forward_kernel": PRODUCT,
    "channel_mixer_forward_kernel": PRODUCT,
    "channel_mixer_backward_kernel": PRODUCT,
    "pointwise_backward_weight_kernel": {**MAPS, "splits": BOTH},
    "pointwise_gradients_kernel": {"MATRIX_UNIT": {0, 1}, "ALIGN": {1, 8}},
    "filter_gradients_kernel": {"ALIGN": {1, 8}},
    "sum_partials_kernel": {},
}  # fmt: skip


def test_the_cases_reach_every_variant_of_every_kernel():
    found = collections.defaultdict(lambda: collections.defaultdict(set))
    for operator, name in CASES:
        case, _ = triton_cases.made(operator, triton_cases.OPTIONS[operator][name])
        args = case.checked()
        mask = [args[i] is not None for i in parity.OPERATORS_BY_NAME[operator].tensors]
        with launch.recording() as launches, choice.use_backend("triton"):
            parity.backward_of("triton", operator)(case.run(), *args, mask)
        for started in launches:
            for argument, value in started.arguments.items():
                if isinstance(value, int | str):
                    found[started.kernel.__name__][argument].add(value if argument.isupper() else value > 1)
    assert found.keys() == VARIANTS.keys()
    for kernel, expected in VARIANTS.items():
        for argument, values in expected.items():
            assert found[kernel][argument] >= values, f"{kernel}: {argument}"


@pytest.mark.long
@settings(max_examples=12)
@given(case=parity.depthwise_cases(triton_cases.SIZES))
def test_drawn_depthwise_conv2d(case):
    check(case)


@pytest.mark.long
@settings(max_examples=12)
@given(case=parity.attention_cases(triton_cases.PAIRS))
def test_drawn_ffnified_attention(case):
    check(case)


@pytest.mark.long
@settings(max_examples=12)
@given(case=parity.channel_mixer_cases(triton_cases.SIZES))
def test_drawn_channel_mixer(case):
    check(case)


@pytest.mark.parametrize("operator", parity.OPERATORS)
@pytest.mark.parametrize("layout", ["expanded_batch", "expanded_channels", "stepped", "channel_slice"])
def test_gradient_of_any_layout(operator, layout):
    parity.check_gradients(example(operator, shape=(2, 8, 4, 5), kernel=(3, 3)), "triton", layout=layout)


ALONE = [(name, {}, {i}) for name in parity.OPERATORS for i in parity.OPERATORS_BY_NAME[name].tensors]
ALONE += [("depthwise_conv2d", {"multiplier": 2}, {0}), ("depthwise_conv2d", {"stride": 2}, {1, 2})]
ALONE += [("ffnified_attention", {"value_kernel": (2, 4)}, {i}) for i in (0, 1, 2, 3, 4, 6)]
ALONE += [("channel_mixer", {}, wanted) for wanted in ({0, 4}, {1, 2, 8}, {3, 6})]


@pytest.mark.parametrize(("operator", "options", "wanted"), ALONE)
def test_some_gradients_alone(operator, options, wanted):
    parity.check_gradients(example(operator, **SMALL, **options), "triton", wanted=wanted)


@pytest.mark.long
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("depthwise_conv2d", {"layout": "channels_last"}),
        ("depthwise_conv2d", {"stride": 2, "multiplier": 2}),
        ("ffnified_attention", {}),
        ("channel_mixer", {"kernel": (1, 1)}),
    ],
)
def test_few_programs(monkeypatch, operator, options):
    """On a large map a program walks down many rows and adds up many images; here one does everything."""
    monkeypatch.setattr(configs, "PROGRAMS", 1)
    check(example(operator, **{"shape": (2, 3, 10, 17), "kernel": (3, 3), **options}))


def shifted(arguments):
    arguments["left"] += 1


def narrowed(arguments):
    arguments["kernel_width"] -= 1


def unwritten(arguments):
    arguments["height"] -= 1
    if "out_height" in arguments:
        arguments["out_height"] -= 1


def dropped_channel(arguments):
    arguments["channels"] -= 1


def without_bias(arguments):
    arguments.update(dict.fromkeys(("bias", "key_bias", "expand_bias")))


FAULTS = [
    ("depthwise_conv2d_forward_kernel", shifted, "depthwise_conv2d", False),
    ("depthwise_conv2d_forward_kernel", narrowed, "depthwise_conv2d", False),
    ("depthwise_conv2d_forward_kernel", unwritten, "depthwise_conv2d", False),
    ("depthwise_conv2d_forward_kernel", without_bias, "channel_mixer", False),
    ("depthwise_conv2d_forward_kernel", shifted, "depthwise_conv2d", True),
    ("depthwise_conv2d_backward_kernel", shifted, "depthwise_conv2d", True),
    ("depthwise_conv2d_backward_kernel", unwritten, "channel_mixer", True),
    ("ffnified_attention_forward_kernel", narrowed, "ffnified_attention", False),
    ("ffnified_attention_forward_kernel", unwritten, "ffnified_attention", False),
    ("ffnified_attention_backward_kernel", narrowed, "ffnified_attention", True),
    ("ffnified_attention_backward_kernel", without_bias, "ffnified_attention", True),
    ("pointwise_forward_kernel", dropped_channel, "channel_mixer", False),
    ("pointwise_backward_weight_kernel", dropped_channel, "channel_mixer", True),
    ("channel_mixer_backward_kernel", without_bias, "channel_mixer", True),
    ("filter_gradients_kernel", narrowed, "ffnified_attention", True),
]


@pytest.mark.parametrize(("kernel", "fault", "operator", "backward"), FAULTS)
def test_parity_sees_a_fault(monkeypatch, kernel, fault, operator, backward):
    """A check of the check: it fails where one kernel is told something wrong."""
    told = []

    def faulty(started, *args, **arguments):
        if started.__name__ == kernel:
            fault(arguments)
            told.append(kernel)
        launch.launch(started, *args, **arguments)

    for host in ("depthwise", "attention", "mixer"):
        monkeypatch.setattr(importlib.import_module(f"ffnet_kernels.backends.triton.{host}"), "launch", faulty)
    case = example(operator, **SMALL)
    check_one = parity.check_gradients if backward else parity.check
    with pytest.raises(AssertionError, match="over the limit"):
        check_one(case, "triton")
    assert told
    monkeypatch.undo()
    check_one(case, "triton")
