"""Chapter 6. Where every byte of a training step goes, and whether it fits on the card.

Weights, adapters and optimizer states stay: arithmetic over shapes. Activations, workspace and
gradients come and go: a step on tensors without memory (`planner/fake_step.py`) shows them. The
*peak*, the largest sum of both at any moment, decides. Source: QLoRA (Dettmers et al., 2023),
section 2; "Training Deep Nets with Sublinear Memory Cost" (Chen et al., 2016).
"""

from bisect import bisect_right
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

from qlora_edu.errors import PlanError, did_you_mean
from qlora_edu.files.host_tier import NEVER_PAGED
from qlora_edu.planner import LLAMA_SHAPES, LLAMA_VOCABULARY, configuration
from qlora_edu.planner import MODELS as MODELS
from qlora_edu.planner.fake_step import StepSettings, trace_step
from qlora_edu.planner.trace import KINDS, ROWS, StepTrace
from qlora_edu.text.conversations import require_counts

GIB = 2**30
RESERVE = GIB
"""Bytes of a card that no tensor gets: CUDA's context, its libraries, gaps between allocations."""

OPTIMIZERS = tuple(
    "adamw_torch adamw_32bit adamw_8bit paged_adamw_32bit paged_adamw_8bit sgd".split()
)
ALWAYS_32_BIT = 4096
"""bitsandbytes keeps the states of smaller tensors in float32."""


def llama_parameters(size: str) -> tuple[int, int]:
    """Count the weights of a LLaMA's linear layers (which QLoRA quantises), and everything else.

    >>> llama_parameters("7B")
    (6476005376, 262410240)
    """
    hidden, layers, inner = LLAMA_SHAPES[size]
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    norms = (2 * layers + 1) * hidden
    return linear, 2 * LLAMA_VOCABULARY * hidden + norms


def adapter_parameters(size: str, r: int) -> int:
    """Count the trained numbers when every linear layer of a LLaMA has an adapter: r × (in + out).

    >>> adapter_parameters("7B", 64)
    159907840
    """
    hidden, layers, inner = LLAMA_SHAPES[size]
    return layers * r * (4 * (hidden + hidden) + 3 * (hidden + inner))


def nf4_bits_per_weight(blocksize: int = 64, absmax_blocksize: int | None = 256) -> float:
    """Count the 4-bit code and its share of the constants, for blocks of weights and of absmax.

    `absmax_blocksize=None` keeps the absmax in 32 bits. Source: QLoRA (2023), section 3.

    >>> round(nf4_bits_per_weight(), 3), nf4_bits_per_weight(absmax_blocksize=None)
    (4.127, 4.5)
    """
    if absmax_blocksize is None:
        return 4 + 32 / blocksize
    return 4 + 8 / blocksize + 32 / (blocksize * absmax_blocksize)


