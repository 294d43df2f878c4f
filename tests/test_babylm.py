"""The calls that BabyLM's evaluation scripts make (2025 and 2026), in their file formats, on a model that we saved."""

import csv
import json
import random

import pytest
import torch
from conftest import make_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from hf_lstm import bpe_tokenizer, minimal_pairs, surprisal

pytestmark = pytest.mark.slow

SUBJECTS = [("the cat", "the cats"), ("a dog", "some dogs"), ("the girl", "the girls")]
VERBS = [("sleeps", "sleep"), ("runs", "run"), ("eats", "eat")]


def sentences(number):
    chosen = random.Random(0)
    for _ in range(number):
        subject, verb, form = chosen.choice(SUBJECTS), chosen.choice(VERBS), chosen.randrange(2)
        yield f"{subject[form]} {verb[form]} .".capitalize(), f"{subject[form]} {verb[1 - form]} .".capitalize()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("babylm")
    tokenizer = bpe_tokenizer([text for pair in sentences(50) for text in pair], vocab_size=300)
    make_model(torch.float32, vocab_size=len(tokenizer), hidden_size=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_sentence_pairs(folder, tmp_path):
    """Right-padded batches with a mask; the pair of larger log-probability wins."""
    lines = [
        json.dumps({"sentence_good": good, "sentence_bad": bad, "field": "morphology", "UID": "agreement"})
        for good, bad in sentences(40)
    ]
    (tmp_path / "agreement.jsonl").write_text("\n".join(lines))
    pairs = [json.loads(line) for line in (tmp_path / "agreement.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, padding_side="right")

    sums = {}
    for name in ("sentence_good", "sentence_bad"):
        batch = processor(
            [pair[name] for pair in pairs], return_tensors="pt", padding=True, return_offsets_mapping=True
        )
        assert batch.pop("offset_mapping").shape[-1] == 2
        with torch.no_grad():
            logs = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits.log_softmax(dim=-1)
        found = logs[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        sums[name] = (found * batch["attention_mask"][:, 1:]).sum(dim=1)

    expected = minimal_pairs(model, processor, pairs)
    torch.testing.assert_close(
        sums["sentence_good"].double(), torch.tensor(expected["log_probability_good"]), atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(
        sums["sentence_bad"].double(), torch.tensor(expected["log_probability_bad"]), atol=1e-4, rtol=1e-5
    )


def test_reading(folder, tmp_path):
    """The surprisal of each word behind its context, whose pieces are found by their offsets."""
    with (tmp_path / "reading.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item", "word", "prev_item", "prev_word", "self_paced_reading_time"])
        for text, _ in sentences(10):
            words = text.split()
            for place in range(1, len(words)):
                writer.writerow([" ".join(words[:place]), " " + words[place], "", "", "1"])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    with (tmp_path / "reading.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            text = row["item"] + row["word"]
            batch = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
            starts = batch["offset_mapping"][0, :, 0]
            with torch.no_grad():
                logs = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0].log_softmax(dim=-1)
            own = [place for place in range(1, len(starts)) if starts[place] >= len(row["item"])]
            found = -sum(logs[place - 1, batch["input_ids"][0, place]].item() for place in own)

            tokens = surprisal(model, tokenizer, [text], base=2.718281828459045)
            expected = tokens[tokens["start"] >= len(row["item"])]["surprisal"].sum()
            assert found == pytest.approx(expected, rel=1e-4)


def labelled(path, tokenizer, number):
    """Write and read a task of two classes: whether subject and verb agree."""
    rows = [{"sentence1": text, "label": label} for pair in sentences(number) for label, text in enumerate(pair[::-1])]
    path.write_text("\n".join(map(json.dumps, rows)))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_fine_tuning_with_the_pad_id_of_eos_and_no_mask(folder, tmp_path):
    """2026: AutoModelForSequenceClassification, whose config's pad id is overwritten with that of `<eos>`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.pad_token = tokenizer.eos_token
    rows = labelled(tmp_path / "task.train.jsonl", tokenizer, 60)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, trust_remote_code=True)
    model.config.pad_token_id = tokenizer.eos_token_id

    def collate(rows):
        batch = tokenizer([row["sentence1"] for row in rows], padding=True, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "labels": torch.tensor([row["label"] for row in rows])}

    arguments = TrainingArguments(
        str(tmp_path / "run"),
        num_train_epochs=15,
        learning_rate=0.01,
        per_device_train_batch_size=16,
        remove_unused_columns=False,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    trainer.train()

    found = trainer.predict(rows)
    assert (found.predictions.argmax(axis=-1) == found.label_ids).mean() == 1
    model.eval()
    alone = [model(tokenizer(row["sentence1"], return_tensors="pt")["input_ids"]).logits[0] for row in rows[:20]]
    torch.testing.assert_close(torch.tensor(found.predictions[:20]), torch.stack(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_fine_tuning_with_a_head_of_their_own(folder, tmp_path, side):
    """2025: AutoModel, and a head of the width `hidden_size` on the last output, with a mask."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side=side)
    rows = labelled(tmp_path / "task.train.jsonl", tokenizer, 40)
    encoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    head = nn.Sequential(nn.LayerNorm(encoder.config.hidden_size), nn.Linear(encoder.config.hidden_size, 2))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=0.01)
    batch = tokenizer([row["sentence1"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in rows])

    for _ in range(60):
        hidden = encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        loss = nn.functional.cross_entropy(head(hidden[:, -1]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert loss.item() < 0.05
