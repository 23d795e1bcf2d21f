"""The kernels of every instruction set against the float64 reference, over shapes, layouts and options."""

import parity
from hypothesis import given

pytestmark = parity.needs_native


@given(case=parity.depthwise_cases())
def test_depthwise_conv2d(case):
    parity.check(case)


@given(case=parity.attention_cases())
def test_ffnified_attention(case):
    parity.check(case)


@given(case=parity.channel_mixer_cases())
def test_channel_mixer(case):
    parity.check(case)


@given(case=parity.depthwise_cases())
def test_depthwise_conv2d_gradients(case):
    parity.check_gradients(case)


@given(case=parity.attention_cases())
def test_ffnified_attention_gradients(case):
    parity.check_gradients(case)


@given(case=parity.channel_mixer_cases())
def test_channel_mixer_gradients(case):
    parity.check_gradients(case)
