"""Support for chapter 10: our loop says what transformers' says, alone and in a batch."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from qlora_edu.errors import GenerationError
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import attach_adapter, load_base, locate
from qlora_edu.text.conversations import read_conversations
from qlora_edu.text.generation import (
    generate_tokens,
    next_token_probabilities,
    sample_answers,
    stream_answer,
)
from qlora_edu.training import generate_answers


@pytest.fixture(scope="module")
def tuned():
    """The base with the adapter that knows all tasks, and its tokenizer."""
    model, tokenizer = load_base(FinetuneConfig.from_preset("embedded", method="lora"))
    return attach_adapter(model, locate("data/adapters/all")).eval(), tokenizer


@pytest.fixture(scope="module")
def prompts():
    return [row[:-1] for row in read_conversations(locate("data/tasks/test.jsonl"))[:12]]


@settings(deadline=None, max_examples=60)
@example([-2.220446049250313e-16, 0.0], 1.0, 0.25)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True),
    st.floats(0.1, 3),
    st.floats(0.05, 1),
)
def test_the_probabilities_are_those_of_transformers(numbers, temperature, top_p):
    logits = torch.tensor([numbers])
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    theirs = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    mine = next_token_probabilities(logits, temperature, top_p)
    theirs = theirs.softmax(-1)
    # Of tokens that are equally likely in float32 ours keeps the first and theirs the last: what is
    # kept is the same, whichever token has it.
    mine_kept, their_kept = (p.sort(descending=True).values for p in (mine, theirs))
    if torch.equal(mine_kept > 0, their_kept > 0):
        torch.testing.assert_close(mine_kept, their_kept, rtol=1e-4, atol=1e-6)
        chances = (logits / temperature).softmax(-1)
        if len(chances.unique()) == chances.numel():
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    else:  # only where some of the likeliest have top_p to the last bit, or what is left is nothing
        sums = (logits / temperature).softmax(-1).sort(descending=True).values.cumsum(-1)
        assert (sums - top_p).abs().min() < 1e-5


def test_of_two_equally_likely_tokens_the_first_is_kept():
    tied = torch.tensor([-2.2e-16, 0.0])
    assert next_token_probabilities(tied, top_p=0.25).tolist() == [1.0, 0.0]
    assert next_token_probabilities(tied, temperature=0).tolist() == [0.0, 1.0]  # 0 is larger


def test_the_nucleus_is_the_fewest_that_have_enough():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    for top_p, kept in (
        (0.1, {0}),
        (0.4, {0}),
        (0.41, {0, 2}),
        (0.75, {0, 2, 3}),
        (1, {0, 1, 2, 3}),
    ):
        mine = next_token_probabilities(logits, top_p=top_p)
        assert set(mine.nonzero().flatten().tolist()) == kept
        assert mine.sum().item() == pytest.approx(1)
    exactly = next_token_probabilities(torch.tensor([0.25, 0.5, 0.25]).log(), top_p=0.5)
    assert exactly.tolist() == [0, 1, 0], "the first has enough by itself"


def test_greedy_says_what_transformers_says(tuned, prompts):
    model, tokenizer = tuned
    theirs = generate_answers(model, tokenizer, prompts, max_new_tokens=60)
    assert sample_answers(model, tokenizer, prompts, max_new_tokens=60) == theirs
    assert len(set(theirs)) > 4


def test_alone_and_in_a_batch(tuned, prompts):
    model, tokenizer = tuned
    together = sample_answers(model, tokenizer, prompts, max_new_tokens=60)
    lengths = {len(tokenizer(p[0]["content"])["input_ids"]) for p in prompts}
    assert len(lengths) > 4
    assert [
        sample_answers(model, tokenizer, [p], max_new_tokens=60)[0] for p in prompts
    ] == together


def test_padding_changes_no_probability(tuned, prompts):
    """In logits and not only in answers: within the noise of float32."""
    from qlora_edu.text.conversations import encode_prompt

    model, tokenizer = tuned
    short, long = sorted((encode_prompt(tokenizer, p) for p in prompts), key=len)[
        :: len(prompts) - 1
    ]
    seen = []
    real = type(model).forward

    class Spy:
        def __init__(self):
            self.config = model.config

        def parameters(self):
            return model.parameters()

        def __call__(self, **inputs):
            out = real(model, **inputs)
            seen.append(out.logits[0, -1])
            return out

    next(generate_tokens(Spy(), [short], tokenizer.eos_token_id))
    next(generate_tokens(Spy(), [short, long], tokenizer.eos_token_id))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-3)


def test_positions_are_counted_from_each_prompt_s_own_beginning():
    """Llama's turn with the distance between tokens alone; GPT-2 has learned every position."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    model.transformer.wpe.weight.data.normal_(0, 1)
    prompts = [[5, 6, 7], [9] * 11, [1, 2, 3, 4, 5]]
    together = list(generate_tokens(model, prompts, 0, max_new_tokens=6))
    for i, prompt in enumerate(prompts):
        alone = [token for (token,) in generate_tokens(model, [prompt], 0, max_new_tokens=6)]
        assert [step[i] for step in together if step[i] is not None] == alone


