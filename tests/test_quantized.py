"""Chapter 3: the tensor in 4 bits equals bitsandbytes' state, and files go both ways."""

import copy
import json
import pickle

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import blocksizes, tensors, unhurried, weights

from qlora_edu import QuantizedTensor, blockwise, double_quant, kernels, quantize
from qlora_edu.blockwise import BLOCKSIZES, DTYPES
from qlora_edu.codebooks import LEVELS
from qlora_edu.double_quant import NESTED_BLOCKSIZE, QuantizedAbsmax
from qlora_edu.errors import QuantizationError


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bitsandbytes_quantize(weight, name="nf4", blocksize=64, double_quant=True):
    return bnb_functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=name, compress_statistics=double_quant
    )


def assert_same_state(quantized, packed, state):
    """Compare every tensor with bitsandbytes' own, to the bit."""
    assert torch.equal(quantized.packed, packed)
    assert quantized.double_quant == state.nested
    if state.nested:
        assert torch.equal(quantized.constants.codes, state.absmax)
        assert torch.equal(quantized.constants.nested_absmax, state.state2.absmax)
        assert torch.equal(quantized.constants.offset, state.offset)
        assert torch.equal(quantized.constants.levels, state.state2.code)
    else:
        assert torch.equal(quantized.constants, state.absmax)


@settings(unhurried, max_examples=80)
@given(weight=weights(), blocksize=blocksizes, name=st.sampled_from(["nf4", "fp4"]))
@example(weight=normal(300, 1001), blocksize=32, name="nf4")  # 37 nested blocks, the last short
def test_double_quantised_state_equals_bitsandbytes_to_the_byte(weight, blocksize, name):
    quantized = quantize(weight, name, blocksize)
    packed, state = bitsandbytes_quantize(weight, name, blocksize)
    if state.offset.isfinite():
        assert_same_state(quantized, packed, state)
        decoded = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(quantized.absmax, decoded)
    else:
        # Near 3e38 their float32 sum overflows and the tensor is lost. Ours must not be.
        assert torch.equal(quantized.packed, packed)
        assert quantized.absmax.isfinite().all()


def test_constants_near_the_end_of_float32_survive_where_their_sum_does_not():
    weight = torch.full((4, 64), 3e38)
    weight[1] = 1.0
    assert bitsandbytes_quantize(weight)[1].offset.isinf()
    quantized = quantize(weight)
    # 1/4 of a step of 0.0141 around the offset is what 8 bits can promise.
    assert torch.allclose(quantized.absmax[[0, 2, 3]], torch.tensor(3e38), rtol=0.01)
    assert quantized.dequantize().isfinite().all()


def test_double_quantisation_costs_little_and_saves_0_373_bits():
    weight = normal(1024, 1024)
    plain, double = quantize(weight, double_quant=False), quantize(weight)
    assert plain.bits_per_weight == 4 + 32 / 64
    assert double.bits_per_weight == 4 + 8 / 64 + 32 / (64 * 256) == 4.126953125
    errors = [(q.dequantize() - weight).square().mean().sqrt().item() for q in (plain, double)]
    # Root mean square errors over 2**20 weights, known to about 1e-4.
    assert errors == pytest.approx([0.09198, 0.09200], abs=3e-4)
    assert 0 < errors[1] - errors[0] < 1e-4


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_nbytes_adds_up(blocksize):
    n = 3 * 4096 + 5
    blocks = -(-n // blocksize)
    quantized = quantize(normal(n), blocksize=blocksize)
    assert quantized.nbytes == (n + 1) // 2 + blocks + 4 * -(-blocks // NESTED_BLOCKSIZE)
    plain = quantize(normal(n), blocksize=blocksize, double_quant=False)
    assert plain.nbytes == (n + 1) // 2 + 4 * blocks
    assert plain.bits_per_weight == 8 * plain.nbytes / n


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (128,), (127,), (3, 0), (1, 1), (2, 3, 5), (10, 100), (0, 4)]
)
def test_shapes_and_dtypes_come_back_exactly(shape, double_quant):
    dtype = torch.float16
    weight = normal(*shape, dtype=dtype) if shape else torch.tensor(-2.5, dtype=dtype)
    quantized = quantize(weight, double_quant=double_quant)
    values = quantized.dequantize()
    assert values.shape == quantized.shape == weight.shape
    assert values.dtype == quantized.dtype == weight.dtype
    assert quantized.absmax.dtype == torch.float32
    assert quantized.dequantize(torch.float64).dtype == torch.float64
    again = QuantizedTensor.from_state_dict(quantized.state_dict())
    assert again.shape == weight.shape and torch.equal(again.dequantize(), values)
    if shape == ():
        assert values == weight


