"""Chapter 5: `QLoRALinear` is bitsandbytes and PEFT to the bit, and keeps no full copy of W."""

import copy
import gc
import itertools
import math
import warnings

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import has_avx512bf16
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import unhurried
from test_blockwise import ON_AVX512
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from qlora_edu.errors import LoRAError, QuantizationError
from qlora_edu.kernels import CHUNK_SIZE
from qlora_edu.qlora import (
    MERGE_TARGETS,
    FrozenProduct,
    FusedQLoRALinear,
    QLoRALinear,
    merge_weight,
    quantized_linear,
    replace_linear_layers,
    surviving_share,
)
from qlora_edu.quantized import quantize

IN, OUT, RANK, ALPHA = 64, 96, 8, 16  # α/r = 2: neither 1, nor α, nor r; and times 2 is exact
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def one_thread():
    """On matrices this small a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_linear(in_features=IN, out_features=OUT, dtype=torch.float32, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, dtype=dtype)


BOTH = pytest.mark.parametrize("layer_class", [QLoRALinear, FusedQLoRALinear])


def make_layer(linear: nn.Linear | None = None, layer_class=QLoRALinear, **settings) -> QLoRALinear:
    """A layer whose B is not zero: a zero B would hide most mistakes."""
    linear = make_linear() if linear is None else linear
    layer = layer_class(linear, RANK, ALPHA, **settings)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def make_linear4bit(linear: nn.Linear, compute_dtype=None, quant_type="nf4"):
    """Build bitsandbytes' layer with the same weight, with its inference kernel switched off.

    That kernel has no backward pass (see the test of it below).
    """
    twin = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype,
        quant_type=quant_type,
    )
    for name, parameter in linear.named_parameters():
        getattr(twin, name).data = parameter.detach().clone()
    twin.support_avx512bf16_for_cpu = False
    return twin.to("cpu").requires_grad_(False)  # .to quantises


def make_peft_twin(layer: QLoRALinear, linear: nn.Linear, lora_dropout: float = 0.0):
    """PEFT's adapter around bitsandbytes' layer, with the A and B of `layer`."""
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=lora_dropout)
    base = make_linear4bit(linear, layer.compute_dtype)
    twin = Linear4bit(base, "default", config, r=RANK, lora_alpha=ALPHA)
    with torch.no_grad():
        # In float32, as `get_peft_model` leaves them (autocast_adapter_dtype=True).
        twin.lora_A["default"].weight.data = layer.lora_A.detach().clone()
        twin.lora_B["default"].weight.data = layer.lora_B.detach().clone()
    return twin


def run(
    module: nn.Module, dtype=torch.float32, autocast=False, in_features=IN
) -> tuple[Tensor, ...]:
    """One forward and backward pass on fixed numbers: the output and the gradient of the input."""
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, in_features, generator=numbers).to(dtype).requires_grad_()
    torch.manual_seed(2)  # the dropout mask
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    y.backward(torch.randn(y.shape, generator=numbers).to(y.dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_product_is_the_dense_one(double_quant):
    linear = make_linear()
    quantized = quantize(linear.weight.detach(), double_quant=double_quant)
    bias = linear.bias.detach()
    dense = run(lambda x: F.linear(x, quantized.dequantize(), bias))
    ours = run(lambda x: quantized_linear(x, quantized, bias))
    assert torch.equal(ours[0], dense[0])  # the same operation on the same numbers
    # Sums of 96 products, perhaps in another order: a few units in the last place.
    torch.testing.assert_close(ours[1], dense[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 2, 6)])
def test_gradcheck_of_the_product(shape):
    """Finite differences in float64 against the backward pass."""
    torch.manual_seed(0)
    quantized = quantize(torch.randn(4, 6))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def product(x, bias):
        return quantized_linear(x, quantized, bias)

    assert torch.autograd.gradcheck(product, (x, bias))


@BOTH
def test_a_second_derivative_is_refused_and_not_wrong(layer_class):
    layer = make_layer(layer_class=layer_class)
    x = torch.randn(3, IN, requires_grad=True)
    (grad_x,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


def test_gradcheck_of_the_layer():
    torch.manual_seed(0)
    layer = make_layer(nn.Linear(6, 4), blocksize=32).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def output(x, lora_A, lora_B):
        parameters = {"lora_A": lora_A, "lora_B": lora_B}
        return torch.func.functional_call(layer, parameters, (x,))

    assert torch.autograd.gradcheck(output, (x, layer.lora_A, layer.lora_B))


@BOTH
def test_gradients_of_the_layer_are_those_of_the_dense_computation(layer_class):
    layer = make_layer(layer_class=layer_class)
    y, grad_x = run(layer)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    dense_weight = layer.weight.dequantize()
    dense_y, dense_grad_x = run(
        lambda x: F.linear(x, dense_weight + (ALPHA / RANK) * (b @ a), layer.bias)
    )
    # Sums of up to 96 products of size about 1, in another order of rounding, in float32.
    torch.testing.assert_close(y, dense_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_x, dense_grad_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_A.grad, a.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_B.grad, b.grad, rtol=1e-4, atol=1e-4)


def watch(forward, n_weights: int) -> tuple[dict[int, int], int]:
    """Run `forward` and see what it leaves behind for the backward pass.

    Returns the bytes of each storage autograd saves, by address, and the number of new floating
    storages of at least `n_weights` elements that are alive (kept on a `ctx`, say) afterwards.
    """

    def count_big() -> int:
        # Not subclasses: a compiler that ran before leaves fake tensors behind, without storage.
        alive = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
        big = [t for t in alive if t.is_floating_point() and t.numel() >= n_weights]
        return len({t.untyped_storage().data_ptr() for t in big})

    saved = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    gc.collect()
    before = count_big()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        y = forward()
    left_behind = count_big() - before
    y.sum().backward()
    return saved, left_behind


@pytest.mark.parametrize("double_quant", [True, False])
def test_nothing_but_the_packed_weight_is_kept_for_the_backward_pass(double_quant):
    quantized = quantize(torch.randn(512, 256), double_quant=double_quant)
    x = torch.randn(3, 256, requires_grad=True)
    saved, left_behind = watch(lambda: quantized_linear(x, quantized), 512 * 256)
    assert saved == {} and left_behind == 0
    assert x.grad is not None
    # The weight itself, and not one byte that was not there before.
    assert FrozenProduct.apply(x, quantized).grad_fn.quantized is quantized


@BOTH
def test_the_layer_adds_activations_only(layer_class):
    """Of a whole layer: `x` for the gradient of A, `A·x` for that of B, and no weight of W."""
    tokens, layer = 3, make_layer(layer_class=layer_class)
    x = torch.randn(tokens, IN, requires_grad=True)
    saved, left_behind = watch(lambda: layer(x), OUT * IN)
    own = itertools.chain(layer.parameters(), layer.buffers())
    there_before = {t.untyped_storage().data_ptr() for t in own}
    new_bytes = sum(size for address, size in saved.items() if address not in there_before)
    assert new_bytes == tokens * (IN + RANK) * 4
    assert left_behind == 0


def test_the_watch_sees_a_full_copy_where_there_is_one():
    quantized = quantize(torch.randn(OUT, IN))
    x = torch.randn(3, IN, requires_grad=True)
    saved, _ = watch(lambda: F.linear(x, quantized.dequantize()), OUT * IN)
    assert sum(saved.values()) == OUT * IN * 4

    class Keeper(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.weight = quantized.dequantize()
            return F.linear(x, ctx.weight)

        @staticmethod
        def backward(ctx, grad):
            return grad @ ctx.weight

    saved, left_behind = watch(lambda: Keeper.apply(x), OUT * IN)
    assert not saved and left_behind == 1


def test_nothing_is_kept_for_an_input_that_needs_no_gradient():
    quantized = quantize(torch.randn(OUT, IN))
    bias = torch.zeros(OUT, requires_grad=True)
    assert watch(lambda: quantized_linear(torch.randn(3, IN), quantized, bias), OUT * IN) == ({}, 0)
    assert not hasattr(
        FrozenProduct.apply(torch.randn(3, IN), quantized, bias).grad_fn, "quantized"
    )


@BOTH
@given(
    dtype=st.sampled_from(DTYPES),
    input_dtype=st.sampled_from(DTYPES),
    lora_dropout=st.sampled_from([0.0, 0.3]),
    autocast=st.booleans(),
)
@settings(unhurried, max_examples=36)  # there are no more
def test_forward_and_gradients_equal_bitsandbytes_with_peft(
    layer_class, dtype, input_dtype, lora_dropout, autocast
):
    """Equal to the bit, for the same operations run on the same numbers in the same order."""
    linear = make_linear(dtype=dtype)
    layer = make_layer(linear, layer_class, lora_dropout=lora_dropout, compute_dtype=dtype)
    twin = make_peft_twin(layer, linear, lora_dropout)
    y, grad_x = run(layer, input_dtype, autocast)
    peft_y, peft_grad_x = run(twin, input_dtype, autocast)
    assert y.dtype == peft_y.dtype == input_dtype
    assert torch.equal(layer.lora_A.grad, twin.lora_A["default"].weight.grad)
    assert torch.equal(layer.lora_B.grad, twin.lora_B["default"].weight.grad)
    assert layer.lora_A.grad.dtype == torch.float32
    if autocast and dtype == torch.float16:
        # Theirs goes through float16 on its way to autocast's bfloat16: one rounding more, of 2^-9.
        torch.testing.assert_close(y, peft_y, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(grad_x, peft_grad_x, rtol=2e-2, atol=2e-2)
    else:
        assert torch.equal(y, peft_y)
        assert torch.equal(grad_x, peft_grad_x)


@pytest.fixture
def small_chunks():
    token = CHUNK_SIZE.set(2**14)
    yield
    CHUNK_SIZE.reset(token)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_features", [2048, 2080, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_in_many_chunks_gives_the_product_of_the_whole(in_features, dtype, bias):
    """Rows end at block ends, whatever the width; sums over chunks come in another order."""
    linear = nn.Linear(in_features, 301, bias=bias)
    quantized = quantize(linear.weight.detach())
    assert (len(list(quantized.row_chunks())) == 1) == (in_features == 33)
    dense = quantized.dequantize(dtype)
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    y, grad_x = run(lambda x: quantized_linear(x, quantized, bias), dtype, False, in_features)
    dense_y, dense_grad_x = run(lambda x: F.linear(x, dense, bias), dtype, False, in_features)
    # A bfloat16 sum of up to ten chunks is rounded ten times, by 2^-9 of values near 1.
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.05}
    torch.testing.assert_close(y, dense_y, **close)
    torch.testing.assert_close(grad_x, dense_grad_x, **close)


@BOTH
def test_never_is_the_whole_weight_unpacked(layer_class):
    """A weight of 64 MiB in float32: what is alive at once beside the result is a sixteenth."""
    layer = layer_class(nn.Linear(4096, 4096, bias=False), r=2, lora_alpha=4)
    x = torch.randn(2, 4096, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        layer(x).sum().backward()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
    assert 2**22 < max(itertools.accumulate(changes)) < 2**23 + 2**22


def test_bitsandbytes_rounds_the_weight_in_its_backward_pass_and_we_do_not():
    """A bfloat16 weight computed in float32: its backward pass is not that of its forward pass.

    When this fails, a release has changed it: let the test above cover every pair of dtypes.
    """
    linear = make_linear(dtype=torch.bfloat16)
    quantized, bias = quantize(linear.weight.detach()), linear.bias.detach()
    y, grad_x = run(lambda x: quantized_linear(x, quantized, bias, torch.float32))
    bnb_y, bnb_grad_x = run(make_linear4bit(linear, torch.float32))
    dense_weight = quantized.dequantize(torch.float32)
    dense_y, dense_grad_x = run(lambda x: F.linear(x, dense_weight, bias.float()))
    assert torch.equal(y, dense_y) and torch.equal(bnb_y, dense_y)
    torch.testing.assert_close(grad_x, dense_grad_x, rtol=1e-5, atol=1e-5)
    error = (bnb_grad_x - dense_grad_x).abs().max().item()
    # One bfloat16 rounding, 2^-9, of weights up to 1/√64, averaged out over a sum of 96.
    assert 1e-4 < error < 1e-2


@pytest.mark.skipif(not ON_AVX512, reason="the kernel at fault is the one for AVX-512")
def test_bitsandbytes_is_wrong_where_the_width_is_no_multiple_of_the_block_and_we_are_not():
    """Its CPU kernel starts a new block at each row. When this fails, a release has fixed it."""
    linear = make_linear(in_features=96)
    layer = make_layer(linear)
    with torch.no_grad():
        layer.lora_B.zero_()
    y, grad_x = run(layer, in_features=96)
    quantized = quantize(linear.weight.detach())
    dense_y, dense_grad_x = run(
        lambda x: F.linear(x, quantized.dequantize(), linear.bias), in_features=96
    )
    bnb_y, bnb_grad_x = run(make_linear4bit(linear), in_features=96)
    assert torch.equal(y, dense_y)
    torch.testing.assert_close(grad_x, dense_grad_x, rtol=1e-5, atol=1e-5)
    assert (bnb_y - dense_y).abs().max() > 0.05 * dense_y.std()
    assert (bnb_grad_x - dense_grad_x).abs().max() > 0.05 * dense_grad_x.std()


@pytest.mark.skipif(not has_avx512bf16(), reason="this processor has no AVX512-BF16")
def test_an_evaluation_before_training_cuts_the_gradient_of_bitsandbytes_and_not_ours():
    """When this fails, a release has fixed it, and the guard in `make_linear4bit` can go."""
    linear = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16)
    layer, twin = make_layer(linear), make_linear4bit(linear)
    twin.support_avx512bf16_for_cpu = True
    gradients = []
    for module in (layer, twin):
        x = torch.randn(3, IN, dtype=torch.bfloat16)
        module.eval()
        with torch.no_grad():
            module(x)
        module.train()
        y = module(x.requires_grad_())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bitsandbytes says no more than this one warning
            y.sum().backward()
        gradients.append(x.grad)
    assert gradients[0].any() and layer.lora_A.grad.any()
    assert gradients[1] is None


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (2, 3, 4, IN), (0, IN), (2, 0, IN)])
def test_leading_dimensions_are_kept(shape):
    layer = make_layer()
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert x.grad.shape == shape
    flat = layer(x.detach().reshape(-1, IN)).reshape(y.shape)
    torch.testing.assert_close(y, flat, rtol=1e-5, atol=1e-5)  # another kernel for one row


def test_the_default_compute_dtype_is_that_of_the_input():
    linear = make_linear(dtype=torch.bfloat16)
    layer = make_layer(linear)
    for dtype in DTYPES:
        y, _ = run(layer, dtype)
        explicit, _ = run(lambda x, dtype=dtype: _with_compute_dtype(layer, dtype)(x), dtype)
        assert y.dtype == dtype and torch.equal(y, explicit)


def _with_compute_dtype(layer: QLoRALinear, dtype: torch.dtype) -> QLoRALinear:
    other = copy.deepcopy(layer)
    other.compute_dtype = dtype
    return other


def assert_consistent(layer: QLoRALinear) -> None:
    """The weight's tensors are the layer's buffers, the very same ones."""
    buffers = dict(layer.named_buffers())
    assert buffers.keys() == layer.weight.tensors().keys()
    assert all(buffers[name] is tensor for name, tensor in layer.weight.tensors().items())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_layer_leaves_the_packed_weight_alone(dtype, double_quant):
    layer = make_layer(double_quant=double_quant)
    before = layer.weight.dequantize()
    layer.to(dtype)
    assert layer.lora_A.dtype == layer.bias.dtype == dtype
    assert layer.weight.absmax.dtype == layer.weight.levels.dtype == torch.float32
    assert torch.equal(layer.weight.dequantize(), before)
    assert_consistent(layer)


@pytest.mark.parametrize("double_quant", [True, False])
def test_every_tensor_moves_with_the_layer(double_quant):
    layer = make_layer(double_quant=double_quant).to("meta", torch.bfloat16)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {t.device.type for t in layer.weight.tensors().values()} == {"meta"}
    assert_consistent(layer)
    assert len(list(layer.buffers())) == (6 if double_quant else 3)


def test_only_the_adapter_is_trained():
    layer = make_layer()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    x, target = torch.randn(64, IN), torch.randn(64, OUT)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {n for n, value in layer.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"lora_A", "lora_B"}


def test_a_new_layer_is_its_quantised_base():
    linear = make_linear()
    layer = QLoRALinear(linear, RANK, ALPHA)
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), F.linear(x, quantize(linear.weight).dequantize(), linear.bias))
    assert linear.weight.requires_grad and linear.bias.requires_grad  # left as it was


def test_every_setting_is_passed_on():
    linear = nn.Linear(IN, OUT, bias=False)
    layer = QLoRALinear(
        linear,
        4,
        16,
        0.1,
        compute_dtype=torch.bfloat16,
        levels="fp4",
        blocksize=128,
        double_quant=False,
    )
    weight = layer.weight
    assert (weight.levels_name, weight.blocksize, weight.double_quant) == ("fp4", 128, False)
    assert (layer.r, layer.scaling, layer.lora_dropout.p) == (4, 4.0, 0.1)
    assert layer.compute_dtype == torch.bfloat16 and layer.bias is None


def two_layers(lora_dropout: float) -> nn.Sequential:
    layers = (
        make_layer(make_linear(seed=seed, out_features=IN), lora_dropout=lora_dropout)
        for seed in (1, 2)
    )
    first, second = layers
    return nn.Sequential(first, nn.SiLU(), second)


def adapter_gradients(model: nn.Module) -> list[Tensor]:
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant, lora_dropout):
    """To the bit: it repeats the same forward pass, dropout mask included."""
    model = two_layers(lora_dropout)
    y, grad_x = run(model)
    gradients = adapter_gradients(model)
    again_y, again_grad_x = run(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert torch.equal(again_y, y) and torch.equal(again_grad_x, grad_x)
    for again, gradient in zip(adapter_gradients(model), gradients, strict=True):
        assert torch.equal(again, gradient)


def test_reentrant_checkpointing_needs_an_input_that_requires_grad():
    """The frozen embedding's output does not, so no adapter would learn; the cure is one line.

    It is the one that `model.enable_input_require_grads()` of transformers adds.
    """
    model, x = two_layers(0.0), torch.randn(3, IN)
    model(x).sum().backward()
    gradients = adapter_gradients(model)

    checkpoint(model, x, use_reentrant=False).sum().backward()  # this kind has no such need
    assert all(map(torch.equal, adapter_gradients(model), gradients))

    with pytest.warns(UserWarning, match="requires_grad=True"):
        assert not checkpoint(model, x, use_reentrant=True).requires_grad

    checkpoint(model, x.requires_grad_(), use_reentrant=True).sum().backward()
    assert all(map(torch.equal, adapter_gradients(model), gradients))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_state_dict_round_trip_into_a_layer_quantised_in_another_way(levels, double_quant):
    """The state dict says how it was quantised; the layer it is loaded into takes that over."""
    model = nn.Sequential(make_layer(levels=levels, double_quant=double_quant))
    another = make_linear(seed=9)
    other = nn.Sequential(make_layer(another, blocksize=32, double_quant=not double_quant))
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(3, IN)
    assert torch.equal(other(x), model(x))
    assert {n: t.shape for n, t in other.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    assert_consistent(other[0])
    assert len(list(other.buffers())) == (6 if double_quant else 3)


def test_loading_copies():
    layer, other = make_layer(), make_layer(make_linear(seed=9))
    other.load_state_dict(layer.state_dict())
    layer.packed.zero_()
    assert other.packed.any()


def test_a_safetensors_file_keeps_the_layer(tmp_path):
    from safetensors.torch import load_file, save_file

    layer, other = make_layer(), make_layer(make_linear(seed=9))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, IN)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_state_dict_of_bitsandbytes_loads(quant_type):
    linear = make_linear(seed=9)
    twin, layer = make_linear4bit(linear, quant_type=quant_type), make_layer()
    result = layer.load_state_dict(twin.state_dict(), strict=False)
    assert result.missing_keys == ["lora_A", "lora_B"] and not result.unexpected_keys
    with torch.no_grad():
        layer.lora_B.zero_()
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), twin(x))


def test_bitsandbytes_loads_ours():
    layer = make_layer(make_linear(seed=9))
    twin = make_linear4bit(make_linear())
    state = layer.state_dict()
    assert set(state) - set(twin.state_dict()) == {"lora_A", "lora_B"}
    facts = {
        name.removeprefix("weight."): t for name, t in state.items() if name.startswith("weight.")
    }
    twin.weight = bitsandbytes.nn.Params4bit.from_prequantized(state["weight"], facts, device="cpu")
    twin.bias.data = state["bias"]
    with torch.no_grad():
        layer.lora_B.zero_()
    x = torch.randn(3, IN)
    assert torch.equal(twin(x), layer(x))


def test_a_state_dict_without_the_weight_is_reported_by_torch():
    layer = make_layer()
    adapter = {name: layer.state_dict()[name] for name in ("lora_A", "lora_B")}
    assert layer.load_state_dict(adapter, strict=False).missing_keys == ["bias", "weight"]
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict(adapter)
    for stray in ("lora_C", "weight_of_another"):
        with pytest.raises(RuntimeError, match=stray):
            layer.load_state_dict({**layer.state_dict(), stray: torch.ones(1)})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(IN + 64, OUT), r"0.weight has shape \(96, 128\).*needs \(96, 64\)"),
        (nn.Linear(IN, OUT + 1), r"0.weight has shape \(97, 64\)"),
    ],
)
def test_loading_another_base_is_refused_and_changes_nothing(other, message):
    model = nn.Sequential(make_layer())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LoRAError, match=message):
        model.load_state_dict(nn.Sequential(make_layer(other)).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_loading_another_rank_or_nan_is_refused_and_changes_nothing():
    layer, linear = make_layer(), make_linear(seed=9)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(LoRAError, match=r"lora_A has shape \(4, 64\).*r=8"):
        layer.load_state_dict(QLoRALinear(linear, 4, 8).state_dict())
    broken = copy.deepcopy(make_layer(linear).state_dict())
    broken["lora_B"][0, 0] = math.nan
    with pytest.raises(LoRAError, match="lora_B .* NaN"):
        layer.load_state_dict(broken)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_loading_a_weight_that_is_not_quantised_is_refused():
    layer = make_layer()
    with pytest.raises(QuantizationError, match="quant_state"):
        layer.load_state_dict(make_linear().state_dict(), strict=False)


def test_a_deep_copy_is_independent():
    layer = make_layer()
    other = copy.deepcopy(layer)
    layer.packed.zero_()
    assert other.packed.any()
    assert_consistent(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "not r=0, "),
        ({"lora_alpha": -1}, "lora_alpha=-1, "),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0$"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(LoRAError, match=message):
        QLoRALinear(make_linear(), **({"r": 4, "lora_alpha": 8} | settings))


def test_a_bad_compute_dtype_is_refused():
    with pytest.raises(LoRAError, match="compute_dtype.*int8"):
        make_layer(compute_dtype=torch.int8)


@pytest.mark.parametrize("weight", [torch.randn(4, 64), quantize(torch.randn(64)), None])
def test_a_weight_that_is_not_a_quantised_matrix_is_refused(weight):
    with pytest.raises(LoRAError, match="QuantizedTensor of shape"):
        QLoRALinear(weight, 4, 8)


def test_a_bias_that_does_not_fit_is_refused():
    with pytest.raises(LoRAError, match=r"bias must have shape \(4,\), not \(5,\)"):
        QLoRALinear(quantize(torch.randn(4, 64)), 4, 8, bias=torch.zeros(5))
    with pytest.raises(LoRAError, match="got a Linear, a bias: True"):
        QLoRALinear(make_linear(), 4, 8, bias=torch.zeros(OUT))


def test_settings_of_a_quantisation_that_is_done_are_refused():
    with pytest.raises(LoRAError, match="no settings; .*blocksize"):
        QLoRALinear(quantize(torch.randn(4, 64)), 4, 8, blocksize=128)


def test_a_linear_layer_and_its_weight_quantised_before_make_the_same_layer():
    linear = make_linear()
    settings = {"levels": "fp4", "blocksize": 128, "double_quant": False}
    weight = quantize(linear.weight.detach(), **settings)
    both = make_layer(linear, **settings), QLoRALinear(weight, RANK, ALPHA, bias=linear.bias)
    both[1].load_state_dict(
        {n: both[0].state_dict()[n] for n in ("lora_A", "lora_B")}, strict=False
    )
    x = torch.randn(3, IN)
    assert torch.equal(both[0](x), both[1](x))
    assert both[1].weight is weight


def test_what_is_not_a_plain_linear_is_refused():
    for linear in (nn.Embedding(4, 4), bitsandbytes.nn.Linear4bit(64, 64), make_layer()):
        with pytest.raises(LoRAError, match=type(linear).__name__):
            QLoRALinear(linear, 4, 8)


def test_a_weight_with_nan_is_refused():
    linear = make_linear()
    with torch.no_grad():
        linear.weight[0, 0] = math.nan
    with pytest.raises(QuantizationError, match="non-finite"):
        QLoRALinear(linear, 4, 8)


def test_an_input_that_does_not_fit_is_refused():
    with pytest.raises(LoRAError, match="last dimension must be 64"):
        make_layer()(torch.randn(3, IN + 1))
    with pytest.raises(LoRAError, match="int64"):
        make_layer()(torch.ones(3, IN, dtype=torch.int64))


# Merging


def layer_to_merge() -> tuple[QLoRALinear, Tensor, Tensor]:
    """A layer whose adapter is trained, the weight from before quantisation, and ΔW."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 128, bias=False)
    layer = QLoRALinear(linear, r=4, lora_alpha=8)
    nn.init.normal_(layer.lora_B, std=0.02)
    return layer, linear.weight.detach(), layer.delta_weight().detach()


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_into_the_dequantised_base_gives_the_trained_function(dtype):
    layer, original, delta = layer_to_merge()
    x = torch.randn(5, 256)
    merged = merge_weight(layer.weight, delta, "dequantized", dtype=dtype)
    assert merged.dtype == dtype
    # Weights of up to 1/16, rounded by 2^-9 (bfloat16) at most, in sums of 256.
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(F.linear(x, merged.float()), layer(x), rtol=0, atol=tolerance)
    off = F.linear(x, merge_weight(layer.weight, delta, "original", original, dtype).float())
    assert (off - layer(x)).abs().max() > 3 * tolerance  # the quantisation error is back


