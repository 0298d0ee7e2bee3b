"""Chapter 5. QLoRA: train a LoRA adapter beside a weight that stays in 4 bits.

The forward pass unpacks the frozen weight, multiplies, and throws the unpacked copy away. The
backward pass needs the weight once more, because ``∂L/∂x = ∂L/∂y · W``, and unpacks it again from
the same bytes. Between the two only the packed weight is held, and it was there anyway. ``W`` gets
no gradient: what is learned are the ``A`` and ``B`` of chapter 4, in float32.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), equations 5 and 6.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_edu.adapters import find_linear_layers, replace_module
from qlora_edu.double_quant import QuantizedAbsmax
from qlora_edu.errors import LoRAError
from qlora_edu.lora import LoRALayer
from qlora_edu.quantized import QuantizedTensor, quantize


def take_apart(quantized: QuantizedTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate a quantised tensor into its tensors, by name, and the facts that describe them.

    >>> tensors, facts = take_apart(quantize(torch.ones(2, 64), double_quant=False))
    >>> list(tensors), list(facts)
    (['packed', 'levels', 'absmax'], ['levels_name', 'blocksize', 'shape', 'dtype'])
    """
    facts = {field.name: getattr(quantized, field.name) for field in fields(quantized)}
    tensors = {"packed": facts.pop("packed"), "levels": facts.pop("levels")}
    constants = facts.pop("constants")
    tensors |= constants._asdict() if quantized.double_quant else {"absmax": constants}
    return tensors, facts


