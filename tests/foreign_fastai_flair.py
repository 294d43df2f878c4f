"""Files of fastai and flair, written by modules of the same layout under the same names."""

import itertools
import pickle
import sys
import types
from contextlib import contextmanager

import torch
from torch import nn

from hf_lstm.convert.torch_lstm import Options

V = 31

# The classes of the libraries, as far as their files go.


class L:
    """fastcore's list."""

    def __init__(self, items):
        self.items = items


class Dictionary:
    """flair's."""

    def __init__(self, items, add_unk=True):
        self.idx2item = [item.encode() for item in ["<unk>"] * add_unk + list(items)]
        self.item2idx = {item: index for index, item in enumerate(self.idx2item)}
        self.add_unk, self.multi_label, self.span_labels = add_unk, False, False

    def ids(self, text):
        """`get_idx_for_item` of each character."""
        return [self.item2idx.get(character.encode(), 0) for character in text]


PLACES = {L: "fastcore.foundation", Dictionary: "flair.data"}


@contextmanager
def under_their_names():
    """Classes have the names of their libraries while pickle looks at them."""
    before = {kind: kind.__module__ for kind in PLACES}
    modules = {name: types.ModuleType(name) for place in PLACES.values() for name in (place.split(".")[0], place)}
    others = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    for kind, place in PLACES.items():
        kind.__module__ = place
        setattr(modules[place], kind.__name__, kind)
    try:
        yield
    finally:
        for kind, place in before.items():
            kind.__module__ = place
        for name, module in others.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def save(content, path, is_zip=True, protocol=2):
    with under_their_names():
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    return path


def pickled(content, path, protocol=2):
    with under_their_names(), path.open("wb") as file:
        pickle.dump(content, file, protocol=protocol)
    return str(path)


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.6, 0.6, generator=generator)
    return module.eval()


# fastai.


class WeightDropout(nn.Module):
    """The raw weights lie beside those with dropped entries, which older versions registered too."""

    def __init__(self, module, is_old):
        super().__init__()
        self.module = module
        raw = module.weight_hh_l0.data
        del module._parameters["weight_hh_l0"]
        self.weight_hh_l0_raw = nn.Parameter(raw)
        if is_old:
            module.weight_hh_l0 = nn.Parameter(torch.zeros_like(raw))

    def forward(self, x):
        cell = nn.LSTM(self.module.input_size, self.module.hidden_size, batch_first=True)
        weights = {name: getattr(self.module, name) for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0")}
        cell.load_state_dict(weights | {"weight_hh_l0": self.weight_hh_l0_raw})
        return cell(x)


class EmbeddingDropout(nn.Module):
    def __init__(self, emb):
        super().__init__()
        self.emb = emb


class AWDEncoder(nn.Module):
    def __init__(self, widths, is_old):
        super().__init__()
        self.encoder = nn.Embedding(V, widths[0], padding_idx=1)
        self.encoder_dp = EmbeddingDropout(self.encoder)
        self.rnns = nn.ModuleList(
            WeightDropout(nn.LSTM(*pair, batch_first=True), is_old) for pair in itertools.pairwise(widths)
        )


class LinearDecoder(nn.Module):
    def __init__(self, width, encoder, out_bias):
        super().__init__()
        self.decoder = nn.Linear(width, V, bias=out_bias)
        if encoder is not None:
            self.decoder.weight = encoder.weight


class AWDLanguageModel(nn.Sequential):
    def __init__(self, widths=(8, 14, 14, 8), tied=True, out_bias=True, is_old=False):
        encoder = AWDEncoder(widths, is_old)
        super().__init__(encoder, LinearDecoder(widths[-1], encoder.encoder if tied else None, out_bias))

    def forward(self, ids):
        x = self[0].encoder(ids)
        for layer in self[0].rnns:
            x = layer(x)[0]
        return self[1].decoder(x)


TOKENS = ["xxunk", "xxpad", "xxbos", "xxeos", "xxfld", "xxrep", "xxwrep", "xxup", "xxmaj"]  # fastai's own
TOKENS += ["the", "\n", ".", ",", "\n\n", "i", "naïve", "山", "e\u0301", "'s", "▁", "3"]
TOKENS += [f"word{number}" for number in range(V - 3 - len(TOKENS))] + ["xxfake"] * 3


def fastai_checkpoint(folder):
    path = save(randomised(AWDLanguageModel()).state_dict(), folder / "model.pth")
    return path, Options(vocabulary=pickled(TOKENS, folder / "itos.pkl"))


# flair.

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyzé山"


class FlairModel(nn.Module):
    def __init__(self, kind="LSTM", hidden=12, nlayers=1, nout=None):
        super().__init__()
        self.encoder = nn.Embedding(V, 8)
        self.rnn = getattr(nn, kind)(8, hidden, nlayers)
        self.proj = None if nout is None else nn.Linear(hidden, nout)
        self.decoder = nn.Linear(nout or hidden, V)
        self.kind, self.nout = kind, nout

    def forward(self, ids):
        x = self.rnn(self.encoder(ids.t()))[0]
        return self.decoder(x if self.proj is None else self.proj(x)).transpose(0, 1)

    def content(self, **fields):
        """Return the content of a file of `LanguageModel.save`."""
        own = {
            "state_dict": self.state_dict(),
            "dictionary": Dictionary(CHARACTERS),
            "is_forward_lm": True,
            "hidden_size": self.rnn.hidden_size,
            "nlayers": self.rnn.num_layers,
            "embedding_size": 8,
            "nout": self.nout,
            "document_delimiter": "\n",
            "dropout": 0.1,
            "recurrent_type": self.kind,
            "has_decoder": True,
        }
        return {name: value for name, value in (own | fields).items() if value is not ...}


def flair_checkpoint(folder):
    return save(randomised(FlairModel()).content(), folder / "best-lm.pt", protocol=4), Options()
