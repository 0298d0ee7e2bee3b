"""Chapter 3: constants in 8 bits equal bitsandbytes."""

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import unhurried

from qlora_edu.double_quant import dequantize_absmax, dynamic_map, quantize_absmax


def test_dynamic_map_equals_bitsandbytes():
    levels = dynamic_map()
    assert torch.equal(levels, bnb_functional.create_dynamic_map())
    assert levels.shape == (256,) and (levels.diff() > 0).all()
    assert levels[0].item() == pytest.approx(-0.993, abs=1e-4) and levels[-1] == 1


@settings(unhurried, max_examples=40)
@given(
    n=st.integers(1, 2000),
    spread=st.sampled_from([0.0, 1e-42, 1e-39, 1e-3, 1.0]),
    mean=st.sampled_from([1e-39, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 1000),
)
def test_constants_alone_equal_bitsandbytes(n, spread, mean, seed):
    absmax = mean * (1 + spread * torch.rand(n, generator=torch.Generator().manual_seed(seed)))
    quantized = quantize_absmax(absmax)
    codes, state = bnb_functional.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(quantized.codes, codes)
    assert torch.equal(quantized.nested_absmax, state.absmax)
    assert torch.equal(quantized.offset, absmax.mean())


def test_the_offset_is_the_mean_and_centres_the_constants():
    absmax = torch.tensor([1.0, 2.0, 6.0])
    quantized = quantize_absmax(absmax)
    assert quantized.offset == 3
    assert quantized.nested_absmax.tolist() == [3]
    # By hand: -2/3, -1/3 and 1 of the nested constant. The nearest levels are 0.0141 apart.
    assert torch.allclose(dequantize_absmax(quantized), absmax, rtol=0, atol=3 * 0.0141 / 2)
