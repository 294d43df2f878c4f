"""Zoneout of an LSTM (Krueger et al. 2017), for the comparison of cells only.

While training each unit of c and h keeps its previous value with a probability of its own; afterwards both are mixed in
those proportions, which is the expectation (section 3.2):

    c_t = d_c c_{t-1} + (1 - d_c) (σ(f) c_{t-1} + σ(i) tanh(g))
    h_t = d_h h_{t-1} + (1 - d_h) σ(o) tanh(σ(f) c_{t-1} + σ(i) tanh(g))

with d_c and d_h drawn from {0, 1} while training, and their means otherwise.
"""

from dataclasses import dataclass

import torch

from hf_lstm import LSTMForCausalLM
from hf_lstm.model.cells_lstm import LSTM, Gates
from hf_lstm.model.modeling_lstm import LSTMLayer

KEEP_C, KEEP_H = 0.5, 0.05  # the paper's for characters (section 4.1)


@dataclass
class ZoneoutGates(Gates):
    """The modules of the cell, and whether it is training."""

    training: bool = False

    def are_plain(self) -> bool:
        return False  # no kernel knows zoneout: the equations are run step by step


class Zoneout(LSTM):
    """An LSTM whose units may keep their previous value."""

    def step(self, read, state, gates):
        parts = zip(state, super().step(read, state, gates), (KEEP_H, KEEP_C), strict=True)
        return tuple(_zone_out(old, new, keep, gates.training) for old, new, keep in parts)


class ZoneoutLSTMLayer(LSTMLayer):
    def gates(self):
        return ZoneoutGates(self.input_gates, self.hidden_gates, training=self.training)


def add_zoneout(model: LSTMForCausalLM) -> LSTMForCausalLM:
    """Give the layers of a stacked LSTM zoneout; their parameters stay."""
    for layer in model.model.layers:
        layer.__class__, layer.cell = ZoneoutLSTMLayer, Zoneout()
    return model


def _zone_out(old, new, keep, training):
    if training:
        return torch.where(torch.rand_like(new) < keep, old, new)
    return keep * old + (1 - keep) * new
