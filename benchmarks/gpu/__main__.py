"""The command: choose parts, refuse a machine without a card, run them, and say what failed."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import torch

from benchmarks.gpu import run
from benchmarks.gpu.card import ALLOCATOR, LABEL


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for; 1 if anything failed."""
    parser = argparse.ArgumentParser(description="Measure the course on a CUDA card.")
    choices = [*run.LETTERS, *run.PARTS]
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(choices))
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU; stores nothing")
    parser.add_argument("--minutes", type=float, default=8.0, help="that each part may take")
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        if part not in choices:
            parser.error(f"no part {part!r}; there are {', '.join(choices)}")
    if not arguments.dry_run and not torch.cuda.is_available():
        print(
            "error: PyTorch finds no CUDA device, and this report measures one. "
            "Try --dry-run, which runs every part on a CPU and stores nothing",
            file=sys.stderr,
        )
        return 1
    wanted = {run.LETTERS.get(part, part) for part in arguments.parts or run.PARTS}
    device = "cpu" if arguments.dry_run else "cuda"
    os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR  # read by each task's process when it begins
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for name in ("bitsandbytes", "peft", "transformers.models.llama.modeling_llama"):
            import_module(name)  # what is imported here the forked tasks need not import
        # Nothing is computed here: a process with a team of threads cannot be forked. And the
        # number of threads is not set: each thread of a forked task would then set it again,
        # several at once while a model loads, and PyTorch sometimes loses its pool over that.
    facts = run.run_task("card", "card", arguments.dry_run, device, arguments.minutes)
    if len(facts) != 1 or "error" in facts[0]:
        print(f"error: this machine cannot be described: {facts}", file=sys.stderr)
        return 1
    failed = False
    for part in (part for part in run.PARTS if part in wanted):
        report = run.run_part(part, facts[0], arguments.dry_run, device, arguments.minutes)
        run.keep(report, part, arguments.dry_run)
        if "error" in report:
            failed = True
            print(f"part {part}, failed: {report['error']}", file=sys.stderr)
    if wanted & {"steps", "headline"}:
        print(LABEL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
