"""torch.ops.ffnet_kernels called past the checks of the public functions: an error, never foreign memory."""

import parity
import pytest
import torch

pytestmark = parity.needs_native

MAP, FILTER = torch.ones(1, 3, 8, 8), torch.ones(3, 1, 3, 3)
DEPTHWISE = {
    "x": MAP, "weight": FILTER, "bias": None, "stride": [1, 1], "padding": [1, 1, 1, 1], "activation": "none",
}  # fmt: skip
ATTENTION = {
    "query": MAP, "key": FILTER, "key_bias": None, "value": FILTER, "value_bias": None, "activation": "gelu",
    "scale": None, "residual": None,
}  # fmt: skip
MIXER = {
    "x": MAP, "weight": FILTER, "bias": None, "expand_weight": torch.ones(5, 3), "expand_bias": None,
    "project_weight": torch.ones(3, 5), "project_bias": None, "activation": "gelu", "scale": None, "residual": None,
}  # fmt: skip

BAD = {
    "depthwise_conv2d": (
        DEPTHWISE,
        [
            ("x", torch.ones(3, 8, 8), "x must be"),
            ("x", MAP.double(), "x must be"),
            ("x", torch.ones(1, 0, 8, 8), "channels"),
            ("x", torch.ones(1, 2, 8, 8), "multiple of x's channels"),
            ("x", torch.ones(1, 3, 0, 0), "smaller than the kernel"),
            ("weight", torch.ones(4, 1, 3, 3), "multiple of x's channels"),
            ("weight", torch.ones(3, 2, 3, 3), "weight must have the shape"),
            ("weight", torch.ones(3, 1, 0, 3), "weight must have the shape"),
            ("weight", torch.ones(3), "weight must be"),
            ("weight", FILTER.double(), "weight must be"),
            ("weight", torch.ones(3, 1, 11, 11), "smaller than the kernel"),
            ("bias", torch.ones(2), "bias must have 3"),
            ("bias", torch.ones(3, 1), "bias must be"),
            ("bias", torch.ones(3).double(), "bias must be"),
            ("stride", [0, 1], "stride"),
            ("stride", [1, -1], "stride"),
            ("activation", "tanh", "unknown activation 'tanh'"),
        ],
    ),
    "ffnified_attention": (
        ATTENTION,
        [
            ("query", torch.ones(3, 8, 8), "query must be"),
            ("query", torch.ones(1, 3, 0, 8), "query must have"),
            ("query", MAP.double(), "query must be"),
            ("key", torch.ones(2, 1, 3, 3), "key and value"),
            ("key", torch.ones(3), "key must be"),
            ("key", torch.ones(3, 1, 3, 0), "key must have"),
            ("key_bias", torch.ones(4), "key_bias must have 3"),
            ("value", torch.ones(4, 1, 3, 3), "key and value"),
            ("value", torch.tensor(1.0), "value|get_size"),
            ("value", FILTER.double(), "value must be"),
            ("value_bias", torch.ones(1), "value_bias must have 3"),
            ("activation", "", "unknown activation"),
            ("scale", torch.ones(3, 1, 1), "scale must be"),
            ("scale", torch.ones(2), "scale must have 3"),
            ("residual", torch.ones(1, 3, 8, 7), "residual"),
            ("residual", torch.ones(2, 3, 8, 8), "residual"),
            ("residual", MAP.double(), "residual must be"),
        ],
    ),
    "channel_mixer": (
        MIXER,
        [
            ("x", torch.ones(3, 8, 8), "x"),
            ("x", MAP.double(), "x"),
            ("x", torch.ones(1, 3, 8, 0), "x"),
            ("weight", torch.ones(2, 1, 3, 3), "weight"),
            ("weight", torch.ones(3), "weight"),
            ("bias", torch.ones(2), "bias"),
            ("expand_weight", torch.ones(5, 4), "expand_weight"),
            ("expand_weight", torch.ones(5), "expand_weight"),
            ("expand_weight", torch.ones(0, 3), "weight"),
            ("expand_bias", torch.ones(4), "expand_bias"),
            ("project_weight", torch.ones(3, 6), "project_weight"),
            ("project_weight", torch.ones(3, 5, 1, 1), "project_weight"),
            ("project_bias", torch.ones(4), "project_bias"),
            ("activation", "GELU", "unknown activation 'GELU'"),
            ("scale", torch.ones(4), "scale"),
            ("residual", torch.ones(1, 4, 8, 8), "residual"),
        ],
    ),
}
CASES = [(operator, good, *bad) for operator, (good, bads) in BAD.items() for bad in bads]


@pytest.mark.parametrize("operator", BAD)
def test_the_good_call_runs(operator):
    """The bad ones differ from it in one argument."""
    good = BAD[operator][0]
    assert getattr(torch.ops.ffnet_kernels, operator)(*good.values()).shape == MAP.shape


@pytest.mark.parametrize(("operator", "good", "name", "value", "message"), CASES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_bad_argument_is_refused(operator, good, name, value, message, mode):
    with mode(), pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.ffnet_kernels, operator)(*{**good, name: value}.values())