def put_together(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> QuantizedTensor:
    """Undo ``take_apart``."""
    constants = {name: t for name, t in tensors.items() if name not in ("packed", "levels")}
    return QuantizedTensor(
        packed=tensors["packed"],
        levels=tensors["levels"],
        constants=constants["absmax"] if "absmax" in constants else QuantizedAbsmax(**constants),
        **facts,
    )


class _QLoRAProduct(torch.autograd.Function):
    """``y = x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ``, or without ``A`` and ``B`` the first two terms of it.

    In both passes ``W`` is unpacked a few rows at a time; between them it is kept in 4 bits only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        quantized: QuantizedTensor,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float = 1.0,
    ) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        y = x.new_empty(len(x), quantized.shape[0])
        for rows, chunk in quantized.row_chunks(x.dtype):
            if bias is None:
                torch.mm(x, chunk.T, out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, chunk.T, out=y[:, rows])
        kept: tuple[Tensor | None, ...] = (None,) * 4
        if lora_A is not None:
            thin = (x @ lora_A.T).mul_(scaling)
            y.addmm_(thin, lora_B.T)
            kept = (x, thin, lora_A, lora_B)
        tensors, ctx.facts = take_apart(quantized) if ctx.needs_input_grad[0] else ({}, {})
        ctx.names, ctx.scaling = list(tensors), scaling
        ctx.save_for_backward(*kept, *tensors.values())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, thin, lora_A, lora_B, *saved = ctx.saved_tensors
        grad_x = grad_bias = grad_A = grad_B = None
        if lora_A is not None:
            grad_thin = (grad_y @ lora_B).mul_(ctx.scaling)
            grad_A, grad_B = grad_thin.T @ x, grad_y.T @ thin
        if ctx.needs_input_grad[0]:
            quantized = put_together(dict(zip(ctx.names, saved, strict=True)), ctx.facts)
            if lora_A is None:
                grad_x = grad_y.new_zeros(len(grad_y), quantized.shape[1])
            else:
                grad_x = grad_thin @ lora_A
            for rows, chunk in quantized.row_chunks(grad_y.dtype):
                grad_x.addmm_(grad_y[:, rows], chunk)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_y.sum(0)
        return grad_x, grad_bias, None, grad_A, grad_B, None


def quantized_linear(
    x: Tensor,
    quantized: QuantizedTensor,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply by a weight that is kept in 4 bits: ``x · Wᵀ + bias``, with a gradient for ``x``.

    ``x`` is ``[..., in]``, ``quantized`` is ``[out, in]``, ``bias`` is ``[out]``. The product is
    taken in ``compute_dtype`` (by default the dtype of ``x``), or in autocast's dtype where that is
    on; the result, ``[..., out]``, has the dtype of ``x``. Between forward and backward only the
    tensors of ``quantized`` are kept, and nothing at all if ``x`` needs no gradient.

    Equals ``bitsandbytes.nn.Linear4bit``; but in the backward pass that one rounds ``W`` to the
    dtype it had before quantisation, and here it is the same ``W`` as in the forward pass.

    >>> weight = quantize(torch.tensor([[-1.0, 0.0, 1.0]]), double_quant=False)
    >>> x = torch.tensor([[1.0, 5.0, 3.0]], requires_grad=True)
    >>> y = quantized_linear(x, weight)
    >>> y.item()
    2.0
    >>> y.backward()
    >>> x.grad
    tensor([[-1.,  0.,  1.]])
    """
    if x.dim() != 2:
        y = quantized_linear(x.reshape(-1, x.shape[-1]), quantized, bias, compute_dtype)
        return y.view(*x.shape[:-1], y.shape[-1])
    dtype = x.dtype if compute_dtype is None else compute_dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return _QLoRAProduct.apply(x.to(dtype), bias, quantized).to(x.dtype)


class QLoRALinear(LoRALayer):
    """A frozen 4-bit linear layer with a trainable low-rank change beside it.

    ``weight`` is ``[out, in]``; its tensors are buffers, so that they move with ``.to(device)``,
    though ``.half()`` and the like leave them as they are. ``bias`` is frozen too. The adapter is
    float32 whatever the rest is. ``x`` is ``[..., in]`` in any floating dtype, and the output
    ``[..., out]`` has the same one; ``compute_dtype`` is that of ``quantized_linear``.

    The state dict holds ``lora_A``, ``lora_B``, ``bias`` and the weight under the keys of
    bitsandbytes (``weight``, ``weight.absmax``, ...); each can load the other's.

    Equals PEFT's ``Linear4bit`` around bitsandbytes' with the same ``A`` and ``B``.

    Raises:
        LoRAError: if ``weight`` is not a two-dimensional ``QuantizedTensor``, ``bias`` does not fit
            it or ``compute_dtype`` is not a floating dtype; see also ``LoRALayer``.

    >>> layer = QLoRALinear.from_linear(nn.Linear(128, 64), r=4, lora_alpha=8)
    >>> layer.packed.nbytes  # 64 · 128 weights, two in a byte
    4096
    >>> [name for name, p in layer.named_parameters() if p.requires_grad]
    ['lora_A', 'lora_B']
    >>> layer(torch.ones(2, 5, 128)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: Tensor | None,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        init: str = "kaiming",
    ) -> None:
        if not isinstance(weight, QuantizedTensor) or len(weight.shape) != 2:
            raise LoRAError(
                "weight must be a QuantizedTensor of shape (out, in), not a "
                f"{type(weight).__name__} of shape {tuple(getattr(weight, 'shape', ()))}; "
                "quantize(linear.weight) makes one, or use QLoRALinear.from_linear(linear, ...)"
            )
        out_features, in_features = weight.shape
        if bias is not None and bias.shape != (out_features,):
            raise LoRAError(f"bias must have shape ({out_features},), not {tuple(bias.shape)}")
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise LoRAError(f"compute_dtype must be a floating-point dtype, not {compute_dtype}")
        super().__init__(
            in_features, out_features, r, lora_alpha, lora_dropout, init, device=weight.device
        )
        self.compute_dtype = compute_dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._names: list[str] = []
        self._hold(weight)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        init: str = "kaiming",
        *,
        levels: str | Tensor = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> Self:
        """Quantise the weight of ``linear``, which is left as it is, and put an adapter beside it.

        Raises:
            LoRAError: if ``linear`` is not a plain ``nn.Linear``; see also ``LoRALayer``.
            QuantizationError: if its weight cannot be quantised; see ``quantize``.
        """
        if type(linear) is not nn.Linear:
            raise LoRAError(
                f"from_linear takes a torch.nn.Linear, not a {type(linear).__name__}; for a weight "
                "that is quantised already use QLoRALinear(weight, bias, ...)"
            )
        weight = quantize(linear.weight.detach(), levels, blocksize, double_quant)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(weight, bias, r, lora_alpha, lora_dropout, compute_dtype, init)

    @property
    def weight(self) -> QuantizedTensor:
        """The frozen weight, over the layer's own buffers (nothing is copied)."""
        return put_together({name: getattr(self, name) for name in self._names}, self._facts)

    def forward(self, x: Tensor) -> Tensor:
        """``x · Wᵀ + bias + (α/r) · B · A · dropout(x)``, with ``W`` unpacked for the moment."""
        self.check_input(x)
        rows = x.reshape(-1, self.in_features)
        if self._sees_one_input(rows):
            adapter = (self.lora_A, self.lora_B, self.scaling)
            y = _QLoRAProduct.apply(rows, self.bias, self.weight, *adapter)
        else:
            y = quantized_linear(rows, self.weight, self.bias, self.compute_dtype)
            y += self.low_rank_update(rows).to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _sees_one_input(self, x: Tensor) -> bool:
        """Whether base and adapter multiply the very same numbers, without dropout or rounding."""
        if (self.training and self.lora_dropout.p) or torch.is_autocast_enabled(x.device.type):
            return False
        base_dtype = self.compute_dtype or x.dtype
        return x.dtype == base_dtype == self.lora_A.dtype == self.lora_B.dtype

    def extra_repr(self) -> str:
        """Shapes and settings, shown when the layer is printed."""
        return f"{super().extra_repr()}, compute_dtype={self.compute_dtype}, weight={self.weight}"

    def _hold(self, weight: QuantizedTensor) -> None:
        # A loaded weight may be of another kind, with other tensors than the one it replaces.
        for name in self._names:
            delattr(self, name)
        tensors, self._facts = take_apart(weight)
        self._names = list(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self._names}
        super()._apply(fn, recurse)
        # .to(dtype) would round the block constants and the levels: only the device may change.
        for name, tensor in before.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(self.packed.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.weight.state_dict(prefix + "weight"))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        key = prefix + "weight"
        ours = {k: v.clone() for k, v in state_dict.items() if k == key or k.startswith(key + ".")}
        rest = {k: v for k, v in state_dict.items() if k not in ours}
        weight = QuantizedTensor.from_state_dict(ours, key) if ours else None
        if weight is not None and weight.shape != self.weight.shape:
            raise LoRAError(
                f"{key} has shape {tuple(weight.shape)} in the state dict, but this layer needs "
                f"{tuple(self.weight.shape)}; load it into a layer of the model it was made from"
            )
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, *args)
        if weight is None:
            missing_keys.append(key)
        else:
            self._hold(weight.to(self.packed.device))


