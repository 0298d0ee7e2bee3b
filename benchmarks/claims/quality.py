"""How good the models are, by the stored studies of the course. Chapters 4, 5, 8 and 10."""

from benchmarks.claims.ledger import (
    MARGIN,
    QLORA,
    Answer,
    ClaimError,
    claim,
    not_here,
    percent,
    stored,
)
from qlora_edu.comparison import equivalence
from qlora_edu.evaluation import Judge, bradley_terry, exact_judge, play, word_judge


def compare(first: str, second: str, measure: str) -> tuple[str, str]:
    """Two ways of fine-tuning, paired by seed: a verdict, and the difference with its interval.

    The verdict is that of chapter 8's `Equivalence`.
    """
    values = {}
    for way in (first, second):
        runs = [
            run
            for run in stored("three_ways")["runs"]
            if (run["part"], run["way"]) == ("seeds", way)
        ]
        values[way] = [run[measure] for run in sorted(runs, key=lambda run: run["seed"])]
    test = equivalence(values[first], values[second], MARGIN)
    mean, low, high = test.difference
    return test.verdict, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def equal_in_both(first: str, second: str, names: str, more: str = "") -> Answer:
    """The answer to a claim that two ways are as good as each other.

    It was made of models up to 20,000 times as large, so a small one cannot contradict it.
    """
    loss, by_loss = compare(first, second, "held_out_loss")
    match, by_match = compare(first, second, "exact_match")
    return Answer.of(
        f"loss {by_loss}, exact match {by_match}",
        in_part=True,
        because=(
            f"On the course's own model of three million weights, five seeds, {names} at a margin "
            f"of {MARGIN}: in held-out loss equivalence is {SAID[loss]}, in exact match it is "
            f"{SAID[match]} (differences, with 90 % intervals).{more} Of the paper's models, which "
            "are far larger, this says nothing."
        ),
    )


SAID = {"equivalent": "shown", "different": "refuted", "not shown": "not shown"}


@claim(
    "QLoRA is as good as LoRA in 16 bits.",
    f"{QLORA}, section 4",
    "`make experiments`; notebook 8",
)
def _qlora_equals_lora() -> Answer:
    return equal_in_both("qlora", "lora", "QLoRA against LoRA")


@claim(
    "QLoRA is as good as full fine-tuning.",
    f"{QLORA}, section 4",
    "`make experiments`; notebook 8",
)
def _qlora_equals_full() -> Answer:
    _, left = compare("qlora + embeddings", "full", "held_out_loss")
    return equal_in_both(
        "qlora",
        "full",
        "QLoRA against full fine-tuning, each at its best rate,",
        f" With the embeddings trained too, of tokens that the base had never seen, {left} of the "
        "loss is left: so that difference is hardly one of the 4 bits.",
    )


def experiment(target_modules: str, rank: int) -> float:
    """Exact match of one run of chapter 4's experiments, at its common learning rate."""
    for row in stored("lora_experiments")["rows"]:
        setting = (
            row["target_modules"],
            row["r"],
            row["lora_alpha"] / row["r"],
            row["learning_rate"],
        )
        if setting == (target_modules, rank, 2, 0.003):
            return row["exact_match_after"]
    raise ClaimError(f"lora_experiments.json has no run of {target_modules} at r = {rank}")


@claim(
    "Adapters have to be on all linear layers to come near full fine-tuning.",
    f"{QLORA}, section 4",
    "`python benchmarks/lora_experiments.py`; notebook 4",
)
def _all_layers_matter() -> Answer:
    everywhere, query_value = experiment("all-linear", 16), experiment("q_proj,v_proj", 64)
    full = stored("lora_experiments")["full"]["exact_match_after"]
    return Answer.of(
        f"exact match {everywhere:.2f} (all) against {query_value:.2f} (query and value)",
        in_part=everywhere - query_value > MARGIN,
        because=(
            "With about as many trained numbers, adapters on all linear layers reach "
            f"{everywhere:.2f} and those on query and value {query_value:.2f}, where full "
            f"fine-tuning has {full:.2f}; but that is one seed of one small model."
        ),
    )


@claim(
    "With adapters on all linear layers the rank hardly matters.",
    f"{QLORA}, section 4 and appendix",
    "`python benchmarks/lora_experiments.py`; notebook 4",
)
def _rank_hardly_matters() -> Answer:
    found = {r: experiment("all-linear", r) for r in (1, 4, 16, 64)}
    high_alike = abs(found[16] - found[64]) < MARGIN
    all_alike = max(found.values()) - min(found.values()) < MARGIN
    return Answer.of(
        "exact match " + ", ".join(f"{number:.2f} (r = {r})" for r, number in found.items()),
        reproduced=all_alike,
        in_part=high_alike,
        because=(
            f"Between r = 16 and 64 nothing is gained ({found[16]:.2f} and {found[64]:.2f}), but "
            f"at r = 1 exact match is {found[1]:.2f}: on one seed of a small model, trained for "
            "few steps, a rank can be too low."
        ),
    )


