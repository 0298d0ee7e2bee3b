"""The plain loop over this course's own layers, held against bitsandbytes + PEFT + TRL."""

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_base, make_rows, make_tokenizer, write_jsonl
from torch import nn

from qlora_edu.adapters import adapter_tensors, load_adapters
from qlora_edu.errors import LoRAError, TrainingError
from qlora_edu.finetuning import make_trainer
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import load_base
from qlora_edu.qlora import replace_linear_layers
from qlora_edu.text.conversations import IGNORED, encode_conversations
from qlora_edu.training import (
    answer_tokens,
    collate,
    completion_loss,
    exact_match,
    generate_answers,
    held_out_loss,
    learning_rate_at,
    row_order,
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
        lora_alpha=16,
        max_steps=STEPS,
        batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        warmup_steps=0,
        logging_steps=1,
    )


def plain_model(base) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def own_model(base) -> nn.Module:
    """The base with this course's QLoRA layers, r=8, lora_alpha=16."""
    model = plain_model(base)
    replace_linear_layers(model, r=8, lora_alpha=16)
    return model


# The climax: two stacks, one curve


def peft_tensors(trainer):
    from peft import get_peft_model_state_dict

    return {k: v.clone() for k, v in get_peft_model_state_dict(trainer.model).items()}


def both_curves(config, base, encoded, tmp_path):
    """Losses of TRL's trainer and of the plain loop, from the same adapters and batches."""
    model, tokenizer = load_base(config)
    trainer = make_trainer(config, model, tokenizer, encoded, tmp_path / "trainer")
    start = peft_tensors(trainer)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    own = own_model(base)
    load_adapters(own, start, allow_untrained=True)
    rows_a_step = BATCH * config.gradient_accumulation_steps
    order = row_order(len(encoded), STEPS * rows_a_step, config.seed)
    batches = [
        collate([encoded[i] for i in order[at : at + BATCH]]) for at in range(0, len(order), BATCH)
    ]
    ours = train(
        own,
        batches,
        config.learning_rate,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        total_steps=STEPS,
        max_grad_norm=config.max_grad_norm,
    )
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


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_the_curve_is_the_same_with_accumulation_warm_up_and_a_schedule(
    config, base, encoded, tmp_path, schedule
):
    config = config.replace(
        gradient_accumulation_steps=3, lr_scheduler_type=schedule, warmup_steps=4
    )
    theirs, ours, *_ = both_curves(config, base, encoded, tmp_path)
    assert len(theirs) == len(ours) == STEPS
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mistake", ["lora_alpha", "levels", "double_quant"])
def test_the_comparison_sees_a_wrong_setting(config, base, encoded, mistake, tmp_path):
    model, tokenizer = load_base(config)
    trainer = make_trainer(config, model, tokenizer, encoded, tmp_path / "trainer")
    wrong = {"lora_alpha": {"lora_alpha": 32}, "levels": {"levels": "fp4"}}.get(
        mistake, {"double_quant": False}
    )
    other = plain_model(base)
    replace_linear_layers(other, **{"r": 8, "lora_alpha": 16, **wrong})
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
    names = replace_linear_layers(model, r=4, lora_alpha=8)
    assert len(names) == 2 * 7 and "lm_head" not in names
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{part}" for name in names for part in "AB"}
    with pytest.raises(LoRAError, match="14 adapted layers already"):
        replace_linear_layers(model, r=4, lora_alpha=8)


def test_collate_is_trls_collator(encoded):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [encoded[0], encoded[4], encoded[2]]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    theirs = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    ours = collate(rows, pad_token_id=0)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_is_in_training_mode_whatever_was_before(base, encoded):
    """Dropout works only there."""
    model, seen = own_model(base).eval(), []
    model.register_forward_hook(lambda module, *_: seen.append(module.training))
    train(model, [collate(encoded[:2])] * 2, 1e-3)
    assert seen == [True, True]


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


