"""The fast twins: equal to the definitions of chapters 2 and 5, in less time and memory."""

import os
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import blocksizes, levels_of, tensors, unhurried
from torch import nn

from qlora_edu import blockwise as bw
from qlora_edu import kernels
from qlora_edu.codebooks import LEVELS, get_levels
from qlora_edu.errors import QuantizationError
from qlora_edu.qlora import FusedQLoRALinear, QLoRALinear
from qlora_edu.quantized import quantize

names = st.sampled_from(LEVELS)
chunks = st.sampled_from([None, 4096, 8192])


@contextmanager
def chunks_of(size):
    token = kernels.CHUNK_SIZE.set(size)
    try:
        yield
    finally:
        kernels.CHUNK_SIZE.reset(token)


@settings(unhurried, max_examples=200)
@given(weight=tensors(), blocksize=blocksizes, name=names, size=chunks)
@example(weight=torch.zeros(100), blocksize=64, name="nf4", size=None)
@example(weight=torch.zeros(0), blocksize=64, name="fp4", size=None)
@example(weight=torch.tensor(-2.5), blocksize=64, name="int4", size=None)
@example(weight=torch.full((65,), 1e-40), blocksize=32, name="nf4", size=None)
@example(weight=torch.full((65,), -3e38), blocksize=32, name="fp4", size=None)
@example(weight=torch.randn(3, 4097).half(), blocksize=4096, name="fp4-e3m0", size=4096)
def test_both_directions_equal_the_definition_in_every_byte(weight, blocksize, name, size):
    levels = levels_of(name, blocksize)
    with chunks_of(size):
        packed, absmax = kernels.quantize_blockwise(weight, levels, blocksize)
        wanted_packed, wanted_absmax = bw.quantize_blockwise(weight, levels, blocksize)
        assert packed.dtype == torch.uint8 and torch.equal(packed, wanted_packed)
        assert absmax.dtype == torch.float32 and torch.equal(absmax, wanted_absmax)
        for dtype in (weight.dtype, torch.float64):
            arguments = (packed, absmax, levels, blocksize, weight.shape, dtype)
            values = kernels.dequantize_blockwise(*arguments)
            wanted = bw.dequantize_blockwise(*arguments)
            assert values.shape == weight.shape and values.dtype == dtype
            assert torch.equal(values, wanted)


@unhurried
@given(weight=tensors(), blocksize=blocksizes, name=names, over=st.booleans())
def test_decode_equals_the_definition(weight, blocksize, name, over):
    levels = levels_of(name, blocksize)
    packed, absmax = bw.quantize_blockwise(weight, levels, blocksize)
    out = torch.empty(len(packed), dtype=torch.int64) if over else None
    values = kernels.decode(packed, absmax, levels, blocksize, out)
    shape = (2 * len(packed),)
    absmax = F.pad(absmax, (0, 1), value=float(absmax[-1]))  # an odd length has one code more
    assert torch.equal(
        values, bw.dequantize_blockwise(packed, absmax, levels, blocksize, shape, torch.float32)
    )
    assert not over or values.data_ptr() == out.data_ptr()


@unhurried
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(1, 700)),
    blocksize=blocksizes,
    double_quant=st.booleans(),
    size=chunks,
)
def test_row_chunks_are_the_rows_of_the_whole(shape, blocksize, double_quant, size):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, "nf4", blocksize, double_quant)
    with chunks_of(size):
        parts = [(rows, chunk.clone()) for rows, chunk in quantized.row_chunks(torch.bfloat16)]
    for rows, chunk in parts:
        assert torch.equal(chunk, quantized.dequantize(torch.bfloat16)[rows])
        assert rows.start * shape[1] % blocksize == 0
    assert sum(len(chunk) for _, chunk in parts) == shape[0]


