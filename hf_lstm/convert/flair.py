"""flair's character language models (Akbik et al. 2018): a dictionary with a state_dict and the characters.

A character is a code point, kept as its bytes in UTF-8; what the dictionary lacks has the id 0, `<unk>`. A model that is not
`is_forward_lm` reads each text from its last character to its first. Where `nout` is set, a linear layer stands before the
output layer.
"""

from pathlib import Path
from typing import Any

from hf_lstm.convert.pickles import StandIn
from hf_lstm.convert.source import Layer, Projection, Source
from hf_lstm.convert.torch_files import plain_names, read_weights
from hf_lstm.convert.torch_lstm import CELLS_BY_GATES, Options, check_layers, is_recurrent_weight
from hf_lstm.convert.torch_save import read_pickle
from hf_lstm.convert.vocabulary import Vocabulary

PARTS = ("encoder.weight", "decoder.weight", "decoder.bias", "proj.weight", "proj.bias")
UNKNOWN = "<unk>"
BACKWARD = (
    "It reads each text from its last character to its first. The functions and scripts of hf-lstm reverse text on the way in "
    "and out; `generate()` and `pipeline` see ids only, which must come in that order."
)


def read(path: Path, options: Options) -> Source:
    """
    Read what `LanguageModel.save` or `save_checkpoint` wrote.

    Raises:
        ValueError: if the file is damaged or refused, holds another model, or one without its output layer.
    """
    options.refuse_names()
    root = read_pickle(path)
    state = root.get("state_dict") if isinstance(root, dict) else None
    dictionary = root.get("dictionary") if isinstance(root, dict) else None
    if not isinstance(state, dict) or not isinstance(dictionary, StandIn) or "is_forward_lm" not in root:
        held = ", ".join(map(str, list(root)[:8])) if isinstance(root, dict) else type(root).__name__
        raise ValueError(
            f"{path} holds {held or 'nothing'}, and a character language model of flair has state_dict, dictionary and "
            "is_forward_lm: it is another model."
        )
    state = plain_names(state, path)
    if options.vocabulary is not None:
        raise ValueError(
            f"`--vocabulary` ({options.vocabulary}) has no meaning here, since {path} holds its own: leave it out."
        )
    if missing := [name for name in PARTS[:3] if name not in state]:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: without an output layer (`has_decoder`) it is not a language model that writes."
        )
    if unknown := [name for name in state if not (name in PARTS or is_recurrent_weight(str(name), "rnn."))]:
        raise ValueError(f"{path} holds {', '.join(map(str, unknown[:5]))}, which no language model of flair has.")
    if not any(is_recurrent_weight(name, "rnn.") for name in state):
        raise ValueError(
            f"{path} holds no weights of an nn.LSTM or nn.GRU, such as rnn.weight_ih_l0: it is another model."
        )
    count = check_layers("rnn.", state, path)
    read = read_weights(state, state, path)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    layers = [Layer(*(read.get(f"rnn.{name}_l{layer}") for name in names)) for layer in range(count)]  # type: ignore[arg-type]
    cell_type = CELLS_BY_GATES[len(layers[0].U) // layers[0].U.shape[1]]
    given = str(root.get("recurrent_type", "lstm")).lower()
    if cell_type != given:
        raise ValueError(
            f"{path} says that its cell is {given}, and its weights are those of {cell_type}: it is damaged."
        )
    backward = not root["is_forward_lm"]
    source = Source(
        title="flair",
        cell_type=cell_type,
        embedding=read["encoder.weight"],
        layers=layers,
        decoder=read["decoder.weight"],
        decoder_bias=read["decoder.bias"],
        vocabulary=read_characters(dictionary, path),
        notes=notes_on(root),
        projection=Projection(read["proj.weight"], read["proj.bias"]) if "proj.weight" in read else None,
        direction="backward" if backward else "forward",
        preface=BACKWARD if backward else "",
    )
    source.check_shapes(path)
    return source


def notes_on(root: dict[str, Any]) -> list[str]:
    """Return sentences on what has no place in a folder."""
    delimiter = root.get("document_delimiter", "\n")
    ending = (
        f"Each document of its training ended with {delimiter!r} (`document_delimiter`). Texts hold such characters, so that it "
        "is neither an end-of-text token nor padding here: write it after each document."
    )
    notes = [ending]
    if root.get("dropout"):
        notes.append(
            f"The dropout of its training, {root['dropout']}, was not taken over: it dropped single numbers, and the dropouts of "
            "this model drop features of whole rows."
        )
    if "optimizer_state_dict" in root:
        notes.append("The state of the optimizer was left out.")
    return notes


def read_characters(dictionary: StandIn, path: Path) -> Vocabulary:
    """
    Return the vocabulary of a `flair.data.Dictionary`. Entries of several characters keep their ids, and are found in no text.

    Raises:
        ValueError: if the dictionary is damaged, contradicts itself or holds anything but UTF-8.
    """
    items, ids = dictionary.fields.get("idx2item"), dictionary.fields.get("item2idx")
    if not isinstance(items, list) or not isinstance(ids, dict) or not all(isinstance(item, bytes) for item in items):
        raise ValueError(
            f"{path}: the dictionary must hold bytes in `idx2item` and their ids in `item2idx`: it is damaged."
        )
    wrong = [item for index, item in enumerate(items) if ids.get(item) != index]
    wrong += [item for item, index in ids.items() if index not in range(len(items))]
    if wrong:
        raise ValueError(
            f"{path}: the dictionary contradicts itself about {wrong[0]!r}, whose id in `item2idx` is {ids.get(wrong[0])}, and not its "
            "place in `idx2item`: an item that is there twice, or was removed, left it so."
        )
    try:
        entries = [item.decode() for item in items]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: the dictionary holds {error.object!r}, which is not UTF-8: no text can hold it."
        ) from error
    roles = {}
    if dictionary.fields.get("add_unk", UNKNOWN in entries):
        if entries[:1] != [UNKNOWN]:
            raise ValueError(
                f"{path}: unknown characters have the id 0 in flair, and that of {UNKNOWN} is "
                f"{entries.index(UNKNOWN) if UNKNOWN in entries else None}: they would be taken for {entries[:1]}."
            )
        roles["unk_token"] = UNKNOWN
    return Vocabulary(entries, "characters", str(path), roles=roles)