@dataclass(frozen=True)
class MemoryPlan:
    """The ledger of one training step, in bytes; `plan_memory` makes it, `print` shows it.

    >>> plan = plan_memory("llama-7b", "qlora", max_length=512)
    >>> print(plan.sentence(24))  # doctest: +ELLIPSIS
    llama-7b, qlora: fits on a 24 GB card with ... GiB to spare; longest sequence ...
    """

    name: str
    config: Any = field(repr=False)
    settings: StepSettings
    batch_size: int
    max_length: int
    optim: str

    def __post_init__(self) -> None:
        require_counts(PlanError, batch_size=self.batch_size, max_length=self.max_length)
        if self.optim not in OPTIMIZERS:
            raise PlanError(f"optim must be one of {OPTIMIZERS}, not {self.optim!r}")

    @cached_property
    def trace(self) -> StepTrace:
        """Every allocation of a step without memory."""
        return trace_step(self.config, self.settings, self.batch_size, self.max_length)

    @property
    def held(self) -> dict[str, int]:
        """Bytes that stay on the device through the whole step: weights and optimizer states."""
        return {**self.trace.weights, "optimizer states": self.state_bytes - self.host_bytes}

    @property
    def state_bytes(self) -> int:
        """Bytes of all optimizer states, wherever they are."""
        return sum(_state_bytes(n, nbytes, self.optim) for n, nbytes in self.trace.trained)

    @property
    def host_bytes(self) -> int:
        """Bytes of optimizer states that a paged optimizer can push out to the host."""
        if not self.optim.startswith("paged"):
            return 0
        large = [(n, nbytes) for n, nbytes in self.trace.trained if n >= NEVER_PAGED]
        return sum(_state_bytes(n, nbytes, self.optim) for n, nbytes in large)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients; each has the dtype of its parameter."""
        return sum(nbytes for _, nbytes in self.trace.trained)

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations that wait for the backward pass when the last block is through."""
        live = self.trace.live(self.batch_size, self.max_length)
        return round(live[self.trace.marks["head"] - 1].sum())

    @cached_property
    def moments(self) -> dict[str, dict[str, int]]:
        """For each part of the step the rows of the ledger at its worst event."""
        live, marks = self.trace.live(self.batch_size, self.max_length), self.trace.marks
        held = self.held
        head, turn = marks["head"], marks[f"back to {self.trace.blocks}"]
        parts = {
            "forward": live[:head],
            "logits and loss": live[head:turn],
            "backward": live[turn:],
        }
        moments = {}
        for name, part in parts.items():
            worst = part[part.sum(axis=1).argmax()]
            traced = {kind: round(nbytes) for kind, nbytes in zip(KINDS, worst, strict=True)}
            moments[name] = {**held, **traced}
        moments["optimizer step"] = {
            **held,
            "optimizer states": self.state_bytes,
            "gradients": self.gradient_bytes,
            "workspace": self._optimizer_workspace(),
        }
        return moments

    def _optimizer_workspace(self) -> int:
        # PyTorch's AdamW makes its denominator in new tensors: two of the parameter's size one by
        # one on a CPU, those of all parameters at a time on CUDA. Fused kernels need none.
        if self.optim != "adamw_torch":
            return 0
        if self.settings.device == "cuda":
            return self.gradient_bytes
        return 2 * max(nbytes for _, nbytes in self.trace.trained)

    @property
    def peak_moment(self) -> str:
        """The part of the step with the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def rows(self) -> dict[str, int]:
        """The rows of the ledger at the peak; they add up to it."""
        return self.moments[self.peak_moment]

    @property
    def peak_bytes(self) -> int:
        """The most bytes that live on the device at once."""
        return sum(self.rows.values())

    def at(self, **changes: Any) -> Self:
        """The same step with another `batch_size`, `max_length` or `optim`."""
        return replace(self, **changes)

    def spare_bytes(self, card_gib: float) -> float:
        """Bytes of a card left at the peak, with `RESERVE` set aside; below 0 it is too small."""
        if isinstance(card_gib, bool) or not isinstance(card_gib, int | float) or not card_gib > 0:
            raise PlanError(f"a card has a positive number of GiB, not {card_gib!r}")
        return card_gib * GIB - RESERVE - self.peak_bytes

    def longest_length(self, card_gib: float) -> int:
        """Find the most tokens a row may have for the step to fit; 0 if it never does."""
        return bisect_right(  # as many lengths fit as lie before the first that does not
            range(1, 2**24), False, key=lambda n: self.at(max_length=n).spare_bytes(card_gib) < 0
        )

    def sentence(self, card_gib: float) -> str:
        """Say whether it fits on a card, with how much to spare, and how long a row may be."""
        spare = self.spare_bytes(card_gib)
        card = f"{'an' if f'{card_gib:g}'.startswith('8') else 'a'} {card_gib:g} GB card"
        verdict = f"fits on {card} with {spare / GIB:,.1f} GiB to spare"
        if spare < 0:
            verdict = f"does not fit on {card}: {-spare / GIB:,.1f} GiB too much"
        longest = self.longest_length(card_gib)
        return f"{self.name}, {self.settings.method}: {verdict}; longest sequence {longest:,}"

    def table(self) -> str:
        """The ledger in GiB: a row for each sort of byte, a column for each part of the step."""
        moments = self.moments.values()
        lines = {row: [moment.get(row, 0) for moment in moments] for row in ROWS}
        lines = {row: sizes for row, sizes in lines.items() if any(sizes)}
        lines["sum"] = [sum(moment.values()) for moment in moments]
        said = [f"{'GiB':<24}" + "".join(f"{name:>17}" for name in self.moments)]
        for row, sizes in lines.items():
            said.append(f"{row:<24}" + "".join(f"{size / GIB:>17.3f}" for size in sizes))
        said.append(f"peak: {self.peak_bytes / GIB:.3f} GiB, in the {self.peak_moment}")
        said.append(f"activations when the loss begins: {self.activation_bytes / GIB:.3f} GiB")
        if self.host_bytes:
            said.append(f"on the host: optimizer states, {self.host_bytes / GIB:.3f} GiB")
        return "\n".join(said)

    __str__ = table


def plan_memory(
    model: Any,
    method: str = "qlora",
    *,
    batch_size: int = 1,
    max_length: int = 512,
    optim: str = "adamw_torch",
    **settings: Any,
) -> MemoryPlan:
    """Plan the memory of a training step: forward, backward, clipping, optimizer step.

    `model` is a name in `MODELS` or on the Hub, a folder with a `config.json`, a Hugging Face
    configuration, as a dictionary too, or a model; `method` "full", "lora", "qlora" or "houlsby".
    A step has `batch_size` rows of `max_length` tokens each. `optim` is one of `OPTIMIZERS`: the
    states of "adamw_torch" have the dtype of the parameters, those of bitsandbytes 32 or 8 bits; a
    paged one's are on the device only in its step. `settings` are fields of `StepSettings`.

    Raises `PlanError`, or `ModelUnavailableError` if the Hub does not give the configuration.

    >>> plan = plan_memory("llama-7b", "qlora", r=64)
    >>> plan.held["quantised weights"]  # half a byte per weight
    3238002688
    """
    known = ["batch_size", "max_length", "optim", *(one.name for one in fields(StepSettings))]
    if unknown := [name for name in settings if name not in known]:
        raise PlanError(f"no setting {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
    step = StepSettings(method=method, **settings)
    plan = MemoryPlan(*configuration(model), step, batch_size, max_length, optim)
    _ = plan.trace  # what is wrong with the model is said now
    return plan


def _state_bytes(n: int, nbytes: int, optim: str) -> int:
    """Bytes of the two running means of a trained tensor of `n` numbers and `nbytes` bytes.

    >>> [_state_bytes(65536, 131072, name) for name in ("adamw_torch", "adamw_32bit")]
    [262144, 524288]
    """
    if optim == "sgd":
        return 0
    if optim == "adamw_torch":
        return 2 * nbytes
    if optim.endswith("32bit") or n < ALWAYS_32_BIT:
        return 2 * 4 * n
    return 2 * (n + 4 * -(-n // 256))
