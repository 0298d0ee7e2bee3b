"""Time a QLoRA training step of ours beside bitsandbytes + PEFT, and count the memory it needs.

The model is a random Llama with the shape of the embedded one (four layers, a feed-forward part of
2.5 widths, eight heads) in several widths; both stacks hold the same 4-bit weights and start from
the same adapters (r = 16, all linear layers). A step is forward, backward, clipping and AdamW, in
float32, on rows of 128 tokens. The two take turns, so that whatever slows the machine slows both.
Memory is what PyTorch's allocator had handed out at the worst moment of a step, above what it held
before: activations, gradients and workspace.
"""

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from qlora_edu.adapters import load_adapters
from qlora_edu.planner.fake_step import StepSettings, add_adapters, quantize_layers
from qlora_edu.planner.trace import trace_memory

LENGTH, RANK, SECONDS, LEAST = 128, 16, 10.0, 9
SIZES = [*((width, rows) for width in (256, 512) for rows in (16, 32, 64)), (1024, 16), (1024, 32)]
SMALL = [(256, 1), (512, 1), (1024, 1)]  # where unpacking W takes a larger part of the time


def make_models(width: int) -> tuple[nn.Module, nn.Module]:
    """The same random Llama, in 4 bits and with the same adapters, of ours and of the peers'."""
    from peft import get_peft_model_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 5 * width // 2, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    ours = LlamaForCausalLM(LlamaConfig(vocab_size=768, tie_word_embeddings=True, **shape, **heads))
    theirs = copy.deepcopy(ours)
    settings = {"r": RANK, "dtype": "float32", "gradient_checkpointing": False}
    for model, backend in ((ours, "qlora_edu"), (theirs, "bitsandbytes")):
        step = StepSettings(backend=backend, **settings)
        add_adapters(model, step, quantize_layers(model, step))
    adapters = {f"base_model.model.{k}": v for k, v in get_peft_model_state_dict(theirs).items()}
    load_adapters(ours, adapters, allow_untrained=True)
    return ours, theirs


def stepper(model: nn.Module, ids: Tensor) -> Callable[[], float]:
    """One training step of a model, as a function that returns the loss."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure_size(width: int, rows: int) -> list[dict]:
    """Two rows of the result for one size, time and peak memory, printed as they are made."""
    ours, theirs = make_models(width)
    ids = torch.randint(5, 768, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    steps = [stepper(model, ids) for model in (ours, theirs)]
    for _ in range(2):
        losses = [step() for step in steps]
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[1], losses
    times: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    while len(times[0]) < LEAST or time.perf_counter() - started < SECONDS:
        for step, of_step in zip(steps, times, strict=True):
            before = time.perf_counter()
            step()
            of_step.append(time.perf_counter() - before)
    kind, peer = "small step" if rows == 1 else "step", "bitsandbytes + PEFT"
    name = f"qlora {kind} width {width} batch {rows}x{LENGTH}"
    ours_s, peer_s = (median(of_step) for of_step in times)
    ours_bytes, peer_bytes = (trace_memory(step).peak for step in steps)
    result = [
        {"name": f"{name} time", "ours_s": ours_s, "peer": peer, "peer_s": peer_s},
        {
            "name": f"{name} peak memory",
            "ours_bytes": ours_bytes,
            "peer": peer,
            "peer_bytes": peer_bytes,
        },
    ]
    result[0]["ratio"], result[1]["ratio"] = peer_s / ours_s, peer_bytes / ours_bytes
    print(f"{name:<44}{ours_s:7.3f} s, {result[0]['ratio']:.3f}×", end="")
    print(f"{ours_bytes / 2**20:9.1f} MiB, {result[1]['ratio']:.3f}×", flush=True)
    return result


def measure() -> list[dict]:
    """All rows."""
    return [row for width, rows in SIZES + SMALL for row in measure_size(width, rows)]
