"""The kernels of every instruction set against the float64 reference, over shapes, layouts and options."""

import parity
from hypothesis import given
from hypothesis import strategies as st

pytestmark = parity.needs_native
layouts = st.sampled_from(parity.LAYOUTS)
subsets = st.one_of(st.none(), st.sets(st.integers(0, 7)))


@given(case=parity.depthwise_cases())
def test_depthwise_conv2d(case):
    parity.check(case)


@given(case=parity.attention_cases())
def test_ffnified_attention(case):
    parity.check(case)


@given(case=parity.channel_mixer_cases())
def test_channel_mixer(case):
    parity.check(case)


@given(case=parity.depthwise_cases(), layout=layouts, wanted=subsets)
def test_depthwise_conv2d_gradients(case, layout, wanted):
    parity.check_gradients(case, layout=layout, wanted=wanted)


@given(case=parity.attention_cases(), layout=layouts, wanted=subsets)
def test_ffnified_attention_gradients(case, layout, wanted):
    parity.check_gradients(case, layout=layout, wanted=wanted)


@given(case=parity.channel_mixer_cases())
def test_channel_mixer_gradients(case):
    parity.check_gradients(case)
