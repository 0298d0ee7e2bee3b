"""Fill the tables of the README and of docs/: no number there is typed in.

    python -m benchmarks.pages      # `make pages`; `make claims` runs it, too

A page holds a block between two comment lines, `<!-- study: begin -->` and `<!-- study: end -->`.
The function of that name makes what stands between them, from `data/results/`, `data/claims.json`
and the title boxes of the notebooks. A test compares the pages with what is made here.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.ledger import MARGIN, stored, table
from benchmarks.stored import ROOT, write_text
from qlora_edu.comparison import equivalence, mean_interval

PAGES = (ROOT / "README.md", ROOT / "docs" / "claims.md", ROOT / "docs" / "measured.md")
IN_THE_README = ("65b-on-48gb", "nf4-16-levels", "qlora-equals-full")
WAYS = {
    "full": "full",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "qlora + embeddings": "QLoRA, embeddings trained too",
    "houlsby": "Houlsby adapters",
}
MODULES = {
    0: "course/doctor.py",
    1: "codebooks.py",
    2: "blockwise.py",
    3: "double_quant.py quantized.py",
    4: "lora.py adapters.py",
    5: "qlora.py",
    6: "memory.py planner/",
    7: "paging.py",
    8: "training.py comparison.py",
    9: "finetuning.py production/",
    10: "evaluation.py text/",
}
"""The modules of each chapter; which chapter needs a card is said in `chapters`."""
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "ten": 10, "twenty": 20}
QUARTERS = {"a quarter": 15, "a half": 30, "three quarters": 45}


class PageError(ValueError):
    """A page cannot be filled; the message names the page or the notebook."""


def rows_of(head: str, rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(rows_of("a | b", [["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [f"| {head} |", "| --- " * len(head.split(" | ")) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def at_least(ratio: float) -> str:
    """A ratio of speeds, never rounded up.

    >>> at_least(2.59), at_least(0.978)
    ('2.5', '0.97')
    """
    digits = 1 if ratio >= 1 else 2
    return f"{math.floor(10**digits * ratio) / 10**digits:.{digits}f}"


def gigabytes(size: int) -> str:
    """Bytes as GB, 10⁹ of them.

    >>> gigabytes(44_121_658_368)
    '44.1 GB'
    """
    return f"{size / 1e9:.1f} GB"


# The notebooks.


def minutes(time: str) -> int:
    """The minutes in the line *Time* of a title box: what stands before its first colon.

    Raises:
        PageError: no duration was found.

    >>> minutes("75 minutes: 40 to read"), minutes("a good hour and a half"), minutes("two hours")
    (75, 90, 120)
    >>> minutes("about an hour and twenty minutes"), minutes("an hour and three quarters: …")
    (80, 105)
    """
    found, total = re.split("[:;(]", time)[0], 0
    for word, unit in re.findall(r"(\w+) (?:good )?(hour|minute)s?\b", found):
        if not (word.isdigit() or word in NUMBERS):
            raise PageError(f"{word!r} is no number, in the time {found!r}: write digits")
        number = int(word) if word.isdigit() else NUMBERS[word]
        total += number * (60 if unit == "hour" else 1)
    total += sum(more for words, more in QUARTERS.items() if f"hour and {words}" in found)
    if not total:
        raise PageError(f"no hours or minutes in the time {found!r}: write '75 minutes: …'")
    return total


def notebooks() -> list[tuple[Path, str, int]]:
    """Every notebook with its title and its minutes, in order.

    Raises:
        PageError: a notebook has no title or no time.
    """
    found = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        opening = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title = re.search(r"^# (.+)$", opening, re.MULTILINE)
        time = re.search(r"^\| \*\*Time\*\* \| (.+) \|$", opening, re.MULTILINE)
        if title is None or time is None:
            raise PageError(f"{path.name}: its first cell needs '# title' and '| **Time** | … |'")
        found.append((path, title[1], minutes(time[1])))
    return found


def hours() -> str:
    """How long the course is, as its notebooks say."""
    times = [time for _, _, time in notebooks()]
    return (
        f"**About {sum(times) / 60:.0f} hours**, exercises included: {len(times)} notebooks of "
        f"{min(times)} to {max(times)} minutes, as their title boxes count."
    )


def chapters() -> str:
    """The map: one chapter, one notebook, its modules, its minutes."""
    rows = []
    for path, title, time in notebooks():
        number = int(path.name[:2])
        modules = (f"[`{name}`](qlora_edu/{name})" for name in MODULES[number].split())
        card = "for 7B; the same cells run small on a CPU" if number == 9 else "no"
        link = f"[{number}](notebooks/{path.name})"
        rows.append([link, title, ", ".join(modules), str(time), card])
    return rows_of("chapter | question | modules | minutes | GPU?", rows)


# Chapter 8's study.


def runs(way: str) -> list[dict[str, Any]]:
    """The runs of the study for one way, by seed."""
    found = [
        run for run in stored("three_ways")["runs"] if (run["part"], run["way"]) == ("seeds", way)
    ]
    return sorted(found, key=lambda run: run["seed"])


def study() -> str:
    """Means over seeds, with 95 % intervals for what counts most."""
    rows = []
    for way, name in WAYS.items():
        of_way = runs(way)
        match = mean_interval([run["exact_match"] for run in of_way])
        loss = mean_interval([run["held_out_loss"] for run in of_way])
        nats = mean_interval([math.log(run["text_perplexity"]) for run in of_way])
        exact = f"{match.mean:.2f} [{match.low:.2f}, {match.high:.2f}]"
        numbers = [f"{loss.mean:.3f}", f"{math.exp(nats.mean):.1f}", f"{of_way[0]['trainable']:,}"]
        rows.append([name, exact, *numbers])
    head = "way | exact match | held-out loss | perplexity on old text | trained parameters"
    return rows_of(head, rows)


def compare(other: str, measure: str, digits: int) -> tuple[str, str]:
    """QLoRA less another way: the difference with its 90 % interval, and the verdict."""
    test = equivalence(
        [run[measure] for run in runs("qlora")],
        [run[measure] for run in runs(other)],
        margin=MARGIN,
    )
    mean, low, high = (f"{number:+.{digits}f}" for number in test.difference)
    return f"{mean} [{low}, {high}]", test.verdict


def verdicts() -> str:
    """What the tests of equivalence say of QLoRA."""
    rows = []
    for other in ("full", "lora"):
        for measure, digits in (("exact_match", 3), ("held_out_loss", 4)):
            difference, verdict = compare(other, measure, digits)
            what = measure.replace("_", " ").replace("held out", "held-out")
            rows.append([WAYS[other], what, difference, f"**{verdict}**"])
    return rows_of("QLoRA less | measure | difference, 90 % interval | verdict", rows)


def base() -> str:
    """What the base model can do before any training."""
    found = stored("embedded_comparison")["base"]
    asked = {
        "0_shot": "asked plainly",
        "3_shot": "with three solved rows before the question",
        "question_as_talk": "asked in the manner of its own stories",
    }
    rows = [[words, f"{found[key]:.2f}"] for key, words in asked.items()]
    return rows_of("the base, before training | exact match", rows)


# Time and memory on a CPU.

KINDS = {
    "`quantize`": r"quantize .*\dx\d+ \w+$",
    "`quantize`, compiled": r"quantize .* compiled$",
    "`dequantize`": r"dequantize ",
    "a QLoRA step of 2,048 tokens or more": r"qlora step .* time$",
    "a QLoRA step of 128 tokens": r"qlora small step .* time$",
    "memory of a step of 2,048 tokens or more": r"qlora step .* peak memory$",
}


MACHINES = ("bench", "bench_other_machine")  # the same code on two processors


def ratios(kind: str, machines: Sequence[str] = MACHINES) -> list[float]:
    """How many times as fast (as small) ours is as bitsandbytes', with PEFT for a step."""
    rows = [row for name in machines for row in stored(name)["rows"] if row["peer"] != "torchao"]
    return [row["ratio"] for row in rows if re.match(KINDS[kind], row["name"])]


