"""Checkpoints of other programs, written by modules of the same layout under the same names."""

import itertools
import sys
import types
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

V = 31
WORDS = [
    "the",
    "<eos>",
    "<unk>",
    "The",
    "cat",
    "cat's",
    "sat",
    ",",
    "-",
    "1984",
    "naïve",
    "山",
    "e\u0301",
    "<pad",
    "&lt;",
]
WORDS += [f"word{number}" for number in range(V - len(WORDS))]
CHARACTERS = list("\n abcdefghijklmnopqrstuvwxyzA.山")


class RNNModel(nn.Module):
    """word_language_model's."""

    def __init__(self, rnn_type="LSTM", ninp=8, nhid=12, nlayers=2, tied=False, dropout=0.2):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(V, ninp)
        if rnn_type in ("LSTM", "GRU"):
            self.rnn = getattr(nn, rnn_type)(ninp, nhid, nlayers, dropout=dropout)
        else:
            self.rnn = nn.RNN(ninp, nhid, nlayers, nonlinearity=rnn_type.removeprefix("RNN_").lower(), dropout=dropout)
        self.decoder = nn.Linear(nhid, V)
        if tied:
            self.decoder.weight = self.encoder.weight
        self.rnn_type, self.nhid, self.nlayers = rnn_type, nhid, nlayers

    def forward(self, ids):
        return self.decoder(self.rnn(self.encoder(ids.t()))[0]).transpose(0, 1)


class WeightDrop(nn.Module):
    """awd-lstm-lm's: the raw weights lie beside those with dropped entries, in a module whose method is replaced."""

    def __init__(self, module, dropout):
        super().__init__()
        self.module, self.dropout = module, dropout
        raw = module.weight_hh_l0.data
        del module._parameters["weight_hh_l0"]
        self.weight_hh_l0_raw = nn.Parameter(raw)
        module.flatten_parameters = self.do_nothing
        module.weight_hh_l0 = F.dropout(raw, 0.5)

    def do_nothing(self):
        return

    def forward(self, x):
        cell = type(self.module)(self.module.input_size, self.module.hidden_size)
        weights = {name: getattr(self.module, name) for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0")}
        cell.load_state_dict(weights | {"weight_hh_l0": self.weight_hh_l0_raw})
        return cell(x)


class AWDModel(nn.Module):
    """awd-lstm-lm's RNNModel."""

    def __init__(self, rnn_type="LSTM", widths=(8, 14, 14, 8), tied=True, wdrop=0.5):
        super().__init__()
        self.encoder = nn.Embedding(V, widths[0])
        layers = [getattr(nn, rnn_type)(*pair) for pair in itertools.pairwise(widths)]
        self.rnns = nn.ModuleList(WeightDrop(layer, wdrop) if wdrop else layer for layer in layers)
        self.decoder = nn.Linear(widths[-1], V)
        if tied:
            self.decoder.weight = self.encoder.weight
        self.dropout, self.dropouti, self.dropouth, self.dropoute = 0.4, 0.65, 0.2, 0.1

    def forward(self, ids):
        x = self.encoder(ids.t())
        for layer in self.rnns:
            x = layer(x)[0]
        return self.decoder(x).transpose(0, 1)


class SplitCrossEntropyLoss(nn.Module):
    """awd-lstm-lm's criterion, which has weights of its own where it splits the vocabulary."""

    def __init__(self, hidden_size=8, splits=()):
        super().__init__()
        self.splits = [0, *splits, 100_000_000]
        if splits:
            self.tail_vectors = nn.Parameter(torch.zeros(len(splits), hidden_size))


class Rnnlm(nn.Module):
    """icefall's."""

    def __init__(self):
        super().__init__()
        self.input_embedding = nn.Embedding(V, 12)
        self.rnn = nn.LSTM(12, 12, 3, batch_first=True)
        self.output_linear = nn.Linear(12, V)
        self.output_linear.weight = self.input_embedding.weight

    def forward(self, ids):
        return self.output_linear(self.rnn(self.input_embedding(ids))[0])


# Where these classes are in their repositories.
PLACES = {
    RNNModel: ("model", "RNNModel"),
    AWDModel: ("model", "RNNModel"),
    WeightDrop: ("weight_drop", "WeightDrop"),
    SplitCrossEntropyLoss: ("splitcross", "SplitCrossEntropyLoss"),
}


@contextmanager
def under_their_names(kinds):
    """Classes have the names of their repositories while torch.save looks at them."""
    before = {kind: (kind.__module__, kind.__qualname__) for kind in kinds}
    for kind in kinds:
        kind.__module__, kind.__qualname__ = PLACES[kind]
        module = sys.modules.setdefault(kind.__module__, types.ModuleType(kind.__module__))
        module.__file__ = __file__  # whose text torch.save wrote before version 1.6
        setattr(module, kind.__qualname__, kind)
    try:
        yield
    finally:
        for kind, names in before.items():
            sys.modules.pop(kind.__module__, None)
            kind.__module__, kind.__qualname__ = names


def randomised(module):
    """Weights large enough for an error to show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.6, 0.6, generator=generator)
    return module.eval()


def save(content, path, is_zip=True, protocol=2):
    """Write a file of torch.save."""
    parts = [part for part in (content if isinstance(content, list) else [content]) if isinstance(part, nn.Module)]
    kinds = {type(module) for part in parts for module in part.modules()} & PLACES.keys()
    with under_their_names(kinds):
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    return path


def word_file(folder):
    path = folder / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return str(path)
