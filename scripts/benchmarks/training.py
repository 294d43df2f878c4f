"""Time training of models of one size: ours in the stock Trainer and in a bare loop, torch's LSTM, GPT-2 and Mamba.

python scripts/benchmarks/training.py

After each step of the Trainer the others do a step on the same tokens, all in one process, and medians of the steps
are reported, of the whole step and of the loss with its gradients alone. All use AdamW and clip the norm of the
gradient to 1. The LSTMs carry their state from step to step.
"""

import tempfile
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from record import RESULTS, write_result
from torch import nn
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    MambaConfig,
    MambaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.utils import logging

from hf_lstm import LaneDataset, LSTMConfig, LSTMForCausalLM
from hf_lstm.training import LSTMTrainingArguments, TruncatedBPTTCallback

SHAPES = {  # rows, tokens, width, layers, vocabulary: 69 are the characters of Shakespeare, 112 those of Python's source
    "recipe": (16, 64, 512, 1, 69),
    "narrower": (16, 64, 384, 1, 112),
    "first run": (32, 32, 384, 1, 112),
    "two layers": (16, 64, 512, 2, 69),
    "narrow": (16, 64, 256, 1, 69),
    "more rows": (64, 64, 512, 1, 69),
    "longer": (16, 256, 512, 1, 69),
    "larger batch": (32, 128, 512, 2, 69),
    "subwords": (16, 64, 512, 1, 2000),
}
TRANSFORMERS = {  # with as many parameters: layers, width and heads of GPT-2; layers and width of Mamba
    "recipe": ((4, 208, 4), (4, 280)),
    "larger batch": ((5, 264, 4), None),  # a step of Mamba would take minutes
}


@dataclass
class Arguments:
    steps: int = field(default=25, metadata={"help": "Timed steps, after five that are not timed."})
    slow_steps: int = field(default=3, metadata={"help": "Timed steps of GPT-2 and Mamba."})


