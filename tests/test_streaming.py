"""Lanes over documents that are read as they are needed: nothing is lost, each process reads its own, a run resumes."""

import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from datasets import Dataset, Features, Value
from test_resume import run
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_lstm import StreamingLanes, byte_tokenizer, load_documents

TEXTS = [f"{number} bottles of beer"[: 3 + number % 11] for number in range(30)] + ["", None]
TOKENIZER = byte_tokenizer()


def documents(texts=TEXTS, shards=1):
    rows = Dataset.from_dict({"text": texts}, features=Features({"text": Value("string")}))
    return rows.to_iterable_dataset(num_shards=shards)


def lanes_of(dataset, chunks):
    """What each lane holds in its first chunks: tokens, and positions."""
    items = list(islice(dataset, chunks * dataset.lanes))
    return [
        [torch.cat([item[name] for item in items[lane :: dataset.lanes]]) for name in ("input_ids", "position_ids")]
        for lane in range(dataset.lanes)
        if items[lane] is not None
    ]


def test_every_document_is_read_once_and_then_again():
    lanes = lanes_of(StreamingLanes(documents(), TOKENIZER, lanes=3, bptt_length=4), chunks=100)

    read = [text for tokens, _ in lanes for text in TOKENIZER.decode(tokens).split("<eos>")[1:-1]]
    whole = [text for text in TEXTS if text]
    times = [read.count(text) for text in whole]
    assert set(read) == set(whole)
    assert max(times) - min(times) <= 2  # what the lanes have just begun is counted out
    assert min(times) >= 3
    for tokens, positions in lanes:
        assert tokens[0] == TOKENIZER.eos_token_id
        assert torch.equal(positions, torch.arange(len(positions)))


def test_a_lane_runs_on_from_chunk_to_chunk():
    dataset = StreamingLanes(documents(), TOKENIZER, lanes=2, bptt_length=5)
    items = list(islice(dataset, 20))

    for item, following in zip(items, items[2:], strict=False):
        assert torch.equal(item["shift_labels"][:-1], item["input_ids"][1:])
        assert item["shift_labels"][-1] == following["input_ids"][0]
        assert torch.equal(item["labels"], item["input_ids"])


def test_the_state_restarts_at_documents_when_asked():
    dataset = StreamingLanes(documents(), TOKENIZER, lanes=2, bptt_length=5, reset_at_documents=True)

    for tokens, positions in lanes_of(dataset, 30):
        assert torch.equal(positions == 0, tokens == TOKENIZER.eos_token_id)


def test_a_continued_document_starts_from_a_zero_state(tmp_path, monkeypatch):
    for module in ("hf_lstm.tokenizers", "hf_lstm.data.readers"):
        monkeypatch.setattr(f"{module}.PIECE_LENGTH", 16)
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be\n" * 10)
    rows = load_documents(path, streaming=True)["train"]

    lanes = lanes_of(StreamingLanes(rows, TOKENIZER, lanes=2, bptt_length=8), 60)

    tokens = torch.cat([lane[0] for lane in lanes])
    assert TOKENIZER.decode(tokens).replace("<eos>", "").count("to be or") > 40
    assert 0 < (tokens == TOKENIZER.eos_token_id).sum() < 10  # one at the beginning of each pass
    assert all((lane[1] == 0).sum() > 20 for lane in lanes)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_processes_read_documents_of_their_own(shards):
    """In each pass: where there are several files, `datasets` deals them out anew for the next one."""
    first, later = [], []
    for process in range(2):
        dataset = StreamingLanes(
            documents(shards=shards), TOKENIZER, lanes=4, bptt_length=4, process_index=process, num_processes=2
        )
        items = list(islice(dataset, 400))
        own = (2 * process, 2 * process + 1)
        assert [lane for lane in range(4) if items[lane] is not None] == list(own)
        for found, part in ((first, items[:60]), (later, items)):
            lanes = [torch.cat([item["input_ids"] for item in part[lane::4] if item is not None]) for lane in own]
            found.append({text for lane in lanes for text in TOKENIZER.decode(lane).split("<eos>")[1:-1]})

    assert len(first[0] | first[1]) > 20
    assert not first[0] & first[1]
    assert later[0] | later[1] == {text for text in TEXTS if text}


