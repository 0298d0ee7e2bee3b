"""The command line: a thin way to what the course does from a notebook.

Settings are `--name value` or `name=value`; what is wrong is said in one line. The exit status is 0
if all went well, 2 for a command written wrongly, 130 after Ctrl-C, else 1 (`plan`: no room).
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

from qlora_edu.errors import ConfigError, GenerationError, PlanError, QloraError, did_you_mean

PLANNED = {  # what a setting of the planner means; the others mean what they mean in a fine-tune
    "method": "full, lora, qlora or houlsby",
    "optim": "optimizer; the states of a paged one may leave the card",
    "bottleneck": "width of a Houlsby adapter",
    "dtype": "dtype of weights that are not quantised, and of the computation",
    "blocksize": "weights that share a constant",
    "autocast": "keep weights in dtype and compute in bfloat16",
    "padding": "rows of several lengths, so that each batch has a mask",
    "backend": "whose 4-bit layers: qlora_edu, or bitsandbytes with PEFT",
    "device": "cuda or cpu",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an arrow must not end a run on a plain terminal
            stream.reconfigure(errors="backslashreplace")
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print("usage: python -m qlora_edu COMMAND ...; each explains itself with --help\n")
        for name, function in COMMANDS.items():
            print(f"  {name:<9} {function.__doc__}")
        return 0
    from qlora_edu.course.doctor import quiet_known_noise

    quiet_known_noise()
    try:
        if command not in COMMANDS:
            raise ConfigError(f"no command {command!r}; {did_you_mean(command, COMMANDS)}")
        status = COMMANDS[command](rest)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as in `plan llama-7b | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as finished:  # argparse has printed its help, or what is wrong
        return int(finished.code or 0)
    except (QloraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | GenerationError | PlanError) else 1
    except KeyboardInterrupt as stopped:
        print(f"\n{str(stopped) or 'stopped'}", file=sys.stderr)
        return 130


def doctor(argv: Sequence[str]) -> int:
    """Is this machine ready for the course?"""
    from qlora_edu.course import doctor

    return doctor.main(list(argv))


def plan(argv: Sequence[str]) -> int:
    """Will a training step fit on a card?  plan llama-7b --card 24 --batch_size 4"""
    from transformers.hf_argparser import string_to_bool

    from qlora_edu.memory import GIB, MODELS, OPTIMIZERS, RESERVE, plan_memory
    from qlora_edu.planner.fake_step import StepSettings
    from qlora_edu.production.config import FinetuneConfig

    parser = argparse.ArgumentParser(**_about("plan", "MODEL [--card GB] [--SETTING VALUE ...]"))
    parser.add_argument("model", help=f"{', '.join(MODELS)}, a folder, or a name on the Hub")
    parser.add_argument("--card", type=float, default=24.0, metavar="GB", help="the card's memory")
    defaults = {"batch_size": 1, "max_length": 512, "optim": "adamw_torch"}
    defaults |= {field.name: field.default for field in fields(StepSettings)}
    meanings = {field.name: field.metadata["help"] for field in fields(FinetuneConfig)} | PLANNED
    for name, default in defaults.items():
        kind = string_to_bool if isinstance(default, bool) else type(default)
        choices, meaning = OPTIMIZERS if name == "optim" else None, meanings[name]
        parser.add_argument(f"--{name}", type=kind, choices=choices, default=default, help=meaning)
    given = _parse(parser, argv)
    if not 0 < (card := given.pop("card")) < 1e6:
        parser.error(f"--card: a card has more than 0 GB, not {card}")
    planned = plan_memory(given.pop("model"), given.pop("method"), **given)
    size = f"batch {planned.batch_size} of {planned.max_length:,} tokens"
    print(f"{planned.name}, {planned.settings.method}: {size}")
    print(planned.table(), planned.sentence(card), sep="\n")
    return int(planned.peak_bytes + RESERVE > card * GIB)


def finetune(argv: Sequence[str]) -> int:
    """QLoRA from start to finish.  finetune --preset embedded --max_steps 100"""
    from qlora_edu.production.threads import choose_threads, wait_passively

    wait_passively()  # OpenMP reads it when torch is loaded
    from transformers import HfArgumentParser

    from qlora_edu.finetuning import finetune as run
    from qlora_edu.production.config import PRESETS, FinetuneConfig
    from qlora_edu.production.run_folder import choose_output_dir

    start = argparse.ArgumentParser("qlora_edu finetune", add_help=False, allow_abbrev=False)
    start.add_argument("--preset", default="embedded", help=", ".join(PRESETS))
    start.add_argument("--config", metavar="FILE", help="YAML settings, instead of a preset")
    start.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    chosen, _ = start.parse_known_args(_spell_out(argv))
    from_file, from_preset = FinetuneConfig.from_yaml, FinetuneConfig.from_preset
    config = from_preset(chosen.preset) if chosen.config is None else from_file(chosen.config)
    about = _about("finetune", "[--preset NAME | --config FILE] [--resume] [--SETTING VALUE ...]")
    parser = HfArgumentParser(FinetuneConfig, **about, parents=[start])  # type: ignore[arg-type]
    parser.set_defaults(**asdict(config))
    metavars: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
    for action in parser._actions:
        action.required = False  # each setting has a value in the preset
        if action.dest in asdict(config):  # one spelling of each is enough to read
            action.option_strings = action.option_strings[:1]
            action.metavar = None if action.choices else metavars.get(action.type, "BOOL")
            action.help = argparse.SUPPRESS if action.nargs == 0 else action.help
    given = _parse(parser, argv)
    config = FinetuneConfig(**{name: given[name] for name in asdict(config)})
    print(f"computing with {choose_threads()}")
    if config.output_dir is None:  # chosen here, so that the way to go on can name it
        config = config.replace(output_dir=str(choose_output_dir(config, chosen.resume)))
        argv = [*argv, f"output_dir={config.output_dir}"]
    try:
        run(config, resume=chosen.resume)
    except KeyboardInterrupt as stopped:
        words = [word for word in argv if word != "--resume"]
        again = shlex.join(["python", "-m", "qlora_edu", "finetune", *words, "--resume"])
        raise KeyboardInterrupt(f"{str(stopped) or 'stopped'}. Go on with: {again}") from None
    return 0


def chat(argv: Sequence[str]) -> int:
    """Talk to a base and its adapters.  chat --use all"""
    from qlora_edu.production.chat import EMBEDDED, converse, load_chat
    from qlora_edu.text.generation import check_sampling

    usage = "[--model NAME] [--adapter NAME=FOLDER ...] [--use NAME ...]"
    parser = argparse.ArgumentParser(**_about("chat", usage))
    add = parser.add_argument
    add("--model", default=EMBEDDED, help="the base: a folder, or a name on the Hub")
    add("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="one or several")
    add("--use", nargs="+", metavar="NAME", help="one system, or two to compare")
    add("--method", default="qlora", help="qlora: the base in 4 bits; lora: as it is")
    add("--chat_template", help="guanaco, for what was trained with it; None: the tokenizer's")
    add("--temperature", type=float, default=0.0, help="0 is greedy; higher is freer")
    add("--top_p", type=float, default=0.9, help="share of the likeliest that are drawn from")
    add("--max_new_tokens", type=int, default=96, help="the most tokens of an answer")
    add("--remember", action="store_true", help="hand earlier messages on")
    given = parser.parse_args(argv)
    check_sampling(given.temperature, given.top_p, given.max_new_tokens)
    adapters = dict(word.partition("=")[::2] for word in given.adapter)
    if not all([*adapters, *adapters.values()]) or len(adapters) < len(given.adapter):
        parser.error(f"--adapter: NAME=FOLDER is wanted, each name once, not {given.adapter}")
    talk = load_chat(given.model, adapters, method=given.method, chat_template=given.chat_template)
    talk.temperature, talk.top_p = given.temperature, given.top_p
    talk.max_new_tokens, talk.remember = given.max_new_tokens, given.remember
    systems = given.use or ["all" if "all" in talk.shelf.names else talk.shelf.names[-1]]
    for name in systems:
        talk.shelf.check(name)
    converse(talk, systems)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    command.__name__: command for command in (doctor, plan, finetune, chat)
}


def _about(name: str, usage: str) -> dict[str, Any]:
    """What every command's parser is made with."""
    return {
        "prog": f"qlora_edu {name}",
        "usage": f"python -m qlora_edu {name} {usage}",
        "description": (COMMANDS[name].__doc__ or "").partition("  ")[0],
        "formatter_class": argparse.ArgumentDefaultsHelpFormatter,
        "allow_abbrev": False,
    }


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Parse everything, `name=value` too; for a name that is none, suggest the nearest."""
    found, rest = parser.parse_known_args(_spell_out(argv))
    if rest:
        names = [word[2:] for word in parser._option_string_actions if word.startswith("--")]
        name = rest[0].lstrip("-").partition("=")[0]
        parser.error(f"no setting {name!r}; {did_you_mean(name, names)}")
    return vars(found)


def _spell_out(argv: Sequence[str]) -> list[str]:
    """Write `name=value` as `--name=value`, unless it is the value of the option before it."""
    flags = ("--resume", "--no_")
    bare = [w[:2] == "--" and "=" not in w and not w.startswith(flags) for w in ["", *argv]]
    words = zip(argv, bare, strict=False)
    return [f"--{w}" if re.match(r"[^\W\d]\w*=", w) and not own else w for w, own in words]
