"""Pretrain the embedded base model on the text of Saltmere, on a CPU, as a Hugging Face folder.

    python data/make_corpus.py
    python data/pretrain_base.py               # about an hour on two cores

It writes `next-base/`. The base in `base-model/`, which the course still uses, has a smaller text
(`make_world.py`) and a BPE tokenizer of 1,024 pieces, of which half never occur in it.

The model is a small Llama whose linear layers have widths that are multiples of 64, so that every
row holds whole quantisation blocks. It reads each document once, in order, one to a row, so that
nothing in its sight belongs to another story. The hidden matrices are trained with Muon and the
embeddings and norms with AdamW, at one shared learning rate: a warm-up, a plateau, then a linear
descent to zero over the last third. Every random choice hangs on `SEED`; the weights are still not
promised to the bit on another processor, whose kernels add in another order.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "build" / "corpus.txt"
BASE = ROOT / "data" / "next-base"
SEED = 20230523
ENOUGH = 200  # times in the corpus
LONG, FEW = 192, 24  # tokens of a row, rows of a batch
SHORT, MANY = 48, 96  # the same, where all of so many rows are short
SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def read_documents(limit: int | None = None) -> list[dict]:
    """The corpus: one JSON document a line, `text` or chat `messages`."""
    with CORPUS.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(limit or 10**9), strict=False)]


def texts_of(document: dict) -> list[str]:
    """What stands in a document, without the template's tokens."""
    return [
        turn["content"] for turn in document.get("messages", [{"content": document.get("text")}])
    ]


def as_text(document: dict) -> str:
    """A document as the model reads it: begin token, text or chat turns, end token."""
    if "text" in document:
        return f"<|begin|>{document['text']}<|end|>"
    turns = (f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in document["messages"])
    return "<|begin|>" + "".join(turns)


def train_tokenizer(documents: list[dict]) -> PreTrainedTokenizerFast:
    """A piece for every word that the corpus holds `ENOUGH` times; all others are spelled in bytes.

    So each piece is used, and no part of a word is learnt that never stands alone. Two rules make
    copying a fact easy. Digits stand alone: a number is read digit by digit. A space before a
    capital stands alone: a name is the same piece inside a sentence, at its start and after a
    quote.
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| (?=[A-Z])"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    counts = Counter(
        word
        for document in documents
        for text in texts_of(document)
        for word, _ in splitter.pre_tokenize_str(text)
    )
    single = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted(w for w, count in counts.items() if count >= ENOUGH and len(w) > 1)
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *single, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[dict], length: int) -> torch.Tensor:
    """One document a row, cut or padded to `length` tokens: int16 `[documents, length]`."""
    rows = torch.full((len(documents), length), tokenizer.pad_token_id, dtype=torch.int16)
    for start in range(0, len(documents), 10_000):
        texts = [as_text(document) for document in documents[start : start + 10_000]]
        for row, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"], start):
            rows[row, : len(ids)] = torch.tensor(ids[:length])
    return rows


def batches(rows: torch.Tensor, padding: int) -> list[tuple[int, int, int]]:
    """First row, last row (exclusive) and width of each batch, over all rows in their order.

    Fewer rows than make a batch, at the end, are not read.
    """
    short = (rows != padding).sum(1) <= SHORT
    found, start = [], 0
    while start + FEW <= len(rows):
        many = start + MANY <= len(rows) and bool(short[start : start + MANY].all())
        stop, width = (start + MANY, SHORT) if many else (start + FEW, rows.shape[1])
        found.append((start, stop, width))
        start = stop
    return found


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 3 million parameters, freshly initialised."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class InFloat32(TorchFunctionMode):
    """Leave out `.bfloat16()`: Muon orthogonalises in it, slowly where no instruction knows it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call `func` as it is, but for that one method."""
        if func is torch.Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def learning_rate_share(step: int, steps: int) -> float:
    """Warm-up over 2 % of the steps, plateau, linear descent over the last third."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (steps / 3))


