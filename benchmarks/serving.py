"""What an adapter costs when it answers: merged, beside the base, and Houlsby's kind.

    python benchmarks/serving.py        # about five minutes on two cores

Two Llama shapes: the course's base (trained) and one of 1,024 wide with random weights, whose
matrices are large enough to be what takes the time. For each way: milliseconds for reading a prompt
of 64 tokens and for each token that follows, for one prompt and for sixteen, and the bytes of its
weights. The ways take turns, and what is kept of each round is the ratio to the plain base in that
round; the interval is the middle half of the rounds. Stored as data/results/serving.json.
"""

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from stored import stamp, store
from torch import nn
from tqdm import tqdm

from qlora_edu.adapters import add_houlsby, add_lora, remove_adapters
from qlora_edu.compat import quiet
from qlora_edu.qlora import FusedQLoRALinear, replace_linear_layers

PROMPT, TOKENS, ROUNDS, R = 64, 8, 15, 16
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}


def embedded() -> nn.Module:
    """The course's base."""
    import three_ways

    return three_ways.load_base()[0]


def wide() -> nn.Module:
    """A wider Llama with random weights: what it says is noise, what it takes is not."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **WIDE)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def fill(model: nn.Module) -> nn.Module:
    """Give every adapter weights that are not zero, as after training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "up" in name.split(".")[-2:]:
                parameter.normal_(0, 0.01)
    return model.eval()


def merged(make: Callable[[], nn.Module]) -> nn.Module:
    """LoRA, added into its weights and taken away."""
    model = make()
    add_lora(model, R, 2 * R)
    fill(model)
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    remove_adapters(model)
    return model.eval()


def ways(make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """The same base in each way of serving."""
    found = {"base": make().eval(), "LoRA, merged": merged(make)}
    lora = make()
    add_lora(lora, R, 2 * R)
    found["LoRA, unmerged"] = fill(lora)
    houlsby = make()
    add_houlsby(houlsby, bottleneck=32)
    found["Houlsby"] = fill(houlsby)
    qlora = make()
    replace_linear_layers(qlora, R, 2 * R, layer_class=FusedQLoRALinear)
    found["QLoRA, unmerged"] = fill(qlora)
    return found


@torch.no_grad()
def once(model: nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds for the prompt, and for each token after it."""
    started = time.perf_counter()
    out = model(input_ids=ids, use_cache=True)
    first = time.perf_counter()
    for _ in range(TOKENS):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return first - started, (time.perf_counter() - first) / TOKENS


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all weights, packed ones with their constants."""
    tensors = [t for t in model.state_dict().values() if isinstance(t, torch.Tensor)]
    return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values())


def measure(name: str, make: Callable[[], nn.Module]) -> list[dict[str, Any]]:
    """All ways of serving one base, at two batch sizes."""
    with quiet():
        models, rows = ways(make), []
    for batch in (1, 16):
        ids = torch.randint(5, 900, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in models}
        for number in tqdm(range(ROUNDS + 2), desc=f"{name}, batch {batch}"):
            for way, model in models.items():
                took = once(model, ids)
                if number >= 2:  # two rounds to warm up
                    times[way].append(took)
        for way in models:
            row: dict[str, Any] = {"base": name, "batch": batch, "way": way}
            for kind, what in enumerate(("prompt", "token")):
                mine = [took[kind] for took in times[way]]
                plain = [took[kind] for took in times["base"]]
                ratios = [a / b for a, b in zip(mine, plain, strict=True)]
                low, _, high = quantiles(ratios, n=4)
                row[f"{what}_ms"] = round(1000 * median(mine), 3)
                row[f"{what}_ratio"] = [round(x, 3) for x in (median(ratios), low, high)]
            rows.append({**row, "weights_bytes": weights_bytes(models[way])})
    return rows


def main() -> None:
    """Measure and store."""
    rows = [*measure("embedded", embedded), *measure("wide, random weights", wide)]
    store({**stamp(["transformers"]), "r": R, "prompt": PROMPT, "rows": rows}, "serving")


if __name__ == "__main__":
    main()
