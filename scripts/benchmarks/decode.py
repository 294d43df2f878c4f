"""Time text generation of models of one size: ours, GPT-2 and Mamba of transformers, llama.cpp's Llama, and lower bounds.

python scripts/benchmarks/decode.py --model runs/shakespeare_deep --file tinyshakespeare.txt

All have 3.9 to 4.3 million parameters and the same vocabulary of 69. The contestants take turns in one process, and
medians are reported. Without --model the weights are random and the perplexity in 8 bits is not measured; llama.cpp is
left out where it is not installed (llama.py says how to install it).
"""

import itertools
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter

import matplotlib.pyplot as plt
import numpy
import onnxruntime
import torch
from lengths import states_after, ways_to_write
from record import RESULTS, write_result
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from hf_lstm import LSTMConfig, LSTMForCausalLM, Session, TokenStream, char_tokenizer, evaluate_stream, load_corpus
from hf_lstm.convert.onnx import export_onnx, quantize_onnx

TOKENIZER = char_tokenizer([bytes(range(33, 98)).decode()])  # the number of characters of Shakespeare
VOCABULARY = len(TOKENIZER)
PROMPTS = [16, 64, 256, 1024, 4096, 16384]
LONG = 100_000


@dataclass
class Arguments:
    model: str | None = field(
        default=None, metadata={"help": "A trained model with two layers of 512, for the perplexity in 8 bits."}
    )
    file: str | None = field(default=None, metadata={"help": "The text that the trained model is tested on."})
    tokens: int = field(default=200, metadata={"help": "Tokens per generation."})
    threads: int | None = field(default=None, metadata={"help": "Threads of each contestant; all cores by default."})
    rounds: int = field(default=7, metadata={"help": "Number of timings of each contestant."})
    long: int = field(default=LONG, metadata={"help": "Tokens of the long text."})


class Empty(PreTrainedModel, GenerationMixin):
    """A model that computes nothing, to measure the cost of `generate()` itself."""

    config_class = LSTMConfig

    def __init__(self, config):
        super().__init__(config)
        self.logits = torch.nn.Parameter(torch.zeros(1, 1, config.vocab_size))

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, **kwargs):
        past_key_values.layers[0].update(self.logits[0], self.logits[0], num_tokens=input_ids.shape[1])
        return CausalLMOutputWithPast(logits=self.logits, past_key_values=past_key_values)


def competitors() -> dict:
    torch.manual_seed(0)
    ours = LSTMForCausalLM(LSTMConfig(vocab_size=VOCABULARY, hidden_size=512, num_hidden_layers=2))
    gpt2 = GPT2Config(vocab_size=VOCABULARY, n_positions=PROMPTS[-1] + 1024, n_embd=256, n_layer=5, n_head=4)
    mamba = MambaConfig(vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=4)
    models = {"LSTM": ours, "GPT-2": GPT2LMHeadModel(gpt2), "Mamba": MambaForCausalLM(mamba)}
    for model in models.values():
        model.eval()
        model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
        model.generation_config.pad_token_id = 0
    return models


def parameters(model) -> int:
    """Count the parameters, except for position embeddings, which only set the maximum length of a text."""
    return sum(part.numel() for name, part in model.named_parameters() if "wpe" not in name)


def generate(model, ids: torch.Tensor, tokens: int) -> None:
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)


@torch.inference_mode()
def bare_cells(model, tokens: int) -> None:
    """Run only the equations of the layers, one token at a time, on one row."""
    states = [(torch.zeros(1, size), torch.zeros(1, size)) for size in model.config.cell_sizes]
    x = torch.zeros(1, model.config.embedding_size)
    for _ in range(tokens):
        for index, layer in enumerate(model.model.layers):
            h, c = states[index]
            i, f, g, o = (layer.input_gates(x) + layer.hidden_gates(h)).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            x = o.sigmoid() * c.tanh()
            states[index] = x, c


@torch.inference_mode()
def products(model, tokens: int, batch: int = 1) -> None:
    """Multiply all matrices once per token, by the vectors of a batch of texts."""
    layers = [(layer.input_gates.weight, layer.hidden_gates.weight) for layer in model.model.layers]
    matrices = [*itertools.chain(*layers), model.lm_head.weight]
    vectors = [torch.zeros(batch, matrix.shape[1]) for matrix in matrices]
    for _ in range(tokens):
        for matrix, vector in zip(matrices, vectors, strict=True):
            torch.nn.functional.linear(vector, matrix)