class TorchLSTM(nn.Module):
    """The same model written with `nn.LSTM` and tied embeddings."""

    def __init__(self, vocabulary: int, width: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.state = None

    def loss(self, ids, targets):
        state = self.state and tuple(part.detach() for part in self.state)
        hidden, self.state = self.lstm(self.embedding(ids), state)
        logits = F.linear(hidden, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class OurLSTM(nn.Module):
    """Our model for the same loop."""

    def __init__(self, config: LSTMConfig):
        super().__init__()
        self.model = LSTMForCausalLM(config)
        self.cache = DynamicCache(config=config)

    def loss(self, ids, targets):
        for layer in self.cache.layers:
            layer.detach_()
        return self.model(ids, shift_labels=targets, past_key_values=self.cache, use_cache=True).loss


class Stateless(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def loss(self, ids, targets):
        return self.model(ids, labels=ids, shift_labels=targets, use_cache=False).loss


class Loop:
    """A bare training loop."""

    def __init__(self, model: nn.Module):
        self.model, self.times, self.times_of_gradients = model.train(), [], []
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(self, ids, targets) -> None:
        start = perf_counter()
        self.model.loss(ids, targets).backward()
        self.times_of_gradients.append(perf_counter() - start)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append(perf_counter() - start)


class Turns(TrainerCallback):
    """Callback that runs a step of every loop after each step of the Trainer, and times the Trainer between them."""

    def __init__(self, loops: dict[str, Loop], slow: dict[str, Loop], batches, slow_steps: int):
        self.loops, self.slow, self.batches, self.slow_steps = loops, slow, batches, slow_steps
        self.times, self.start = [], None

    def on_step_end(self, args, state, control, **kwargs):
        if self.start is not None:
            self.times.append(perf_counter() - self.start)
        batch = self.batches[state.global_step % len(self.batches)]
        for loop in self.loops.values():
            loop.step(*batch)
        if state.global_step <= self.slow_steps + 1:
            for loop in self.slow.values():
                loop.step(*batch)
        self.start = perf_counter()


def measure(name: str, steps: int, slow_steps: int) -> dict:
    rows, tokens, width, layers, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    count = steps + 6
    lanes = LaneDataset(torch.randint(4, vocabulary, (rows * tokens * count + 1,)), lanes=rows, bptt_length=tokens)
    batches = []
    for start in range(0, len(lanes), rows):
        batch = default_data_collator([lanes[index] for index in range(start, start + rows)])
        batches.append((batch["input_ids"], batch["shift_labels"]))
    config = LSTMConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers)
    loops = {"bare loop": Loop(OurLSTM(config)), "nn.LSTM": Loop(TorchLSTM(vocabulary, width, layers))}
    slow = {}
    if name in TRANSFORMERS:
        (depth, size, heads), mamba = TRANSFORMERS[name]
        gpt2 = GPT2Config(vocab_size=vocabulary, n_positions=tokens, n_embd=size, n_layer=depth, n_head=heads)
        gpt2.resid_pdrop = gpt2.embd_pdrop = gpt2.attn_pdrop = 0.0  # like the others
        slow = {"GPT-2": Loop(Stateless(GPT2LMHeadModel(gpt2)))}
        if mamba is not None:
            config_of_mamba = MambaConfig(vocab_size=vocabulary, num_hidden_layers=mamba[0], hidden_size=mamba[1])
            slow["Mamba"] = Loop(Stateless(MambaForCausalLM(config_of_mamba)))
    turns = Turns(loops, slow, batches, slow_steps)
    model = LSTMForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = LSTMTrainingArguments(
            folder,
            per_device_train_batch_size=rows,
            num_train_epochs=1,
            learning_rate=1e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=lanes,
            data_collator=default_data_collator,
            callbacks=[TruncatedBPTTCallback(), turns],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = {"Trainer": median(turns.times[5:])}
    seconds |= {key: median(loop.times[5:]) for key, loop in loops.items()}
    seconds |= {key: median(loop.times[1:]) for key, loop in slow.items()}
    gradients = {key: median(loop.times_of_gradients[5:]) for key, loop in loops.items()}
    sizes = {"LSTM": model.num_parameters()}
    sizes |= {key: loop.model.model.num_parameters() for key, loop in slow.items()}
    result = {
        "rows": rows,
        "tokens": tokens,
        "width": width,
        "layers": layers,
        "vocabulary": vocabulary,
        "parameters": sizes,
        "ms_per_step": {key: value * 1000 for key, value in seconds.items()},
        "tokens_per_second": {key: rows * tokens / value for key, value in seconds.items()},
        "Trainer of the bare loop": seconds["bare loop"] / seconds["Trainer"],
        "bare loop of nn.LSTM": seconds["nn.LSTM"] / seconds["bare loop"],
        "loss and gradients of nn.LSTM": gradients["nn.LSTM"] / gradients["bare loop"],
    }
    print(
        f"{name}: {rows} x {tokens} tokens of {vocabulary}, {layers} x {width}, {model.num_parameters():,} parameters"
    )
    for key, rate in result["tokens_per_second"].items():
        print(f"  {key:<10} {rate:10,.0f} tokens per second, {seconds[key] * 1000:9.1f} ms a step")
    print(
        f"  the Trainer reaches {result['Trainer of the bare loop']:.3f} of the bare loop "
        f"({(seconds['Trainer'] - seconds['bare loop']) * 1000:+.1f} ms a step), and that {result['bare loop of nn.LSTM']:.2f} "
        f"of nn.LSTM, {result['loss and gradients of nn.LSTM']:.2f} without clipping and optimizer",
        flush=True,
    )
    return result


def draw(shapes: dict) -> None:
    figure, panels = plt.subplots(3, 3, figsize=(13, 9), layout="constrained")
    for panel, result in zip(panels.flat, shapes.values(), strict=True):
        rates = result["tokens_per_second"]
        panel.barh(list(rates)[::-1], list(rates.values())[::-1], color="tab:blue")
        panel.set_title(
            f"{result['rows']} x {result['tokens']} tokens of {result['vocabulary']:,}, {result['layers']} x {result['width']}",
            fontsize=10,
        )
    figure.suptitle("tokens per second in training")
    path = RESULTS / "training_cpu.png"
    figure.savefig(path, dpi=110)
    print(f"drawn in {path}")


def main(arguments: Arguments) -> None:
    logging.set_verbosity_error()
    shapes = {name: measure(name, arguments.steps, arguments.slow_steps) for name in SHAPES}
    draw(shapes)
    write_result("training_cpu", vars(arguments) | {"shapes": shapes})


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