def span(found: Sequence[float]) -> str:
    """From the least to the most, never rounded up."""
    return f"{at_least(min(found))} to {at_least(max(found))}"


def bench() -> str:
    """Ours beside its peers on two CPU cores, of two machines."""
    dates = [stored(name)["date"] for name in MACHINES]
    rows = [
        [kind, *(span(ratios(kind, [name])) for name in MACHINES), str(len(ratios(kind)) // 2)]
        for kind in KINDS
        if ratios(kind)
    ]
    return rows_of(f"peer's time (or memory) over ours | {' | '.join(dates)} | cases", rows)


def planner_error() -> str:
    """The planner's largest error on real CPU steps, rounded up."""
    worst = max(abs(row["error"]) for row in stored("memory")["rows"])
    return f"{math.ceil(1000 * worst) / 10} %"


def planner() -> str:
    """How far off the planner is on a CPU."""
    rows = stored("memory")["rows"]
    lines = [
        ["real training steps", str(len(rows))],
        ["architectures", str(len({row["model"] for row in rows}))],
        ["of the steps drawn at random", str(sum(row["held_out"] for row in rows))],
        ["largest error of the peak", planner_error()],
    ]
    return rows_of("the planner against the CPU | ", lines)


def paging() -> str:
    """What a paged step costs on a CPU with a tenth of the states at hand."""
    rows = [
        [f"{row['page_bytes'] // 1024:,} KiB", f"{row['ratio']:.1f}"]
        for row in stored("paging")["rows"]
        if row["budget_share"] == 0.1 and row["prefetch"]
    ]
    return rows_of("pages of | a step, times as long as AdamW's", rows)


# On a card.


def sizes() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The stored steps of each size on a card: bitsandbytes with PEFT, and ours."""
    rows = {(row["model"], row["stack"]): row for row in stored("gpu_headline")["rows"]}
    models = dict.fromkeys(model for model, _ in rows)
    return [(rows[model, "bitsandbytes"], rows[model, "qlora_edu"]) for model in models]


def plan_command(row: dict[str, Any]) -> str:
    """The command that plans the step of a stored result."""
    # The results were stored when the planner called PyTorch's own by a shorter name.
    optim = "adamw_torch" if row["optimizer"] == "adamw" else row["optimizer"]
    return (
        f"python -m qlora_edu plan {row['model']} --card {row['card_bytes'] / 1e9:.0f} "
        f"--adapter_dtype {row['settings']['adapter_dtype']} --optim {optim} "
        f"--backend {row['stack']}"
    )


def gpu() -> str:
    """QLoRA steps of three sizes on a card: planned, measured, timed."""
    lines = []
    for theirs, ours in sizes():
        planned = f"{gigabytes(theirs['plan_bytes'])} ({theirs['plan_bytes'] / 2**30:.3f} GiB)"
        times = (f"{row['seconds_a_step']:.2f} s" for row in (theirs, ours))
        name = theirs["model"].removeprefix("llama-").upper()
        card = f"{theirs['card_bytes'] / 1e9:.0f} GB"
        lines.append([name, card, gigabytes(theirs["peak_bytes"]), planned, *times])
    head = "model | card | peak | planned | a step, bitsandbytes and PEFT | a step, ours"
    commands = "\n".join(plan_command(theirs) for theirs, _ in sizes())
    return f"{rows_of(head, lines)}\n\nThe plans:\n\n```\n{commands}\n```"


def gpu_steps() -> str:
    """Ways to train a 7B on a card: peak and plan, and the time of a step."""
    lines = [
        [
            row["task"],
            f"{row['batch'] * row['length']:,}",
            gigabytes(row["peak_allocated_bytes"]),
            f"{(row['plan_bytes'] - row['peak_allocated_bytes']) / 2**20:+.0f} MiB",
            f"{row['seconds_a_step']:.2f} s",
        ]
        for row in stored("gpu_steps")["rows"]
    ]
    return rows_of("a 7B's step | tokens | peak | plan less peak | time", lines)


def gpu_bytes() -> str:
    """How many packed bytes of NF4 differ from those of bitsandbytes' CUDA kernels."""
    worst: dict[str, tuple[int, int]] = {}
    for row in stored("gpu_quantiser")["rows"]:
        if row["what"] == "equality" and row["levels"] == "nf4":
            found = (row["packed"]["differing"], row["packed"]["of"])
            worst[row["dtype"]] = max(found, worst.get(row["dtype"], (0, 0)))
    rows = [[dtype, f"{most:,} of {of:,}"] for dtype, (most, of) in worst.items()]
    return rows_of("weights | packed bytes that differ, at most", rows)


def gpu_paging() -> str:
    """The optimizer step of a 7B's adapters on a card."""
    rows = [
        [row["task"], f"{1000 * row['seconds_a_step']:.0f} ms" if "seconds_a_step" in row else "–"]
        for row in stored("gpu_paging")["rows"]
    ]
    return rows_of("optimizer | a step", rows)


# The README, the ledger, the sources.


def headline() -> str:
    """The README's results: what came out, and what did not."""
    match, of_match = compare("full", "exact_match", 3)
    loss, of_loss = compare("lora", "held_out_loss", 4)
    largest, ours = sizes()[0]
    times = [ours["seconds_a_step"] / theirs["seconds_a_step"] for theirs, ours in sizes()]
    faster = ratios("a QLoRA step of 2,048 tokens or more")
    steps = stored("memory")["rows"]
    name = largest["model"].removeprefix("llama-").upper()
    rows = [
        ["QLoRA less full fine-tuning, exact match, five seeds", match, f"**{of_match}**"],
        ["QLoRA less LoRA, held-out loss in nats, five seeds", loss, f"**{of_loss}**"],
        [
            f"peak of a QLoRA step of a {name} on a GPU held to "
            f"{largest['card_bytes'] / 1e9:.0f} GB, random weights",
            gigabytes(largest["peak_bytes"]),
            f"{gigabytes(largest['plan_bytes'])} planned",
        ],
        ["the planner's largest error", planner_error(), f"{len(steps)} real steps on a CPU"],
        [
            "our `quantize`, speed beside bitsandbytes'",
            f"{span(ratios('`quantize`'))} times; compiled {span(ratios('`quantize`, compiled'))}",
            "two CPUs, the same bytes",
        ],
        [
            "our QLoRA step, speed beside bitsandbytes and PEFT",
            f"{span(faster)} times",
            "two CPUs, 2,048 tokens or more",
        ],
        [
            "our QLoRA step, time beside bitsandbytes and PEFT",
            f"{min(times):.1f} to {max(times):.1f} times as long",
            "GPU, 512 tokens: theirs is the one to use",
        ],
    ]
    return rows_of("what | measured | remark", rows)


def claims() -> list[dict[str, str]]:
    """The rows of data/claims.json."""
    return json.loads((ROOT / "data" / "claims.json").read_text(encoding="utf-8"))


def three_claims() -> str:
    """The README's three rows of the ledger."""
    rows = {row["id"]: row for row in claims()}
    return table([rows[id] for id in IN_THE_README])


def ledger() -> str:
    """The whole ledger, and why each verdict was given."""
    reasons = [f"- **{row['claim']}** {row['because']}" for row in claims()]
    return "\n".join([table(claims()), "", "## Why", "", *reasons])


def sources() -> str:
    """Where each stored result comes from."""
    lines = []
    for path in sorted((ROOT / "data" / "results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        lines.append([f"`{path.name}`", f"`{found['command']}`", found["date"], found["machine"]])
    return rows_of("result | command, as it was called then | date | machine", lines)


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__.replace("_", "-"): block
    for block in (
        *(hours, chapters, headline, three_claims, ledger, sources),
        *(study, verdicts, base, bench, planner, paging, gpu, gpu_steps, gpu_bytes, gpu_paging),
    )
}


def fill(text: str, name: str) -> str:
    """The text of a page with every block made anew.

    Raises:
        PageError: a begin without its end, or a block that no function here makes.

    >>> fill("no block at all", "a page")
    'no block at all'
    """
    out, *parts = text.split("<!-- ")
    opened = ""
    for part in parts:
        label, _, rest = part.partition(" -->")
        block, _, edge = label.partition(": ")
        if edge == "begin" and not opened and block in BLOCKS:
            opened = block
            out += f"<!-- {label} -->\n{BLOCKS[block]()}\n"
        elif edge == "end" and opened == block:
            opened = ""
            out += f"<!-- {label} -->{rest}"
        else:
            raise PageError(
                f"{name}: the comment {label!r} begins or ends no block; write 'NAME: begin' and "
                f"then 'NAME: end', NAME one of {', '.join(BLOCKS)}"
            )
    if opened:
        raise PageError(f"{name}: the block {opened!r} has no end; add '<!-- {opened}: end -->'")
    return out


def main(pages: Sequence[Path] = PAGES) -> None:
    """Fill every page, each whole or not at all."""
    filled = {path: fill(path.read_text(encoding="utf-8"), path.name) for path in pages}
    for path, text in filled.items():
        write_text(text, path)
        print(f"{path.name} filled")


if __name__ == "__main__":
    main()