@torch.inference_mode()
def recurrences(model, tokens: int) -> None:
    """Multiply the recurrent matrices by a vector once per token, as reading a text does at the least."""
    matrices = [layer.hidden_gates.weight for layer in model.model.layers]
    for matrix in matrices:
        vector = torch.zeros(1, matrix.shape[1])
        for _ in range(tokens):
            torch.nn.functional.linear(vector, matrix)


@torch.inference_mode()
def read_weights(model, tokens: int) -> None:
    """Sum all weights once per token."""
    for _ in range(tokens):
        for parameter in model.parameters():
            parameter.sum()


def session_text(model, tokens: int) -> None:
    """Generate greedily with a `Session`."""
    session = Session(model, TOKENIZER)
    session.feed("A")
    for _ in session.stream(max_new_tokens=tokens, do_sample=False):
        pass


class Onnx:
    """Greedy generation of one row with an exported step."""

    def __init__(self, path: Path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options)
        self.zeros = {
            part.name: numpy.zeros((1, part.shape[1]), numpy.float32) for part in self.session.get_inputs()[1:]
        }

    def __call__(self, tokens: int) -> None:
        state, ids = self.zeros, numpy.array([[5]])
        for _ in range(tokens):
            logits, *following = self.session.run(None, {"input_ids": ids, **state})
            state, ids = dict(zip(state, following, strict=True)), logits[:, -1:].argmax(axis=-1)

    def loss(self, ids: numpy.ndarray) -> float:
        """Return the loss of a text in nats per token, read in chunks."""
        total, state = 0.0, self.zeros
        for start in range(0, len(ids) - 1, 1024):
            read, targets = ids[start : start + 1024][: len(ids) - 1 - start], ids[start + 1 : start + 1025]
            logits, *following = self.session.run(None, {"input_ids": read[None], **state})
            state = dict(zip(state, following, strict=True))
            total += torch.nn.functional.cross_entropy(
                torch.from_numpy(logits[0]), torch.from_numpy(targets), reduction="sum"
            ).item()
        return total / (len(ids) - 1)


def seconds(call, *arguments) -> float:
    start = perf_counter()
    call(*arguments)
    return perf_counter() - start


def turns(contestants: dict, rounds: int, unit: str = "ms", scale: float = 1000) -> dict[str, float]:
    """Time the contestants in turns and return the median of each, without the first round."""
    times = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, call in contestants.items():
            times[name].append(seconds(call))
    medians = {name: median(taken[1:]) * scale for name, taken in times.items()}
    for name, taken in medians.items():
        print(f"  {name:<28} {taken:10.3f} {unit}", flush=True)
    return medians


