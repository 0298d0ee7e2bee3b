"""The plain loop over this course's own layers, held against bitsandbytes + PEFT + TRL."""

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_base, make_rows, make_tokenizer, write_jsonl
from torch import nn

from qlora_edu.adapters import adapter_tensors, load_adapters
from qlora_edu.chat_data import IGNORED, encode_conversations
from qlora_edu.config import FinetuneConfig
from qlora_edu.finetune import make_trainer
from qlora_edu.loading import load_base
from qlora_edu.lora import LoRAError
from qlora_edu.qlora import replace_linear_layers
from qlora_edu.training import (
    TrainingError,
    collate,
    completion_loss,
    exact_match,
    generate_answers,
    held_out_loss,
    train,
)

STEPS, BATCH = 20, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def encoded(tokenizer):
    talks = [row["messages"] for row in make_rows(STEPS * BATCH)]
    return encode_conversations(tokenizer, talks, 64)


@pytest.fixture
def config(base, tmp_path):
    data = str(write_jsonl(tmp_path / "data.jsonl", make_rows(8)))
    return FinetuneConfig.from_preset(
        "embedded",
        model=str(base),
        train_data=data,
        held_out_data=data,
        r=8,
        alpha=16,
        max_steps=STEPS,
        batch_size=BATCH,
        learning_rate=3e-3,
        lr_schedule="constant",
        warmup_steps=0,
        logging_steps=1,
    )


def plain_model(base) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def own_model(base) -> nn.Module:
    """The base with this course's QLoRA layers, r=8, alpha=16."""
    model = plain_model(base)
    replace_linear_layers(model, r=8, alpha=16)
    return model


# The climax: two stacks, one curve


def peft_tensors(trainer):
    from peft import get_peft_model_state_dict

    return {k: v.clone() for k, v in get_peft_model_state_dict(trainer.model).items()}


def both_curves(config, base, encoded, tmp_path):
    """Losses of TRL's trainer and of the plain loop, from the same adapters and batches."""
    from torch.utils.data import SequentialSampler

    model, tokenizer = load_base(config)
    trainer = make_trainer(config, model, tokenizer, encoded, tmp_path / "trainer")
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(encoded)
    start = peft_tensors(trainer)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    own = own_model(base)
    load_adapters(own, start, allow_untrained=True)
    batches = [collate(encoded[i : i + BATCH]) for i in range(0, len(encoded), BATCH)]
    ours = train(own, batches, config.learning_rate, max_grad_norm=config.max_grad_norm)
    return theirs, ours, peft_tensors(trainer), adapter_tensors(own)


def test_loss_curve_is_that_of_bitsandbytes_and_peft(config, base, encoded, tmp_path):
    theirs, ours, their_end, our_end = both_curves(config, base, encoded, tmp_path)
    assert len(theirs) == len(ours) == STEPS
    assert ours[-1] < 0.8 * ours[0]  # they learn: equal curves that go nowhere prove nothing
    # Both compute in float32 on the same 4-bit weights, and add up in another order. Measured: 1e-6
    # nats. AdamW divides by the root of a squared gradient, so noise in tiny gradients grows; 1e-4
    # leaves room for other processors. The least of the mistakes below shows at more than that.
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)
    # Measured: the adapters end 6e-5 apart at most. One gradient near zero whose sign flips moves
    # its parameter by 2·lr, so what is bounded is the distance as a whole.
    apart = sum((our_end[name] - their_end[name]).square().sum() for name in our_end).sqrt()
    length = sum(tensor.square().sum() for tensor in our_end.values()).sqrt()
    assert apart < 0.01 * length


@pytest.mark.parametrize("mistake", ["alpha", "levels", "double_quant"])
def test_the_comparison_sees_a_wrong_setting(config, base, encoded, mistake, tmp_path):
    model, tokenizer = load_base(config)
    trainer = make_trainer(config, model, tokenizer, encoded, tmp_path / "trainer")
    wrong = {"alpha": {"alpha": 32}, "levels": {"levels": "fp4"}}.get(
        mistake, {"double_quant": False}
    )
    other = plain_model(base)
    replace_linear_layers(other, **{"r": 8, "alpha": 16, **wrong})
    right = own_model(base)
    start = {  # B = 0 would hide the scaling
        k: v + 0.02 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
        for k, v in peft_tensors(trainer).items()
    }
    losses = []
    for own in (right, other):
        load_adapters(own, start)
        losses.append(completion_loss(own, collate(encoded[:8])).item())
    assert abs(losses[0] - losses[1]) > 1e-4


