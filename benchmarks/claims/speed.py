"""How long it takes, and what paging costs, as a card and a CPU measured it. Chapters 7, 9, 10."""

from typing import Any

from benchmarks.claims.ledger import (
    LITGPT,
    LORA,
    MARGIN,
    QLORA,
    Answer,
    ClaimError,
    claim,
    not_here,
    percent,
    stored,
)
from benchmarks.claims.memory import guanaco, headline, step


@claim(
    "QLoRA is slower than LoRA: 3.68 minutes instead of 2.36 for a Llama-2-7B.",
    f"{LITGPT}, tutorials/resource-tables.md",
    "`make gpu-report`, part b; notebook 9",
)
def _qlora_slower_than_lora() -> Answer:
    ratios = [
        step(task, length)["seconds_a_step"] / step("lora", length)["seconds_a_step"]
        for task in ("qlora, bitsandbytes + PEFT", "qlora, ours")
        for length in (512, 2048)
    ]
    return Answer.of(
        f"{min(ratios):.1f} to {max(ratios):.1f} times as long",
        reproduced=min(ratios) > 1,
        because=(
            f"Their ratio is {3.68 / 2.36:.1f}; a step of a 7B on an "
            f"{stored('gpu_steps')['machine']} took {min(ratios):.1f} to {max(ratios):.1f} times "
            "as long as LoRA's, by the stack and the length of the row, since every weight is "
            "unpacked anew."
        ),
    )


def optimizer(name: str) -> dict[str, Any]:
    """The stored optimizer step on the adapters of a 7B at r = 64."""
    return next(row for row in stored("gpu_paging")["rows"] if row["task"] == name)


@claim(
    "At a batch of 16 a paged optimizer is as fast as an ordinary one (65B).",
    f"{QLORA}, section 4",
    "`make gpu-report`, parts b and c; notebook 7",
)
def _paging_no_slower() -> Answer:
    plain = optimizer("bitsandbytes AdamW32bit")["seconds_a_step"]
    paged = optimizer("bitsandbytes PagedAdamW32bit")["seconds_a_step"]
    row = step("qlora, bitsandbytes + PEFT")["seconds_a_step"]
    more = (paged - plain) / (16 * row)
    return Answer.of(
        f"{percent(more, 2, '+')} of a step of 16 rows (7B)",
        in_part=more < 0.01,
        because=(
            f"With memory to spare the paged update of a 7B's adapters took {1000 * paged:.0f} ms "
            f"instead of {1000 * plain:.0f}, which beside sixteen rows of {row:.2f} s is nothing; "
            "a 65B, and a card short of memory, were not timed."
        ),
    )


@claim(
    "The peak of memory is the same with and without a paged optimizer.",
    f"{LITGPT}, pull request 275",
    "`make gpu-report`, part c; notebook 7",
)
def _paging_same_peak() -> Answer:
    plain, paged = optimizer("bitsandbytes AdamW32bit"), optimizer("bitsandbytes PagedAdamW32bit")
    seen = [row["peak_allocated_bytes"] / 1e9 for row in (plain, paged)]
    whole = seen[1] + paged["managed_bytes"] / 1e9
    return Answer.of(
        f"{seen[0]:.2f} and {seen[1]:.2f} GB by PyTorch's counter; {whole:.2f} with what it misses",
        in_part=abs(whole / seen[0] - 1) < 0.01,
        because=(
            "PyTorch's counter does not see the memory that the driver pages, so that paged "
            f"states look free; counted with it the peak of the optimizer step is {whole:.2f} GB, "
            f"against {seen[0]:.2f} without paging."
        ),
    )


@claim(
    "Paged optimizers are critical for 33B on 24 GB and 65B on 48 GB.",
    f"{QLORA}, section 4",
    "the planner and `make gpu-report`, part d; notebooks 6 and 7",
)
def _paging_critical() -> Answer:
    _, rows, fits = headline("llama-33b")
    unpaged = fits and not any(row["managed_bytes"] for row in rows)
    late = guanaco("65B").peak_moment == "optimizer step"
    return Answer.of(
        f"33B on 24 GB {'without' if unpaged else 'only with'} paging",
        reproduced=not unpaged,
        in_part=True,
        because=(
            f"With rows of {rows[0]['length']} tokens and 16-bit states a 33B trained within 24 GB "
            f"{'without' if unpaged else 'only with'} paging; the planned peak of a 65B "
            f"{'is' if late else 'is not'} in the optimizer step, when paged states are back on "
            "the card, so that paging makes room for rare long rows, which the paper did not "
            "measure."
        ),
    )


def serving(way: str) -> tuple[float, float]:
    """The least and the most time that a way of serving adds to a token, as shares of the base's.

    A share for each of the stored models and batches: the median over rounds in turns.

    Raises:
        ClaimError: if the stored result has another layout than is read here.
    """
    try:
        rows = [row for row in stored("serving")["rows"] if row["way"] == way]
        added = [row["token_ratio"][0] - 1 for row in rows]
        return min(added), max(added)
    except (KeyError, ValueError) as error:
        raise ClaimError(
            f"data/results/serving.json holds no {way!r} as `serving` in claims.py reads it (rows "
            f"with way and token_ratio): bring the two together ({error})"
        ) from error


@claim(
    "Adapters of Houlsby's kind add 10 to 20 % of latency.",
    f"{LORA}, section 3 and table 1 (the range is a common summary)",
    "`python benchmarks/serving.py`; notebook 4 times it on your machine",
)
def _houlsby_latency() -> Answer:
    low, high = serving("Houlsby")
    inside = low >= 0.1 and high <= 0.2
    added = f"{percent(low, 0, '+')} to {percent(high, 0, '+')}"
    return Answer.of(
        f"{added} a token",
        reproduced=inside,
        in_part=high > MARGIN,
        because=(
            "Two adapters a block, on two small models and for one prompt and sixteen at a time, "
            f"change the time for a token by {added} on a CPU: it depends on the model and the "
            "batch."
        ),
    )


@claim(
    "A merged LoRA adapter adds no latency.",
    f"{LORA}, abstract and section 4.1",
    "`python benchmarks/serving.py`; notebook 4 times it on your machine",
)
def _merged_no_latency() -> Answer:
    low, high = serving("LoRA, merged")
    alike = high < MARGIN, low < MARGIN
    added = f"{percent(low, 0, '+')} to {percent(high, 0, '+')}"
    return Answer.of(
        f"{added} a token",
        reproduced=all(alike),
        in_part=any(alike),
        because=(
            "A merged model does the same operations as the base; on two small models, for one "
            f"prompt and sixteen at a time, the time for a token changes by {added}, and less than "
            f"{percent(MARGIN)} is taken for noise."
        ),
    )


@claim(
    "Guanaco 65B is trained in 24 hours on one GPU.",
    f"{QLORA}, abstract",
    "an estimate only, from `make gpu-report`, part d",
)
def _guanaco_65b_24_hours() -> Answer:
    _, rows, _ = headline("llama-65b")
    row = next(row for row in rows if row["stack"] == "bitsandbytes")
    passes = 1875 * 16  # the recipe's steps, and rows of each
    hours = passes * row["seconds_a_step"] / 3600
    return not_here(
        f"no 65B was trained to the end; as an estimate, {passes:,} rows of {row['length']} tokens "
        f"at the measured {row['seconds_a_step']:.2f} s would take {hours:.1f} hours, on a card "
        "that is faster than those of 48 GB."
    )
