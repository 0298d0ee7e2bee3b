"""How many numbers are trained: arithmetic on the shapes of the models. Chapter 4."""

from benchmarks.claims.ledger import LORA, Answer, claim, percent
from qlora_edu.memory import adapter_parameters, llama_parameters


def share(rank: int) -> float:
    """Trained share of a LLaMA-7B with adapters on all linear layers.

    >>> round(share(64), 4)
    0.0237
    """
    return adapter_parameters("7B", rank) / sum(llama_parameters("7B"))


@claim(
    "With adapters less than 1 % of the parameters are trained.",
    "Common in tutorials of LoRA; no paper",
    "arithmetic on the shapes; notebook 4",
)
def _less_than_1_percent_trained() -> Answer:
    largest = max(r for r in range(1, 257) if share(r) < 0.01)
    return Answer.of(
        f"{percent(share(64), 1)} at r = 64; below 1 % up to r = {largest}",
        reproduced=largest >= 64,
        in_part=True,
        because=(
            "With adapters on all linear layers of a 7B the trained share grows with the rank: it "
            f"is below 1 % up to r = {largest}, and {percent(share(64), 1)} at the r = 64 of the "
            "Guanaco recipe."
        ),
    )


@claim(
    "With adapters 0.5 to 5 % of the parameters are trained.",
    "Common in tutorials of PEFT methods; no paper",
    "arithmetic on the shapes; notebook 4",
)
def _0_5_to_5_percent_trained() -> Answer:
    low, high = share(8), share(64)
    inside = low >= 0.005 and high <= 0.05
    return Answer.of(
        f"{percent(low, 2)} to {percent(high, 2)} for r = 8 to 64",
        reproduced=inside,
        in_part=high >= 0.005,
        because=(
            f"With adapters on all linear layers of a 7B the share is {percent(low, 2)} at r = 8, "
            f"{percent(share(16), 2)} at r = 16 and {percent(high, 2)} at r = 64."
        ),
    )


@claim(
    "LoRA trains 10,000 times fewer parameters than full fine-tuning of GPT-3 175B.",
    f"{LORA}, abstract and section 4.2 (r = 4 on query and value)",
    "arithmetic on the shapes; notebook 4",
)
def _lora_10000_times_fewer() -> Answer:
    width, blocks, rank = 12_288, 96, 4
    trained = blocks * 2 * rank * (width + width)
    ratio = 175e9 / trained
    return Answer.of(
        f"{ratio:,.0f} times",
        reproduced=abs(ratio / 10_000 - 1) < 0.1,
        because=(
            f"At r = {rank} on the query and value matrices of {blocks} blocks of width {width:,} "
            f"there are {trained:,} trained numbers; the paper says roughly, and it is within a "
            "tenth."
        ),
    )


@claim(
    "Of a 345M model full fine-tuning trains 345M parameters, adapters 24M and LoRA 12M.",
    "Goes round in teaching, without its settings; no paper",
    "arithmetic on the shapes of GPT-2 Medium; notebook 4",
)
def _345m_24m_12m() -> Answer:
    width, blocks, words, places, bottleneck, rank = 1024, 24, 50_257, 1024, 256, 32
    full = (words + places + 2) * width + blocks * (12 * width**2 + 13 * width)
    houlsby = blocks * 2 * (2 * bottleneck * width + bottleneck + width)
    # q, k and v in one matrix, the output of attention, up, down: r · (in + out) of each
    lora = blocks * rank * (4 + 2 + 5 + 5) * width
    near = round(houlsby / 2**20) == 24 and round(lora / 2**20) == 12
    return Answer.of(
        f"{full / 1e6:.1f}M; {houlsby / 2**20:.2f} and {lora / 2**20:.2f} · 2²⁰",
        in_part=near,
        because=(
            f"Two adapters a block with a bottleneck of {bottleneck}, and LoRA of r = {rank} on "
            "all linear layers, give 24 and 12 in binary millions, which is our reconstruction; "
            f"the model has {full / 1e6:.1f} million, and other settings give any other number."
        ),
    )
