"""A wrong argument gets one exception that says what was expected and what came."""

import pytest
import torch

import ffnet_kernels as fk

MAP, FILTER, VECTOR = torch.ones(2, 4, 8, 8), torch.ones(4, 1, 3, 3), torch.ones(4)
EXPAND, PROJECT = torch.ones(6, 4), torch.ones(4, 6)
DEPTHWISE = {"x": MAP, "weight": FILTER, "bias": VECTOR}
ATTENTION = {"query": MAP, "key": FILTER, "key_bias": VECTOR, "value": FILTER, "value_bias": VECTOR}
MIXER = {
    "x": MAP, "weight": FILTER, "bias": VECTOR, "expand_weight": EXPAND, "expand_bias": torch.ones(6),
    "project_weight": PROJECT, "project_bias": VECTOR,
}  # fmt: skip

BAD = {
    fk.depthwise_conv2d: (
        DEPTHWISE,
        [
            ("x", None, TypeError, r"x: expected a tensor, got NoneType"),
            ("x", [[1.0]], TypeError, r"x: expected a tensor, got list"),
            ("x", MAP[0], ValueError, r"x: expected a map \[N, C, H, W\], got 3 dim.*\[4, 8, 8\]"),
            ("x", MAP.int(), ValueError, r"x: expected a floating-point dtype, got torch.int32"),
            ("x", MAP.to(torch.complex64), ValueError, r"floating-point dtype, got torch.complex64"),
            ("x", MAP[..., :0], ValueError, r"x: expected .* width, got .*\[2, 4, 8, 0\]"),
            ("x", MAP[:, :0], ValueError, r"x: expected at least one channel.*\[2, 0, 8, 8\]"),
            ("weight", 3, TypeError, r"weight: expected a tensor, got int"),
            ("weight", FILTER[0], ValueError, r"weight: expected a depthwise filter.*\[1, 3, 3\]"),
            ("weight", torch.ones(4, 4, 3, 3), ValueError, r"depthwise filter.*\[4, 4, 3, 3\]"),
            ("weight", torch.ones(4, 1, 0, 3), ValueError, r"depthwise filter.*\[4, 1, 0, 3\]"),
            ("weight", torch.ones(12, 1, 3, 3), ValueError, r"expected 4 or 8 filters.*got 12"),
            ("weight", FILTER.half(), ValueError, r"weight: expected .* torch.float32, got torch.float16"),
            ("weight", FILTER.to("meta"), ValueError, r"weight: expected .* device cpu, got meta"),
            ("bias", torch.ones(3), ValueError, r"bias: expected 4 elements, got 3"),
            ("bias", torch.ones(4, 1), ValueError, r"bias: expected the shape \[4\], got \[4, 1\]"),
            ("bias", VECTOR.double(), ValueError, r"bias: expected .* torch.float32, got torch.float64"),
            ("bias", 0.0, TypeError, r"bias: expected a tensor, got float"),
            ("stride", 3, ValueError, r"stride: expected 1 or 2, got 3"),
            ("stride", (1, 0), ValueError, r"stride: expected 1 or 2, got \(1, 0\)"),
            ("stride", (1, 1, 1), ValueError, r"stride: .* pair of integers, got \(1, 1, 1\)"),
            ("stride", 1.0, ValueError, r"stride: .* pair of integers, got 1.0"),
            ("padding", "full", ValueError, r"padding: expected 'same', 'valid' .*got 'full'"),
            ("padding", -1, ValueError, r"padding: expected no negative number, got -1"),
            ("padding", (1, None), ValueError, r"padding: .* pair of integers, got \(1, None\)"),
            ("activation", "tanh", ValueError, r"activation: expected one of none, relu.*got 'tanh'"),
            ("activation", None, ValueError, r"activation: expected one of none.*got None"),
        ],
    ),
    fk.ffnified_attention: (
        ATTENTION,
        [
            ("query", MAP[..., :0], ValueError, r"query: expected .* width, got .*\[2, 4, 8, 0\]"),
            ("key", torch.ones(8, 1, 3, 3), ValueError, r"key: expected 4 filters.*\[8, 1, 3, 3\]"),
            ("value", torch.ones(3, 1, 3, 3), ValueError, r"value: expected 4 filters.*\[3, 1"),
            ("value", None, TypeError, r"value: expected a tensor, got NoneType"),
            ("key_bias", torch.ones(5), ValueError, r"key_bias: expected 4 elements, got 5"),
            ("value_bias", torch.ones(5), ValueError, r"value_bias: expected 4 elements, got 5"),
            ("scale", torch.ones(1, 4, 1, 1), ValueError, r"scale: expected .*\[4\], got \[1, 4, 1, 1\]"),
            ("residual", MAP[:1], ValueError, r"residual: expected .*\[2, 4, 8, 8\], got \[1, 4, 8, 8\]"),
            ("residual", MAP.double(), ValueError, r"residual: .* torch.float32, got torch.float64"),
            ("activation", "GELU", ValueError, r"activation: expected one of .*got 'GELU'"),
        ],
    ),
    fk.channel_mixer: (
        MIXER,
        [
            ("x", MAP[:, :, :0], ValueError, r"x: expected .* height and width, got .*\[2, 4, 0, 8\]"),
            ("weight", torch.ones(8, 1, 3, 3), ValueError, r"weight: expected 4 filters.*\[8, 1, 3, 3\]"),
            ("bias", torch.ones(1), ValueError, r"bias: expected 4 elements, got 1"),
            ("expand_weight", torch.ones(6, 5), ValueError, r"expand_weight: expected 4 input channels, got 5"),
            ("expand_weight", torch.ones(6, 4, 3, 3), ValueError, r"expand_weight: expected .*\[6, 4, 3, 3\]"),
            ("expand_weight", None, TypeError, r"expand_weight: expected a tensor, got NoneType"),
            ("expand_bias", VECTOR, ValueError, r"expand_bias: expected 6 elements, got 4"),
            ("project_weight", torch.ones(4, 4), ValueError, r"project_weight: expected 6 input channels, got 4"),
            ("project_bias", torch.ones(6), ValueError, r"project_bias: expected 4 elements, got 6"),
            ("scale", torch.ones(6), ValueError, r"scale: expected 4 elements, got 6"),
            ("residual", MAP[:, :3], ValueError, r"residual: expected .*\[2, 4, 8, 8\], got \[2, 3, 8, 8\]"),
        ],
    ),
}
CASES = [(function, good, *bad) for function, (good, bads) in BAD.items() for bad in bads]


@pytest.mark.parametrize("function", BAD)
def test_the_good_call_runs(function):
    """The bad ones differ from it in one argument."""
    assert function(**BAD[function][0]).shape == MAP.shape


@pytest.mark.parametrize(("function", "good", "name", "value", "error", "message"), CASES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_bad_argument(function, good, name, value, error, message, mode):
    call = {**good, name: value}
    with mode(), pytest.raises(error, match=message) as raised:
        function(**call)
    assert raised.type is error
    with pytest.raises(error, match=message):
        fk.explain(function, **call)


def test_a_kernel_larger_than_the_padded_map():
    with pytest.raises(ValueError, match=r"the 9×9 kernel is larger than the padded map 8×8 .*\[2, 4, 8, 8\].*'valid'"):
        fk.depthwise_conv2d(MAP, torch.ones(4, 1, 9, 9), padding="valid")


def test_explain_of_something_else():
    with pytest.raises(ValueError, match=r"expected one of depthwise_conv2d, .*got 'conv3d'"):
        fk.explain("conv3d", MAP)


def test_optimize_of_something_else():
    with pytest.raises(TypeError, match=r"expected an nn.Module, got function"):
        fk.optimize(lambda x: x)