# Adapters under PEFT's names


def test_adapters_written_by_peft_give_the_same_outputs_here(config, base, encoded, tmp_path):
    model, tokenizer = load_base(config)
    peft_model = make_trainer(config, model, tokenizer, encoded, tmp_path / "trainer").model.eval()
    with torch.no_grad():
        for parameter in (p for p in peft_model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape))
    peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = own_model(base).eval()
    assert adapter_tensors(own).keys() == stored.keys()
    load_adapters(own, stored)
    batch = collate(encoded[:4])
    with torch.no_grad():
        theirs = peft_model(input_ids=batch["input_ids"]).logits
        ours = own(input_ids=batch["input_ids"]).logits
    # float32 sums of up to 128 terms in another order, through two layers.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# The loop and its parts


def test_every_linear_layer_but_the_head_is_replaced(base):
    model = plain_model(base)
    names = replace_linear_layers(model, r=4, alpha=8)
    assert len(names) == 2 * 7 and "lm_head" not in names
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{part}" for name in names for part in "AB"}
    with pytest.raises(LoRAError, match=r"no nn\.Linear"):
        replace_linear_layers(model, r=4, alpha=8)


def test_collate_is_trls_collator(encoded):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [encoded[0], encoded[4], encoded[2]]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    theirs = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    ours = collate(rows, pad_token_id=0)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_refuses_what_cannot_be_trained(base, encoded):
    model = plain_model(base).requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter requires a gradient"):
        train(model, [collate(encoded[:2])], lr=1e-3)
    model = own_model(base)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss is nan at step 1"):
        train(model, [collate(encoded[:2])], lr=1e-3)


def test_held_out_loss_is_the_mean_over_answer_tokens(base, encoded):
    model = plain_model(base).train()
    rows = encoded[:7]
    total = tokens = 0
    for row in rows:  # one by one, without padding
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        for position, label in enumerate(row["labels"][1:]):
            if label != IGNORED:
                total, tokens = total - logits[position, label].item(), tokens + 1
    # Float noise of padding and summation order only.
    assert held_out_loss(model, rows, batch_size=3) == pytest.approx(total / tokens, rel=1e-5)
    assert model.training  # as it was found
    unlabelled = [{"input_ids": [5, 6], "labels": [IGNORED, IGNORED]}]
    with pytest.raises(TrainingError, match="no answer token"):
        held_out_loss(model, unlabelled)


@pytest.fixture(scope="module")
def taught(base, encoded):
    """The tiny base after it has learned the task by heart, all weights trained."""
    torch.manual_seed(0)
    model = plain_model(base)
    batches = [collate(encoded[i : i + 30]) for i in (0, 30) * 60]
    losses = train(model, batches, lr=5e-3, max_grad_norm=1.0)
    assert losses[-1] < 0.05, losses[-1]
    return model


def test_answers_are_greedy_stop_at_the_end_and_do_not_depend_on_the_batch(taught, tokenizer):
    rows = [row["messages"] for row in make_rows(30)]
    prompts, wanted = [row[:-1] for row in rows], [row[-1]["content"] for row in rows]
    together = generate_answers(taught, tokenizer, prompts, max_new_tokens=12)
    alone = generate_answers(taught, tokenizer, prompts, max_new_tokens=12, batch_size=1)
    assert together == alone
    assert exact_match(together, wanted) == 1.0  # in order, and nothing after the name
    greedy = list(
        tokenizer.apply_chat_template(prompts[0], add_generation_prompt=True)["input_ids"]
    )
    for _ in range(4):  # the same, by hand and without a cache
        logits = taught(input_ids=torch.tensor([greedy])).logits
        greedy.append(logits[0, -1].argmax().item())
    assert tokenizer.decode(greedy).split("<|assistant|>")[1].startswith(wanted[0] + "<|end|>")


def test_an_answer_that_never_ends_is_cut_at_the_limit(base, tokenizer):
    answer = generate_answers(plain_model(base), tokenizer, [make_rows(1)[0]["messages"][:1]], 5)
    assert len(tokenizer(answer[0])["input_ids"]) <= 6


def test_exact_match_wants_one_prediction_for_each_reference():
    assert exact_match(["a", " b ", "C"], ["a", "b", "c"]) == pytest.approx(2 / 3)
    for predictions, references in ([], []), (["a"], ["a", "b"]):
        with pytest.raises(TrainingError, match="need one for each"):
            exact_match(predictions, references)
