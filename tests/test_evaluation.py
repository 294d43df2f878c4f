"""Every target is scored once, and how the text is cut into calls changes nothing."""

import math
from itertools import pairwise

import pytest
import reference
import torch
from conftest import CONFIGS, make_ids, make_model

from hf_lstm import TokenStream, byte_tokenizer, char_tokenizer, evaluate_stream

TOKENS = make_ids(1, 50)[0]


def expected_nats(model, documents):
    """The sum over documents, each read from a zero state, and how many targets were the most probable."""
    nats, correct = 0.0, 0
    for document in documents:
        log_probabilities = model(document[None]).logits[0].log_softmax(dim=-1)[:-1]
        nats -= log_probabilities.gather(1, document[1:, None]).sum().item()
        correct += (log_probabilities.argmax(dim=-1) == document[1:]).sum().item()
    return nats, correct


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_hidden_state_is_what_the_output_layer_takes(name):
    """The neural cache compares it."""
    model = make_model(**CONFIGS[name])

    output = model(TOKENS[None], output_hidden_states=True)

    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


def test_the_loss_is_that_of_the_equations():
    model, tokens = make_model(cell_type="gru"), TOKENS[:6]
    logits, _ = reference.language_model(tokens.tolist(), reference.weights_of(model), model.config.cell_type)
    expected = reference.mean_cross_entropy(logits[:-1], tokens[1:].tolist()).value

    assert evaluate_stream(model, tokens)["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bptt_length", [1, 7, 49, 1000])
def test_every_target_is_scored_once(bptt_length):
    model = make_model()
    nats, correct = expected_nats(model, [TOKENS])
    low, high = evaluate_stream(model, TOKENS)["loss_interval"]

    result = evaluate_stream(model, TOKENS, bptt_length=bptt_length)

    assert result == {
        "loss": pytest.approx(nats / 49, rel=1e-6),
        "loss_interval": [pytest.approx(low, rel=1e-6), pytest.approx(high, rel=1e-6)],
        "perplexity": pytest.approx(math.exp(nats / 49), rel=1e-6),
        "bits_per_token": pytest.approx(nats / 49 / math.log(2), rel=1e-6),
        "accuracy": correct / 49,
        "tokens": 49,
        "tokens_without_history": 1,
    }
    assert low < result["loss"] < high


def test_the_interval_is_that_of_blocks_drawn_anew():
    """49 targets are 49 blocks, of which the bootstrap draws: about twice the standard error on either side."""
    model = make_model()
    log_probabilities = model(TOKENS[None]).logits[0].log_softmax(dim=-1)[:-1]
    nats = -log_probabilities.gather(1, TOKENS[1:, None])

    low, high = evaluate_stream(model, TOKENS)["loss_interval"]

    half = 1.96 * nats.std().item() / 7
    assert high - nats.mean().item() == pytest.approx(half, rel=0.15)
    assert nats.mean().item() - low == pytest.approx(half, rel=0.15)


def test_the_interval_of_a_long_stream_is_that_of_its_blocks():
    model, tokens = make_model(), make_ids(1, 1001)[0]  # 200 blocks of 5
    log_probabilities = model(tokens[None]).logits[0].log_softmax(dim=-1)[:-1]
    blocks = -log_probabilities.gather(1, tokens[1:, None]).view(200, 5).mean(dim=1)

    low, high = evaluate_stream(model, tokens, batch_size=3, bptt_length=17)["loss_interval"]

    assert (high - low) / 2 == pytest.approx(1.96 * blocks.std().item() / 200**0.5, rel=0.15)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 48, 49, 60])
def test_parts_read_side_by_side_begin_without_history(batch_size):
    model = make_model()
    part = math.ceil(49 / batch_size)
    nats, correct = expected_nats(model, [TOKENS[start : start + part + 1] for start in range(0, 49, part)])

    result = evaluate_stream(model, TOKENS, batch_size=batch_size, bptt_length=5)

    assert result["loss"] == pytest.approx(nats / 49, rel=1e-6)
    assert (result["tokens"], result["accuracy"]) == (49, correct / 49)
    assert result["tokens_without_history"] == len(range(0, 49, part))