def test_merging_into_4_bits_is_quantising_the_sum():
    layer, _, delta = layer_to_merge()
    merged = merge_weight(layer.weight, delta, "4-bit")
    assert torch.equal(merged, quantize(layer.weight.dequantize() + delta).dequantize())


def test_small_updates_do_not_survive_the_merge_into_4_bits_and_large_ones_do():
    layer, original, delta = layer_to_merge()
    start = layer.weight.dequantize()

    def share(into, size):
        base = original if into == "original" else start
        merged = merge_weight(layer.weight, size * delta, into, original)
        return surviving_share(base, merged, size * delta)

    size = start.std() / delta.std()
    assert share("4-bit", 0.005 * size) < 0.1 and share("4-bit", size) > 0.95
    # bfloat16 keeps 8 bits of each weight, so that an update of 0.5 % is rounded, but not lost.
    for into in ("dequantized", "original"):
        assert 0.9 < share(into, 0.005 * size) < 1.1


def test_the_surviving_share_by_hand():
    before, delta = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert surviving_share(before, before + delta, delta) == 1
    assert surviving_share(before, before, delta) == 0
    assert (
        surviving_share(before, before + torch.tensor([3.0, -1.0]), delta) == 0
    )  # at right angles
    assert surviving_share(before, before + torch.tensor([0.0, 3.0]), delta) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"into": "8-bit"}, "into must be one of"),
        ({"into": "original"}, "nothing"),
        ({"into": "original", "original": torch.ones(3, 3)}, r"\(3, 3\)"),
        ({"delta": torch.ones(2, 2)}, r"\(2, 2\)"),
        ({"delta": torch.full((128, 256), torch.nan)}, "NaN"),
    ],
)
def test_a_merge_that_cannot_work_is_refused(arguments, says):
    layer, _, delta = layer_to_merge()
    with pytest.raises(LoRAError, match=says):
        merge_weight(layer.weight, **{"delta": delta, **arguments})


