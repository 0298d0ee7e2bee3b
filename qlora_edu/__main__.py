"""The command line, for the jobs that the course does from a notebook.

python -m qlora_edu doctor                       is this machine ready?
python -m qlora_edu plan llama-7b --card 24      will a training step fit?
python -m qlora_edu finetune --preset embedded   QLoRA from start to finish
python -m qlora_edu chat --use all               talk to the base and its adapters
python -m qlora_edu random-init llama-7b FOLDER  a real architecture, to measure without the Hub
"""

import sys


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command == "doctor":
        from qlora_edu.course import doctor

        return doctor.main(rest)
    if command == "plan":
        from qlora_edu.memory import main as plan_main

        return plan_main(rest)
    if command == "finetune":
        from qlora_edu.finetuning import main as finetune_main

        return finetune_main(rest) or 0
    if command == "chat":
        from qlora_edu.production.chat import main as chat_main

        return chat_main(rest)
    if command == "random-init":
        from qlora_edu.production.random_weights import main as random_init_main

        return random_init_main(rest)
    print(__doc__.strip())
    if command in ("-h", "--help"):
        return 0
    print(f"\nno command {command!r}: doctor, plan, finetune, chat or random-init", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