def test_an_empty_tensor_holds_nothing():
    quantized = quantize(torch.empty(0, 7))
    assert quantized.nbytes == 0 and quantized.bits_per_weight == 0
    assert quantized.constants.offset == 0


@pytest.mark.parametrize("name", LEVELS)
def test_every_codebook_quantises_and_goes_through_a_file(name, tmp_path):
    weight = normal(65, 33, dtype=torch.bfloat16)
    quantized = quantize(weight, name, blocksize=32)
    assert quantized.levels_name == name
    save_file(quantized.state_dict("layer.weight"), tmp_path / "q.safetensors")
    again = QuantizedTensor.from_state_dict(load_file(tmp_path / "q.safetensors"), "layer.weight")
    assert repr(again) == repr(quantized)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    # 0.17 of a block's largest weight is half the widest gap, for E3M0 0.25.
    assert (again.dequantize() - weight).abs().max() < 0.26 * weight.abs().max()


def test_af4_follows_the_blocksize():
    weight = normal(4096)
    assert not torch.equal(quantize(weight, "af4", 64).levels, quantize(weight, "af4", 128).levels)


def test_levels_may_be_a_tensor(tmp_path):
    ternary = torch.tensor([-1.0, 0.0, 1.0])
    weight = torch.tensor([2.0, -2.0, 0.5, 0.0])
    quantized = quantize(weight, ternary, double_quant=False)
    assert quantized.dequantize().tolist() == [2, -2, 0, 0]
    assert quantized.levels_name == "custom"
    state = quantized.state_dict()
    assert torch.equal(QuantizedTensor.from_state_dict(state).dequantize(), quantized.dequantize())
    state["weight"] = torch.full_like(state["weight"], 0xFF)
    with pytest.raises(QuantizationError, match="beyond the 3 levels"):
        QuantizedTensor.from_state_dict(state)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_state_dict_equals_the_one_of_bitsandbytes(name, dtype, double_quant):
    """Every key and every byte, the JSON of the metadata included."""
    weight = normal(96, 64, dtype=dtype)
    packed, state = bitsandbytes_quantize(weight, name, 128, double_quant)
    theirs = {"w": packed} | {f"w.{k}": v for k, v in state.as_dict(packed=True).items()}
    ours = quantize(weight, name, 128, double_quant).state_dict("w")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_reads_our_file(double_quant, tmp_path):
    weight = normal(128, 64)
    quantized = quantize(weight, double_quant=double_quant)
    save_file(quantized.state_dict("proj.weight"), tmp_path / "ours.safetensors")
    tensors = load_file(tmp_path / "ours.safetensors")

    def stats():
        # from_dict takes the metadata out of the dictionary that it is given.
        return {k.removeprefix("proj."): v for k, v in tensors.items() if k != "proj.weight"}

    state = bnb_functional.QuantState.from_dict(stats(), device=torch.device("cpu"))
    packed, expected = bitsandbytes_quantize(weight, double_quant=double_quant)
    assert state == expected
    assert_same_state(quantized, packed, state)

    layer = bnb.nn.Linear4bit(64, 128, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        tensors["proj.weight"], stats(), device="cpu", module=layer
    )
    x = normal(5, 64, seed=1).requires_grad_()  # with a gradient, so that no repacking happens
    assert torch.equal(layer(x), torch.nn.functional.linear(x, quantized.dequantize()))


@pytest.mark.parametrize("double_quant", [True, False])
def test_we_read_a_file_of_bitsandbytes(double_quant, tmp_path):
    layer = bnb.nn.Linear4bit(
        64, 128, bias=True, quant_type="nf4", compress_statistics=double_quant
    )
    weight = layer.weight.data.clone()
    save_file(layer.to("cpu").state_dict(prefix="up."), tmp_path / "theirs.safetensors")
    quantized = QuantizedTensor.from_state_dict(
        load_file(tmp_path / "theirs.safetensors"), "up.weight"
    )
    assert_same_state(quantized, layer.weight.data, layer.weight.quant_state)
    assert torch.equal(
        quantized.dequantize(), quantize(weight, double_quant=double_quant).dequantize()
    )


def test_bitsandbytes_refuses_a_codebook_it_does_not_have():
    state = quantize(normal(64), "int4").state_dict()
    stats = {key.removeprefix("weight."): t for key, t in state.items() if key != "weight"}
    with pytest.raises(ValueError, match="bitsandbytes__int4"):
        bnb_functional.QuantState.from_dict(stats, device=torch.device("cpu"))


