"""Trains on lanes, in as many processes as it is launched in."""

import json
import os
import sys

import torch
from conftest import make_ids, make_model
from test_tbptt import make_trainer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from hf_lstm import LaneDataset, StreamingLanes, TokenStream, byte_tokenizer
from hf_lstm.training import DivergenceCallback, last_complete_checkpoint
from hf_lstm.training.processes import end_processes

LANES, BPTT = 4, 10


def lanes_of(tokens, streaming, length_seed, shuffle_seed):
    if not streaming:
        stream = TokenStream(tokens, torch.arange(0, len(tokens), 7))
        return LaneDataset(stream, LANES, BPTT, length_seed=length_seed, shuffle_seed=shuffle_seed)
    from datasets import Dataset

    texts = [f"{number} bottles" for number in range(40)]
    rows = Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=4)
    place = {  # as `TrainingArguments` will say it
        "process_index": int(os.environ.get("RANK", "0")),
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    return StreamingLanes(rows, byte_tokenizer(), LANES, BPTT, **place)


def train(
    folder, processes=1, resume=False, length_seed=None, shuffle_seed=None, streaming=False, vocab_size=31, **options
):
    """Losses of training and of evaluations, by step."""
    tokens, other = (make_ids(1, LANES * BPTT * 5 + 1, seed)[0] for seed in (1, 2))
    trainer, losses = make_trainer(
        folder,
        make_model(torch.float32, vocab_size=vocab_size),
        lanes_of(tokens, streaming, length_seed, shuffle_seed),
        eval_dataset=LaneDataset(other, LANES, BPTT),
        callbacks=[DivergenceCallback()],
        **{
            "per_device_train_batch_size": LANES // processes,
            "per_device_eval_batch_size": LANES // processes,
            "optim": "adamw_torch",
            "learning_rate": 0.01,
            "num_train_epochs": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "steps",
            "save_steps": 4,
        }
        | options,
    )
    if trainer.args.world_size != processes:
        raise RuntimeError(f"{trainer.args.world_size} processes were started, not {processes}")
    trainer.train(resume_from_checkpoint=str(last_complete_checkpoint(folder)) if resume else None)
    return end(trainer, {"train": losses.train, "eval": losses.eval})


def train_documents(folder, processes=1):
    """Losses of steps that hardly learn, on documents in order, four a step: the stock Trainer and the README's way."""
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"
    trainer = Trainer(
        model=make_model(torch.float32, vocab_size=260),
        args=TrainingArguments(
            folder,
            per_device_train_batch_size=2 // processes,
            gradient_accumulation_steps=2,
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            learning_rate=1e-12,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=documents_of(8),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    return end(trainer, {"train": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]})


def documents_of(number):
    """Rows of very different lengths."""
    tokenizer = byte_tokenizer()
    return [tokenizer("to be, or not to be"[: 2 + 5 * index % 17]) for index in range(number)]


def end(trainer, results):
    if trainer.is_world_process_zero():
        print(json.dumps(results))
    end_processes(trainer)
    return results


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    run = train_documents if options.pop("documents", False) else train
    run(sys.argv[1], **options)
