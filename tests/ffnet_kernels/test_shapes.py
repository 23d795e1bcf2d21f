"""What calls give for tensors without data, by our rules: as PyTorch has it, without what that imports."""

import operator
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from ffnet_kernels import kernels, shapes

X = torch.ones(2, 6, 8, 12)
CALLS = {
    torch.conv2d: [
        (X, torch.ones(4, 3, 3, 5), None, (2, 1), (1, 2), 1, 2),
        (X, torch.ones(4, 6, 3, 3), None, 1, "same"),
        (X, torch.ones(4, 6, 3, 3), None, 1, 0, (2, 3)),
        (X, torch.ones(4, 6, 9, 3)),
        (X[0], torch.ones(4, 6, 3, 3)),
    ],
    F.linear: [(X, torch.ones(5, 12), None), (X, torch.ones(5, 11))],
    F.adaptive_avg_pool2d: [(X, 1), (X, (2, 3))],
    F.max_pool2d: [(X, 2), (X, 3, 2, 1), (X, 3, 2, 1, 2), (X, 3, 2, 1, 1, True), (X[0], 2)],
    F.avg_pool2d: [(X, 2), (X, (3, 2), (1, 2), (1, 0)), (X, 3, 2, 0, True), (X, 3, 1, 1, False, False)],
    "to": [(X, torch.bfloat16), (X, X)],
    torch.cat: [
        ([X, X[:, :2]], 1), ([X, X[:, :2]], -3), ([X, X],), ([X, X[:, :2]], 0), ([X, X.double()], 1),
        ([X, torch.ones(0)], 1),
    ],
    torch.stack: [([X, X], 1), ([X, X], -1), ([X, X],), ([X, X[:1]], 1)],
    F.interpolate: [
        (X, (3, 5)), (X, 16), (X, None, 2), (X, None, (1.7, 2.3), "bilinear"), (X[0], 7, None, "linear"),
        (X, (3, 5), None, "bicubic", False), (X, (3, 5, 7)),
    ],
    torch.pixel_shuffle: [(torch.ones(2, 12, 4, 5), 2), (X, 2)],
    "repeat": [(X, 1, 2, 3, 1), (X, (3, 1, 2, 1, 1)), (X, 2)],
    F.scaled_dot_product_attention: [
        (X, X, X), (X, X[:, :, :5], X[:, :, :5, :7]), (X, X[:, :3], X[:, :3]), (X, X[..., :5], X),
    ],
    "norm": [(X, 2, 1), (X, 2, (2, 3), True), (X,)],
}  # fmt: skip
for function in (torch.mean, "mean", torch.sum, "sum", torch.amax, "amax"):
    CALLS[function] = [(X, 1), (X, (2, -1)), (X, (2, -1), True), (X, ()), (X.long(), 1), (X, 4)]
for function in (torch.matmul, operator.matmul, "matmul"):
    CALLS[function] = [(X, X.mT), (X, X[0].mT), (X, X[:1, :, :5].mT), (X, X), (X, X[0, 0, 0]), (X, X.mT.double())]
CALLS[torch.bmm] = [(X[0], X[0].mT), (X[0], X[0])]
_TWO = [(X, X), (X, 2.0), (X, X[0, :, :1]), (X[:, :1], X[:1]), (X, X.double()), (X, X[:, :5]), (X.long(), 2)]
for function, rule in shapes._RULES.items():
    if rule in (shapes._broadcast, shapes._broadcast_onto):
        CALLS[function] = _TWO
    elif rule is shapes._same and function not in CALLS:
        CALLS[function] = [(X,)]
_STATISTICS = torch.ones(6)
CALLS |= {
    kernels.batch_norm: [(X, _STATISTICS, _STATISTICS, None, None, 1e-5, (4,))],
    kernels.batch_norm_training: [(X, None, None, None, None, None, None, 1e-5)],
    F.batch_norm: [(X, _STATISTICS, _STATISTICS)],
    F.layer_norm: [(X, (12,))],
    F.group_norm: [(X, 2)],
    F.softmax: [(X, 1)],
    "softmax": [(X, 1)],
    torch.roll: [(X, 1, 2)],
}


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f if isinstance(f, str) else getattr(f, "__name__", str(f)))
def test_as_pytorch_has_it(function):
    answered = 0
    for args in CALLS[function]:
        graph, values = fx.Graph(), {}

        def placeholder(a, graph=graph, values=values):
            if not isinstance(a, torch.Tensor):
                return a
            node = graph.placeholder(f"x{len(values)}")
            values[node] = a.to("meta")
            return node

        kind = "call_method" if isinstance(function, str) else "call_function"
        node = graph.create_node(kind, function, tuple(fx.node.map_aggregate(args, placeholder)))
        answered += shapes._by_rule(function, fx.map_arg(node.args, values.get), {}) is not None
        found = shapes.evaluate(node, values.get)
        copies = fx.node.map_aggregate(args, lambda a: a.clone() if isinstance(a, torch.Tensor) else a)
        try:
            call = getattr(copies[0], function) if isinstance(function, str) else function
            expected = call(*copies[isinstance(function, str) :])
        except Exception:  # what PyTorch refuses has no shape
            assert found is None
        else:
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert found.is_meta
    assert answered


def test_every_rule_is_called():
    assert set(CALLS) == set(shapes._RULES)


MODELS = """
import sys, torch, ffnet, ffnet_kernels

torch.set_num_threads(1)
image, series = torch.randn(1, 3, 64, 64), torch.randn(1, 24, 2)
for name, example, options in (
    ("ffnet_1", image, {}),
    ("ffnet_1", image, {"token_mixers": ("ffnified", "ffnified", ("ffnified", "attention"), "attention")}),
    ("ffnet_seg_ade20k", image, {}),
    ("ffnet_2_upernet", image, {}),
    ("ffnet_sr_light", image, {"depth": 1}),
    ("ffnet_ts", series, {"variables": 2, "lookback": 24, "horizon": 8}),
):
    model = ffnet_kernels.optimize(ffnet.create_model(name, **options).eval())
    with torch.inference_mode():
        model(example)
    print(name, "sympy" in sys.modules, str(ffnet_kernels.report(model)).splitlines()[0], sep="|")
"""


@pytest.mark.long
def test_a_first_call_imports_nothing_of_the_compiler():
    done = subprocess.run([sys.executable, "-c", MODELS], capture_output=True, text=True, check=True)
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == 6
    assert not [name for name, imported, _ in lines if imported != "False"], done.stdout
