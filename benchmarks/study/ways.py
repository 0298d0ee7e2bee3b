"""The base, the ways to fine-tune it, and one run."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.stored import ROOT
from benchmarks.study.measures import Row, measure
from benchmarks.study.unseen import NEW_WORDS, learn_rows, with_new_words
from qlora_edu.adapters import adapter_tensors, add_houlsby, add_lora, load_adapters
from qlora_edu.codebooks import lloyd_max_levels, nf4_levels
from qlora_edu.qlora import FusedQLoRALinear, replace_linear_layers
from qlora_edu.text.conversations import encode_conversations, read_conversations
from qlora_edu.training import collate, row_order, train

BASE, TASKS = ROOT / "data" / "next-base", ROOT / "data" / "tasks"
STEPS, ROWS_A_STEP, WARMUP = 240, 8, 10
RANK, ALPHA, BOTTLENECK = 16, 32.0, 64  # 286,720 parameters of LoRA, 264,704 of Houlsby
# What QLoRA can be varied in.
FORMATS = {
    "qlora": {"levels": "nf4", "double_quant": True},
    "nf4 without DQ": {"levels": "nf4", "double_quant": False},
    "fp4": {"levels": "fp4", "double_quant": True},
    "int4": {"levels": "int4", "double_quant": True},
    "nf3": {"levels": "nf3", "double_quant": True},
    "nf2": {"levels": "nf2", "double_quant": True},
    "lloyd 2 bits": {"levels": "lloyd", "double_quant": True},
}
WAYS = (
    *("full", "lora", "qlora", "houlsby", "nf4 without DQ", "fp4", "int4"),
    # The controls: what is it that the table of embeddings does?
    *("full, table frozen", "lora + embeddings", "qlora + embeddings"),
)
CROSSED = {
    "lora": ("qlora", "nf3", "nf2", "lloyd 2 bits"),
    **{way: ("lora",) for way in ("qlora", "nf3", "nf2", "lloyd 2 bits")},
}


def load_base() -> tuple[Any, Any]:
    """The base in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval(), AutoTokenizer.from_pretrained(BASE)


@cache
def lloyd_levels() -> Tensor:
    """Four levels of least mean squared error for blocks of normal weights: a fair 2-bit table."""
    blocks = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    return lloyd_max_levels(blocks / blocks.abs().amax(1, keepdim=True), 4, pinned=())


def levels_of(name: str) -> str | Tensor:
    """A codebook by the study's name for it."""
    if name in ("nf3", "nf2"):
        return nf4_levels(bits=int(name[-1]))
    return lloyd_levels() if name == "lloyd" else name


def make_trainable(model: nn.Module, way: str) -> None:
    """Prepare the base, in place, for one way of fine-tuning."""
    method, _, more = way.partition(" + ")
    if method == "lora":
        add_lora(model, RANK, ALPHA)
    elif method == "houlsby":
        add_houlsby(model, BOTTLENECK)
    elif method in FORMATS:
        settings = FORMATS[method] | {"levels": levels_of(str(FORMATS[method]["levels"]))}
        replace_linear_layers(model, RANK, ALPHA, layer_class=FusedQLoRALinear, **settings)
    elif method not in ("full", "full, table frozen"):
        raise ValueError(f"no way {way!r}")
    table: Any = model.get_input_embeddings().weight  # the head's, too: they are tied
    if way == "full, table frozen":
        table.requires_grad_(False)
    elif more == "embeddings":
        table.requires_grad_()
    elif more == "token rows":
        learn_rows(table, len(NEW_WORDS))


def prepare(way: str, device: str = "cpu", new_words: bool = False) -> tuple[Any, Any]:
    """The base, ready for a way of fine-tuning, and its tokenizer.

    All that is drawn is drawn on the CPU and then moved: a card's generator has other numbers for a
    seed. The rows of new words come first, from one seed, so that every way begins with the same.
    """
    model, tokenizer = load_base()
    if new_words:
        tokenizer.add_tokens(list(NEW_WORDS.values()))
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer))
    make_trainable(model, way)
    return model.to(device), tokenizer


def read_rows(split: str, new_words: bool = False) -> list[Row]:
    """The conversations of a split, with their families, and with new words if these are asked."""
    rows = [Row(c.row["family"], c) for c in read_conversations(TASKS / f"{split}.jsonl")]
    return [Row(row.family, with_new_words(row.messages)) for row in rows] if new_words else rows


def run(spec: dict, device: str = "cpu") -> dict:
    """One fine-tune, measured; `spec` says which."""
    new_words = spec["part"] == "unseen"
    torch.manual_seed(spec["seed"])
    model, tokenizer = prepare(spec["way"], device, new_words)
    conversations = [row.messages for row in read_rows("train", new_words)][: spec["rows"]]
    rows = encode_conversations(tokenizer, conversations, 256)
    order = row_order(len(rows), STEPS * ROWS_A_STEP, spec["seed"])
    batches = (
        collate([rows[i] for i in order[at : at + ROWS_A_STEP]])
        for at in range(0, len(order), ROWS_A_STEP)
    )
    losses = train(
        model,
        batches,
        spec["rate"],
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        total_steps=STEPS,
        max_grad_norm=1.0,
    )
    asked = read_rows("valid" if spec["part"] in ("tuning", "pilot") else "test", new_words)
    result = {
        **spec,
        "trainable": trainable(model, spec["way"]),
        "losses": [round(loss, 4) for loss in losses[::10]],
        "training_loss": round(sum(losses[-50:]) / 50, 5),
        **measure(model, tokenizer, asked),
    }
    crossed = spec["part"] == "bits" or (spec["part"] == "verdict" and spec["seed"] < 5)
    if crossed and spec["way"] in CROSSED:
        tensors = adapter_tensors(model)
        result["on_another_base"] = {}
        for other in CROSSED[spec["way"]]:
            model, _ = prepare(other, device)
            load_adapters(model, tensors)
            result["on_another_base"][other] = measure(model, tokenizer, asked[:99])
    return result


def trainable(model: nn.Module, way: str) -> int:
    """How many numbers are trained."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if way.endswith("token rows"):  # of the table only these
        table: Any = model.get_input_embeddings().weight
        count += (len(NEW_WORDS) - len(table)) * table.shape[1]
    return count


def untrained() -> list[dict]:
    """The base as it is, before any training: in 32 and 16 bits, and in each format."""
    found = []
    for name in ("float32", "bfloat16", *FORMATS):
        model, tokenizer = load_base()
        if name == "bfloat16":
            model = model.bfloat16().float()  # the weights of 16 bits, the arithmetic of 32
        elif name != "float32":
            make_trainable(model, name)
        found.append({"base": name, **measure(model, tokenizer, read_rows("test"))})
    return found