def test_a_chunk_has_the_size_asked_for_and_whoever_watches_sees_each():
    quantized = quantize(torch.ones(64, 512))
    entered = []

    @contextmanager
    def watch():
        entered.append("in")
        yield
        entered.append("out")

    token = kernels.UNPACKING.set(watch)
    try:
        with chunks_of(4096):
            seen = [(len(chunk), entered[-1]) for _, chunk in quantized.row_chunks()]
    finally:
        kernels.UNPACKING.reset(token)
    assert seen == [(8, "out")] * 8
    assert entered == ["in", "out"] * 9, "once for the constants, once for each chunk"


def test_off_the_cpu_a_matrix_is_unpacked_in_few_chunks():
    """A card takes as long to start a call as for a million weights: chunks of a CPU starve it."""
    with torch.device("meta"):
        tensors = {"packed": torch.empty(2**23, 1), "levels": torch.empty(16)}
        wide = quantize(torch.ones(4096, 4096, device="cpu"), double_quant=False)
        wide = wide.with_tensors(tensors | {"absmax": torch.empty(2**18)})
    assert len(list(wide.row_chunks())) == 1


def test_chunks_meet_without_a_seam():
    weight = torch.randn(2 * kernels.CHUNK + 64, generator=torch.Generator().manual_seed(0))
    levels = get_levels("nf4")
    packed, absmax = kernels.quantize_blockwise(weight, levels, 64)
    wanted = bw.quantize_blockwise(weight, levels, 64)
    assert torch.equal(packed, wanted[0]) and torch.equal(absmax, wanted[1])
    arguments = (packed, absmax, levels, 64, weight.shape, weight.dtype)
    assert torch.equal(
        kernels.dequantize_blockwise(*arguments), bw.dequantize_blockwise(*arguments)
    )


def test_a_short_last_block_is_divided_here_too():
    """Pairs for which dividing and multiplying by the reciprocal round to different codes."""
    levels = get_levels("nf4")
    absmax = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 0.5
    midpoint = (levels[8] + levels[9]) / 2
    x = torch.nextafter(absmax * midpoint, torch.tensor(9.0))
    differs = (x / absmax > midpoint) & ~(x * (1 / absmax) > midpoint)
    assert differs.sum() > 10
    for pair in torch.stack([absmax, x], dim=1)[differs]:
        packed, _ = kernels.quantize_blockwise(pair, levels, 32)
        assert torch.equal(packed, bw.quantize_blockwise(pair, levels, 32)[0])


def test_memory_layout_and_gradient_do_not_matter():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    levels = get_levels("nf4")
    expected = bw.quantize_blockwise(weight.T.contiguous(), levels, 64)
    actual = kernels.quantize_blockwise(weight.requires_grad_().T, levels, 64)
    for ours, wanted in zip(actual, expected, strict=True):
        assert torch.equal(ours, wanted) and not ours.requires_grad


def test_more_levels_than_a_nibble_can_name_are_refused():
    with pytest.raises(QuantizationError, match="4 bits, too few for 17"):
        kernels.quantize_blockwise(torch.ones(64), torch.linspace(-1, 1, 17), 64)


# Chapter 5


def layers(**settings) -> tuple[QLoRALinear, FusedQLoRALinear]:
    """The definition and its twin, with the same weights and a B that is not zero."""
    torch.manual_seed(0)
    linear = nn.Linear(320, 96, bias=settings.pop("bias", True))
    plain = QLoRALinear(linear, 8, 16, **settings)
    nn.init.normal_(plain.lora_B, std=0.1)
    fused = FusedQLoRALinear(plain.weight, 8, 16, bias=plain.bias, **settings)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def run(layer, dtype=torch.float32, autocast=False, x_learns=True):
    """Every number that a step computes: the output and all gradients."""
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 320, generator=numbers).to(dtype).requires_grad_(x_learns)
    torch.manual_seed(2)  # the dropout mask
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(torch.randn(y.shape, generator=numbers).to(y.dtype))
    found = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad} | found


