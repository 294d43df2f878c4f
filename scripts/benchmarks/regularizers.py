"""Ablation of the regularisers of AWD-LSTM on little text: test perplexity with all, without each and without any.

python scripts/benchmarks/regularizers.py --train_file wikitext-2/valid.txt --test_file wikitext-2/test.txt

The models are trained on the validation file of WikiText-2, whose last tenth is used to choose the best epoch, and
tested on its test file. The results of this "WT2-small" do not transfer to WikiText-2 itself.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from record import RESULTS, write_result
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
LANES, BPTT = 20, 35


def variants() -> dict[str, dict]:
    """Return the settings of each run by its name in the table."""
    every = {name: value for settings in REGULARIZERS.values() for name, value in settings.items()}
    without = {
        f"without {left_out}": {name: value for name, value in every.items() if name not in settings}
        for left_out, settings in REGULARIZERS.items()
    }
    return {"all of them": every} | without | {"none": {}}


def train_and_test(settings: dict, streams: dict, vocab_size: int, epochs: int) -> dict:
    set_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=vocab_size, **MODEL, **settings))
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
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=LaneDataset(streams["train"], LANES, BPTT, length_seed=0),
            eval_dataset=LaneDataset(streams["validation"], LANES, BPTT),
            data_collator=default_data_collator,
            callbacks=[TruncatedBPTTCallback()],
        )
        trainer.train()
    best_epoch = trainer.state.best_global_step / (trainer.state.global_step / epochs)
    return {
        "validation_perplexity": evaluate_stream(model, streams["validation"])["perplexity"],
        "test_perplexity": evaluate_stream(model, streams["test"])["perplexity"],
        "best_epoch": round(best_epoch),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--test_file", required=True)
    parser.add_argument("--min_frequency", type=int, default=5, help="minimum frequency of words in the vocabulary")
    parser.add_argument("--epochs", type=int, default=12)
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
    rows = []
    for name in options.only or variants():
        rows.append({"regularizers": name} | train_and_test(variants()[name], streams, len(tokenizer), options.epochs))
        print(rows[-1], flush=True)

    write_result(
        "regularizers",
        {
            "model": MODEL
            | {"parameters": LSTMForCausalLM(LSTMConfig(vocab_size=len(tokenizer), **MODEL)).num_parameters()},
            "regularizers": REGULARIZERS,
            "epochs": options.epochs,
            "train_words": len(streams["train"]),
            "vocabulary": len(tokenizer),
            "unknown_in_test": unknown,
            "rows": rows,
        },
        options.results,
    )
    print("\n| regularizers | validation perplexity | test perplexity | best epoch |\n|---|---|---|---|")
    for row in rows:
        print("| {regularizers} | {validation_perplexity:.1f} | {test_perplexity:.1f} | {best_epoch} |".format(**row))


if __name__ == "__main__":
    main()