# The loop's parts


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_the_schedules_are_those_of_transformers(name):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40)
    for step in range(40):
        ours = learning_rate_at(step, 0.3, name, warmup_steps=5, total_steps=40)
        # The same formula; the last bit may fall otherwise.
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()
    with pytest.raises(TrainingError, match="no schedule 'cosin'"):
        learning_rate_at(0, 0.3, "cosin")


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ((0, 1.0, "constant_with_warmup", -1), "warmup_steps must be 0 or more, not -1"),
        ((0, 1.0, "linear", 0, 0), "ends at total_steps=0"),
        ((0, 1.0, "cosine", 2, -3), "ends at total_steps=-3"),
        ((7, 1.0, "linear", 0, 6), "total_steps=6, and step 7"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(schedule, says):
    with pytest.raises(TrainingError, match=says):
        learning_rate_at(*schedule)
    assert learning_rate_at(6, 1.0, "linear", 0, 6) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps must be a whole"),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be above 0"),
        ({"lr_scheduler_type": "linear"}, "ends at total_steps=0"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
    ],
)
def test_a_setting_that_means_nothing_trains_nothing(base, encoded, settings, says):
    model = own_model(base)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(TrainingError, match=says):
        train(model, [collate(encoded[:2])], 1e-3, **settings)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("count", [0, -1, 2.0])
def test_counts_that_mean_nothing_are_refused(base, encoded, tokenizer, count):
    model, prompts = plain_model(base), [make_rows(1)[0]["messages"][:1]]
    with pytest.raises(TrainingError, match="batch_size must be a whole number"):
        held_out_loss(model, encoded[:2], count)
    with pytest.raises(TrainingError, match="batch_size must be a whole number"):
        generate_answers(model, tokenizer, prompts, batch_size=count)
    with pytest.raises(TrainingError, match="max_new_tokens must be a whole number"):
        generate_answers(model, tokenizer, prompts, max_new_tokens=count)
    with pytest.raises(TrainingError, match="rows must be a whole number"):
        row_order(count, 5, seed=0)  # without rows it would look for one for ever


def test_four_batches_of_two_train_as_one_of_eight(base, encoded):
    # Some rows are trained on whole, so that a mean of means would be another number.
    rows_of_all_sorts = [
        row if i % 3 else {**row, "labels": row["input_ids"]} for i, row in enumerate(encoded)
    ]
    curves, ends = [], []
    for rows, accumulation in ((8, 1), (2, 4)):
        model = own_model(base)
        torch.manual_seed(0)
        start = {k: torch.randn_like(v) * 0.02 for k, v in adapter_tensors(model).items()}
        load_adapters(model, start)
        batches = [collate(rows_of_all_sorts[i : i + rows]) for i in range(0, 40, rows)]
        assert len({answer_tokens(batch) for batch in batches}) > 1
        curves.append(train(model, batches, 1e-3, gradient_accumulation_steps=accumulation))
        ends.append(torch.cat([t.flatten() for t in adapter_tensors(model).values()]))
    # Sums in another order; a mean of means is off by 1e-2 here.
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=0, atol=1e-5)
    assert (ends[0] - ends[1]).norm() < 1e-3 * ends[0].norm()


def test_the_order_of_rows_reads_each_row_once_a_pass():
    order = row_order(7, 21, seed=3)
    passes = [order[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(rows) == list(range(7)) for rows in passes)
    assert passes[0] != passes[1] and order != row_order(7, 21, seed=4)
    assert row_order(7, 10, seed=3) == order[:10]  # a longer run begins as the shorter one


def test_rows_of_like_length_come_together():
    lengths = torch.randint(5, 500, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    plain, grouped = (row_order(1000, 1000, 0, given, 4) for given in (None, lengths))
    assert sorted(grouped) == list(range(1000))

    def padding(order):
        steps = [[lengths[i] for i in order[at : at + 4]] for at in range(0, 1000, 4)]
        return sum(4 * max(step) - sum(step) for step in steps)

    assert padding(grouped) < padding(plain) / 10
    assert lengths[grouped[0]] == max(lengths[i] for i in grouped[:200])  # the worst comes first


def test_a_step_without_answers_is_refused(base, encoded):
    row = {"input_ids": encoded[0]["input_ids"], "labels": [IGNORED] * len(encoded[0]["labels"])}
    batches = [collate(encoded[:2]), collate([row])]
    with pytest.raises(TrainingError, match="no token of step 2 has a label"):
        train(own_model(base), batches, 1e-3)
