"""What attention adds to LSTM layers: it recalls any of many pairs, in a memory and a time per token that stay the same."""

import json
import statistics
import time

import pytest
import torch
from conftest import SCRIPTS, TEXT

from hf_lstm import LSTMConfig, LSTMForCausalLM, Session, char_tokenizer

HYBRID = {"layer_types": ["hf_lstm", "hf_lstm_window", "hf_lstm"], "attention_window": 64, "num_attention_heads": 2}


@pytest.fixture
def recall(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    import recall

    return recall


def test_a_value_follows_its_key(recall):
    ids, targets = recall.examples(5, 3, 4, torch.Generator().manual_seed(0))

    assert ids.shape == targets.shape == (4, 23)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        told = dict(zip(row[:10:2], row[1:10:2], strict=True))
        assert len(told) == 5
        assert [told[key] for key in row[13::2]] == row[14::2] == wanted[13::2]
        assert set(wanted[:13] + wanted[14::2]) == {-100}


@pytest.mark.slow
def test_a_hybrid_recalls_what_an_lstm_does_not(recall, capsys):
    """8 pairs of 32 keys and 32 values; two minutes of two cores at most, of which this uses one."""
    found = {}
    for name, width, layers, options in (("hybrid", 64, 3, HYBRID), ("LSTM", 70, 2, {})):
        torch.manual_seed(0)
        sizes = {"vocab_size": recall.VOCABULARY, "hidden_size": width, "num_hidden_layers": layers}
        model = LSTMForCausalLM(LSTMConfig(**sizes, block_type="residual", **options))
        trained = recall.train(model, 8, 0, 64, 110.0, 3e-3, seed=0, goal=0.999)
        found[name] = recall.accuracy(model, 8, 0, 1000)
        with capsys.disabled():
            print(f"\n{name}, {model.num_parameters():,} parameters: {found[name]:.3f} after {trained}")

    assert found["hybrid"] >= 0.99
    assert found["LSTM"] < 0.5


@pytest.mark.slow
def test_memory_and_time_of_a_session_stay_the_same(capsys):
    """500 tokens around the 1,000th, in turns with 500 around the 100,000th; the window is full at both."""
    tokenizer = char_tokenizer([TEXT])
    model = LSTMForCausalLM(
        LSTMConfig(vocab_size=len(tokenizer), hidden_size=128, block_type="residual", num_hidden_layers=3, **HYBRID)
    ).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:4] = 0  # special tokens, which have no text, are never the most probable
    sessions, streams, times = [], [], [[], []]
    for length in (750, 99_750):
        session = Session(model, tokenizer)
        session.feed((TEXT * (1 + length // len(TEXT)))[:length])
        sessions.append(session)
        streams.append(session.stream(500, do_sample=False))
    for _ in range(500):
        for place, stream in enumerate(streams):
            start = time.process_time()
            next(stream)
            times[place].append(time.process_time() - start)

    early, late = (statistics.median(taken) for taken in times)
    with capsys.disabled():
        print(f"\n{1000 * early:.3f} ms a token around 1,000, {1000 * late:.3f} ms around 100,000")
    assert late == pytest.approx(early, rel=0.05)
    assert [session.cache.get_seq_length() for session in sessions] == [1249, 100_249]
    # numbers of 4 bytes, the output that padding repeats among them, and a flag for each token of the window
    expected = (model.config.state_size + 128) * 4 + 64
    assert [sum(layer.nbytes for layer in session.cache.layers) for session in sessions] == [expected] * 2


@pytest.mark.slow
def test_the_benchmark_stores_each_run_once(run, monkeypatch, text_file, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    command = ("benchmarks/hybrid.py", "--quick", "--results", tmp_path, "--train_file", text_file)
    command += ("--task", "seconds", "recall", "decode", "--only", "hybrid", "gpt2")

    first, again = run(*command), run(*command)

    runs = json.loads((tmp_path / "hybrid.json").read_text())["runs"]
    assert [one["task"] for one in runs] == ["seconds", "recall", "recall", "decode"] * 2
    assert (first.count(": stored"), again.count(": stored")) == (0, 8)
    found = {one["model"]: one["decode"] for one in runs if one["task"] == "decode"}
    assert found["hybrid"]["10"]["bytes"] == found["hybrid"]["30"]["bytes"]
    assert found["gpt2"]["10"]["bytes"] < found["gpt2"]["30"]["bytes"]
