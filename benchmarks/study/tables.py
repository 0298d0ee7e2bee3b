"""The study in tables and verdicts: what the pages, the ledger and notebook 8 read."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.stored import ROOT
from benchmarks.study.parts import ALL_ROWS, FEW_ROWS, MAIN, UNSEEN_WAYS, best_rate, tuned
from benchmarks.study.ways import FORMATS, WAYS
from qlora_edu.comparison import Equivalence, equivalence, mean_interval

Rows = list[list[str]]
RESULTS = ROOT / "data" / "results"
NAMES = {
    "full": "full",
    "full, table frozen": "full, embeddings frozen",
    "lora": "LoRA",
    "lora + embeddings": "LoRA, embeddings trained too",
    "lora + token rows": "LoRA, rows of the new words trained too",
    "qlora": "QLoRA",
    "qlora + embeddings": "QLoRA, embeddings trained too",
    "qlora + token rows": "QLoRA, rows of the new words trained too",
    "nf4 without DQ": "QLoRA without double quantisation",
    "fp4": "QLoRA on FP4",
    "int4": "QLoRA on INT4",
    "nf3": "QLoRA on NF3",
    "nf2": "QLoRA on NF2",
    "lloyd 2 bits": "QLoRA on 2 bits, Lloyd's table",
    "houlsby": "Houlsby adapters",
}
PAIRS = (
    ("qlora", "full"),
    ("lora", "full"),
    ("qlora", "lora"),
    ("full, table frozen", "full"),
    ("lora + embeddings", "lora"),
    ("qlora + embeddings", "qlora"),
    ("nf4 without DQ", "qlora"),
    ("fp4", "qlora"),
    ("int4", "qlora"),
    ("houlsby", "lora"),
)
FAMILIES = ("question", "absent", "record")


def study() -> dict[str, Any]:
    """The stored study."""
    return json.loads((RESULTS / "study.json").read_text(encoding="utf-8"))


def plan() -> dict[str, Any]:
    """The plan that was committed before the verdict runs."""
    return json.loads((RESULTS / "study_plan.json").read_text(encoding="utf-8"))


def runs_of(report: dict[str, Any], part: str, way: str, rows: int = ALL_ROWS) -> list[dict]:
    """The runs of a way in a part, by seed."""
    found = [r for r in report["runs"] if (r["part"], r["way"], r["rows"]) == (part, way, rows)]
    return sorted(found, key=lambda run: run["seed"])


def value(run: dict, measure: str) -> float:
    """A measure of a run: 'exact_match', or 'record' for that of one family.

    >>> value({"exact_match": 0.9, "by_family": {"record": 0.8}}, "record")
    0.8
    """
    return run["by_family"][measure] if measure in FAMILIES else run[measure]


def compare(report: dict, settled: dict, first: str, second: str, measure: str) -> Equivalence:
    """The verdict on two ways, as the plan says: its margin, and pairs only if it asks for them.

    What the plan does not name (families, controls) is tested as its main pair is.
    """
    of_loss = measure == "held_out_loss"
    asked = [row for row in settled["rows"] if (row["measure"] == "held_out_loss") == of_loss]
    named = [row for row in asked if tuple(row["pair"]) == (first, second)]
    row = (named or asked)[0]
    values = [
        [value(run, measure) for run in runs_of(report, "verdict", way)] for way in (first, second)
    ]
    if row["paired"]:  # the control has fewer seeds: those that both have
        values = [of_way[: min(map(len, values))] for of_way in values]
    return equivalence(*values, margin=row["margin"], paired=row["paired"])


def interval(values: Sequence[float], digits: int = 2) -> str:
    """A mean with its 95 % interval.

    >>> interval([0.90, 0.94, 0.92])
    '0.92 [0.87, 0.97]'
    """
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*mean_interval(values), d=digits)


def main_table(report: dict) -> tuple[str, Rows]:
    """Means over the seeds for each way, the worst seed beside them."""
    rows = []
    for way in WAYS:
        runs = runs_of(report, "verdict", way)
        matches = [run["exact_match"] for run in runs]
        nats = [math.log(run["text_perplexity"]) for run in runs]
        losses = [run["held_out_loss"] for run in runs]
        cells = [NAMES[way], f"{runs[0]['rate']:g}", str(len(runs)), interval(matches)]
        cells += [f"{min(matches):.2f}", interval(losses, 4)]
        cells += [f"{math.exp(mean_interval(nats).mean):.2f}", f"{runs[0]['trainable']:,}"]
        rows.append(cells)
    return (
        "way | rate | seeds | exact match | worst seed | held-out loss | perplexity on old text | "
        "trained parameters",
        rows,
    )


def family_table(report: dict) -> tuple[str, Rows]:
    """Exact match by family, and loss by class of token: means over the seeds."""
    rows = []
    classes = [*runs_of(report, "verdict", "full")[0]["loss_by_class"]]
    for way in WAYS:
        runs = runs_of(report, "verdict", way)
        by_family = [mean_interval([value(run, f) for run in runs]).mean for f in FAMILIES]
        by_class = [mean_interval([run["loss_by_class"][c] for run in runs]).mean for c in classes]
        cells = [*(f"{x:.3f}" for x in by_family), *(f"{x:.4f}" for x in by_class)]
        rows.append([NAMES[way], *cells])
    head = [*FAMILIES, *(f"loss on a {name}" for name in classes)]
    return f"way | {' | '.join(head)}", rows


def verdict_table(
    report: dict, settled: dict, pairs: Iterable[tuple[str, str]] = PAIRS
) -> tuple[str, Rows]:
    """The test of each pair: in exact match, in each family, and in the loss."""
    rows = []
    for first, second in pairs:
        for measure in ("exact_match", *FAMILIES, "held_out_loss"):
            found = compare(report, settled, first, second, measure)
            digits = 4 if measure == "held_out_loss" else 3
            mean, low, high = (f"{number:+.{digits}f}" for number in found.difference)
            what = measure.replace("_", " ").replace("held out", "held-out")
            names = f"{NAMES[first]} less {NAMES[second]}"
            rows.append([names, what, f"{mean} [{low}, {high}]", f"**{found.verdict}**"])
    return "ways | measure | difference, 90 % interval | verdict", rows


def seed_table(report: dict) -> tuple[str, Rows]:
    """Exact match of every seed of every way: nothing is left out."""
    rows = [
        [
            NAMES[way],
            " ".join(f"{run['exact_match']:.2f}" for run in runs_of(report, "verdict", way)),
        ]
        for way in WAYS
    ]
    return "way | exact match, seed by seed", rows


def tuning_table(report: dict) -> tuple[str, Rows]:
    """Exact match, and loss, at each rate that was tried; the chosen one in bold."""
    rows = []
    for way, count in [*((way, ALL_ROWS) for way in WAYS), *((way, FEW_ROWS) for way in MAIN)]:
        best, cells = best_rate(report["runs"], way, count), []
        for rate, (match, loss) in tuned(report["runs"], way, count).items():
            cell = f"{rate:g}: {match:.3f} ({loss:.3f})"
            cells.append(f"**{cell}**" if rate == best else cell)
        rows.append([NAMES[way], f"{count:,}", ", ".join(cells)])
    return "way | rows | rate: exact match (loss), two seeds, validation rows", rows


def power_table(settled: dict) -> tuple[str, Rows]:
    """What the pilots said of each pair, and the chance of a verdict."""
    rows = []
    for row in settled["rows"]:
        first, second = (NAMES[way] for way in row["pair"])
        at = str(settled["seeds"])
        spreads = " and ".join(f"{spread:.4f}" for spread in row["pilot_spreads"])
        cells = [f"{first} less {second}", row["measure"].replace("_", " "), f"{row['margin']:g}"]
        cells += [spreads, f"{row['pilot_correlation']:+.2f}", "yes" if row["paired"] else "no"]
        cells += [f"{row['power_if_equal'][at]:.2f}", f"{row['power_if_half_the_margin'][at]:.2f}"]
        rows.append(cells)
    return (
        f"ways | measure | margin | spread of the pilots | correlation | paired | power at "
        f"{settled['seeds']} seeds | if half the margin lies between them",
        rows,
    )


def part_table(report: dict, part: str) -> tuple[str, Rows]:
    """A smaller part: each way with every seed, by family, and the loss."""
    ways = {"bits": [w for w in FORMATS if w not in WAYS], "rows": MAIN, "unseen": UNSEEN_WAYS}[
        part
    ]
    count, rows = FEW_ROWS if part == "rows" else ALL_ROWS, []
    for way in ways:
        runs = runs_of(report, part, way, count)
        matches = " ".join(f"{run['exact_match']:.2f}" for run in runs)
        families = [mean_interval([value(run, f) for run in runs]).mean for f in FAMILIES]
        loss = mean_interval([run["held_out_loss"] for run in runs]).mean
        cells = [*(f"{x:.2f}" for x in families), f"{loss:.3f}", f"{runs[0]['trainable']:,}"]
        rows.append([NAMES[way], matches, *cells])
    head = (
        f"exact match, seed by seed | {' | '.join(FAMILIES)} | held-out loss | trained parameters"
    )
    return f"way | {head}", rows
