"""Compare the tokens per second of the data pipeline with those of training in the Shakespeare recipe.

python scripts/benchmarks/pipeline.py

Both use the batches of Trainer: lanes of a text that is already tokenized. The model is that of the recipe
shakespeare_gpu on a GPU and that of shakespeare_cpu on a CPU.
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from runpy import run_path

import torch
from record import write_result
from transformers import Trainer, default_data_collator

from hf_lstm import LaneDataset, LSTMConfig, LSTMForCausalLM, TokenStream, char_tokenizer
from hf_lstm.data import load_documents
from hf_lstm.training import LSTMTrainingArguments

STANDARD_LIBRARY = Path(__file__).parents[1] / "standard_library.py"
ROUNDS, STEPS = 9, 20
RECIPES = {  # model, lanes, tokens per lane and step
    "cpu": ({"hidden_size": 512, "num_hidden_layers": 1, "output_dropout": 0.3}, 16, 64),
    "cuda": ({"hidden_size": 768, "num_hidden_layers": 2, "hidden_dropout": 0.3, "weight_dropout": 0.4}, 64, 128),
}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, lanes, length = RECIPES[device]
    with tempfile.TemporaryDirectory() as folder:
        library = run_path(STANDARD_LIBRARY)["standard_library"]()
        path = Path(folder) / "text.txt"
        path.write_text("".join(text for rows in library.values() for text in rows["text"]), encoding="utf-8")
        rows = load_documents(path)["train"]
        tokenizer = char_tokenizer(rows["text"])
        stream = TokenStream.from_documents(rows, tokenizer)
    dataset = LaneDataset(stream, lanes, length)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=len(tokenizer), **config)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = Trainer(
        model,
        LSTMTrainingArguments(
            "unused",
            per_device_train_batch_size=lanes,
            bf16=device == "cuda",
            dataloader_pin_memory=device == "cuda",
            report_to="none",
        ),
        train_dataset=dataset,
        data_collator=default_data_collator,
    )
    batches = itertools.chain.from_iterable(iter(trainer.get_train_dataloader()) for _ in itertools.count())
    seconds = {"pipeline": [], "training": []}
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        taken = [next(batches) for _ in range(STEPS)]
        seconds["pipeline"].append(time.perf_counter() - start)
        start = time.perf_counter()
        for batch in taken:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds["training"].append(time.perf_counter() - start)
    tokens = STEPS * lanes * length
    speeds = {name: tokens / statistics.median(values[1:]) for name, values in seconds.items()}
    ratio = speeds["pipeline"] / speeds["training"]
    print(
        f"{speeds['pipeline']:,.0f} tokens a second delivered, {speeds['training']:,.0f} trained on: {ratio:.1f} times"
    )
    write_result(
        f"pipeline_{device}",
        {"model": config, "batch": [lanes, length], "tokens_per_second": speeds, "pipeline_over_training": ratio},
    )


if __name__ == "__main__":
    main()