def test_we_read_packed_weights_stored_under_a_float_dtype():
    """Sharded training asks bitsandbytes for `bnb_4bit_quant_storage=bfloat16`."""
    weight = normal(64, 64)
    packed, state = bnb_functional.quantize_4bit(
        weight, quant_type="nf4", quant_storage=torch.bfloat16
    )
    assert packed.dtype == torch.bfloat16
    tensors = {"w": packed} | {f"w.{k}": v for k, v in state.as_dict(packed=True).items()}
    quantized = QuantizedTensor.from_state_dict(tensors, "w")
    assert torch.equal(quantized.packed, quantize(weight).packed)


def test_the_state_dict_may_hold_other_layers_too():
    first, second = quantize(normal(64)), quantize(normal(32, seed=1), "fp4")
    state = first.state_dict("a.weight") | second.state_dict("a.weight2") | {"b": torch.ones(1)}
    for prefix, quantized in (("a.weight", first), ("a.weight2", second)):
        again = QuantizedTensor.from_state_dict(state, prefix)
        assert torch.equal(again.dequantize(), quantized.dequantize())


METADATA = "weight.quant_state.bitsandbytes__nf4"


def as_metadata(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def with_metadata(state, **changes):
    metadata = json.loads(bytes(state[METADATA].tolist()))
    return state | {METADATA: as_metadata(json.dumps(metadata | changes))}


@pytest.mark.parametrize("key", sorted(quantize(torch.ones(64)).state_dict()))
def test_a_missing_key_is_named(key):
    state = quantize(normal(100)).state_dict()
    del state[key]
    if key == "weight.nested_absmax":  # then it reads as a plain absmax, of the wrong dtype
        key = "absmax is 2 x torch.uint8"
    with pytest.raises(QuantizationError, match=key.removesuffix("nf4")):
        QuantizedTensor.from_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state | {METADATA: as_metadata("{not json")},
        lambda state: state | {METADATA: torch.tensor([255, 254], dtype=torch.uint8)},
        lambda state: state | {METADATA: as_metadata("[]")},
        lambda state: state | {METADATA: as_metadata("{}")},
        lambda state: state | {METADATA + "x": state[METADATA]},
        lambda state: with_metadata(state, dtype="float64"),
        lambda state: with_metadata(state, dtype=None),
        lambda state: with_metadata(state, shape=[101]),
        lambda state: with_metadata(state, shape=[-100]),
        lambda state: with_metadata(state, shape=None),
        lambda state: with_metadata(state, shape=["a"]),
        lambda state: with_metadata(state, blocksize=65),
        lambda state: with_metadata(state, blocksize=None),
        lambda state: with_metadata(state, blocksize=32),
        lambda state: with_metadata(state, nested_blocksize=128),
        lambda state: with_metadata(state, nested_offset=None),
        lambda state: with_metadata(state, nested_offset=float("nan")),
        lambda state: with_metadata(state, quant_type="fp4"),
        lambda state: state | {"weight": state["weight"][:-1]},
        lambda state: state | {"weight.absmax": state["weight.absmax"].float()},
        lambda state: state | {"weight.absmax": state["weight.absmax"][:1]},
        lambda state: state | {"weight.nested_absmax": torch.ones(2)},
        lambda state: state | {"weight.nested_absmax": torch.tensor([torch.inf])},
        lambda state: state | {"weight.nested_quant_map": torch.ones(16)},
        lambda state: state | {"weight.quant_map": torch.ones(17)},
        lambda state: state | {"weight.quant_map": torch.full((16,), torch.nan)},
    ],
)
def test_a_damaged_state_dict_is_refused(damage):
    state = quantize(normal(100)).state_dict()
    with pytest.raises(QuantizationError, match="weight"):
        QuantizedTensor.from_state_dict(damage(state))


def test_bad_input_is_refused_by_kind():
    weight = normal(4, 4)
    with pytest.raises(QuantizationError, match="nf5"):
        quantize(weight, "nf5")
    with pytest.raises(QuantizationError, match="100"):
        quantize(weight, blocksize=100)
    with pytest.raises(QuantizationError, match="'64'"):
        quantize(weight, "af4", blocksize="64")
    with pytest.raises(QuantizationError, match="int64"):
        quantize(weight.long())
    with pytest.raises(QuantizationError, match="complex64"):
        quantize(weight.to(torch.complex64))
    weight[3, 1] = torch.nan
    with pytest.raises(QuantizationError, match=r"nan.*\(3, 1\)"):
        quantize(weight)


def test_nothing_is_shared_with_the_weight_or_between_tensors():
    weight = normal(64, 64)
    quantized = quantize(weight)
    values = quantized.dequantize()
    weight.zero_()
    assert torch.equal(quantized.dequantize(), values)
    copied = copy.deepcopy(quantized)
    quantized.packed.zero_()
    assert torch.equal(copied.dequantize(), values)


