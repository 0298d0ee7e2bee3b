"""Which runs the study has: for each way its learning rate, then the parts."""

from collections.abc import Iterable, Sequence

from benchmarks.study.ways import WAYS

ALL_ROWS, FEW_ROWS = 3000, 100
START = {"full": (5e-4, 1e-3, 2e-3), "adapter": (1e-3, 2e-3, 4e-3)}
"""The learning rates that tuning begins with; it goes on until the best has one on either side."""
TUNING_SEEDS, PILOT_SEEDS, FEW_SEEDS = (100, 101), (200, 201, 202, 203, 204, 205), (0, 1, 2)
MAIN, OTHER_SEEDS = ("full", "lora", "qlora"), 5
TWO_AND_THREE_BITS = ("nf3", "nf2", "lloyd 2 bits")
UNSEEN_WAYS = (*MAIN, "lora + token rows", "qlora + token rows", "qlora + embeddings")
Spec = dict[str, str | int | float]


def key(run: dict) -> tuple:
    """What tells one run from another."""
    return (run["part"], run["rows"], run["way"], run["rate"], run["seed"])


def tuned(runs: Iterable[dict], way: str, rows: int = ALL_ROWS) -> dict[float, tuple[float, float]]:
    """For each rate that was tried: mean exact match, and mean loss, over the tuning seeds."""
    of_rate: dict[float, list[dict]] = {}
    for run in runs:
        if (run["part"], run["way"], run["rows"]) == ("tuning", way, rows):
            of_rate.setdefault(run["rate"], []).append(run)
    return {
        rate: tuple(
            sum(run[name] for run in found) / len(found)
            for name in ("exact_match", "held_out_loss")
        )
        for rate, found in sorted(of_rate.items())
        if len(found) == len(TUNING_SEEDS)
    }


def best_rate(runs: Iterable[dict], way: str, rows: int = ALL_ROWS) -> float:
    """The rate with the most exact matches on the validation rows; of equals, the least loss."""
    found = tuned(runs, way, rows)
    return max(found, key=lambda rate: (found[rate][0], -found[rate][1]))


def to_tune(runs: Sequence[dict], way: str, rows: int = ALL_ROWS) -> list[Spec]:
    """The tuning runs that are still to be made for a way; none if its best rate is settled."""
    rates = START["full" if way.startswith("full") else "adapter"]
    if set(rates) <= (tried := tuned(runs, way, rows)).keys():
        best = best_rate(runs, way, rows)
        rates = tuple(rate for rate in (best / 2, best * 2) if rate not in tried)
    return [
        {"part": "tuning", "rows": rows, "way": way, "rate": rate, "seed": seed}
        for rate in rates
        for seed in TUNING_SEEDS
    ]


def tuning(runs: Sequence[dict]) -> list[Spec]:
    """The next tuning runs, of every way with all rows and of the main ones with few."""
    return [
        *(spec for way in WAYS for spec in to_tune(runs, way)),
        *(spec for way in MAIN for spec in to_tune(runs, way, FEW_ROWS)),
    ]


def rate_of(runs: Sequence[dict], way: str, rows: int = ALL_ROWS) -> float:
    """The tuned rate of a way; what was not tuned itself takes that of the way it is a form of."""
    if way in TWO_AND_THREE_BITS:
        way = "qlora"
    return best_rate(runs, way.removesuffix(" + token rows"), rows)


def specs(part: str, runs: Sequence[dict], seeds: int = 0) -> list[Spec]:
    """The runs of one part after the tuning; `seeds` is what the plan says for the main ways."""
    wanted: list[tuple[str, int, Sequence[int]]] = {
        "pilot": [(way, ALL_ROWS, PILOT_SEEDS) for way in MAIN],
        "verdict": [(way, ALL_ROWS, range(seeds if way in MAIN else OTHER_SEEDS)) for way in WAYS],
        "bits": [(way, ALL_ROWS, FEW_SEEDS) for way in TWO_AND_THREE_BITS],
        "rows": [(way, FEW_ROWS, FEW_SEEDS) for way in MAIN],
        "unseen": [(way, ALL_ROWS, FEW_SEEDS) for way in UNSEEN_WAYS],
    }[part]
    return [
        {"part": part, "rows": rows, "way": way, "rate": rate_of(runs, way, rows), "seed": seed}
        for way, rows, seeds_of_way in wanted
        for seed in seeds_of_way
    ]
