"""Test every claim, and write the file that the pages and notebook 10 read."""

from collections import Counter

from benchmarks.claims.ledger import VERDICTS, fill
from benchmarks.stored import ROOT, write_json

FILE = ROOT / "data" / "claims.json"


def main() -> None:
    """Fill the ledger and write data/claims.json, whole or not at all."""
    rows = fill()
    write_json(rows, FILE)
    found = Counter(entry["verdict"] for entry in rows)
    print(
        f"{len(rows)} claims: " + ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS)
    )


if __name__ == "__main__":
    main()
