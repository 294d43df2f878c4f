"""What a model does at test time is what the papers' equations say, and never changes the model."""

import math
from io import StringIO

import pytest
import torch
from conftest import make_ids, make_model
from pandas import read_csv
from torch.nn import functional as F

from hf_lstm import LSTMForCausalLM, TokenStream, char_tokenizer, evaluate_stream
from hf_lstm.evaluation import DynamicEvaluation, NeuralCache, fit_temperature, gradient_rms
from hf_lstm.model.cells_lstm import at_least_float32

TOKENS = make_ids(1, 40)[0]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_logits_are_divided_by_the_temperature(temperature):
    model = make_model()
    expected = F.cross_entropy(model(TOKENS[None]).logits[0, :-1] / temperature, TOKENS[1:]).item()

    assert evaluate_stream(model, TOKENS, temperature=temperature)["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_best_temperature_is_found():
    """The text is the model's own, written at another temperature than 1."""
    model = make_model()
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 1.7, "top_k": 0, "eos_token_id": None}
    tokens = model.generate(TOKENS[None, :1], attention_mask=torch.ones(1, 1), max_new_tokens=600, **options)[0]

    temperature = fit_temperature(model, tokens, bptt_length=100)

    assert temperature == pytest.approx(1.7, rel=0.1)
    best = evaluate_stream(model, tokens, temperature=temperature)["loss"]
    for factor in (0.98, 1.02):
        assert best < evaluate_stream(model, tokens, temperature=factor * temperature)["loss"]


def test_a_text_without_a_best_temperature_is_refused():
    with pytest.raises(ValueError, match="has no minimum in the temperature"):
        fit_temperature(make_model(), TOKENS)  # a random text: the flatter, the better


