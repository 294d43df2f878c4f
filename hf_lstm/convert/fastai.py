"""fastai's AWD-LSTM (Howard & Ruder 2018): the state_dict of a language model, alone or beside its optimizer's state.

Each LSTM lies in a wrapper that drops recurrent weights: `weight_hh_l0_raw` is U, and `module.weight_hh_l0`, which older files
hold too, the copy with dropped entries of the last step. The embedding is there twice, and the output layer is mostly the same
matrix. The vocabulary is a pickle of its own.
"""

import re
from pathlib import Path
from typing import Any

from hf_lstm.convert.pickles import StandIn, read_plain_pickle
from hf_lstm.convert.source import Layer, Source
from hf_lstm.convert.torch_files import plain_names, read_weights
from hf_lstm.convert.torch_lstm import Options
from hf_lstm.convert.torch_save import read_pickle
from hf_lstm.convert.vocabulary import Vocabulary, entries_of_json

EMBEDDING = "0.encoder.weight"
COPIES = ("0.encoder_dp.emb.weight", "0.encoder_with_dropout.embed.weight")  # the second one's name before fastai 1
DECODER = "1.decoder.weight"
DECODER_BIAS = "1.decoder.bias"
LAYER = re.compile(r"0\.rnns\.(\d+)\.(?:module\.)?(weight_ih_l0|weight_hh_l0_raw|weight_hh_l0|bias_ih_l0|bias_hh_l0)")
NEEDED = ("weight_ih_l0", "weight_hh_l0_raw", "bias_ih_l0", "bias_hh_l0")
# Ids that are fixed, by their names since fastai 1 and before; what a vocabulary lacks has the first id.
UNKNOWN, PADDING, BEGIN = ("xxunk", "_unk_"), ("xxpad", "_pad_"), ("xxbos", "xbos")
FILLER = "xxfake"  # fills a vocabulary up to a multiple of 8, perhaps several times; it is never found in a text
NOTES = (
    "The dropout rates of its training are not in the file, and the state of the optimizer, where there is one, was left out.",
    "The file does not say whether the model reads tokens in reverse order (`backwards=True`); if so, it does here too.",
)
PREFACE = """\
It reads text that fastai has already tokenized: tokens with one space between them, `{begin}`, `xxmaj` and the others among \
them. The rules by which fastai makes such text of raw text are not in its tokenizer. Where fastai is installed, this call \
applies them, with the tokenizer that the training used, by default `WordTokenizer()`:

```python
from fastai.text.all import WordTokenizer, tokenize1

text = " ".join(tokenize1("Raw text.", WordTokenizer()))
```"""


def read(path: Path, options: Options) -> Source:
    """
    Read what `Learner.save` wrote. `options.vocabulary` is the pickled list of its tokens (itos.pkl, or `dls.vocab`), or a JSON
    list of them.

    Raises:
        ValueError: if a file is damaged or refused, the model is of another kind, bidirectional or of QRNN layers, or the
            vocabulary is missing, of another size or holds a token twice.
    """
    options.refuse_names()
    state = plain_names(find_state(read_pickle(path), path), path)
    if any(name.startswith("0.rnns.") and ".layers." in name for name in state):
        raise ValueError(f"{path} is a QRNN, a convolution over time, which this package lacks: it is refused.")
    if any(name.endswith("_reverse") or "_reverse_" in name for name in state):
        raise ValueError(f"{path} reads in both directions, so it is not a language model that writes: it is refused.")
    names = {match[0]: match for match in map(LAYER.fullmatch, state) if match}
    known = {EMBEDDING, *COPIES, DECODER, DECODER_BIAS, *names}
    if unknown := [name for name in state if name not in known]:
        raise ValueError(
            f"{path} holds {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}, which no AWD-LSTM of fastai has: the model "
            "is of another kind."
        )
    count = 1 + max((int(match[1]) for match in names.values()), default=-1)
    layers = [{match[2]: name for name, match in names.items() if int(match[1]) == layer} for layer in range(count)]
    if DECODER not in state or not layers or any(part not in layer for layer in layers for part in NEEDED):
        lacking = [f"{part} of layer {k}" for k, layer in enumerate(layers) for part in NEEDED if part not in layer]
        raise ValueError(
            f"{path} lacks {', '.join([DECODER] * (DECODER not in state) + lacking[:5]) or 'layers'}: a language model of fastai has "
            f"{DECODER}, and in each layer {', '.join(NEEDED)}. Give what `learn.save` wrote."
        )
    stale = {layer["weight_hh_l0"] for layer in layers if "weight_hh_l0" in layer}
    read = read_weights(state, [name for name in state if name not in stale], path)
    for copy in COPIES:
        if copy in read and not read[copy].equal(read[EMBEDDING]):
            raise ValueError(
                f"{path}: {copy} differs from {EMBEDDING}, which is the same in fastai: the file is damaged."
            )
    vocabulary = read_tokens(options.vocabulary, len(read[EMBEDDING]))
    source = Source(
        title="fastai (AWD-LSTM)",
        cell_type="lstm",
        embedding=read[EMBEDDING],
        layers=[Layer(*(read[layer[part]] for part in NEEDED)) for layer in layers],
        decoder=read[DECODER],
        decoder_bias=read.get(DECODER_BIAS),
        vocabulary=vocabulary,
        notes=[*NOTES, *notes_on(vocabulary)],
        preface=PREFACE.format(begin=(vocabulary.roles or {}).get("bos_token", "xxbos")),
    )
    source.check_shapes(path)
    return source