@claim(
    "Merging an adapter into its 4-bit base can change the answers, through rounding.",
    "huggingface/peft, the warning of its 4-bit `merge`",
    "`python benchmarks/merge_lab.py`; notebook 5",
)
def _merging_into_4_bits() -> Answer:
    rows = stored("merge_lab")["rows"]
    kept = [row["surviving_share"]["4-bit"] for row in rows]
    lost = max(row["exact_match"]["unmerged"] - row["exact_match"]["4-bit"] for row in rows)
    return Answer.of(
        f"{percent(min(kept))} to {percent(max(kept))} of the update survive",
        reproduced=lost > MARGIN,
        because=(
            "Of nine adapters merged into 4 bits, small updates vanish in the rounding "
            f"({percent(min(kept))} survive) and large ones stay ({percent(max(kept))}), and exact "
            f"match falls by up to {lost:.2f}."
        ),
    )


def places(judge: Judge) -> dict[str, int]:
    """The place of each system of the course's tournament, by one judge; equals share a place."""
    ratings = bradley_terry(play(stored("tournament")["rows"], judge))
    whole = {system: round(rating) for system, rating in ratings.items()}
    return {system: 1 + sum(o > mine for o in whole.values()) for system, mine in whole.items()}


@claim(
    "A place depends on the judge: people put Guanaco 7B third, GPT-4 puts it eighth.",
    f"{QLORA}, section 5",
    "`python benchmarks/tournament.py`, with two other judges",
)
def _judges_disagree() -> Answer:
    exact, words = places(exact_judge), places(word_judge)
    moved = max(exact, key=lambda system: abs(exact[system] - words[system]))
    two = f"place {exact[moved]} and {words[moved]}"
    if abs(exact[moved] - words[moved]) < 2:
        return not_here("the course's own judges agree, and people and GPT-4 were not asked.")
    return Answer.of(
        f"{two} of {len(exact)} (“{moved}”)",
        in_part=True,
        because=(
            "Two programs as judges, one that wants the exact answer and one that counts shared "
            f"words, give the system “{moved}” of the course's own tournament {two} of "
            f"{len(exact)}, among others that are nearly as good; people and GPT-4 were not asked."
        ),
    )


def before_training(base: str) -> float:
    """The course's base model on held-out text before any fine-tuning, its weights in a format."""
    found = {row["base"]: row["text_perplexity"] for row in stored("three_ways")["base"]}
    return found[base]


@claim(
    "Four bits of NF4 keep the quality of 16 bits.",
    f"{QLORA}, section 4",
    "`make experiments`; notebook 8",
)
def _nf4_keeps_quality() -> Answer:
    sixteen, four = before_training("bfloat16"), before_training("qlora")
    more = four / sixteen - 1
    return Answer.of(
        f"perplexity {sixteen:.4f} to {four:.4f} ({percent(more, 2, '+')})",
        in_part=more < 0.005,
        because=(
            "Measured before any fine-tuning on the course's own base of three million weights, "
            f"whose perplexity on held-out text moves by {percent(more, 2, '+')}; on no larger "
            "model."
        ),
    )


@claim(
    "NF4 (27.41) beats FP4 (29.48 and 31.07) and INT4 (34.34) in mean perplexity.",
    f"{QLORA}, table 2",
    "`make experiments`; notebook 8",
)
def _nf4_beats_fp4_and_int4() -> Answer:
    base = before_training("float32")
    more = {
        name: before_training(key) / base - 1
        for name, key in {"NF4": "qlora", "INT4": "int4", "FP4": "fp4"}.items()
    }
    first = min(more, key=more.get) == "NF4"
    differ = max(more.values()) - min(more.values()) > 0.005
    after = sorted({compare("qlora", other, "held_out_loss")[0] for other in ("fp4", "int4")})
    return Answer.of(
        ", ".join(f"{name} {percent(number, 2, '+')}" for name, number in more.items())
        + " perplexity",
        reproduced=first and differ,
        in_part=first,
        because=(
            f"On the course's small base NF4 {'comes' if first else 'does not come'} first, but at "
            f"4 bits all formats are within {percent(max(more.values()), 2)} of the unquantised "
            "model, and that NF4 has the held-out loss of the others after fine-tuning is "
            f"{' and '.join(SAID[word] for word in after)}; the paper's models are far larger."
        ),
    )


@claim(
    "Guanaco 65B reaches 99.3 % (± 4.4) of ChatGPT's score.",
    f"{QLORA}, table 6",
    "not checked",
)
def _guanaco_99_3_percent() -> Answer:
    return not_here("it needs ChatGPT's answers, and GPT-4 as their judge.")


@claim(
    "Fine-tuned in NF4 with double quantisation LLaMA has 53.1 on MMLU, in BF16 53.0, in FP4 52.2.",
    f"{QLORA}, section 4",
    "not checked",
)
def _mmlu_nf4_dq() -> Answer:
    return not_here(
        "it needs the weights of LLaMA 7B to 65B and dozens of fine-tunes on large cards; the "
        "course's own model is too small to answer such questions."
    )
