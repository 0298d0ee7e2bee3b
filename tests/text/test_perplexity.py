"""Surprise is the mean cross-entropy, whatever the batch; rounded weights are undone to the bit."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_edu import quantize
from qlora_edu.errors import DataError
from qlora_edu.text.perplexity import encode_text, linear_weights, rounded_weights, surprise

DOCUMENTS = [
    {"text": "Mara sold a red lamp to Hugo."},
    {"text": "It was Monday. " * 30},
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Mara"}]},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_base(tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("base") / "base")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    return encode_text(tokenizer, path, max_length=64)


def test_documents_begin_end_and_are_cut(tokenizer, rows):
    assert [row[0] for row in rows] == 3 * [tokenizer.bos_token_id]
    assert rows[0][-1] == rows[2][-1] == tokenizer.eos_token_id
    assert len(rows[1]) == 64 and rows[1][-1] != tokenizer.eos_token_id


def test_a_tokenizer_without_a_begin_token_begins_with_the_text(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "Mara sold a lamp."}) + "\n")
    (whole,) = encode_text(tokenizer, path)
    tokenizer.bos_token = None
    assert encode_text(tokenizer, path) == [whole[1:]]
    tokenizer.eos_token = None
    assert encode_text(tokenizer, path) == [whole[1:-1]]
    assert tokenizer.decode(whole[1:-1]) == "Mara sold a lamp."


def test_a_special_token_in_a_text_is_text(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a<|end|>b"}) + "\n")
    (row,) = encode_text(tokenizer, path)
    assert row.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(row) == "<|begin|>a<|end|>b<|end|>"


def test_a_line_that_is_no_document_is_named(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"text\.jsonl:2: write .*'prompt'"):
        encode_text(tokenizer, path)
    with pytest.raises(DataError, match="max_length must be a whole number"):
        encode_text(tokenizer, path, max_length=0)


def test_what_cannot_be_measured_is_refused(model, rows):
    with pytest.raises(DataError, match="document 1 has no second token"):
        surprise(model, [rows[0], [5]])
    with pytest.raises(DataError, match="batch_size must be a whole number"):
        surprise(model, rows, batch_size=-1)


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_surprise_is_the_models_own_loss_whatever_the_batch(model, rows, batch_size):
    measured = surprise(model, rows, batch_size)
    assert measured.tokens.tolist() == [len(row) - 1 for row in rows]
    for nats, row in zip(measured.nats, rows, strict=True):
        ids = torch.tensor([row])
        own = model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
        # float32 sums in another order; the losses are of order 100 nats.
        assert nats.item() == pytest.approx(own, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(rows):
    def uniform(input_ids):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 1000))

    assert surprise(uniform, rows).perplexity == pytest.approx(1000, rel=1e-6)


def test_loss_is_a_mean_over_tokens_not_over_documents():
    model_of_two = SimpleNamespace
    logits = torch.zeros(1, 4, 2)
    logits[0, :, 1] = math.log(3)  # token 1 has probability 3/4

    def model(input_ids):
        return model_of_two(logits=logits[:, : input_ids.shape[1]].expand(len(input_ids), -1, -1))

    measured = surprise(model, [[0, 1], [0, 0, 0, 0]])
    wanted = (-math.log(0.75) - 3 * math.log(0.25)) / 4
    assert measured.loss == pytest.approx(wanted, rel=1e-6)


def test_rounded_weights_are_what_the_quantiser_gives_and_come_back(model, rows):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plain = surprise(model, rows)
    with rounded_weights(model, lambda weight: quantize(weight).dequantize()):
        for name, parameter in model.named_parameters():
            if name in linear_weights(model):
                assert torch.equal(parameter, quantize(before[name]).dequantize())
            else:
                assert torch.equal(parameter, before[name])
        assert surprise(model, rows).loss != plain.loss
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(surprise(model, rows).nats, plain.nats)


def test_rounding_only_what_is_named(model):
    name = linear_weights(model)[0]
    with rounded_weights(model, torch.zeros_like, [name]):
        zero = [n for n, p in model.named_parameters() if not p.any()]
    assert zero == [name]


def test_weights_come_back_after_an_error_and_a_wrong_name_changes_nothing(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), rounded_weights(model, torch.zeros_like):
        raise RuntimeError("stop")
    with (
        pytest.raises(AttributeError, match="nothing"),
        rounded_weights(model, torch.zeros_like, ["nothing"]),
    ):
        pass
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_is_rounded_by_default_is_what_bitsandbytes_quantises(model):
    names = linear_weights(model)
    assert len(names) == 7 * model.config.num_hidden_layers
    assert not any("embed" in name or "lm_head" in name for name in names)