@pytest.mark.parametrize("size", [None, 4096])
@pytest.mark.parametrize("x_learns", [True, False])
@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
def test_the_fused_product_equals_the_two_it_is_made_of(bias, x_learns, size):
    plain, fused = layers(bias=bias != "none")
    if bias == "trained":
        plain.bias.requires_grad_()
        fused.bias.requires_grad_()
    with chunks_of(size):
        found, wanted = run(fused, x_learns=x_learns), run(plain, x_learns=x_learns)
    assert found.keys() == wanted.keys() and ("bias" in found) == (bias == "trained")
    assert (found["x"] is None) == (not x_learns)
    for name, tensor in wanted.items():
        # Sums of up to 320 products of size 1, in another order.
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "compute_dtype": torch.float32},
        {"compute_dtype": torch.bfloat16},
        {"autocast": True},
        {"lora_dropout": 0.3},
    ],
    ids=str,
)
def test_where_base_and_adapter_see_two_inputs_the_twin_is_the_definition_to_the_bit(case):
    steps = {key: case[key] for key in ("dtype", "autocast") if key in case}
    settings = {key: value for key, value in case.items() if key not in steps}
    plain, fused = layers(**settings)
    found, wanted = run(fused, **steps), run(plain, **steps)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_dropout_in_evaluation_is_no_reason_not_to_fuse(monkeypatch):
    _, fused = layers(lora_dropout=0.3)
    x = torch.randn(2, 320, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(QLoRALinear, "forward", None)
    fused.eval()(x)
    with pytest.raises(TypeError):
        fused.train()(x)


def test_gradcheck_of_the_fused_product():
    """Finite differences in float64 against the gradients written by hand."""
    torch.manual_seed(0)
    layer = FusedQLoRALinear(nn.Linear(6, 4), 3, 6, blocksize=32).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    bias = layer.bias.detach().clone().requires_grad_()

    def output(x, lora_A, lora_B, bias):
        parameters = {"lora_A": lora_A, "lora_B": lora_B, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x,))

    assert torch.autograd.gradcheck(output, (x, layer.lora_A, layer.lora_B, bias))


# Compiled, and in little memory


# torch.compile wants a C++ compiler and the header that modules for Python are compiled with.
CAN_COMPILE = (shutil.which("g++") or shutil.which("clang++")) and (
    Path(sysconfig.get_path("include")) / "Python.h"
).exists()


@pytest.mark.skipif(not CAN_COMPILE, reason="no C++ compiler, or no Python.h")
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4"])
def test_compiled_code_gives_the_same_bytes(name):
    # Two whole chunks, which are compiled, some blocks that are not, and a short last one.
    weight = torch.randn(8 * kernels.CHUNK + 5 * 64 + 7).to(torch.bfloat16)
    levels = get_levels(name)
    for blocksize in bw.BLOCKSIZES if name == "nf4" else (64, 4096):
        plain = bw.quantize_blockwise(weight, levels, blocksize)
        compiled = kernels.quantize_blockwise(weight, levels, blocksize, compiled=True)
        assert torch.equal(plain[0], compiled[0]) and torch.equal(plain[1], compiled[1])


def test_without_a_compiler_the_way_out_is_named(tmp_path):
    script = """
import torch
from qlora_edu import kernels, quantize
from qlora_edu.errors import NotReadyError

try:
    quantize(torch.randn(4 * kernels.CHUNK), compiled=True)
except NotReadyError as error:
    print(error)
"""
    # A compiler that always fails, and no cache of what another one has compiled before.
    broken = os.environ | {"CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=broken)
    assert "apt-get install g++" in run.stdout and "the result is the same" in run.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is counted in KiB on Linux alone")
def test_a_large_tensor_needs_little_memory_beside_it():
    script = """
import resource, torch
from qlora_edu import quantize

weight = torch.ones(2**28)
quantize(weight[:2**20])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantized = quantize(weight)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((1024 * (after - before) - quantized.nbytes) / weight.nbytes)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # Half of it is what was promised. A fifth leaves room for the double quantisation of its
    # constants, and shows a temporary of even one byte per weight.
    assert float(run.stdout) < 0.2
