"""Chapter 4: LoRA, which leaves the weight alone and learns a small change beside it.

Fine-tuning turns a weight `W` into `W + ΔW`. LoRA bets that `ΔW` needs only a few directions, so it
is written as the product of two thin matrices: `ΔW = (α/r) · B · A`, where `A` is `[r, in]`, `B` is
`[out, r]` and the rank `r` is small. Only they are trained. `A` starts random and `B` at zero, so
the adapted layer begins as exactly the layer it wraps.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_edu.errors import LoRAError


def low_rank_factors(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Split `[out, in]` into `B` `[out, r]` and `A` `[r, in]`, whose product is the nearest.

    Source: Eckart and Young (1936): the truncated singular value decomposition.

    >>> B, A = low_rank_factors(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
    >>> (B @ A).round().int().tolist()
    [[3, 0], [0, 0]]
    """
    U, sizes, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = sizes[:r].sqrt()
    return U[:, :r] * root, root[:, None] * Vh[:r]


def energy_kept(singular_values: Tensor) -> Tensor:
    """Share of the sum of squares that the first 1, 2, 3 … of `[n]` hold; float64 `[n]`.

    >>> energy_kept(torch.tensor([3.0, 1.0])).tolist()
    [0.9, 1.0]
    """
    squares = singular_values.double().square()
    return squares.cumsum(dim=0) / squares.sum()


