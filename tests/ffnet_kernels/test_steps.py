"""Steps in a row as one native call: the same results, and clear errors for numbers that make no sense."""

import random

import pytest
import torch
from torch import Tensor, fx, nn

import ffnet
from ffnet_kernels import depthwise_conv2d, optimize, steps
from ffnet_kernels.backends import cpu
from ffnet_kernels.ops import schemas
from ffnet_kernels.program import Program
from ffnet_kernels.state import State

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no native CPU library")

DEPTHWISE = schemas.STEP_OPERATORS.index("depthwise_conv2d")


def written(x: int, weight: int, activation: str = "relu") -> list[int]:
    """A 3×3 depthwise step, without what it lets go."""
    text = activation.encode()
    return [DEPTHWISE, x, weight, -1, 2, 1, 1, 4, 1, 1, 1, 1, len(text), *text]


@pytest.fixture
def values() -> list[Tensor]:
    return [torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last), torch.randn(8, 1, 3, 3)]


def run(values: list[Tensor], numbers: list[int]) -> Tensor:
    return torch.ops.ffnet_kernels.steps(values, numbers)


def test_two_steps(values: list[Tensor]) -> None:
    x, weight = values
    hidden = depthwise_conv2d(x, weight, padding=1, activation="relu")
    expected = depthwise_conv2d(hidden, weight, padding=1, activation="relu")
    assert torch.equal(run(values, [*written(0, 1), 1, 0, *written(2, 1), 2, 2, 1]), expected)


@pytest.mark.parametrize(("numbers", "message"), [
    ([], "expected steps"),
    ([99], "no step 99"),
    ([-1], "no step -1"),
    (written(0, 1), "end within a step"),
    (written(0, 1)[:6], "a list of a step has 2 elements"),
    ([*written(0, 2), 0], "reads value 2, which is not there"),
    ([*written(-1, 1), 0], "reads value -1"),
    ([*written(0, 1), 1, 7], "reads value 7"),
    ([*written(0, 1), 1, 0, *written(0, 1), 0], "reads value 0, which is not there"),
    ([*written(0, 1), 1, 2], "reads value 2, which is not there"),
    ([*written(0, 1, "rleu"), 0], "rleu"),
    ([*written(0, 1)[:12], 1, 200, 0], "a string of a step has character 200"),
])  # fmt: skip
def test_numbers_that_make_no_sense(values: list[Tensor], numbers: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(values, numbers)


def test_any_wrong_number_is_an_error_or_another_result(values: list[Tensor]) -> None:
    right = [*written(0, 1), 1, 0, *written(2, 1), 2, 2, 1]
    draw = random.Random(0)
    failed = 0
    for _ in range(500):
        wrong = list(right)
        wrong[draw.randrange(len(wrong))] = draw.choice([-1, 0, 1, 3, 100, 2**31, 2**62, -(2**63)])
        try:
            run(values, wrong)
        except RuntimeError:
            failed += 1
    assert failed > 200


def models() -> dict[str, nn.Module]:
    layers = [nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8), nn.GELU()]
    return {
        "FFNet": ffnet.FFNet((1, 1, 2, 1), (16, 16, 32, 32), stem_width=16),
        "row": nn.Sequential(*layers, *layers, *layers),
    }


@pytest.mark.parametrize("name", models())
def test_programs_compute_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models()[name].eval()
    x = torch.randn(2, 3 if name == "FFNet" else 8, 64, 64)
    with torch.no_grad():
        joined = Program(model, State(model), x, differentiable=False)
        monkeypatch.setattr(steps, "join", lambda graph: None)
        alone = Program(model, State(model), x, differentiable=False)
        for ours, theirs in zip(as_tuple(joined.run(x)), as_tuple(alone.run(x)), strict=True):
            assert torch.equal(ours, theirs)
    assert "steps" in joined.direct.__code__.co_names
    assert "steps" not in alone.direct.__code__.co_names


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_values_are_let_go_after_their_last_reader() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    value = x
    for _ in range(3):
        arguments = (value, weight, None, (1, 1), (1, 1, 1, 1), "relu")
        value = graph.call_function(torch.ops.ffnet_kernels.depthwise_conv2d.default, arguments)
    graph.output(value)
    steps.join(graph)
    (call,) = (node for node in graph.nodes if node.op == "call_function")
    assert call.target is torch.ops.ffnet_kernels.steps.default
    assert call.args[0] == [x, weight]
    assert list(call.args[1]) == [*written(0, 1), 1, 0, *written(2, 1), 1, 2, *written(3, 1), 2, 3, 1]


def test_a_profile_shows_operators_by_their_names() -> None:
    model = ffnet.FFNet((1, 1, 2, 1), (16, 16, 32, 32), stem_width=16).eval()
    x = torch.randn(1, 3, 64, 64)
    optimize(model)
    with torch.no_grad():
        model(x)
        with torch.profiler.profile() as profile:
            model(x)
    names = {event.key for event in profile.key_averages()}
    assert {"ffnet_kernels::ffnified_attention", "ffnet_kernels::channel_mixer"} <= names
