"""Chapter 4: LoRA, which leaves the weight alone and learns a small change beside it.

Fine-tuning turns a weight `W` into `W + ΔW`. LoRA bets that `ΔW` needs only a few directions,
so it is written as the product of two thin matrices: `ΔW = (α/r) · B · A`, where `A` is
`[r, in]`, `B` is `[out, r]` and the rank `r` is small. Only `A` and `B` are trained.
`A` starts random and `B` starts at zero, so the adapted layer begins as exactly the layer it
wraps. Dividing `α` by `r` keeps the size of the change about the same when `r` is varied.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_edu.errors import LoRAError


def low_rank_factors(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Split a matrix into two thin ones whose product is as near to it as rank `r` allows.

    Takes `[out, in]`; returns `B` `[out, r]` and `A` `[r, in]`.

    Source: Eckart and Young (1936): the truncated singular value decomposition.

    >>> B, A = low_rank_factors(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
    >>> (B @ A).round().int().tolist()
    [[3, 0], [0, 0]]
    """
    U, sizes, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = sizes[:r].sqrt()
    return U[:, :r] * root, root[:, None] * Vh[:r]


def energy_kept(singular_values: Tensor) -> Tensor:
    """Measure the share of the sum of squares that the first 1, 2, 3 … directions hold.

    Takes `[n]`, descending; returns float64 `[n]`, of which the last is 1.

    >>> energy_kept(torch.tensor([3.0, 1.0])).tolist()
    [0.9, 1.0]
    """
    squares = singular_values.double().square()
    return squares.cumsum(dim=0) / squares.sum()


