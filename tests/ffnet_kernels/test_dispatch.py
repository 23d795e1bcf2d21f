"""Which backend runs a call: the chooser, the override, the environment."""

import os
import subprocess
import sys
import threading

import parity
import patience
import pytest
import torch
from examples import example
from torch.utils.flop_counter import FlopCounterMode

import ffnet_kernels as fk
from ffnet_kernels.backends import choice, crossover
from ffnet_kernels.ops._operator import is_plain_cpu_call

CALL = example("depthwise_conv2d")


def chosen(case=CALL):
    return fk.explain(case.operator, *case.args, **case.kwargs).backend


@parity.needs_native
def test_the_kernels_run_by_default():
    assert fk.available_backends()[-2:] == ("cpu", "reference")
    assert [chosen(example(operator)) for operator in parity.OPERATORS] == ["cpu"] * 3


@parity.needs_native
def test_short_cuts_are_of_plain_eager_calls_on_the_cpu():
    x = CALL.args[0]
    assert is_plain_cpu_call(x)
    with torch.no_grad():
        assert is_plain_cpu_call(x)
    others = (None, x[0], x.double(), x.to("meta"), torch.nn.Parameter(x), x.int())
    assert not any(map(is_plain_cpu_call, others))
    for watched in (
        fk.use_backend("reference"),
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.forward_ad.dual_level(),
        FlopCounterMode(display=False),
    ):
        with watched:
            assert not is_plain_cpu_call(x)
    seen = []
    torch.func.vmap(lambda row: seen.append(is_plain_cpu_call(x)) or row)(x)
    torch.jit.trace(lambda row: seen.append(is_plain_cpu_call(x)) or row + 1, (x,), check_trace=False)
    compiled = torch.compile(lambda row: row * is_plain_cpu_call(row), fullgraph=True, backend="eager")
    assert not compiled(x).any()
    assert seen == [False, False]


@parity.needs_native
def test_explain_tells_what_runs_and_why_not_the_others():
    decision = fk.explain(fk.depthwise_conv2d, *CALL.args)
    assert decision.operator == "depthwise_conv2d"
    assert list(decision.refused) == ["cuda", "triton"]
    assert all(decision.refused.values())
    assert str(decision).splitlines()[0].startswith("depthwise_conv2d -> cpu (")
    with parity.selected_isa("baseline"):
        assert "baseline" in fk.explain(fk.depthwise_conv2d, *CALL.args).variant
    with fk.use_backend("reference"):
        forced = fk.explain("depthwise_conv2d", *CALL.args)
    assert forced.backend == "reference"
    assert forced.refused["cpu"] == "'reference' is forced"


@parity.needs_native
@pytest.mark.parametrize("operator", parity.OPERATORS)
@pytest.mark.parametrize(("shape", "layout"), [((2, 3, 9, 9), "channels_last"), ((4, 32, 2, 2), "nchw")])
def test_what_plain_pytorch_does_faster_is_left_to_it(operator, shape, layout, monkeypatch):
    case = example(operator, shape=shape, layout=layout)
    monkeypatch.setattr(crossover, "now", crossover.Rules())
    assert chosen(case) == "cpu"
    monkeypatch.setattr(crossover, "now", crossover.Rules(few_channels=3, few_pixels=4))
    assert choice.select(operator, case.checked()).NAME == "reference"
    with fk.use_backend("cpu"):
        assert chosen(case) == "cpu"


@parity.needs_native
def test_use_backend_nests_and_restores():
    before = chosen()
    override = fk.use_backend("reference")
    with override:
        with fk.use_backend("cpu"):
            assert chosen() == "cpu"
            with override:
                assert chosen() == "reference"
            assert chosen() == "cpu"
        assert chosen() == "reference"
        with fk.use_backend("auto"):
            assert chosen() == "cpu"
    assert chosen() == before


def test_use_backend_restores_after_an_exception():
    before = chosen()
    with pytest.raises(ZeroDivisionError), fk.use_backend("reference"):
        1 / 0  # noqa: B018
    assert chosen() == before


def test_use_backend_decorates():
    @fk.use_backend("reference")
    def decorated(depth):
        return [chosen(), *(decorated(depth - 1) if depth else [])]

    before = chosen()
    assert decorated(2) == ["reference"] * 3
    assert chosen() == before


def test_use_backend_is_of_one_thread():
    seen = []
    with fk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
        assert chosen() == "reference"
    assert seen == [chosen()]


@pytest.mark.parametrize("name", ["CPU", "", "gpu", None, 3])
def test_an_unknown_backend(name):
    with pytest.raises(ValueError, match=r"use_backend: expected one of auto, reference, cpu, triton, cuda, got"):
        fk.use_backend(name)


