"""Chapter 2: one weight is found in its byte, in memory and on disk; and what blocks cost."""

import json

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_edu import quantize
from qlora_edu.blockwise import DTYPES, dequantize_blockwise, quantize_blockwise
from qlora_edu.codebooks import LEVELS, get_levels
from qlora_edu.errors import QuantizationError
from qlora_edu.files.inspector import inspect_file, inspect_weight


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def every_index(shape):
    return torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape)).tolist()


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("shape", [(7,), (5, 21), (3, 4, 11)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_found_where_reading_the_whole_tensor_finds_it(name, shape, dtype):
    weight, levels = random(*shape).to(dtype), get_levels(name, 32)
    packed, absmax = quantize_blockwise(weight, levels, 32)
    whole = dequantize_blockwise(packed, absmax, levels, 32, shape, dtype)
    for position, index in enumerate(every_index(shape)):
        found = inspect_weight(packed, absmax, levels, 32, shape, index, dtype)
        assert found.position == position and found.file_position is None
        assert found.dequantized == whole[tuple(index)].item()
        byte = packed.flatten()[position // 2].item()
        assert (found.byte, found.value) == (position // 2, byte)
        assert found.code == (byte >> 4 if found.half == "high" else byte & 15)
        assert found.half == ("high" if position % 2 == 0 else "low")
        assert found.level == levels[found.code].item()
        assert found.absmax == absmax[found.block].item()


@pytest.mark.parametrize("index", [(3, 0), (0, 5), (-4, 0), (-1, 0), (0,), (0, 0, 0)])
def test_a_place_that_is_not_there_is_refused(index):
    packed, absmax = quantize_blockwise(random(3, 5), get_levels("nf4"), 64)
    with pytest.raises(QuantizationError, match=r"no weight at index .* shape \(3, 5\)"):
        inspect_weight(packed, absmax, get_levels("nf4"), 64, (3, 5), index)


def test_too_few_bytes_or_levels_are_refused():
    levels = get_levels("nf4")
    packed, absmax = quantize_blockwise(random(130), levels, 64)
    with pytest.raises(QuantizationError, match="64 byte"):
        inspect_weight(packed[:64], absmax, levels, 64, (130,), (129,))
    with pytest.raises(QuantizationError, match=r"2 constant\(s\)"):
        inspect_weight(packed, absmax[:2], levels, 64, (130,), (129,))
    with pytest.raises(QuantizationError, match="8 levels .*index 15"):
        inspect_weight(torch.tensor([[0xF0]]), torch.ones(1), levels[:8], 64, (1,), (0,))


def test_what_it_prints_has_the_byte_in_hexadecimal_and_its_nibble_in_brackets():
    packed, absmax = quantize_blockwise(torch.tensor([-2.0, 2.0]), get_levels("nf4"), 64)
    first, second = (
        str(inspect_weight(packed, absmax, get_levels("nf4"), 64, (2,), (i,))) for i in (0, 1)
    )
    assert "0x0F = [0000] 1111" in first and "0x0F = 0000 [1111]" in second
    assert "code         0, the high nibble" in first
    assert "dequantised  -2" in first and "dequantised  +2" in second


@pytest.fixture(scope="module")
def linear4bit(tmp_path_factory):
    """A file with a layer that bitsandbytes quantised and another tensor before it."""
    folder = tmp_path_factory.mktemp("file")
    layers = {}
    for double_quant in (False, True):
        layer = bnb.nn.Linear4bit(
            128, 96, bias=False, quant_type="nf4", compress_statistics=double_quant
        )
        layer.weight.data.copy_(random(96, 128, seed=3))
        layer = layer.to("cpu")
        state = {f"up.{key}": value.contiguous() for key, value in layer.state_dict().items()}
        path = folder / f"{'double' if double_quant else 'plain'}.safetensors"
        save_file(state | {"a_norm": torch.ones(7)}, path)
        layers[double_quant] = (path, layer)
    return layers


def test_the_file_of_bitsandbytes_is_read_byte_by_byte(linear4bit):
    path, layer = linear4bit[False]
    weight = random(96, 128, seed=3)
    packed, absmax = quantize_blockwise(weight, get_levels("nf4"), 64)
    whole = bnb_functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    content = path.read_bytes()
    for index in ((0, 0), (0, 1), (0, 64), (1, 0), (47, 77), (95, 127)):
        found = inspect_file(path, "up.weight", index)
        here = inspect_weight(packed, absmax, get_levels("nf4"), 64, (96, 128), index)
        assert found._replace(file_position=None) == here
        assert content[found.file_position] == found.value
        assert found.dequantized == whole[index].item()
        assert f"byte {found.file_position} of the file" in str(found)


def test_a_nibble_changed_on_disk_changes_one_weight(linear4bit, tmp_path):
    path, _ = linear4bit[False]
    copy = tmp_path / "changed.safetensors"
    content = bytearray(path.read_bytes())
    found = inspect_file(path, "up.weight", (10, 20))
    content[found.file_position] = (15 - found.code << 4) | (found.value & 15)
    copy.write_bytes(content)

    def whole(file):
        state = load_file(file)
        return dequantize_blockwise(
            state["up.weight"],
            state["up.weight.absmax"],
            state["up.weight.quant_map"],
            64,
            (96, 128),
            torch.float32,
        )

    changed = (whole(path) != whole(copy)).nonzero().tolist()
    assert changed == [[10, 20]]
    assert inspect_file(copy, "up.weight", (10, 20)).code == 15 - found.code
    neighbour = inspect_file(copy, "up.weight", (10, 21))
    assert neighbour.file_position == found.file_position
    assert neighbour.code == inspect_file(path, "up.weight", (10, 21)).code


def test_our_own_file_is_read_too(tmp_path):
    weight = random(33, 5).to(torch.bfloat16)
    quantized = quantize(weight, "fp4", blocksize=32, double_quant=False)
    path = tmp_path / "ours.safetensors"
    save_file(quantized.state_dict("layer.weight"), path)
    whole = quantized.dequantize()
    for index in every_index((33, 5))[::7]:
        assert inspect_file(path, "layer.weight", index).dequantized == whole[tuple(index)].item()


def test_double_quantised_constants_and_missing_names_are_refused(linear4bit):
    path, _ = linear4bit[True]
    with pytest.raises(QuantizationError, match="double-quantised, see chapter 3"):
        inspect_file(path, "up.weight", (0, 0))
    for name in ("down.weight", "a_norm"):
        with pytest.raises(QuantizationError, match=f"must hold '{name}' in 4 bits"):
            inspect_file(path, name, (0, 0))
    with pytest.raises(QuantizationError, match="no weight at index"):
        inspect_file(linear4bit[False][0], "up.weight", (96, 0))


def test_a_file_without_its_constants_says_which_are_missing(linear4bit, tmp_path):
    state = load_file(linear4bit[False][0])
    del state["up.weight.absmax"]
    path = tmp_path / "torn.safetensors"
    save_file(state, path)
    with pytest.raises(QuantizationError, match=r"\('up\.weight\.absmax'\)"):
        inspect_file(path, "up.weight", (0, 0))


def test_the_header_of_a_file_says_where_the_bytes_are(linear4bit):
    """What `inspect_file` relies on, said by the file itself."""
    content = linear4bit[False][0].read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    begin, end = header["up.weight"]["data_offsets"]
    assert header["up.weight"]["dtype"] == "U8" and end - begin == 96 * 128 // 2
    stored = torch.frombuffer(
        bytearray(content[8 + size + begin : 8 + size + end]), dtype=torch.uint8
    )
    assert torch.equal(stored.view(-1, 1), load_file(linear4bit[False][0])["up.weight"])