def resident() -> float:
    """Return the resident memory of this process in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


@torch.inference_mode()
def long_text(model, tokens: int, loop: str) -> dict[str, list[float]]:
    """Measure milliseconds per token and memory growth in megabytes at each hundredth of the text."""
    every, taken, grown = tokens // 100, [], []

    def note(count):
        nonlocal start
        if count % every == 0:
            taken.append((perf_counter() - start) / every * 1000)
            grown.append(resident() - before)
            start = perf_counter()

    class Watch:
        count = -1  # the first call brings the prompt

        def put(self, _):
            self.count += 1
            if self.count:
                note(self.count)

        def end(self):
            pass

    ids, cache = torch.tensor([[5]]), DynamicCache(config=model.config)
    for _ in range(2000):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
    before, start = resident(), perf_counter()
    if loop == "model":
        for count in range(1, tokens + 1):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
            note(count)
    else:
        model.generate(
            ids, max_new_tokens=tokens, do_sample=False, streamer=Watch(), attention_mask=torch.ones_like(ids)
        )
    return {"ms_per_token": taken, "grown_mb": grown}


def long_session(model, tokens: int) -> dict[str, list[float]]:
    """Measure the same for a `Session`."""
    every, taken, grown = tokens // 100, [], []
    session = Session(model, TOKENIZER)
    session.feed("A")
    for _ in session.stream(max_new_tokens=2000, do_sample=False):
        pass
    before = resident()
    for _ in range(100):
        taken.append(seconds(lambda: all(session.stream(max_new_tokens=every, do_sample=False))) / every * 1000)
        grown.append(resident() - before)
    return {"ms_per_token": taken, "grown_mb": grown}


def late_of_early(model, tokens: int, rounds: int) -> dict[str, float]:
    """Compare the time of 500 tokens after `tokens` tokens with that after 1,000, in turns."""
    lengths, ratios = [1000, tokens], {}
    for name, write in ways_to_write(model, TOKENIZER, states_after(model, lengths), 500).items():
        contestants = {f"{name}, after {length:,}": partial(write, length) for length in lengths}
        early, late = turns(contestants, 2 * rounds, scale=2).values()
        ratios[f"{name}: time after {tokens:,} tokens of that after 1,000"] = late / early
    return ratios


def draw(result: dict, path: Path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(11, 8))
    bars, batches, latency, memory = panels.flat
    single = dict(sorted(result["ms_per_token"].items(), key=lambda item: -item[1]))
    bars.barh(list(single), list(single.values()), color="tab:blue")
    bars.set_title("one text: ms per token")
    for name in ("LSTM", "GPT-2", "Mamba"):
        rates = result["tokens_per_second"][name]
        batches.plot([int(size) for size in rates], list(rates.values()), "o-", label=name)
        firsts = result["first_token_ms"][name]
        latency.plot([int(length) for length in firsts], list(firsts.values()), "o-", label=name)
    batches.set(xscale="log", yscale="log", title="tokens per second, by texts at once", xlabel="texts")
    latency.set(xscale="log", yscale="log", title="ms to the first token, by prompt", xlabel="tokens of the prompt")
    for name, watched in result["long"].items():
        memory.plot(list(range(1, 101)), watched["ms_per_token"], label=name)
    memory.set(title=f"ms per token along {result['long_tokens']:,} tokens", xlabel="% of the way", ylim=(0, None))
    for panel in (batches, latency, memory):
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"drawn in {path}")


def main(arguments: Arguments) -> None:
    if arguments.model and not arguments.file:
        raise ValueError(f"--model ({arguments.model}) is tested on a text: give --file too.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    models, trained = competitors(), None
    if arguments.model:
        trained = LSTMForCausalLM.from_pretrained(arguments.model).eval()
        models["LSTM"].load_state_dict(trained.state_dict())
    ours, empty, tokens = (
        models["LSTM"],
        Empty(LSTMConfig(vocab_size=VOCABULARY, num_hidden_layers=1)),
        arguments.tokens,
    )
    empty.generation_config.eos_token_id, empty.generation_config.pad_token_id = None, 0
    result = {"parameters": {name: parameters(model) for name, model in models.items()}, "tokens": tokens}
    print(result["parameters"])
    one = torch.full((1, 1), 5)

    with tempfile.TemporaryDirectory() as folder:
        step, chunk = export_onnx(ours, TOKENIZER, folder)
        paths = {"step": step, "chunk": chunk, "step int8": quantize_onnx(step), "chunk int8": quantize_onnx(chunk)}
        result["file_mb"] = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
        graphs = {name: Onnx(path) for name, path in paths.items()}
        llamas = {}
        if find_spec("llama_cpp") is None or find_spec("gguf") is None:
            print('llama.cpp is left out, since it is not installed: `pip install -e ".[benchmarks]"` builds it.')
        else:
            from llama import LlamaCpp, write_llama

            for kind in ("F32", "Q8_0"):
                path = Path(folder, f"{kind}.gguf")
                result["parameters"]["llama.cpp"] = write_llama(path, VOCABULARY, 2 * tokens, kind == "Q8_0")
                llamas[kind] = LlamaCpp(path, VOCABULARY, 2 * tokens, torch.get_num_threads())

    print(f"One text of {tokens} tokens, per token:")
    contestants = {
        "weights read once": lambda: read_weights(ours, tokens),
        "matrix products": lambda: products(ours, tokens),
        "bare cells": lambda: bare_cells(ours, tokens),
        "empty model, generate()": lambda: generate(empty, one, tokens),
        "LSTM, generate()": lambda: generate(ours, one, tokens),
        "LSTM, Session": lambda: session_text(ours, tokens),
        "LSTM, ONNX": lambda: graphs["step"](tokens),
        "LSTM, ONNX int8": lambda: graphs["step int8"](tokens),
        "GPT-2, generate()": lambda: generate(models["GPT-2"], one, tokens),
        "Mamba, generate()": lambda: generate(models["Mamba"], one, tokens),
    }
    contestants |= {f"llama.cpp, {kind}": partial(llama, tokens) for kind, llama in llamas.items()}
    single = turns(contestants, arguments.rounds, scale=1000 / tokens)
    result["ms_per_token"] = single
    bound = 1.35 * single["bare cells"] + single["empty model, generate()"]
    result["ratios"] = {
        "generate() of (1.35 bare cells + empty model)": single["LSTM, generate()"] / bound,
        "GPT-2 of generate()": single["GPT-2, generate()"] / single["LSTM, generate()"],
        "Mamba of generate()": single["Mamba, generate()"] / single["LSTM, generate()"],
        "GPT-2 of Session": single["GPT-2, generate()"] / single["LSTM, Session"],
        "Session of the weights read once": single["LSTM, Session"] / single["weights read once"],
        "generate() of ONNX int8": single["LSTM, generate()"] / single["LSTM, ONNX int8"],
        "Session of ONNX int8": single["LSTM, Session"] / single["LSTM, ONNX int8"],
        "file of ONNX int8 of float32": result["file_mb"]["step int8"] / result["file_mb"]["step"],
    }

    if llamas:
        result["ratios"] |= {
            "llama.cpp F32 of Session": single["llama.cpp, F32"] / single["LSTM, Session"],
            "llama.cpp F32 of generate()": single["llama.cpp, F32"] / single["LSTM, generate()"],
            "llama.cpp Q8_0 of ONNX int8": single["llama.cpp, Q8_0"] / single["LSTM, ONNX int8"],
        }

    if trained is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        validation = load_corpus(arguments.file)["validation"]
        stream = TokenStream.from_documents(validation, tokenizer, trained.config.direction)
        ids = numpy.asarray(stream[:])
        losses = {"PyTorch": evaluate_stream(trained, stream)["loss"]}
        losses |= {name: graphs[name].loss(ids) for name in ("chunk", "chunk int8")}
        result["nats_per_character"] = losses
        result["ratios"]["perplexity of int8 of float32"] = float(numpy.exp(losses["chunk int8"] - losses["PyTorch"]))
    for name, ratio in result["ratios"].items():
        print(f"  {name}: {ratio:.3f}")

    result["tokens_per_second"] = {name: {} for name in (*models, "matrix products")}
    for batch in (1, 8, 64):
        print(f"{batch} texts at once, 50 tokens each:")
        ids = torch.full((batch, 1), 5)
        contestants = {name: partial(generate, model, ids, 50) for name, model in models.items()}
        contestants["matrix products"] = partial(products, ours, 50, batch)
        for name, taken in turns(contestants, max(2, arguments.rounds // 2)).items():
            result["tokens_per_second"][name][str(batch)] = batch * 50 / taken * 1000

    result["first_token_ms"] = {name: {} for name in (*models, "U by each token")}
    for length in PROMPTS:
        print(f"The first token after a prompt of {length:,}:")
        ids = torch.randint(4, VOCABULARY, (1, length))
        contestants = {name: partial(generate, model, ids, 1) for name, model in models.items()}
        contestants["U by each token"] = partial(recurrences, ours, length)
        for name, taken in turns(contestants, arguments.rounds if length < 1000 else 2).items():
            result["first_token_ms"][name][str(length)] = taken

    print(f"A text of {arguments.long:,} tokens:")
    result["long_tokens"] = arguments.long
    result["long"] = {
        "model": long_text(ours, arguments.long, "model"),
        "Session": long_session(ours, arguments.long),
        "generate()": long_text(ours, arguments.long, "generate"),
    }
    for name, watched in result["long"].items():
        times, grown = watched["ms_per_token"], watched["grown_mb"]
        print(f"  {name}: {median(times):.3f} ms per token, {max(grown):.1f} MB more")
    print("The next 500 tokens, per token:")
    late = late_of_early(ours, arguments.long, arguments.rounds)
    for name, ratio in late.items():
        print(f"  {name}: {ratio:.3f}")
    result["ratios"] |= late
    draw(result, RESULTS / "decode_cpu.png")
    write_result("decode_cpu", result)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