def test_a_backend_that_is_not_available(monkeypatch):
    monkeypatch.setattr(choice.BACKENDS["cpu"], "unavailable", lambda: "no compiler was there")
    with pytest.raises(fk.BackendError, match=r"backend 'cpu' is not available: no compiler was there"):
        fk.use_backend("cpu").__enter__()
    assert chosen(example("depthwise_conv2d", dtype=torch.float64)) == "reference"


@parity.needs_native
@pytest.mark.parametrize("operator", parity.OPERATORS)
def test_a_forced_backend_that_does_not_take_the_call(operator):
    case = example(operator, dtype=torch.float64)
    message = (
        rf"{operator}: backend 'cpu' does not take this call: takes float32, bfloat16 and float16, got torch.float64"
    )
    with fk.use_backend("cpu"), pytest.raises(fk.BackendError, match=message):
        case.run()


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return patience.run([sys.executable, "-c", code], env={**os.environ, **environment})


WHICH = """
import torch, ffnet_kernels as fk
print(fk.explain("depthwise_conv2d", torch.ones(1, 4, 8, 8), torch.ones(4, 1, 3, 3)))
"""


@parity.needs_native
@pytest.mark.parametrize("isa", parity.ISAS)
def test_environment_isa(isa):
    code = "from ffnet_kernels import native; print(*native.usable_isas())"
    answer = run(f"{WHICH}\n{code}", FFNET_KERNELS_ISA=isa).stdout
    assert f"-> cpu ({isa}," in answer
    as_if_there_were_no_better = parity.ISAS[: parity.ISAS.index(isa) + 1]
    assert answer.splitlines()[-1].split() == as_if_there_were_no_better


def test_environment_backend():
    assert "-> reference" in run(WHICH, FFNET_KERNELS_BACKEND="reference").stdout


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            {"FFNET_KERNELS_BACKEND": "gpu"},
            "FFNET_KERNELS_BACKEND: expected one of auto, reference, cpu, triton, cuda, got 'gpu'",
        ),
        ({"FFNET_KERNELS_BACKEND": "cpu", "FFNET_KERNELS_LIBRARY_DIR": os.devnull}, "backend 'cpu' is not available: "),
    ],
)
def test_a_bad_backend_in_the_environment_gives_one_line(environment, line):
    result = run(WHICH, **environment)
    assert result.returncode == 1
    assert line in result.stderr.strip().splitlines()[-1]


@parity.needs_native
def test_a_bad_isa_in_the_environment_is_the_reason_why_there_are_no_kernels():
    code = "from ffnet_kernels.backends import choice\nprint(choice.why_unavailable('cpu'))\n" + WHICH
    result = run(code, FFNET_KERNELS_ISA="sse9")
    reason = result.stdout.splitlines()[0]
    assert reason.startswith(
        "FFNET_KERNELS_ISA names the instruction set 'sse9', but there are: baseline, avx2, avx512"
    )
    assert all(isa in reason for isa in parity.ISAS)
    assert "-> reference" in result.stdout
    forced = run(WHICH, FFNET_KERNELS_ISA="sse9", FFNET_KERNELS_BACKEND="cpu")
    assert forced.returncode == 1
    assert "'sse9'" in forced.stderr.strip().splitlines()[-1]


def test_a_decorated_function_may_overlap_with_itself_in_threads():
    both_inside, first_is_out = threading.Barrier(2, timeout=patience.LIMIT), threading.Event()
    after = {}

    @fk.use_backend("auto")
    def overlapping(leave_last):
        both_inside.wait()
        assert not leave_last or first_is_out.wait(patience.LIMIT)

    def first():
        overlapping(leave_last=False)
        after["first"] = choice._state.forced
        first_is_out.set()

    def second():
        with fk.use_backend("reference"):
            overlapping(leave_last=True)
            after["second"] = choice._state.forced

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    default = choice._state.forced
    assert after == {"first": default, "second": "reference"}


def test_a_graph_compiled_before_the_first_override_is_not_reused():
    code = """
import torch, ffnet_kernels as fk
seen = []
def backend(graph, inputs):
    seen.append(str(graph.graph))
    return graph.forward
f = torch.compile(lambda x, w: fk.depthwise_conv2d(x, w), fullgraph=True, backend=backend)
x, w = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 3, 3)
f(x, w)
with fk.use_backend("reference"):
    f(x, w)
assert len(seen) == 2 and "ffnet_kernels" not in seen[1], seen
"""
    subprocess.run([sys.executable, "-c", code], check=True)
