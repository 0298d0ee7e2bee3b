"""`python -m qlora_edu`: the command line of `cli.py`."""

import sys

from qlora_edu.cli import main

if __name__ == "__main__":
    sys.exit(main())