def test_draws_follow_the_probabilities_and_the_seed(tuned, prompts):
    model, tokenizer = tuned
    kind = {"max_new_tokens": 12, "temperature": 1.5}
    one, same, other = (
        sample_answers(model, tokenizer, prompts, seed=seed, **kind) for seed in (1, 1, 2)
    )
    assert one == same != other
    state = torch.get_rng_state()
    sample_answers(model, tokenizer, prompts[:1], **kind)
    assert torch.equal(state, torch.get_rng_state()), "it drew from the global generator"


def test_a_nucleus_of_next_to_nothing_is_greedy(tuned, prompts):
    model, tokenizer = tuned
    greedy = sample_answers(model, tokenizer, prompts[:4], max_new_tokens=30)
    kind = {"max_new_tokens": 30, "temperature": 1.0, "top_p": 1e-6}
    drawn = sample_answers(model, tokenizer, prompts[:4], **kind)
    assert drawn == greedy


def test_what_is_streamed_grows_to_the_answer(tuned, prompts):
    model, tokenizer = tuned
    whole = sample_answers(model, tokenizer, [prompts[2]], max_new_tokens=60)[0]
    pieces = list(stream_answer(model, tokenizer, prompts[2], max_new_tokens=60))
    assert pieces[-1] == whole and len(pieces) > 5
    assert all(whole.startswith(piece) for piece in pieces)


def test_it_stops_at_the_end_token_at_the_limit_and_where_positions_end(tuned, prompts):
    model, tokenizer = tuned
    end, positions = tokenizer.eos_token_id, model.config.max_position_embeddings
    steps = list(generate_tokens(model, [[5, 6, 7]], end, max_new_tokens=4))
    assert 0 < len(steps) <= 4 and all(end not in step for step in steps)
    nearly = [[9] * (positions - 2)]
    assert len(list(generate_tokens(model, nearly, -1, max_new_tokens=50))) == 2
    with pytest.raises(GenerationError, match=f"{positions:,} positions"):
        next(generate_tokens(model, [[9] * positions], end))


@pytest.mark.parametrize("prompts", [[], [[]], [[5], []]])
def test_an_empty_prompt_is_refused(tuned, prompts):
    with pytest.raises(GenerationError, match="empty"):
        next(generate_tokens(tuned[0], prompts, 0))


def test_counts_that_mean_nothing_are_refused(tuned, prompts):
    model, tokenizer = tuned
    for count in (0, -5, 2.0):
        with pytest.raises(GenerationError, match="max_new_tokens must be a whole number"):
            sample_answers(model, tokenizer, prompts, max_new_tokens=count)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"temperature": -1}, "not -1 and 1.0$"),
        ({"temperature": float("nan")}, "not nan and 1.0$"),
        ({"top_p": 0}, "not 1.0 and 0$"),
        ({"top_p": 1.1}, "not 1.0 and 1.1$"),
    ],
)
def test_bad_settings_are_refused(setting, says):
    with pytest.raises(GenerationError, match=says):
        next_token_probabilities(torch.zeros(3), **setting)
