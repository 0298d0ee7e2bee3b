"""The format: the levels of NF4, and the bits of its constants. Chapters 1 to 3."""

import torch

from benchmarks.claims.ledger import LITGPT, QLORA, Answer, claim, percent
from qlora_edu.blockwise import unpack_nibbles
from qlora_edu.codebooks import entropy_bits, level_usage, nf4_levels, normal_quantile
from qlora_edu.memory import llama_parameters, nf4_bits_per_weight
from qlora_edu.quantized import quantize


@claim(
    "NF4 in blocks of 64 with double quantisation takes 4.127 bits per weight.",
    f"{QLORA}, section 3 (0.5 bits of constants become 0.127)",
    "bytes of a quantised tensor; notebook 3",
)
def _nf4_dq_4_127_bits() -> Answer:
    value = quantize(torch.ones(2**20)).bits_per_weight
    return Answer.of(
        f"{value:.3f} bits",
        reproduced=round(value, 3) == 4.127,
        because=(
            "Four bits of code, 8 bits of constant for 64 weights and 32 bits for 64 times 256 "
            "weights, counted in the bytes of a real tensor."
        ),
    )


@claim(
    "Double quantisation saves 0.373 bits per weight.",
    f"{QLORA}, section 3",
    "bytes of a tensor quantised both ways; notebook 3",
)
def _dq_saves_0_373_bits() -> Answer:
    weight = torch.ones(2**20)
    double = quantize(weight).bits_per_weight
    plain = quantize(weight, double_quant=False).bits_per_weight
    return Answer.of(
        f"{plain - double:.3f} bits",
        reproduced=round(plain - double, 3) == 0.373,
        because=(
            f"A tensor takes {plain:.3f} bits per weight with 32-bit constants and {double:.3f} "
            "with constants that are quantised themselves."
        ),
    )


def dq_saves(size: str) -> float:
    """Bytes that double quantisation saves on the linear layers of a LLaMA."""
    saved = 4 + 32 / 64 - nf4_bits_per_weight()
    return saved / 8 * llama_parameters(size)[0]


@claim(
    "Double quantisation saves about 3 GB on a 65B model.",
    f"{QLORA}, section 1",
    "arithmetic on the shapes; notebook 3",
)
def _dq_saves_3gb() -> Answer:
    saved = dq_saves("65B") / 1e9
    return Answer.of(
        f"{saved:.2f} GB",
        reproduced=round(saved) == 3,
        because=(
            f"The linear layers of a LLaMA-65B have {llama_parameters('65B')[0] / 1e9:.1f} billion "
            f"weights, and the bits saved on them are {saved:.2f} GB."
        ),
    )


@claim(
    "Double quantisation takes a Llama-2-7B fine-tune from 14.14 to 13.84 GB.",
    f"{LITGPT}, tutorials/resource-tables.md",
    "arithmetic on the shapes; notebook 3",
)
def _litgpt_dq_saves_0_3gb() -> Answer:
    saved, printed = dq_saves("7B") / 1e9, 14.14 - 13.84
    return Answer.of(
        f"{saved:.2f} GB less",
        reproduced=round(saved, 2) == round(printed, 2),
        because=(
            f"Their two measurements are {printed:.2f} GB apart, and our arithmetic, on a model of "
            f"the same shapes, says {saved:.3f} GB; the totals depend on their settings and were "
            "not run."
        ),
    )


PRINTED_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The table that the paper prints in its appendix."""


@claim(
    "NF4's sixteen levels are the table −1, −0.6962, …, 0, 0.0796, …, 1.",
    f"{QLORA}, appendix (the exact values of NF4)",
    "derived from the normal distribution; notebook 1",
)
def _nf4_16_levels() -> Answer:
    equal = int((nf4_levels() == torch.tensor(PRINTED_NF4)).sum())
    return Answer.of(
        f"{equal} of {len(PRINTED_NF4)} levels equal, to the bit",
        reproduced=equal == len(PRINTED_NF4),
        because=(
            "Quantiles of the normal distribution, taken from the outermost probability 0.9677083 "
            f"on, give {equal} of the {len(PRINTED_NF4)} printed levels exactly."
        ),
    )


@claim(
    "NF4's levels are means of neighbouring quantiles at i/17 and (i + 1)/17.",
    f"{QLORA}, equation 4",
    "the equation computed as printed; notebook 1",
)
def _nf4_equation_4() -> Answer:
    quantiles = normal_quantile(torch.arange(18) / 17)
    levels = (quantiles[:-1] + quantiles[1:]) / 2
    infinite = int(levels.isinf().sum())
    finite = levels[levels.isfinite()]
    symmetric = torch.allclose(finite, -finite.flip(0), atol=1e-6)
    return Answer.of(
        f"{len(levels)} values, {infinite} of them infinite",
        reproduced=not infinite and not symmetric,
        because=(
            f"As printed the equation gives {len(levels)} values, {infinite} of them infinite and "
            f"the others {'' if symmetric else 'not '}symmetric, while the table that is used has "
            "sixteen finite levels and is not symmetric."
        ),
    )


@claim(
    "NF4 uses its sixteen levels equally often: 6.25 % each.",
    f"{QLORA}, section 3",
    "sixteen million normal weights quantised in blocks of 64; notebook 1",
)
def _nf4_equal_use() -> Answer:
    weights = torch.randn(2**24, generator=torch.Generator().manual_seed(0))
    usage = level_usage(unpack_nibbles(quantize(weights).packed, len(weights)))
    low, high = usage.min().item(), usage.max().item()
    return Answer.of(
        f"{percent(low)} to {percent(high)}; {entropy_bits(usage):.2f} of 4 bits",
        reproduced=high - low < 0.01,
        because=(
            "Each block is divided by its own largest weight, which crowds the others towards the "
            f"middle, so that the rarest level gets {percent(low)} and the commonest "
            f"{percent(high)}."
        ),
    )
