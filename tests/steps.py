"""A small Llama, and what a real training step of it needs: the planner is held against both."""

import torch
from transformers import AutoConfig

from qlora_edu.planner.fake_step import build_model, training_loss
from qlora_edu.planner.trace import trace_memory

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}


def make_config(**changes):
    shape = {**LLAMA, **changes}
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def measured_peak(config, step_settings, batch, length):
    """The allocator's peak in the second step, and what was there before it."""
    kept = {}

    def step():
        training_loss(kept["model"], kept["ids"], step_settings).backward()
        kept["optimizer"].step()
        kept["optimizer"].zero_grad()

    def start():
        torch.manual_seed(0)
        kept["model"] = build_model(config, step_settings)
        trained = [p for p in kept["model"].parameters() if p.requires_grad]
        kept["optimizer"] = torch.optim.AdamW(trained)
        kept["ids"] = torch.randint(0, config.vocab_size, (batch, length))
        step()

    before = trace_memory(start).live[-1]
    return before + trace_memory(step).peak