class LoRALayer(nn.Module):
    """The adapter itself, `x -> (α/r) · B · A · dropout(x)`; the layers that use it add a base.

    `lora_A` is `[r, in]`, `lora_B` is `[out, r]`. Raises `LoRAError` for a setting out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        numbers = isinstance(lora_alpha, int | float) and isinstance(lora_dropout, int | float)
        whole = type(r) is int and r >= 1
        if not (whole and numbers and 0 < lora_alpha < math.inf and 0 <= lora_dropout < 1):
            raise LoRAError(
                "the rank r must be a whole number of at least 1, lora_alpha positive and finite, "
                f"lora_dropout in [0, 1); not {r=}, {lora_alpha=}, {lora_dropout=}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.r, self.lora_alpha = r, lora_alpha
        self.scaling = lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # within ±1/√in, as nn.Linear's
        nn.init.zeros_(self.lora_B)

    def low_rank_update(self, x: Tensor) -> Tensor:
        """Compute what the adapter adds for `x` `[..., in]`: `[..., out]`, in its own dtype."""
        # ΔW is never formed; the scaling acts where a token has only r numbers.
        x = self.lora_dropout(x.to(self.lora_A.dtype))
        return F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)

    def delta_weight(self) -> Tensor:
        """Compute `ΔW = (α/r) · B · A`, `[out, in]`, in float32 or wider (equation 3)."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self.lora_B.to(wide) @ self.lora_A.to(wide)) * self.scaling

    def check_input(self, x: Tensor) -> None:
        """Refuse, by `LoRAError`, what is no floating-point `[..., in_features]`."""
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise LoRAError(
                f"the input is {x.dtype} of shape {tuple(x.shape)}; the last dimension must be "
                f"{self.in_features}, the dtype a floating-point one"
            )

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, r={self.r}, lora_alpha={self.lora_alpha}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch would load what fits and report the rest at the end; nothing here is half-loaded.
        for name, parameter in self.named_parameters():
            loaded = state_dict.get(prefix + name)
            if loaded is not None and not (
                loaded.shape == parameter.shape and loaded.isfinite().all()
            ):
                raise LoRAError(
                    f"{prefix + name} has shape {tuple(loaded.shape)} in the state dict; this "
                    f"layer (r={self.r}) needs {tuple(parameter.shape)}, without NaN or infinity"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoRALinear(LoRALayer):
    """A frozen `nn.Linear` with a trainable low-rank change beside it: `base(x) + ΔW·x`.

    `linear` is kept as `base`, and frozen. The adapter is float32 or wider: a bfloat16 parameter
    would lose most of its small steps to rounding.

    Source: equals `peft.tuners.lora.Linear` with the same `A` and `B`.

    >>> base = nn.Linear(4, 3, bias=False)
    >>> layer = LoRALinear(base, r=2, lora_alpha=4)
    >>> x = torch.ones(5, 4)
    >>> torch.equal(layer(x), base(x))  # B is zero: nothing has changed yet
    True
    """

    unmerged_weight: Tensor | None

    def __init__(
        self, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0
    ) -> None:
        # A subclass may hold its weight in another form (bitsandbytes' Linear4bit packs it).
        if type(linear) is not nn.Linear:
            kind = type(linear).__name__
            raise LoRAError(f"LoRALinear wraps a plain nn.Linear, not a {kind}; see QLoRALinear")
        shape, weight = (linear.in_features, linear.out_features), linear.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        super().__init__(*shape, r, lora_alpha, lora_dropout, device=weight.device, dtype=dtype)
        self.base = linear.requires_grad_(False)
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.register_state_dict_post_hook(_save_the_unmerged_weight)

    @property
    def merged(self) -> bool:
        """Whether `base.weight` holds `W + ΔW` at the moment."""
        return self.unmerged_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        """`base(x) + (α/r) · B · A · dropout(x)`; once merged, `base(x)` alone."""
        self.check_input(x)
        result = self.base(x)
        if self.merged:
            return result
        return (result + self.low_rank_update(x)).to(result.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Put `W + ΔW`, rounded once, into `base.weight`; `A` and `B` then get no gradient.

        The old `W` is kept until `unmerge`, because `(W + ΔW) - ΔW` is not `W` in floating point.
        """
        if self.merged:
            raise LoRAError("the adapter is already merged; call unmerge() before merging again")
        merged = (self.base.weight + self.delta_weight()).to(self.base.weight.dtype)
        if not merged.isfinite().all():
            raise LoRAError("merging would write NaN or infinity; look in lora_A, lora_B and base")
        self.unmerged_weight = self.base.weight.data
        self.base.weight.data = merged

    def unmerge(self) -> None:
        """Put the old `W` back, to the bit, even if `A` and `B` have changed meanwhile."""
        if self.unmerged_weight is None:
            raise LoRAError("the adapter is not merged; call merge() first")
        self.base.weight.data = self.unmerged_weight
        self.unmerged_weight = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.merged:
            raise LoRAError("cannot load into a merged layer; call unmerge() first")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _save_the_unmerged_weight(
    layer: LoRALinear, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    # Otherwise a file saved while merged would, on loading, apply the adapter twice.
    if layer.merged:
        state_dict[prefix + "base.weight"] = layer.unmerged_weight


class HoulsbyAdapter(nn.Module):
    """The older rival of LoRA: a small network *behind* a frozen layer, `h + U · gelu(D · h)`.

    `h` is the output of `base`; `D`, `down`, and `U`, `up`, are trained, both with a bias. `U`
    starts at zero, so the layer begins as its base. Because of the bend between `D` and `U`, it
    cannot be merged into `base`.

    Source: Houlsby et al. (arXiv 1902.00751), section 2.1 and figure 2.
    """

    def __init__(self, base: nn.Linear, bottleneck: int) -> None:
        super().__init__()
        if type(bottleneck) is not int or bottleneck < 1:
            raise LoRAError(f"bottleneck must be a whole number of at least 1, not {bottleneck!r}")
        self.base = base.requires_grad_(False)
        width, like = base.out_features, base.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.down = nn.Linear(width, bottleneck, device=like.device, dtype=dtype)
        self.up = nn.Linear(bottleneck, width, device=like.device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`h + U · gelu(D · h)` for `h = base(x)`, in the dtype of `h`."""
        h = self.base(x)
        change = self.up(F.gelu(self.down(h.to(self.down.weight.dtype))))
        return (h + change).to(h.dtype)