def pretrain(
    model: LlamaForCausalLM, rows: torch.Tensor, lr: float, bfloat16: bool, scratch: Path
) -> list[tuple[int, float]]:
    """Next-token training; returns (step, mean loss over 50 steps) pairs.

    Padding stands at the end of a row, where no earlier token sees it, and has no loss.
    """
    optimizers = make_optimizers(model, lr)
    compiled = torch.compile(model, dynamic=False)
    curve, recent = [], []
    plan = batches(rows, model.config.pad_token_id)
    progress = tqdm(plan, mininterval=10)
    for step, (start, stop, width) in enumerate(progress):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate_share(step, len(plan))
        ids = rows[start:stop, :width].long()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = compiled(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            ids[:, 1:].flatten(),
            ignore_index=model.config.pad_token_id,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with nullcontext() if bfloat16 else InFloat32():
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if len(recent) == 50:
            curve.append((step + 1, sum(recent) / 50))
            progress.set_postfix(loss=f"{curve[-1][1]:.3f}")
            recent = []
        if (step + 1) % 500 == 0:
            model.save_pretrained(scratch)
    return curve


def write_card(folder: Path) -> None:
    """The model card, from the facts that pretraining stored beside the weights."""
    facts = json.loads((folder / "pretraining.json").read_text())
    curve = facts["loss_curve"]
    shown = [curve[0], *curve[len(curve) // 8 :: len(curve) // 8]]
    if shown[-1] != curve[-1]:
        shown.append(curve[-1])
    points = "\n".join(f"| {step:,} | {loss:.3f} |" for step, loss in shown)
    millions = f"{facts['parameters'] / 1e6:.2f} million"
    run = f"{facts['steps']:,} steps, {facts['seconds'] / 60:.0f} minutes on {facts['processor']}"
    (folder / "README.md").write_text(
        f"""---
license: mit
language: en
pipeline_tag: text-generation
---
# Saltmere, the embedded base model of qlora_edu

A Llama of {millions} parameters (hidden size 256, 4 layers, 8 heads of which 4 for keys and
values, feed-forward 640, tied embeddings, {facts["vocabulary"]} pieces) that knows one invented
harbour town and nothing else. It exists so that every step of QLoRA can be run and measured on a
laptop. It is of no use for anything else.

**Corpus.** {facts["tokens"] / 1e6:.1f} million tokens of synthetic text, generated from one seed by
`data/make_corpus.py`: stories of a sale, a loan, a repair or a delivery, each retold, talked about
or entered in a ledger; letters, notices, price lists, word lists, questions of who is who, what one
tells another to write, JSON of other things, small talk in chat turns. None of it comes from
elsewhere. Every piece that the tasks of `data/tasks/` need occurs at least a thousand times, in
other uses; their families and passages do not occur.

**Tokenizer.** A piece for each word that the corpus holds {ENOUGH} times, and one for each byte, in
which all other words are spelled. Digits stand alone.

**Training.** {run}, torch {facts["torch"]}, seed {facts["seed"]}:

    python data/make_corpus.py
    {facts["command"]}

**Loss curve** (nats per token, mean over 50 steps; all points are in `pretraining.json`):

| step | loss |
| --- | --- |
{points}

**Licence.** MIT, like the rest of the repository.
"""
    )


def write_checksums() -> None:
    """Renew the base model's lines in `data/CHECKSUMS.txt`."""
    checksums = ROOT / "data" / "CHECKSUMS.txt"
    kept = [line for line in checksums.read_text().splitlines() if f"  {BASE.name}/" not in line]
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        digest = hashlib.sha256((BASE / name).read_bytes()).hexdigest()
        kept.append(f"{digest}  {BASE.name}/{name}")
    checksums.write_text("\n".join(kept) + "\n")


def main() -> None:
    """Train tokenizer and model, then put the finished folder in place in one move."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded base model.")
    parser.add_argument("--documents", type=int, help="read only so many")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument(
        "--bfloat16", action="store_true", help="faster where the processor multiplies in it"
    )
    parser.add_argument("--out", type=Path, default=BASE)
    arguments = parser.parse_args()

    tokenizer = train_tokenizer(read_documents())
    documents = read_documents(arguments.documents)
    rows = encode(tokenizer, documents, LONG)
    tokens = int((rows != tokenizer.pad_token_id).sum())
    print(f"{len(rows):,} documents, {tokens / 1e6:.1f}M tokens")

    scratch = ROOT / "build" / "base-model.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tokenizer.save_pretrained(scratch)
    model = build_model(tokenizer)
    started = time.perf_counter()
    curve = pretrain(model, rows, arguments.lr, arguments.bfloat16, scratch)
    seconds = time.perf_counter() - started
    model.to(torch.bfloat16).save_pretrained(scratch)
    facts = {
        "command": " ".join(["python data/pretrain_base.py", *sys.argv[1:]]),
        "vocabulary": len(tokenizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "corpus_sha256": hashlib.sha256(CORPUS.read_bytes()).hexdigest(),
        "documents": len(rows),
        "steps": len(batches(rows, tokenizer.pad_token_id)),
        "seconds": round(seconds),
        "seed": SEED,
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "loss_curve": [[step, round(loss, 4)] for step, loss in curve],
    }
    (scratch / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n")
    write_card(scratch)
    shutil.rmtree(arguments.out, ignore_errors=True)
    os.replace(scratch, arguments.out)
    if arguments.out == BASE:
        write_checksums()
    print(f"{arguments.out.name}: loss {curve[-1][1]:.3f} after {seconds / 60:.0f} minutes")


if __name__ == "__main__":
    main()