def test_merging_keeps_the_settings_of_the_quantisation():
    linear = nn.Linear(256, 64)
    layer = QLoRALinear(linear, 2, 4, levels="fp4", blocksize=128, double_quant=False)
    again = quantize(layer.weight.dequantize(), "fp4", 128, False).dequantize()
    merged = merge_weight(layer.weight, torch.zeros(64, 256), "4-bit")
    assert torch.equal(merged, again) and MERGE_TARGETS[0] == "4-bit"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_layer_is_a_plain_linear_layer_in_the_dtype_asked_for(dtype, bias):
    layer = make_layer(nn.Linear(IN, OUT, bias=bias))
    before = copy.deepcopy(layer.state_dict())
    merged = layer.merge(dtype)
    assert type(merged) is nn.Linear and merged.weight.dtype == dtype
    assert {name for name, _ in merged.named_parameters()} == (
        {"weight", "bias"} if bias else {"weight"}
    )
    delta = layer.delta_weight().detach()
    assert torch.equal(merged.weight, merge_weight(layer.weight, delta, "dequantized", dtype=dtype))
    x = torch.randn(5, IN).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05  # weights of 0.3, rounded to 8 bits
    torch.testing.assert_close(merged(x), layer(x), rtol=0, atol=tolerance)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_merging_what_is_not_finite_is_refused():
    layer = make_layer()
    with torch.no_grad():
        layer.lora_B[0, 0] = math.inf
    with pytest.raises(LoRAError, match="NaN or infinity"):
        layer.merge()
    assert make_layer().merge().weight.dtype == torch.bfloat16


def test_the_class_of_the_layers_is_chosen():
    for layer_class in (QLoRALinear, FusedQLoRALinear):
        model = nn.Sequential(nn.Linear(64, 64))
        replace_linear_layers(model, 4, 8, target_modules="0", layer_class=layer_class)
        assert type(model[0]) is layer_class