def test_shuffled_documents_come_in_another_order_each_time():
    shuffled = documents().shuffle(3, buffer_size=50)
    ((tokens, _),) = lanes_of(StreamingLanes(shuffled, TOKENIZER, lanes=1, bptt_length=8), 120)
    texts = TOKENIZER.decode(tokens).split("<eos>")[1:-1]
    passes = [texts[:30], texts[30:60]]

    assert sorted(passes[0]) == sorted(passes[1]) == sorted(text for text in TEXTS if text)
    assert passes[0] != passes[1]


def test_streamed_training_resumes_bit_equal(tmp_path):
    options = {"dataset": StreamingLanes(documents(), TOKENIZER, lanes=3, bptt_length=5), "max_steps": 12}
    model = make_model(torch.float32, vocab_size=260)
    expected_logs, expected_weights = run(tmp_path, model=model, **options)

    logs, weights = run(
        tmp_path, model=make_model(torch.float32, vocab_size=260), resume=str(tmp_path / "checkpoint-8"), **options
    )

    assert [entry.get("loss") for entry in logs[:-1]] == [entry.get("loss") for entry in expected_logs[:-1]]
    assert all(torch.equal(weights[name], weight) for name, weight in expected_weights.items())
    metadata = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert metadata["global_step"] == 8


def test_a_worker_reads_ahead(monkeypatch):
    dataset = StreamingLanes(documents(), TOKENIZER, lanes=2, bptt_length=5)

    alone, worked = (
        next(iter(DataLoader(dataset, batch_size=2, num_workers=number, collate_fn=default_data_collator)))
        for number in (0, 1)
    )

    assert torch.equal(alone["input_ids"], worked["input_ids"])
    monkeypatch.setattr("hf_lstm.data.streaming.get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match=r"`dataloader_num_workers` \(2\) must be 0 or 1"):
        next(iter(dataset))


def test_invalid_streaming_arguments_raise(tmp_path):
    no_end = byte_tokenizer()
    no_end.eos_token = None
    with pytest.raises(ValueError, match=r"`eos_token` \(None\) must be set"):
        StreamingLanes(documents(), no_end, 2, 5)
    with pytest.raises(ValueError, match="3 lanes cannot be those of process 0 of 2"):
        StreamingLanes(documents(), TOKENIZER, 3, 5, num_processes=2)
    with pytest.raises(ValueError, match="Process 0 of 1 finds no text: give at least one document"):
        next(iter(StreamingLanes(documents(["", None]), TOKENIZER, 2, 5)))
    with pytest.raises(ValueError, match=r"`bptt_length` \(0\) must be at least 1"):
        StreamingLanes(documents(), TOKENIZER, 2, 0)
    with pytest.raises(ValueError, match=r"`documents` \(list\) must be a `datasets.IterableDataset`"):
        StreamingLanes(["a"], TOKENIZER, 2, 5)
    numbers = Dataset.from_dict({"text": [1, 2]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="A row of `text` holds 1: it must hold text"):
        next(iter(StreamingLanes(numbers, TOKENIZER, 2, 5)))
    stream = StreamingLanes(documents(), TOKENIZER, 6, 5, process_index=1, num_processes=2)
    with pytest.raises(ValueError, match="`lanes` must be their product, 3"):
        run(tmp_path / "a", dataset=stream)
    stream = StreamingLanes(documents(), TOKENIZER, 3, 5, process_index=1, num_processes=3)
    with pytest.raises(ValueError, match="those of process 1 of 3, and this is process 0 of 1"):
        run(tmp_path / "b", dataset=stream)
    model, stream = make_model(torch.float32, vocab_size=260), StreamingLanes(documents(), TOKENIZER, 3, 5)
    with pytest.raises(ValueError, match="never ends: make a `LaneDataset`"):
        run(tmp_path / "c", model=model, dataset=stream, eval_dataset=stream, eval_strategy="steps", eval_steps=1)
