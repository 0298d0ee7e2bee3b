"""What a step costs: seconds, the ways taking turns, and the peak of memory over its start."""

import time

import torch

from benchmarks.study.ways import ROWS_A_STEP, WAYS, load_base, prepare, read_rows
from qlora_edu.planner.trace import trace_memory
from qlora_edu.text.conversations import encode_conversations
from qlora_edu.training import collate, train


def cost(rounds: int = 8) -> list[dict]:
    """One row for each way; all see the same machine at the same time."""
    _, tokenizer = load_base()
    messages = [row.messages for row in read_rows("train")[:ROWS_A_STEP]]
    batch = collate(encode_conversations(tokenizer, messages, 256))
    models, seconds = {}, {way: [] for way in WAYS}
    for way in WAYS:
        torch.manual_seed(0)
        models[way], _ = prepare(way)
        train(models[way], [batch] * 3, 1e-3)
    for _ in range(rounds):
        for way, model in models.items():
            started = time.perf_counter()
            train(model, [batch] * 5, 1e-3)
            seconds[way].append((time.perf_counter() - started) / 5)
    found = []
    for way, model in models.items():
        # `state_dict` holds packed weights and their constants at the bytes they really take.
        tensors = [t for t in model.state_dict().values() if isinstance(t, torch.Tensor)]
        found.append(
            {
                "way": way,
                "seconds_a_step": round(sorted(seconds[way])[rounds // 2], 4),
                "weights_bytes": sum({t.data_ptr(): t.nbytes for t in tensors}.values()),
                "step_bytes": int(trace_memory(lambda m=model: train(m, [batch], 1e-3)).peak),
                "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "rows": ROWS_A_STEP,
                "tokens": batch["input_ids"].shape[1],
            }
        )
    return found
