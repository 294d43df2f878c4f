"""Ablation of the regularisers of AWD-LSTM on little text: test perplexity with all, without each and without any.

python scripts/benchmarks/regularizers.py --train_file wikitext-2/valid.txt --test_file wikitext-2/test.txt

The models are trained on the validation file of WikiText-2, whose last tenth is used to choose the best epoch, and
tested on its test file. The results of this "WT2-small" do not transfer to WikiText-2 itself. `--seeds 3 --only "all of
them" "with adversarial softmax" "with partial shuffle" "with both"` measures what the last two add and cost.

Each finished run is stored at once in regularizers.json, with its CPU seconds; one that is stored is not repeated.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from comparisons import regularizers_table
from record import RESULTS, commit, write_result
from transformers import Trainer, default_data_collator, set_seed

from hf_lstm import (
    LaneDataset,
    LSTMConfig,
    LSTMForCausalLM,
    TokenStream,
    evaluate_stream,
    load_corpus,
    word_tokenizer,
)
from hf_lstm.training import LSTMTrainingArguments, TruncatedBPTTCallback

MODEL = {"hidden_size": 160, "embedding_size": 96, "num_hidden_layers": 2}
REGULARIZERS = {
    "word dropout": {"embedding_dropout": 0.1},
    "input dropout": {"input_dropout": 0.2},
    "hidden dropout": {"hidden_dropout": 0.1},
    "output dropout": {"output_dropout": 0.3},
    "weight dropout": {"weight_dropout": 0.2},
    "activation penalties": {"activation_regularization": 2.0, "temporal_activation_regularization": 1.0},
}
ADDITIONS = {
    "with adversarial softmax": {"adversarial_softmax": 0.005},
    "with partial shuffle": {"partial_shuffle": True},
    "with both": {"adversarial_softmax": 0.005, "partial_shuffle": True},
}
LANES, BPTT = 20, 35


def variants() -> dict[str, dict]:
    """Return the settings of each run by its name in the table."""
    every = {name: value for settings in REGULARIZERS.values() for name, value in settings.items()}
    without = {
        f"without {left_out}": {name: value for name, value in every.items() if name not in settings}
        for left_out, settings in REGULARIZERS.items()
    }
    added = {name: every | settings for name, settings in ADDITIONS.items()}
    return {"all of them": every} | without | {"none": {}} | added


def train_and_test(settings: dict, streams: dict, vocab_size: int, epochs: int, seed: int) -> dict:
    set_seed(seed)
    rotation = seed if settings.get("partial_shuffle") else None
    fields = {name: value for name, value in settings.items() if name != "partial_shuffle"}
    model = LSTMForCausalLM(LSTMConfig(vocab_size=vocab_size, **MODEL, **fields))
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        arguments = LSTMTrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=LANES,
            per_device_eval_batch_size=LANES,
            learning_rate=6e-3,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            warmup_steps=50,
            adam_beta2=0.99,
            logging_strategy="epoch",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            load_best_model_at_end=True,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=LaneDataset(streams["train"], LANES, BPTT, length_seed=seed, partial_shuffle_seed=rotation),
            eval_dataset=LaneDataset(streams["validation"], LANES, BPTT),
            data_collator=default_data_collator,
            callbacks=[TruncatedBPTTCallback()],
        )
        trainer.train()
    seconds = time.process_time() - start
    best_epoch = trainer.state.best_global_step / (trainer.state.global_step / epochs)
    return {
        "validation_perplexity": evaluate_stream(model, streams["validation"])["perplexity"],
        "test_perplexity": evaluate_stream(model, streams["test"])["perplexity"],
        "best_epoch": round(best_epoch),
        "cpu_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--test_file", required=True)
    parser.add_argument("--min_frequency", type=int, default=5, help="minimum frequency of words in the vocabulary")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=variants(), help="rows of the table (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    corpus = load_corpus(options.train_file, test_file=options.test_file)
    tokenizer = word_tokenizer(corpus["train"]["text"], min_frequency=options.min_frequency)
    streams = {split: TokenStream.from_documents(documents, tokenizer) for split, documents in corpus.items()}
    unknown = streams["test"].counts(len(tokenizer))[tokenizer.unk_token_id].item() / len(streams["test"])
    print(
        f"{len(streams['train']):,} words to train on, vocabulary of {len(tokenizer):,}, {unknown:.1%} of test unknown"
    )
    path = options.results / "regularizers.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    model = LSTMForCausalLM(LSTMConfig(vocab_size=len(tokenizer), **MODEL))
    result = {
        "model": MODEL | {"parameters": model.num_parameters()},
        "regularizers": REGULARIZERS | ADDITIONS,
        "epochs": options.epochs,
        "train_words": len(streams["train"]),
        "vocabulary": len(tokenizer),
        "unknown_in_test": unknown,
    }
    same = all(stored.get(name) == result[name] for name in ("model", "epochs", "train_words", "vocabulary"))
    rows = [{"seed": 0, "commit": stored["commit"]} | row for row in stored["rows"]] if same else []
    for seed in range(options.seeds):
        for name in options.only or variants():
            if any((row["regularizers"], row["seed"]) == (name, seed) for row in rows):
                print(f"{name}, seed {seed}: stored", flush=True)
                continue
            found = train_and_test(variants()[name], streams, len(tokenizer), options.epochs, seed)
            rows.append({"regularizers": name, "seed": seed, "commit": commit()} | found)
            print(rows[-1], flush=True)
            write_result("regularizers", result | {"rows": rows}, options.results)
    print("\n" + regularizers_table(rows))


if __name__ == "__main__":
    main()