def replace_linear_layers(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    lora_dropout: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    skip: Sequence[str] = (),
    **quantization: Any,
) -> list[str]:
    """Freeze ``model`` and put a ``QLoRALinear`` in the place of its linear layers; their names.

    ``target_modules`` and ``skip`` are as for ``find_linear_layers``, so the output head stays as
    it is (bitsandbytes keeps it, too). ``quantization`` may hold ``levels``, ``blocksize`` and
    ``double_quant``.

    Raises:
        LoRAError: if there is nothing to replace; see also ``QLoRALinear``.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> replace_linear_layers(model, r=4, lora_alpha=8, skip=["2"])
    ['0']
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 4·64 + 64·4
    512
    """
    names = find_linear_layers(model, target_modules, skip)
    model.requires_grad_(False)
    for name in names:
        linear = model.get_submodule(name)
        layer = QLoRALinear.from_linear(
            linear, r, lora_alpha, lora_dropout, compute_dtype, **quantization
        )
        replace_module(model, name, layer)
    return names


MERGES = ("4-bit", "dequantized", "original")


def merge_weight(
    quantized: QuantizedTensor,
    delta: Tensor,
    into: str = "dequantized",
    original: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Merge ``ΔW`` ``[out, in]`` into a frozen weight: what a model without adapter computes with.

    ``into="dequantized"`` adds it to the weight that it was trained beside, in ``dtype``;
    ``"original"`` to the weight from before quantisation, in ``dtype``; ``"4-bit"`` quantises the
    sum again, as ``quantized`` was, and returns what is read back.

    Raises:
        LoRAError: for an unknown ``into``, a missing ``original``, shapes that differ, or if the
            merged weight would hold NaN or infinity.

    >>> merge_weight(quantize(torch.ones(1, 64)), 0.25 * torch.ones(1, 64))[0, :2]
    tensor([1.2500, 1.2500], dtype=torch.bfloat16)
    """
    if into not in MERGES:
        raise LoRAError(f"into must be one of {MERGES}, not {into!r}")
    base = original if into == "original" else quantized.dequantize(torch.float32)
    if base is None or base.shape != delta.shape:
        found = "nothing" if base is None else tuple(base.shape)
        raise LoRAError(f"ΔW has shape {tuple(delta.shape)}; the weight to merge into: {found}")
    merged = base.float() + delta.float()
    if not merged.isfinite().all():
        raise LoRAError("merging would write NaN or infinity; look for them in A, B and the base")
    if into != "4-bit":
        return merged.to(dtype)
    settings = (quantized.levels, quantized.blocksize, quantized.double_quant)
    return quantize(merged, *settings).dequantize()


def surviving_share(before: Tensor, after: Tensor, delta: Tensor) -> float:
    """How much of ``ΔW`` a merge has kept: ``⟨after − before, ΔW⟩ / ⟨ΔW, ΔW⟩``.

    1 if the weight moved by all of it, 0 if not at all or at random.

    >>> surviving_share(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]), torch.ones(3))
    0.6666666865348816
    """
    delta = delta.float()
    moved = (after.float() - before.float()) * delta
    return (moved.sum() / delta.square().sum()).item()
