"""The kernels of every instruction set against the float64 reference, over shapes, layouts and options."""

import parity
import torch
from hypothesis import given
from hypothesis import strategies as st

pytestmark = parity.needs_native

# Plain PyTorch computes the gradients of strides and of doubled channels; oneDNN's are wrong for some 16-bit maps.
SINGLE = parity.NATIVE._replace(dtypes=st.just(torch.float32))


@given(case=parity.depthwise_cases())
def test_depthwise_conv2d(case):
    parity.check(case)


@given(case=parity.attention_cases())
def test_ffnified_attention(case):
    parity.check(case)


@given(case=parity.channel_mixer_cases())
def test_channel_mixer(case):
    parity.check(case)


@given(case=parity.depthwise_cases(SINGLE))
def test_depthwise_conv2d_gradients(case):
    parity.check_gradients(case)


@given(case=parity.attention_cases(SINGLE))
def test_ffnified_attention_gradients(case):
    parity.check_gradients(case)


@given(case=parity.channel_mixer_cases(SINGLE))
def test_channel_mixer_gradients(case):
    parity.check_gradients(case)
