"""Chapter 5: QLoRA, which trains a LoRA adapter beside a weight that stays in 4 bits.

The forward pass unpacks the frozen weight, multiplies, and throws the unpacked copy away. The
backward pass needs it too, because `∂L/∂x = ∂L/∂y · W`, and unpacks it again. `W` gets no gradient:
what is learned are the `A` and `B` of chapter 4, in float32.

Source: Dettmers et al., "QLoRA" (arXiv 2305.14314), equations 5 and 6.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_edu.adapters import find_linear_layers, refuse_adapters, replace_module
from qlora_edu.errors import LoRAError
from qlora_edu.kernels import FusedProduct
from qlora_edu.lora import LoRALayer
from qlora_edu.quantized import QuantizedTensor, quantize


class FrozenProduct(torch.autograd.Function):
    """`y = x·Wᵀ + bias`, where `W` stays in 4 bits and is unpacked again on the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantized: QuantizedTensor, bias: Tensor | None = None
    ) -> Tensor:
        """Compute y `[tokens, out]` from x `[tokens, in]`; the bias is of the same dtype."""
        if ctx.needs_input_grad[0]:
            ctx.quantized = quantized  # frozen, and held by its layer: nothing new is kept
        y = x.new_empty(len(x), quantized.shape[0])
        for rows, W in quantized.row_chunks(x.dtype):
            y[:, rows] = F.linear(x, W, None if bias is None else bias[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Compute `∂L/∂x = ∂L/∂y · W` and, if it is trained, the gradient of the bias."""
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y.new_zeros(len(grad_y), ctx.quantized.shape[1])
            for rows, W in ctx.quantized.row_chunks(grad_y.dtype):
                grad_x.addmm_(grad_y[:, rows], W)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.sum(0)
        return grad_x, None, grad_bias


def quantized_linear(
    x: Tensor,
    quantized: QuantizedTensor,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply x `[..., in]` by a weight in 4 bits: `x · Wᵀ + bias`, with a gradient for x.

    Returns `[..., out]` in the dtype of x. The product is computed in `compute_dtype`, by default
    that of x, under autocast in autocast's.

    Source: equals `bitsandbytes.nn.Linear4bit`, but that one rounds the `W` of the backward pass to
    the dtype from before quantisation.

    >>> weight = quantize(torch.tensor([[-1.0, 0.0, 1.0]]), double_quant=False)
    >>> x = torch.tensor([[1.0, 5.0, 3.0]], requires_grad=True)
    >>> quantized_linear(x, weight).backward()
    >>> x.grad
    tensor([[-1.,  0.,  1.]])
    """
    dtype = x.dtype if compute_dtype is None else compute_dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    tokens = x.reshape(-1, x.shape[-1]).to(dtype)
    y = FrozenProduct.apply(tokens, quantized, None if bias is None else bias.to(dtype))
    return y.view(*x.shape[:-1], quantized.shape[0]).to(x.dtype)


class QLoRALinear(LoRALayer):
    """A frozen 4-bit linear layer with a trainable low-rank change beside it.

    Takes an `nn.Linear`, whose weight is quantised by `quantize(weight, **quantization)`, or a
    `QuantizedTensor` `[out, in]` and its `bias`. The adapter is float32. `.half()` and the like
    leave the weight as it is. Its keys in the state dict are those of bitsandbytes.

    Raises `LoRAError`, or `QuantizationError` if the weight cannot be quantised.

    Source: equals PEFT's `Linear4bit` around bitsandbytes' with the same `A` and `B`.

    >>> layer = QLoRALinear(nn.Linear(128, 64), r=4, lora_alpha=8)
    >>> [name for name, p in layer.named_parameters() if p.requires_grad]
    ['lora_A', 'lora_B']
    """

    weight: QuantizedTensor
    packed: Tensor

    def __init__(
        self,
        linear: nn.Linear | QuantizedTensor,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        *,
        compute_dtype: torch.dtype | None = None,
        bias: Tensor | None = None,
        **quantization: Any,
    ) -> None:
        weight: Any = linear
        if type(linear) is nn.Linear and bias is None:
            bias = linear.bias
            weight, quantization = quantize(linear.weight.detach(), **quantization), {}
        if not isinstance(weight, QuantizedTensor) or len(weight.shape) != 2 or quantization:
            raise LoRAError(
                "QLoRALinear takes a torch.nn.Linear and settings of quantize, or a "
                "QuantizedTensor of shape (out, in), its bias and no settings; got a "
                f"{type(linear).__name__}, a bias: {bias is not None}, settings: {quantization}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise LoRAError(f"bias must have shape ({weight.shape[0]},), not {tuple(bias.shape)}")
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise LoRAError(f"compute_dtype must be a floating-point dtype, not {compute_dtype}")
        out_features, in_features = weight.shape
        super().__init__(
            in_features, out_features, r, lora_alpha, lora_dropout, device=weight.device
        )
        self.compute_dtype = compute_dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)
        self._hold(weight)

    def forward(self, x: Tensor) -> Tensor:
        """`x · Wᵀ + bias + (α/r) · B · A · dropout(x)`, with `W` unpacked for the moment."""
        self.check_input(x)
        y = quantized_linear(x, self.weight, self.bias, self.compute_dtype)
        return y + self.low_rank_update(x).to(y.dtype)

    @torch.no_grad()
    def merge(self, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
        """Merge the adapter into a copy of the dequantised weight; see `merge_weight`.

        >>> QLoRALinear(nn.Linear(64, 2), r=4, lora_alpha=8).merge(torch.float32)
        Linear(in_features=64, out_features=2, bias=True)
        """
        merged = nn.Linear(self.in_features, self.out_features, device="meta")
        merged.weight = nn.Parameter(merge_weight(self.weight, self.delta_weight(), dtype=dtype))
        bias = None if self.bias is None else nn.Parameter(self.bias.to(dtype, copy=True))
        merged.register_parameter("bias", bias)
        return merged

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{super().extra_repr()}, compute_dtype={self.compute_dtype}, weight={self.weight}"

    def _hold(self, weight: QuantizedTensor) -> None:
        # A loaded weight may be of another kind, with other tensors than the one it replaces.
        for name in self.weight.tensors() if hasattr(self, "weight") else ():
            delattr(self, name)
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor, persistent=False)
        self.weight = weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.weight.tensors()
        super()._apply(fn, recurse)
        # .to(dtype) would round the block constants and the levels: only the device may change.
        for name, tensor in before.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(self.packed.device))
        self.weight = self.weight.with_tensors({name: getattr(self, name) for name in before})
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.weight.state_dict(prefix + "weight"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        ours = {k: v.clone() for k, v in state_dict.items() if k == key or k.startswith(key + ".")}
        rest = {k: v for k, v in state_dict.items() if k not in ours}
        weight = QuantizedTensor.from_state_dict(ours, key) if ours else self.weight
        if weight.shape != self.weight.shape:
            raise LoRAError(
                f"{key} has shape {tuple(weight.shape)} in the state dict, but this layer needs "
                f"{tuple(self.weight.shape)}; load it into a layer of the model it was made from"
            )
        super()._load_from_state_dict(rest, prefix, *args)
        if ours:
            self._hold(weight.to(self.weight.device))
        else:
            args[2].append(key)  # the missing keys stand after the metadata and `strict`


class FusedQLoRALinear(QLoRALinear):
    """The fast twin of `QLoRALinear`, for production: base and adapter in one `FusedProduct`."""

    def forward(self, x: Tensor) -> Tensor:
        """`x · Wᵀ + bias + (α/r) · B · A · dropout(x)`, as `QLoRALinear` but for rounding."""
        self.check_input(x)
        # Where one of these gives the adapter another input than the base, nothing can be fused.
        dtypes = {x.dtype, self.compute_dtype or x.dtype, self.lora_A.dtype, self.lora_B.dtype}
        drops = self.training and self.lora_dropout.p
        if drops or len(dtypes) > 1 or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        tokens = x.reshape(-1, self.in_features)
        y = FusedProduct.apply(tokens, self.weight, bias, self.lora_A, self.lora_B, self.scaling)
        return y.view(*x.shape[:-1], self.out_features)


def replace_linear_layers(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    layer_class: type[QLoRALinear] = QLoRALinear,
    **settings: Any,
) -> list[str]:
    """Freeze `model` and put a `QLoRALinear` in the place of its linear layers.

    Takes `target_modules` as `find_linear_layers`; `FusedQLoRALinear` as the class, for speed; and
    settings of a layer, such as `blocksize`. Returns the names of the layers. Raises `LoRAError`
    for a model that has adapters already; after any later error, for NaN say, load the model again.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> replace_linear_layers(model, r=4, lora_alpha=8, target_modules=["0"])
    ['0']
    """
    refuse_adapters(model)
    names = find_linear_layers(model, target_modules)
    model.requires_grad_(False)
    for name in names:
        linear: Any = model.get_submodule(name)
        replace_module(model, name, layer_class(linear, r, lora_alpha, **settings))
    return names


MERGE_TARGETS = ("4-bit", "dequantized", "original")


def merge_weight(
    quantized: QuantizedTensor,
    delta: Tensor,
    into: str = "dequantized",
    original: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Merge `ΔW` into a frozen weight: what a model without adapter computes with.

    `into="dequantized"` adds it to the weight that it was trained beside; "original" to the one
    from before quantisation; "4-bit" quantises the first sum again, as `quantized` was, and reads
    it back in float32, whatever `dtype` is. Raises `LoRAError`, for NaN and infinity too.

    >>> merge_weight(quantize(torch.ones(1, 64)), 0.25 * torch.ones(1, 64))[0, :2]
    tensor([1.2500, 1.2500], dtype=torch.bfloat16)
    """
    if into not in MERGE_TARGETS:
        raise LoRAError(f"into must be one of {MERGE_TARGETS}, not {into!r}")
    base = original if into == "original" else quantized.dequantize(torch.float32)
    if base is None or base.shape != delta.shape:
        found = "missing, pass it as original=" if base is None else tuple(base.shape)
        raise LoRAError(f"ΔW has shape {tuple(delta.shape)}; the weight to merge into: {found}")
    merged = base.to(delta.device).float() + delta.float()
    result = merged if into == "4-bit" else merged.to(dtype)
    if not result.isfinite().all():
        where = f"the rounding to {dtype}" if merged.isfinite().all() else "A, B and the base"
        raise LoRAError(f"merging would write NaN or infinity; look for them in {where}")
    if into != "4-bit":
        return result
    settings = (quantized.levels, quantized.blocksize, quantized.double_quant)
    return quantize(merged, *settings).dequantize()


def surviving_share(before: Tensor, after: Tensor, delta: Tensor) -> float:
    """Measure how much of `ΔW` a merge has kept: `⟨after − before, ΔW⟩ / ⟨ΔW, ΔW⟩`, 1 for all.

    >>> surviving_share(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]), torch.ones(3))
    0.6666666865348816
    """
    delta = delta.float()
    moved = (after.float() - before.float()) * delta
    return (moved.sum() / delta.square().sum()).item()