def test_repr_says_what_it_is_in_one_line():
    assert repr(quantize(torch.ones(256, 256))) == (
        "QuantizedTensor(nf4, shape=(256, 256), dtype=torch.float32, blocksize=64, "
        "4.127 bits per weight)"
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_finite_is_refused_with_its_place(bad, dtype):
    weight = torch.zeros(4, 6, dtype=dtype)
    weight[2, 5] = weight[3, 0] = bad
    with pytest.raises(QuantizationError, match=rf"2 non-finite.*{bad}.*\(2, 5\)"):
        quantize(weight)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float64, torch.complex64]
)
def test_an_unsupported_dtype_is_refused_by_name(dtype):
    with pytest.raises(QuantizationError, match=f"{dtype}.*float32, torch.float16, torch.bfloat16"):
        quantize(torch.ones(4).to(dtype))


@pytest.mark.parametrize("weight", [[1.0, 2.0], None, 3.0])
def test_what_is_no_tensor_is_refused_by_type(weight):
    with pytest.raises(QuantizationError, match=type(weight).__name__):
        quantize(weight)


@pytest.mark.parametrize("blocksize", [0, -64, 16, 63, 96, 8192, 64.0, True, "64", None, [64]])
def test_an_unsupported_blocksize_is_refused_by_value(blocksize):
    with pytest.raises(QuantizationError, match="32, 64, 128"):
        quantize(torch.ones(4), blocksize=blocksize)


# What a user of PyTorch expects


@pytest.mark.parametrize("levels", LEVELS)
def test_no_default_of_torch_reaches_a_quantised_tensor(levels):
    """Neither the default dtype nor the default device, nor the tables that are made only once."""
    weight = normal(3, 100)
    expected = quantize(weight, levels)
    for table in (double_quant.codes_of_grid, kernels._codes_in_bytes):
        table.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = quantize(weight, levels)
            state, back = found.state_dict(), found.dequantize()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert torch.equal(back, expected.dequantize())


@pytest.mark.parametrize("double_quant", [True, False])
def test_moving_to_a_device_moves_every_tensor(double_quant):
    quantized = quantize(normal(64), double_quant=double_quant)
    for device in ("meta", torch.device("meta")):
        moved = quantized.to(device)
        assert moved.device.type == "meta" and quantized.device.type == "cpu"
        assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert torch.equal(quantized.to(device="cpu").dequantize(), quantized.dequantize())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_to_refuses_a_dtype(dtype):
    with pytest.raises(QuantizationError, match=r"never converted.*use dequantize\(dtype\)"):
        quantize(normal(64)).to(dtype)


def test_to_takes_a_device_and_nothing_that_has_one():
    with pytest.raises(TypeError):
        quantize(normal(64)).to(torch.ones(1))


@pytest.mark.parametrize("double_quant", [True, False])
def test_torch_saves_it_and_loads_it_without_running_code(double_quant, tmp_path):
    quantized = quantize(normal(65, 33, dtype=torch.bfloat16), "fp4", 32, double_quant)
    torch.save({"w": quantized}, tmp_path / "q.pt")
    again = torch.load(tmp_path / "q.pt", weights_only=True)["w"]
    assert type(again) is QuantizedTensor and repr(again) == repr(quantized)
    assert (type(again.constants) is QuantizedAbsmax) == double_quant
    for name, tensor in quantized.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    assert torch.equal(pickle.loads(pickle.dumps(quantized)).dequantize(), quantized.dequantize())


def test_the_familiar_members_speak_of_the_weights_and_not_of_the_bytes():
    quantized = quantize(normal(3, 65))
    assert quantized.numel() == 195 and quantized.packed.numel() == 98
    assert quantized.shape == torch.Size([3, 65])


@pytest.mark.parametrize("double_quant", [True, False])
def test_tensors_are_named_and_not_copied(double_quant):
    quantized = quantize(normal(4, 64), double_quant=double_quant)
    again = quantized.with_tensors(quantized.tensors())
    assert all(again.tensors()[name] is tensor for name, tensor in quantized.tensors().items())
    assert len(quantized.tensors()) == (6 if double_quant else 3)
    assert torch.equal(again.dequantize(), quantized.dequantize())


@settings(unhurried, max_examples=100)
@given(weight=tensors(), blocksize=blocksizes, name=st.sampled_from(LEVELS))
@example(weight=torch.zeros(0, 7), blocksize=64, name="nf4")
def test_quantize_is_the_chapters_definition_with_its_settings(weight, blocksize, name):
    quantized = quantize(weight, name, blocksize, double_quant=False)
    packed, absmax = blockwise.quantize_blockwise(weight, quantized.levels, blocksize)
    assert torch.equal(quantized.packed, packed) and torch.equal(quantized.constants, absmax)
    wanted = blockwise.read_back(weight, quantized.levels, blocksize)
    assert torch.equal(quantized.dequantize(), wanted)
