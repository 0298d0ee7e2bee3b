"""Chapter 4: `LoRALinear` equals PEFT's layer, merges exactly, and refuses what cannot work."""

import copy
import math

import pytest
import torch
from torch import nn

from qlora_edu.errors import LoRAError
from qlora_edu.lora import HoulsbyAdapter, LoRALinear, energy_kept, low_rank_factors

IN, OUT, RANK, ALPHA = 24, 16, 4, 8  # α/r = 2: neither 1, nor α, nor r; and × 2 is exact


def make_layer(dtype=torch.float32, *, trained=True, bias=True, seed=0, **settings) -> LoRALinear:
    """A small layer; `trained` fills B, which starts at zero and would hide most mistakes."""
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(IN, OUT, bias=bias, dtype=dtype), RANK, ALPHA, **settings)
    if trained:
        nn.init.normal_(layer.lora_B)
    return layer


def peft_twin(layer: LoRALinear, lora_dropout: float = 0.0):
    """PEFT's layer over a copy of the same base, with the same A and B."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=lora_dropout)
    twin = Linear(copy.deepcopy(layer.base), "default", config, r=RANK, lora_alpha=ALPHA)
    with torch.no_grad():
        twin.lora_A["default"].weight.data = layer.lora_A.detach().clone()
        twin.lora_B["default"].weight.data = layer.lora_B.detach().clone()
    return twin


def test_forward_is_the_definition_by_hand():
    """W = I, A = [1 1], B = [1; 0], α/r = 3: (1, 2) -> (1, 2) + 3 · (1 + 2) · (1, 0) = (10, 2)."""
    layer = LoRALinear(nn.Linear(2, 2, bias=False), r=1, lora_alpha=3)
    with torch.no_grad():
        layer.base.weight.copy_(torch.eye(2))
        layer.lora_A.copy_(torch.tensor([[1.0, 1.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [0.0]]))
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [10.0, 2.0]
    assert layer.delta_weight().tolist() == [[3.0, 3.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_forward_and_gradients_equal_peft(dtype, lora_dropout):
    """The same operations in the same order, so equal to the bit, dropout mask included."""
    layer = make_layer(dtype, lora_dropout=lora_dropout)
    twin = peft_twin(layer, lora_dropout)
    outputs, gradients = [], []
    for module in (layer, twin):
        x = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
        x.requires_grad_()
        torch.manual_seed(2)  # the dropout mask
        y = module(x)
        (y.float() ** 2).sum().backward()
        outputs.append(y)
        gradients.append(x.grad)
    assert outputs[0].dtype == dtype
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(layer.lora_A.grad, twin.lora_A["default"].weight.grad)
    assert torch.equal(layer.lora_B.grad, twin.lora_B["default"].weight.grad)
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_forward_equals_peft_under_autocast():
    layer = make_layer()
    twin, x = peft_twin(layer), torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), twin(x))


def test_the_initial_values_are_those_of_peft():
    base = nn.Linear(IN, OUT)
    torch.manual_seed(3)
    layer = LoRALinear(base, RANK, ALPHA)
    twin = peft_twin(layer)
    torch.manual_seed(3)
    twin.reset_lora_parameters("default", True)
    assert torch.equal(layer.lora_A, twin.lora_A["default"].weight)
    assert layer.lora_A.abs().max() > 0
    assert not layer.lora_B.any()


def test_the_spread_of_the_initial_values():
    """Uniform in ±1/√in, so σ = 1/√(3·in)."""
    drawn = LoRALinear(nn.Linear(1024, 8), 64, 1).lora_A
    assert drawn.abs().max() <= 1 / math.sqrt(1024)
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(3 * 1024), rel=0.02)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_the_adapter_is_float32_over_any_base(base):
    layer = make_layer(base)
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.delta_weight().dtype == torch.float32
    assert layer.base.weight.dtype == base


def test_a_new_layer_is_its_base_to_the_bit():
    layer = make_layer(trained=False)
    x = torch.randn(7, IN)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (2, 3, 4, IN), (0, IN), (2, 0, IN)])
def test_leading_dimensions_are_kept(shape):
    layer = make_layer()
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    dense = x @ (layer.base.weight + layer.delta_weight()).T + layer.base.bias
    # Sums of 24 products in another order: a few units in the last place of values near 10.
    torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-5)


def test_dropout_acts_on_the_input_of_the_adapter_alone():
    """While B = 0 the adapter is silent and dropout cannot show: the base sees the whole of x."""
    layer = make_layer(trained=False, lora_dropout=0.5)
    x = torch.randn(7, IN)
    assert torch.equal(layer(x), layer.base(x))
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_doubling_the_rank_at_the_same_alpha_halves_the_scaling():
    base = nn.Linear(IN, OUT)
    assert [LoRALinear(base, r, 16).scaling for r in (4, 8, 16, 32)] == [4.0, 2.0, 1.0, 0.5]


def test_only_the_adapter_is_trained():
    layer = make_layer()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(torch.randn(5, IN)).square().sum().backward()
    optimizer.step()
    changed = {n for n, value in layer.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"lora_A", "lora_B"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_the_weight_to_the_bit(dtype):
    """Taking ΔW off again would not: on this very weight it misses, and the test says so."""
    layer = make_layer(dtype)
    before = layer.base.weight.clone()
    subtracted = (before + layer.delta_weight()).to(dtype) - layer.delta_weight().to(dtype)
    assert not torch.equal(subtracted, before)
    for _ in range(3):
        layer.merge()
        assert not torch.equal(layer.base.weight, before)
        with torch.no_grad():
            layer.lora_B.add_(1)  # what A and B become while merged must not matter
        layer.unmerge()
        assert torch.equal(layer.base.weight, before)
    assert layer.base.weight.dtype == dtype and not layer.base.weight.requires_grad


def test_a_merged_layer_computes_the_same():
    layer = make_layer().eval()
    x = torch.randn(3, 5, IN)
    apart = layer(x)
    layer.merge()
    # The same sum in another order of rounding, in float32 and of size about 10.
    torch.testing.assert_close(layer(x), apart, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), layer.base(x))
    layer.unmerge()
    assert torch.equal(layer(x), apart)


def test_the_merged_weight_equals_peft():
    layer = make_layer()
    twin = peft_twin(layer)
    twin.merge(safe_merge=True)
    layer.merge()
    assert torch.equal(layer.base.weight, twin.base_layer.weight)


def test_a_merge_into_bfloat16_rounds_once():
    """PEFT rounds ΔW to bfloat16 first and then the sum, so its merged weight is a little worse."""
    layer = make_layer(torch.bfloat16)
    twin = peft_twin(layer)
    exact = layer.base.weight.double() + layer.delta_weight().double()
    layer.merge()
    twin.merge(safe_merge=True)
    assert torch.equal(layer.base.weight, exact.to(torch.bfloat16))
    error, error_of_peft = (
        (weight.double() - exact).abs().mean()
        for weight in (layer.base.weight, twin.base_layer.weight)
    )
    assert error < error_of_peft


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_merging_nan_or_infinity_is_refused_and_changes_nothing(name, value):
    layer = make_layer()
    before = layer.base.weight.clone()
    with torch.no_grad():
        getattr(layer, name)[0, 0] = value
    with pytest.raises(LoRAError, match="NaN or infinity"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.base.weight, before)


def test_a_merge_that_overflows_float16_is_refused():
    layer = make_layer(torch.float16)
    with torch.no_grad():
        layer.lora_B.fill_(1e6)
    with pytest.raises(LoRAError, match="NaN or infinity"):
        layer.merge()


def test_merging_twice_and_unmerging_the_unmerged_are_refused():
    layer = make_layer()
    with pytest.raises(LoRAError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(LoRAError, match="already merged"):
        layer.merge()


def test_state_dict_round_trip():
    layer, other = make_layer(), make_layer(seed=9)
    assert list(layer.state_dict()) == ["lora_A", "lora_B", "base.weight", "base.bias"]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, IN)
    assert torch.equal(other(x), layer(x))


def test_a_layer_saved_while_merged_does_not_apply_its_adapter_twice():
    model, other = nn.Sequential(make_layer()), nn.Sequential(make_layer(seed=9))
    before = copy.deepcopy(model.state_dict())
    model[0].merge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other.load_state_dict(model.state_dict())
    x = torch.randn(5, IN)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(LoRAError, match="unmerge"):
        model.load_state_dict(before)


def test_the_weight_kept_while_merged_moves_with_the_layer():
    layer = make_layer()
    layer.merge()
    layer.to("meta")
    assert layer.unmerged_weight.device.type == "meta"


def test_loading_another_rank_or_another_base_is_refused_and_changes_nothing():
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    another_rank = LoRALinear(nn.Linear(IN, OUT), 8, ALPHA).state_dict()
    another_base = LoRALinear(nn.Linear(IN + 1, OUT), RANK, ALPHA).state_dict()
    with pytest.raises(LoRAError, match=r"lora_A has shape \(8, 24\).*r=4.*\(4, 24\)"):
        layer.load_state_dict(another_rank)
    with pytest.raises(LoRAError, match=r"lora_A has shape \(4, 25\)"):
        layer.load_state_dict(another_base)
    with pytest.raises(LoRAError, match=r"base.weight has shape"):
        layer.load_state_dict({**before, "base.weight": torch.zeros(OUT, IN + 1)})
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_loading_nan_is_refused(name):
    layer = make_layer()
    broken = copy.deepcopy(layer.state_dict())
    broken[name][0, 0] = math.nan
    with pytest.raises(LoRAError, match=f"0.{name} .* NaN"):
        nn.Sequential(layer).load_state_dict({f"0.{key}": value for key, value in broken.items()})


@pytest.mark.parametrize("r", [0, -1, 2.0, True, None])
def test_a_bad_rank_is_refused(r):
    with pytest.raises(LoRAError, match=f"not r={r!r}, "):
        LoRALinear(nn.Linear(4, 4), r, 1)


@pytest.mark.parametrize("lora_alpha", [0, -1, math.nan, math.inf, "32", None])
def test_a_bad_alpha_is_refused(lora_alpha):
    with pytest.raises(LoRAError, match=f"lora_alpha={lora_alpha!r}, "):
        LoRALinear(nn.Linear(4, 4), 1, lora_alpha)


@pytest.mark.parametrize("lora_dropout", [-0.1, 1.0, 1.5, math.nan])
def test_a_bad_dropout_is_refused(lora_dropout):
    with pytest.raises(LoRAError, match=f"lora_dropout={lora_dropout!r}$"):
        LoRALinear(nn.Linear(4, 4), 1, 1, lora_dropout=lora_dropout)


def test_what_is_not_a_plain_linear_is_refused():
    from bitsandbytes.nn import Linear4bit

    for base in (nn.Embedding(4, 4), torch.randn(4, 4), Linear4bit(64, 64), make_layer()):
        with pytest.raises(LoRAError, match=type(base).__name__):
            LoRALinear(base, 1, 1)


@pytest.mark.parametrize("x", [torch.ones(3, IN + 1), torch.tensor(1.0)])
def test_an_input_of_the_wrong_width_is_refused(x):
    with pytest.raises(LoRAError, match="last dimension must be 24"):
        make_layer()(x)


def test_an_integer_input_is_refused():
    with pytest.raises(LoRAError, match="int64"):
        make_layer()(torch.ones(3, IN, dtype=torch.int64))


# Houlsby's adapter, the rival


def trained_houlsby(dtype=torch.float32) -> HoulsbyAdapter:
    torch.manual_seed(1)
    adapter = HoulsbyAdapter(nn.Linear(6, 5).to(dtype), bottleneck=3)
    nn.init.normal_(adapter.up.weight)
    nn.init.normal_(adapter.up.bias)
    return adapter


def test_houlsby_is_its_formula():
    adapter, x = trained_houlsby(), torch.randn(2, 7, 6)
    h = x @ adapter.base.weight.T + adapter.base.bias
    inner = torch.nn.functional.gelu(h @ adapter.down.weight.T + adapter.down.bias)
    expected = h + inner @ adapter.up.weight.T + adapter.up.bias
    # Three products in float32, summed in another order.
    torch.testing.assert_close(adapter(x), expected, rtol=1e-5, atol=1e-6)


def test_houlsby_trains_its_two_matrices_and_not_the_base():
    adapter = trained_houlsby()
    adapter(torch.randn(3, 6)).square().sum().backward()
    trained = {name for name, p in adapter.named_parameters() if p.requires_grad}
    assert trained == {"down.weight", "down.bias", "up.weight", "up.bias"}
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters() if p.requires_grad)
    assert adapter.base.weight.grad is None
    # A frozen base still passes gradients on.
    x = torch.randn(3, 6, requires_grad=True)
    adapter(x).sum().backward()
    assert x.grad.any()


def test_houlsby_cannot_be_folded_into_one_matrix():
    adapter = trained_houlsby()
    x = torch.randn(4, 6)
    zero = adapter(torch.zeros(1, 6))
    # A linear map (less its constant) would give twice as much for twice the input.
    assert not torch.allclose(adapter(2 * x) - zero, 2 * (adapter(x) - zero), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_houlsby_keeps_the_dtype_of_its_base(dtype):
    adapter = trained_houlsby(dtype)
    assert adapter(torch.randn(2, 6, dtype=dtype)).dtype == dtype
    assert adapter.down.weight.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("bottleneck", [0, -1, True, 2.0, None])
def test_a_bad_bottleneck_is_refused(bottleneck):
    with pytest.raises(LoRAError, match="bottleneck must be a whole number"):
        HoulsbyAdapter(nn.Linear(4, 4), bottleneck)


# The best change of a given rank


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_no_change_of_the_same_rank_comes_closer(shape):
    """Eckart and Young: what is left is what the dropped singular values hold."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    sizes = torch.linalg.svdvals(matrix)
    for r in range(1, min(shape) + 1):
        B, A = low_rank_factors(matrix, r)
        assert B.shape == (shape[0], r) and A.shape == (r, shape[1])
        error = (matrix - B @ A).norm()
        torch.testing.assert_close(error, sizes[r:].norm(), rtol=0, atol=1e-10)
        kept = 1 - error**2 / matrix.square().sum()
        torch.testing.assert_close(energy_kept(sizes)[r - 1], kept, rtol=0, atol=1e-12)
        for _ in range(20):  # the best B for a random A is no better
            strip = torch.randn(r, shape[1], dtype=torch.float64)
            rival = matrix @ torch.linalg.pinv(strip) @ strip
            assert (matrix - rival).norm() >= error - 1e-10