@pytest.mark.parametrize("bptt_length", [1, 3, 100])
def test_documents_can_be_read_from_a_zero_state(bptt_length):
    model = make_model(vocab_size=260)
    stream = TokenStream.from_documents(["abc", "defgh", "i", "jk"], byte_tokenizer())
    bounds = [*stream.document_starts.tolist(), len(stream) - 1]
    documents = [stream[a : b + 1] for a, b in pairwise(bounds)]
    nats, correct = expected_nats(model, documents)

    result = evaluate_stream(model, stream, bptt_length=bptt_length, reset_at_documents=True)

    assert result["loss"] == pytest.approx(nats / 15, rel=1e-6)
    assert result["accuracy"] == correct / 15
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / 11, rel=1e-6)
    assert result["bits_per_word"] == pytest.approx(nats / math.log(2) / 4, rel=1e-6)
    assert result["tokens_without_history"] == 4


def test_characters_and_words_are_counted_however_they_are_spelled():
    """A token count that differs changes neither: two tokenizers, a model that finds all tokens equally likely."""
    text = "床前 明月光 ab"  # of 9 characters, 3 words and 19 bytes
    for tokenizer, targets, characters in ((byte_tokenizer(), 18, 9), (char_tokenizer([text]), 8, 8)):
        model = make_model(vocab_size=len(tokenizer))
        model.lm_head.weight.data.zero_()

        result = evaluate_stream(model, TokenStream.from_documents([text], tokenizer))

        nats = targets * math.log(len(tokenizer))
        assert result["tokens"] == targets
        assert result["bits_per_word"] == pytest.approx(nats / math.log(2) / 3, rel=1e-6)
        assert ("word_perplexity" in result) == (math.exp(nats / 3) < 1e6) == (characters == 8)
        assert result.get("word_perplexity", math.exp(nats / 3)) == pytest.approx(math.exp(nats / 3), rel=1e-5)
        assert result["bits_per_character"] == pytest.approx(nats / math.log(2) / characters, rel=1e-6)


@pytest.mark.parametrize("bptt_length", [4, 10, 64])
def test_the_state_can_be_reset_regularly(bptt_length):
    model = make_model()
    nats, _ = expected_nats(model, [TOKENS[start : start + 11] for start in range(0, 49, 10)])

    result = evaluate_stream(model, TOKENS, bptt_length=bptt_length, reset_every=10)

    assert result["loss"] == pytest.approx(nats / 49, rel=1e-6)


def test_the_model_is_left_as_it_was():
    model = make_model().train()
    before = [parameter.clone() for parameter in model.parameters()]

    evaluate_stream(model, TOKENS)

    assert model.training
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TOKENS[:1], {}, "holds 1 tokens: it must hold at least two"),
        (TOKENS, {"batch_size": 0}, r"`batch_size` \(0\) must be at least 1"),
        (TOKENS, {"bptt_length": 0}, r"`bptt_length` \(0\) must be at least 1"),
        (TOKENS, {"reset_every": 0}, r"`reset_every` \(0\) must be at least 1"),
        (torch.tensor([1, 31]), {}, "ids from 1 to 31: they must lie within the model's vocabulary of 31"),
        (torch.tensor([-1, 3]), {}, "ids from -1 to 3"),
        (TOKENS[None], {}, r"`tokens` of shape \(1, 50\)"),
        (TOKENS, {"temperature": 0}, r"`temperature` \(0\) must be a number above 0"),
        (TOKENS, {"temperature": math.nan}, r"`temperature` \(nan\) must be a number above 0"),
    ],
)
def test_invalid_arguments_raise(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_stream(make_model(), tokens, **options)


def test_a_nan_prediction_names_its_token():
    model = make_model(tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[30] = math.nan
    tokens = torch.where(TOKENS == 30, 29, TOKENS)
    tokens[20] = 30

    with pytest.raises(ValueError, match=r"The prediction of token 21 is NaN"):
        evaluate_stream(model, tokens, bptt_length=7)


def test_a_token_of_probability_zero_has_infinite_loss(monkeypatch):
    model = make_model()
    head = model.lm_head.forward
    impossible = torch.zeros(31).index_fill(0, TOKENS[9], -math.inf)
    monkeypatch.setattr(model.lm_head, "forward", lambda x: head(x) + impossible)

    result = evaluate_stream(model, TOKENS)

    assert (result["loss"], result["perplexity"]) == (math.inf, math.inf)
    assert result["loss_interval"] == [math.inf, math.inf]


def test_a_model_without_a_state_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config)

    with pytest.raises(ValueError, match="The model is a 'gpt2': it must be an 'hf_lstm'"):
        evaluate_stream(model, TOKENS)