def notes_on(vocabulary: Vocabulary) -> list[str]:
    """Return a sentence on the tokens that text with spaces between tokens cannot hold."""
    lost = [entry for entry in vocabulary.entries if " " in entry and not entry.startswith(FILLER)]
    if not lost:
        return []
    return [
        f"{len(lost):,} tokens contain a space, such as {lost[0]!r}, and are never found in text with spaces between tokens."
    ]


def find_state(root: Any, path: Path) -> dict[str, Any]:
    """Return the state_dict of a language model, which may lie beside an optimizer's state."""
    state = root["model"] if isinstance(root, dict) and isinstance(root.get("model"), dict) else root
    names = [name for name in state if isinstance(name, str)] if isinstance(state, dict) else []
    if EMBEDDING not in names or len(names) != len(state):
        held = ", ".join(names[:8]) or type(state).__name__
        hint = ""
        if "encoder.weight" in names:
            alone = "decoder.weight" not in names
            hint = " It is an encoder alone: give what `learn.save` wrote." if alone else " Try `--from awd-lstm-lm`."
        raise ValueError(
            f"{path} holds {held}, and not {EMBEDDING}, 0.rnns.0.weight_hh_l0_raw, ... of a language model of fastai.{hint}"
        )
    return state


def read_tokens(file: str | None, size: int) -> Vocabulary:
    """
    Return the vocabulary of a pickled or JSON list. It reads tokens between spaces, and what it lacks has the first id.
    The fillers, which fastai never finds in a text, become entries that no text can hold, since a space is in each.
    """
    if file is None:
        raise ValueError(
            f"The model has {size:,} tokens, and its file does not say which: give the pickled list of them, itos.pkl or "
            "`dls.vocab`, with `--vocabulary`."
        )
    loaded: Any = entries_of_json(Path(file))[0] if file.endswith(".json") else read_plain_pickle(Path(file))
    if isinstance(loaded, StandIn) and loaded.name == "fastcore.foundation.L":
        loaded = loaded.fields.get("items")
    if not isinstance(loaded, list) or not all(isinstance(token, str) for token in loaded):
        raise ValueError(
            f"{file} must hold a list of tokens, of Python's kind or fastcore's: save `list(dls.vocab)` of the language model "
            "with pickle, or as JSON."
        )
    if not loaded or loaded[0] not in UNKNOWN:
        raise ValueError(
            f"{file} begins with {loaded[0] if loaded else 'nothing'!r}, and fastai's vocabularies with {UNKNOWN[0]}, which stands "
            "for what they lack: give the vocabulary that the model was trained with."
        )
    entries = [f"{FILLER} {index}" if token == FILLER else token for index, token in enumerate(loaded)]
    roles = {"unk_token": entries[0]}
    if len(entries) > 1 and entries[1] in PADDING:
        roles["pad_token"] = entries[1]
    if begin := next((token for token in BEGIN if token in entries), None):
        # It begins each text of a stream of texts, and so ends the one before.
        roles |= {"bos_token": begin, "eos_token": begin}
    return Vocabulary(entries, "tokens", file, roles=roles)