@pytest.mark.parametrize("bptt_length", [1, 7, 100])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_the_cache_is_that_of_the_equations(size, bptt_length):
    model, theta, weight = make_model(), 0.3, 0.2
    hidden = model.model(TOKENS[None]).last_hidden_state[0].detach()
    predictions = model(TOKENS[None]).logits[0].softmax(dim=-1)
    expected = 0.0
    for t in range(39):
        p_model = predictions[t, TOKENS[t + 1]]
        seen = range(max(0, t - size), t)
        likeness = {i: math.exp(theta * (hidden[t] @ hidden[i]).item()) for i in seen}
        p = p_model.item()
        if likeness:
            hits = sum(value for i, value in likeness.items() if TOKENS[i + 1] == TOKENS[t + 1])
            p = (1 - weight) * p + weight * hits / sum(likeness.values())
        expected -= math.log(p) / 39

    result = evaluate_stream(model, TOKENS, bptt_length=bptt_length, neural_cache=NeuralCache(size, theta, weight))

    assert result["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_cache_reaches_no_further_back_than_the_state():
    """Documents, parts and regular resets: what is read alone gets the numbers it gets among others."""
    model, cache = make_model(), NeuralCache(7, 0.3, 0.2)
    alone = [evaluate_stream(model, TOKENS[a : a + 14], neural_cache=cache)["loss"] for a in (0, 13, 26)]
    stream = TokenStream(TOKENS, torch.tensor([0, 13, 26]))

    for options in ({"batch_size": 3}, {"reset_every": 13}, {"reset_at_documents": True}):
        result = evaluate_stream(model, stream, bptt_length=5, neural_cache=cache, **options)
        assert result["loss"] == pytest.approx(sum(alone) / 3, rel=1e-6)


def learn_by_hand(model, tokens, length, step):
    """Score a segment, then change the weights by the gradient of its mean loss; the state runs on."""
    nats, cache = 0.0, None
    for start in range(0, len(tokens) - 1, length):
        ids, targets = tokens[None, start : start + length], tokens[start + 1 : start + length + 1]
        output = model(ids[:, : len(targets)], past_key_values=cache, use_cache=True)
        loss = F.cross_entropy(output.logits[0], targets)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        nats += loss.item() * len(targets)
        cache = output.past_key_values
        for layer in cache.layers:
            layer.detach_()
        with torch.no_grad():
            for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                step(name, parameter, gradient)
    return nats / (len(tokens) - 1)


@pytest.mark.parametrize(
    ("decay", "cell_type"), [(0.0, "lstm"), (0.1, "gru"), (0.1, "mogrifier"), (0.0, "rnn_relu"), (0.1, "rnn_tanh")]
)
def test_plain_steps_are_those_of_the_equations(decay, cell_type):
    model, by_hand = make_model(cell_type=cell_type), make_model(cell_type=cell_type)
    trained = {name: parameter.detach().clone() for name, parameter in by_hand.named_parameters()}

    def step(name, parameter, gradient):
        parameter += decay * (trained[name] - parameter) - 0.01 * gradient

    expected = learn_by_hand(by_hand, TOKENS, 6, step)

    options = DynamicEvaluation(learning_rate=0.01, decay=decay, segment_length=6)
    assert evaluate_stream(model, TOKENS, dynamic_evaluation=options)["loss"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(evaluate_stream(model, TOKENS)["loss"], rel=1e-3)


def test_scaled_steps_are_those_of_the_equations():
    model, by_hand = make_model(), make_model()
    rms = gradient_rms(model, make_ids(1, 200, seed=2)[0], lanes=4, segment_length=6)
    trained = {name: parameter.detach().clone() for name, parameter in by_hand.named_parameters()}
    mean = sum(tensor.mean() for tensor in rms.values()) / len(rms)

    def step(name, parameter, gradient):
        pull = (0.3 * rms[name] / mean).clamp(max=1)
        parameter += pull * (trained[name] - parameter) - 0.003 * gradient / (rms[name] + 1e-3)

    expected = learn_by_hand(by_hand, TOKENS, 6, step)

    options = DynamicEvaluation(rms, learning_rate=0.003, decay=0.3, epsilon=1e-3, segment_length=6)
    assert evaluate_stream(model, TOKENS, dynamic_evaluation=options)["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_root_mean_square_is_that_of_the_segments_of_the_lanes():
    model, tokens = make_model(), make_ids(1, 25)[0]  # two lanes of twelve, in segments of five, five and two
    squares, segments = {}, 0
    cache = None
    for start in (0, 5, 10):
        ids = torch.stack([tokens[lane + start : lane + min(start + 5, 12)] for lane in (0, 12)])
        targets = torch.stack([tokens[lane + start + 1 : lane + min(start + 5, 12) + 1] for lane in (0, 12)])
        output = model(ids, past_key_values=cache, use_cache=True)
        loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
        for name, gradient in zip(
            dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            squares[name] = squares.get(name, 0) + gradient.square()
        segments, cache = segments + 1, output.past_key_values
        for layer in cache.layers:
            layer.detach_()

    rms = gradient_rms(model, tokens, lanes=2, segment_length=5)

    for name, square in squares.items():
        torch.testing.assert_close(rms[name], (square / 3).sqrt(), rtol=1e-4, atol=1e-7)


def test_adapting_leaves_the_model_unchanged():
    model = make_model().train()
    before = [parameter.detach().clone() for parameter in model.parameters()]

    results = [
        evaluate_stream(
            model,
            TOKENS,
            temperature=1.5,
            neural_cache=NeuralCache(10, 0.2, 0.1),
            dynamic_evaluation=DynamicEvaluation(gradient_rms(model, TOKENS, lanes=3, segment_length=4)),
        )
        for _ in range(2)
    ]

    assert results[0] == results[1]
    assert model.training
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_learning_sees_the_plain_prediction_and_the_cache_the_tempered_one():
    model, by_hand = make_model(), make_model()
    temperature, theta, weight, length = 1.5, 0.2, 0.3, 6
    hidden, nats, cache = torch.zeros(0, 12), 0.0, None
    for start in range(0, 39, length):
        targets = TOKENS[start + 1 : start + length + 1]
        output = by_hand(
            TOKENS[None, start : start + len(targets)],
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        logits, states = output.logits[0], output.hidden_states[-1][0].detach()
        hidden = torch.cat([hidden, states])
        for step, target in enumerate(targets):
            p = (logits[step] / temperature).softmax(dim=-1)[target].item()
            now = start + step
            if now > 0:
                shares = (theta * hidden[:now] @ hidden[now]).softmax(dim=0)
                p = (1 - weight) * p + weight * shares[TOKENS[1 : now + 1] == target].sum().item()
            nats -= math.log(p)
        gradients = torch.autograd.grad(F.cross_entropy(logits, targets), list(by_hand.parameters()))
        cache = output.past_key_values
        for layer in cache.layers:
            layer.detach_()
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.01 * gradient

    result = evaluate_stream(
        model,
        TOKENS,
        temperature=temperature,
        neural_cache=NeuralCache(100, theta, weight),
        dynamic_evaluation=DynamicEvaluation(learning_rate=0.01, segment_length=length),
    )

    assert result["loss"] == pytest.approx(nats / 39, rel=1e-5)


def test_several_parts_learn_together_from_zero_states():
    """Three parts of 13, 13 and 12 targets: one step for what is read side by side, as far as each goes."""
    model, by_hand = make_model(), make_model()
    tokens = TOKENS[:39]
    stream = TokenStream(tokens, torch.tensor([0, 13, 20, 36]))
    first = torch.tensor([0, 13, 26])[:, None]
    nats, cache = 0.0, None
    for start in range(0, 13, 5):
        indices = first + torch.arange(start, min(start + 5, 13))
        starts = torch.maximum(first, stream.starts_of(indices))
        read = indices < 38
        ids, targets = (tokens[(indices + shift).clamp(max=38)] for shift in (0, 1))
        output = by_hand(ids, position_ids=indices - starts, past_key_values=cache, use_cache=True)
        loss = F.cross_entropy(output.logits[read], targets[read])
        nats += loss.item() * read.sum().item()
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        cache = output.past_key_values
        for layer in cache.layers:
            layer.detach_()
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.01 * gradient

    result = evaluate_stream(
        model,
        stream,
        batch_size=3,
        reset_at_documents=True,
        dynamic_evaluation=DynamicEvaluation(learning_rate=0.01, segment_length=5),
    )

    assert read.sum().item() < read.numel()  # the last part ends earlier
    assert result["tokens"] == 38
    assert result["tokens_without_history"] == 5
    assert result["loss"] == pytest.approx(nats / 38, rel=1e-5)


def test_half_precision_learns_in_single():
    model = make_model(torch.bfloat16)
    rms = gradient_rms(model, TOKENS, lanes=3, segment_length=4)
    learner = DynamicEvaluation(rms).learner(model)

    assert {tensor.dtype for tensor in rms.values()} == {torch.float32}
    assert {parameter.dtype for parameter in learner.model.parameters()} == {torch.float32}
    assert model.dtype == torch.bfloat16
    single = evaluate_stream(
        make_model(torch.float32), TOKENS, dynamic_evaluation=DynamicEvaluation(rms, segment_length=4)
    )
    half = evaluate_stream(model, TOKENS, dynamic_evaluation=DynamicEvaluation(rms, segment_length=4))
    assert half["loss"] == pytest.approx(single["loss"], rel=0.05)


def test_few_segments_are_the_first_of_each_lane():
    model, tokens = make_model(), make_ids(1, 41)[0]
    firsts = torch.cat([tokens[:5], tokens[20:25], tokens[40:]])  # two lanes of 20, of which 4 targets each

    few = gradient_rms(model, tokens, lanes=2, segment_length=4, max_segments=1)

    by_hand = torch.autograd.grad(
        F.cross_entropy(
            model(torch.stack([firsts[:4], firsts[5:9]])).logits.flatten(0, 1), torch.cat([firsts[1:5], firsts[6:10]])
        ),
        list(model.parameters()),
    )
    for tensor, gradient in zip(few.values(), by_hand, strict=True):
        torch.testing.assert_close(tensor, gradient.abs(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("call", [fit_temperature, lambda model, tokens: gradient_rms(model, tokens, lanes=2)])
def test_nan_predictions_raise(call):
    model = make_model()
    model.lm_head.weight.data[5] = math.nan

    with pytest.raises(ValueError, match="token 1 is NaN"):
        call(model.train(), TOKENS)
    assert model.training


def test_a_large_offset_of_all_logits_changes_no_temperature(monkeypatch):
    model = make_model()
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 1.7, "top_k": 0, "eos_token_id": None}
    tokens = model.generate(TOKENS[None, :1], attention_mask=torch.ones(1, 1), max_new_tokens=100, **options)[0]
    expected = fit_temperature(model, tokens)
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: head(x).float() + 1e4)

    assert fit_temperature(model, tokens) == pytest.approx(expected, rel=0.01)


def test_the_defaults_are_the_papers():
    assert vars(NeuralCache()) == {"size": 500, "theta": 1.0, "weight": 0.1}
    plain, scaled = DynamicEvaluation(), DynamicEvaluation({})
    assert (plain.learning_rate, plain.decay) == (0.1, 0.0)
    assert (scaled.learning_rate, scaled.decay, scaled.epsilon, scaled.segment_length) == (2e-4, 8e-3, 2e-5, 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeuralCache(size=0), r"`size` \(0\) must be at least 1"),
        (lambda: NeuralCache(weight=1.0), r"`weight` \(1.0\) must lie in \[0, 1\)"),
        (lambda: NeuralCache(theta=math.nan), r"`theta` \(nan\) must be a number"),
        (lambda: DynamicEvaluation(learning_rate=-1), r"`learning_rate` \(-1\) must be a number of at least 0"),
        (lambda: DynamicEvaluation(decay=2), r"`decay` \(2\) must lie in \[0, 1\]"),
        (lambda: DynamicEvaluation(segment_length=0), r"`segment_length` \(0\) must be at least 1"),
        (lambda: DynamicEvaluation({"x": torch.ones(1)}).learner(make_model()), "belongs to another model"),
        (lambda: gradient_rms(make_model(), TOKENS), r"`lanes` \(100\) must be fewer than the 40 tokens"),
        (lambda: gradient_rms(make_model(), TOKENS, lanes=0), r"`lanes` \(0\) must be at least 1"),
        (lambda: gradient_rms(make_model(), TOKENS, 2, 3, 0), r"`max_segments` \(0\) must be at least 1"),
        (
            lambda: evaluate_stream(make_model(), TOKENS, bptt_length=7, dynamic_evaluation=DynamicEvaluation()),
            r"`bptt_length` \(7\) and `dynamic_evaluation` exclude each other",
        ),
        (lambda: fit_temperature(make_model(), TOKENS[:1]), "holds 1 tokens"),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_adapted_copy_is_the_one_that_was_scored_and_is_saved_like_any_model(tmp_path, dtype):
    model, by_hand = make_model(dtype).train(), make_model(dtype).to(at_least_float32(dtype)).eval()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def step(name, parameter, gradient):
        parameter -= 0.01 * gradient

    learn_by_hand(by_hand, TOKENS, 6, step)

    adapted = DynamicEvaluation(learning_rate=0.01, segment_length=6).adapt(model, TOKENS)

    assert adapted.training
    assert type(adapted) is type(model)
    assert all(tensor.equal(kept[name]) for name, tensor in model.state_dict().items())
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(adapted.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)
    adapted.save_pretrained(tmp_path)
    loaded = LSTMForCausalLM.from_pretrained(tmp_path)
    assert all(tensor.equal(loaded.state_dict()[name]) for name, tensor in adapted.state_dict().items())
    before, after = (evaluate_stream(each, TOKENS)["loss"] for each in (model, loaded))
    assert after < before


def test_an_adaptation_resets_at_documents():
    model, options = make_model(), DynamicEvaluation(learning_rate=0.01, segment_length=5)
    stream = TokenStream(TOKENS[:11], torch.tensor([0, 5]))

    adapted = options.adapt(model, stream, reset_at_documents=True)

    # The token after the first document is its last target, as in `evaluate_stream`.
    expected = options.adapt(options.adapt(model, TOKENS[:6]), TOKENS[5:11])
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(adapted.get_parameter(name), parameter)


def test_the_script_shows_surprisal_before_and_after_in_one_table(tmp_path, run):
    tokenizer = char_tokenizer(["the horse"])
    make_model(torch.float32, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "more.txt").write_text("the horse the horse " * 20)
    command = [
        "evaluate.py",
        "surprisal",
        "--model",
        tmp_path / "model",
        "--text",
        "the horse",
        "--start_token",
        "<eos>",
    ]

    table = read_csv(StringIO(run(*command, "--adapt_file", tmp_path / "more.txt")))

    assert table["surprisal_adapted"].sum() < table["surprisal"].sum()
    assert table["surprisal"].tolist() == read_csv(StringIO(run(*command)))["surprisal"].tolist()
