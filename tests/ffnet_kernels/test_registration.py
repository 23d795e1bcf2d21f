"""The operators as torch sees them: schemas, fakes and autograd keys, dtypes, autocast, export."""

import warnings

import parity
import pytest
import torch
import torch.nn.functional as F
from examples import Mixers, example

import ffnet_kernels as fk

LAYOUTS = ("nchw", "channels_last", "batch_inside")
OPERATORS = [parity.OPERATORS_BY_NAME[name] for name in parity.OPERATORS]
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=parity.OPERATORS)


def grad_enabled(args: tuple) -> tuple:
    return tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)


@every_operator
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck_forward(operator, layout, batch):
    args = example(operator.name, shape=(batch, 5, 6, 7), kernel=(3, 3), layout=layout).checked()
    torch.library.opcheck(getattr(torch.ops.ffnet_kernels, operator.name).default, grad_enabled(args))


@every_operator
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck_backward(operator, layout, batch):
    args = example(operator.name, shape=(batch, 5, 6, 7), kernel=(3, 3), layout=layout).checked()
    shape = getattr(torch.ops.ffnet_kernels, operator.name)(*args).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    backward = getattr(torch.ops.ffnet_kernels, f"{operator.name}_backward").default
    for mask in ([True] * len(operator.tensors), [i % 2 == 0 for i in range(len(operator.tensors))]):
        torch.library.opcheck(backward, (grad, *args, mask))


@every_operator
@pytest.mark.parametrize("layout", parity.LAYOUTS)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_fake_has_the_shape_and_strides_of_the_result(operator, layout, batch):
    args = example(operator.name, shape=(batch, 5, 6, 7), layout=layout).checked()
    run = getattr(torch.ops.ffnet_kernels, operator.name)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake = run(*fakes)
    real = run(*args)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@every_operator
def test_other_dtypes_run_on_the_reference_and_explain_says_why(operator):
    dtype = torch.float64
    case = example(operator.name, dtype=dtype)
    decision = fk.explain(operator.name, *case.args, **case.kwargs)
    assert decision.backend == "reference"
    assert str(dtype) in decision.refused["cpu"] or "cpu" not in fk.available_backends()
    assert str(dtype) in str(decision) or "cpu" not in fk.available_backends()
    out = case.run()
    assert out.dtype == dtype
    assert torch.equal(out, parity.reference_of(operator.name, case.checked())[1])


@every_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_a_convolution(operator, dtype):
    case = example(operator.name)
    case.args[1].requires_grad_()
    with torch.autocast("cpu", dtype):
        out = case.run()
        assert out.dtype == F.conv2d(case.args[0], case.args[1], groups=19).dtype == dtype
    out.float().sum().backward()
    assert case.args[1].grad.dtype == torch.float32
    with torch.autocast("cpu", dtype, enabled=False):
        assert case.run().dtype == torch.float32


@every_operator
def test_meta_tensors(operator):
    case = example(operator.name)
    meta = case._replace(
        args=tuple(t.to("meta") for t in case.args),
        kwargs={k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in case.kwargs.items()},
    )
    assert meta.run().shape == case.run().shape
    assert meta.run().device.type == "meta"


def test_export_holds_plain_operators_only():
    torch.manual_seed(0)
    model, x = Mixers().eval(), torch.randn(2, 8, 12, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("conv2d" in target for target in targets)
    assert not [target for target in targets if "ffnet" in target]
    for batch in (2, 5):
        x = torch.randn(batch, 8, 12, 10)
        with fk.use_backend("reference"):
            expected = model(x)
        assert torch.equal(program.module()(x), expected)