class LoRALayer(nn.Module):
    """The adapter itself, `x -> (α/r) · B · A · dropout(x)`; the layers that use it add a base.

    `lora_A` is `[r, in_features]` and `lora_B` is `[out_features, r]`: the parameters PEFT calls
    `lora_A.weight` and `lora_B.weight`.

    Args:
        in_features, out_features: the shape of `ΔW`.
        r: the rank.
        lora_alpha: α; the product is scaled by `α/r`.
        lora_dropout: the probability that an entry of the adapter's input is dropped in training.
        init: "kaiming" draws `A` as `nn.Linear` draws its weight (uniform within ±1/√in, PEFT's
            default); "gaussian" from a normal distribution of standard deviation `1/r` (PEFT's
            `init_lora_weights="gaussian"`).
        device, dtype: of `A` and `B`.

    Raises:
        LoRAError: a rank below 1, an alpha that is not positive and finite, a dropout outside
            [0, 1), or an unknown `init`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        init: str = "kaiming",
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise LoRAError(f"the rank r must be a whole number of at least 1, not {r!r}")
        if not isinstance(lora_alpha, int | float) or not 0 < lora_alpha < math.inf:
            raise LoRAError(
                f"lora_alpha must be positive and finite, not {lora_alpha!r}; r itself scales by 1"
            )
        if not 0 <= lora_dropout < 1:
            raise LoRAError(
                f"lora_dropout is a probability in [0, 1), not {lora_dropout!r}; 0 turns it off"
            )
        if init not in ("kaiming", "gaussian"):
            raise LoRAError(f"unknown init {init!r}; choose 'kaiming' or 'gaussian'")
        self.in_features, self.out_features = in_features, out_features
        self.r, self.lora_alpha, self.init = r, lora_alpha, init
        self.scaling = lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `A` afresh and set `B` to zero, so that `ΔW` is zero again."""
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=1 / self.r)
        nn.init.zeros_(self.lora_B)

    def low_rank_update(self, x: Tensor) -> Tensor:
        """Compute what the adapter adds for `x` `[..., in]`: `[..., out]`, in its own dtype.

        The two thin products are taken one after the other; `ΔW` is never formed. The scaling
        acts between them, where a token has only `r` numbers.
        """
        x = self.lora_dropout(x.to(self.lora_A.dtype))
        return F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)

    def delta_weight(self) -> Tensor:
        """Compute `ΔW = (α/r) · B · A`, `[out, in]`, in float32 or wider (equation 3)."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self.lora_B.to(wide) @ self.lora_A.to(wide)) * self.scaling

    def check_input(self, x: Tensor) -> None:
        """Refuse, by `LoRAError`, what is no floating-point `[..., in_features]`."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise LoRAError(
                f"the input has shape {tuple(x.shape)}, but the last dimension must be "
                f"{self.in_features}"
            )
        if not x.is_floating_point():
            raise LoRAError(f"the input must be a floating-point tensor, not {x.dtype}")

    def extra_repr(self) -> str:
        """Shapes and settings, shown when the layer is printed."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch would load what fits and report the rest at the end; nothing here is half-loaded.
        for name, parameter in self.named_parameters():
            loaded = state_dict.get(prefix + name)
            if loaded is None:
                continue
            if loaded.shape != parameter.shape:
                raise LoRAError(
                    f"{prefix + name} has shape {tuple(loaded.shape)} in the state dict, but this "
                    f"layer (r={self.r}) needs {tuple(parameter.shape)}; build the layer with the "
                    "rank and the base model that the file was made with"
                )
            if name.startswith("lora_") and not loaded.isfinite().all():
                raise LoRAError(f"{prefix + name} in the state dict holds NaN or infinity")
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoRALinear(LoRALayer):
    """A frozen `nn.Linear` with a trainable low-rank change beside it: `base(x) + ΔW·x`.

    The adapter is float32, or float64 for a float64 base: a bfloat16 parameter would lose most of
    its small training steps to rounding. `x` is `[..., in]` in the base's dtype; the output is
    `[..., out]` in the same dtype.

    Args:
        linear: the base; it is kept (not copied) as `base`, and frozen, bias included.
        r: the rank. One above `min(in, out)` is allowed, as in PEFT, but adds parameters and no
            freedom.
        lora_alpha, lora_dropout, init: as for `LoRALayer`.

    Source: equals `peft.tuners.lora.Linear` with the same `A` and `B`.

    >>> base = nn.Linear(4, 3, bias=False)
    >>> layer = LoRALinear(base, r=2, lora_alpha=4)
    >>> layer.scaling, tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)
    (2.0, (2, 4), (3, 2))
    >>> x = torch.ones(5, 4)
    >>> torch.equal(layer(x), base(x))  # B is zero: nothing has changed yet
    True
    >>> [name for name, p in layer.named_parameters() if p.requires_grad]
    ['lora_A', 'lora_B']
    """

    unmerged_weight: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        init: str = "kaiming",
    ) -> None:
        # A subclass may hold its weight in another form (bitsandbytes' Linear4bit packs it).
        if type(linear) is not nn.Linear:
            raise LoRAError(
                f"LoRALinear wraps a torch.nn.Linear, not a {type(linear).__name__}; "
                "for a quantised weight use QLoRALinear"
            )
        super().__init__(
            linear.in_features,
            linear.out_features,
            r,
            lora_alpha,
            lora_dropout,
            init,
            device=linear.weight.device,
            dtype=torch.promote_types(linear.weight.dtype, torch.float32),
        )
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
        """Put `W + ΔW` into `base.weight`, rounded once to its dtype: no extra cost to infer.

        The old `W` is kept until `unmerge`, because `(W + ΔW) - ΔW` is not `W` in floating
        point; so a merged layer holds two weights. For a lasting merge, keep `layer.base` alone.
        `A` and `B` get no gradient while the layer is merged.

        Raises `LoRAError`, with `base.weight` unchanged, if merged already, or not finite.
        """
        if self.merged:
            raise LoRAError("the adapter is already merged; call unmerge() before merging again")
        merged = (self.base.weight + self.delta_weight()).to(self.base.weight.dtype)
        if not merged.isfinite().all():
            raise LoRAError(
                "merging would write NaN or infinity into the weight, which is left unchanged; "
                "look for them in lora_A, lora_B and base.weight"
            )
        self.unmerged_weight = self.base.weight.data
        self.base.weight.data = merged

    def unmerge(self) -> None:
        """Put the old `W` back, to the bit, even if `A` and `B` have changed meanwhile."""
        if self.unmerged_weight is None:
            raise LoRAError("the adapter is not merged; call merge() first")
        self.base.weight.data = self.unmerged_weight
        self.unmerged_weight = None

    def extra_repr(self) -> str:
        """Shapes and settings, shown when the layer is printed."""
        return super().extra_repr() + f", merged={self.merged}"

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

    `h` is the output of `base`; `down` (`D`, `[bottleneck, out]`) and `up` (`U`,
    `[out, bottleneck]`), both with a bias, are trained. `U` and its bias start at zero, so the
    layer begins as its base (Houlsby starts near zero: a normal of standard deviation 0.01). In a
    transformer it stands behind each block's attention and behind its feed-forward part. Between
    `D` and `U` lies a bend, so it cannot be merged into `base`: it costs time at every use.

    Args:
        base: a module whose output is `[..., out_features]`; it is frozen.
        out_features: the width of that output; by default `base.out_features`.
        bottleneck: the inner width, `m` in the paper; `2·m·out + m + out` parameters.

    Source: Houlsby et al. (arXiv 1902.00751), section 2.1 and figure 2.

    >>> base = nn.Linear(4, 6)
    >>> adapter = HoulsbyAdapter(base, bottleneck=2)
    >>> x = torch.ones(5, 4)
    >>> torch.equal(adapter(x), base(x))
    True
    >>> sum(p.numel() for p in adapter.parameters() if p.requires_grad)  # 2·2·6 + 2 + 6
    32
    """

    def __init__(self, base: nn.Module, bottleneck: int, out_features: int | None = None) -> None:
        super().__init__()
        if isinstance(bottleneck, bool) or not isinstance(bottleneck, int) or bottleneck < 1:
            raise LoRAError(
                f"the bottleneck must be a whole number of at least 1, not {bottleneck!r}"
            )
        width = out_features if out_features is not None else getattr(base, "out_features", None)
        if width is None:
            raise LoRAError(
                f"{type(base).__name__} does not say how wide its output is; pass out_features"
            )
        self.base = base.requires_grad_(False)
        like = next((p for p in base.parameters() if p.is_floating_point()), torch.empty(0))
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
