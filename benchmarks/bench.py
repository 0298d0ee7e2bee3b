"""Time the quantiser and a QLoRA training step beside their peers.

    make bench        # some eight minutes on two cores

What is measured, and how, is said in `quantiser.py` and `qlora_step.py`. All rows are stored in
data/results/bench.json.
"""

import argparse

import qlora_step
import quantiser
from stored import stamp, store


def main() -> None:
    """Measure, print, store."""
    argparse.ArgumentParser(description="Time ours beside its peers.").parse_args()
    rows = quantiser.measure() + qlora_step.measure()
    store({**stamp(["bitsandbytes", "transformers", "peft", "torchao"]), "rows": rows}, "bench")


if __name__ == "__main__":
    main()
