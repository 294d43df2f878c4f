"""llama.cpp as a contestant of decode.py: a random Llama in a GGUF file, and greedy generation by it.

pip install -e ".[benchmarks]"      (pip builds llama.cpp from source, in some ten minutes on two cores)
"""

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy

LAYERS, WIDTH, INNER, HEADS = 5, 256, 768, 4  # 4.3 million parameters with 69 tokens, about as many as the others


def write_llama(path: Path, vocabulary: int, context: int, quantized: bool) -> int:
    """Write a Llama with random weights, in float32 or with matrices in 8 bits (Q8_0), and return its parameters."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    shapes = {"token_embd": (vocabulary, WIDTH), "output": (vocabulary, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (WIDTH, INNER)}
    random, parameters = numpy.random.default_rng(0), 0
    for name, shape in shapes.items():
        weight = random.normal(scale=0.05, size=shape).astype(numpy.float32)
        parameters += weight.size
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized and len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return parameters


class LlamaCpp:
    """Greedy generation of one text, with as little Python around each token as llama.cpp's own loop has."""

    def __init__(self, path: Path, vocabulary: int, context: int, threads: int):
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = context, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocabulary, self.token = vocabulary, (llama_cpp.llama_token * 1)(5)

    def __call__(self, tokens: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        for _ in range(tokens):
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(self.token, 1)):
                raise RuntimeError("llama.cpp cannot read another token.")
            logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (self.vocabulary,))
            self.token[0] = int(logits.argmax())


@llama_cpp.llama_log_callback
def _quiet(level, text, data):
    """Print nothing."""
