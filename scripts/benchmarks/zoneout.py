"""Zoneout of an LSTM (Krueger et al. 2017), for the comparison of cells only.

While training each unit of c and h keeps its previous value with a probability of its own; afterwards both are mixed in
those proportions, which is the expectation (section 3.2):

    c_t = d_c c_{t-1} + (1 - d_c) (σ(f) c_{t-1} + σ(i) tanh(g))
    h_t = d_h h_{t-1} + (1 - d_h) σ(o) tanh(σ(f) c_{t-1} + σ(i) tanh(g))

with d_c and d_h drawn from {0, 1} while training, and their means otherwise.
"""

import torch

from hf_lstm import LSTMForCausalLM
from hf_lstm.model.modeling_lstm import LSTMLayer
from hf_lstm.model.recurrence_lstm import Recurrence, Rows

KEEP_C, KEEP_H = 0.5, 0.05  # the paper's for characters (section 4.1)


class ZoneoutLSTMLayer(LSTMLayer):
    """An LSTM layer with zoneout, step by step."""

    def forward(self, x, h, c, reading=None, record=False, tokens=None, embeddings=None):
        reading = reading or Rows(*x.shape[:2])
        last_h, last_c = reading.start(h), reading.start(c)
        outputs, cells = [], []
        for read in reading.pack(self.input_gates(x)).split(reading.batch_sizes):
            n = len(read)  # sequences that have another token
            new_h, new_c = self.step(read, last_h[:n], last_c[:n])
            outputs.append(new_h)
            cells.append(new_c)
            last_h, last_c = torch.cat([new_h, last_h[n:]]), torch.cat([new_c, last_c[n:]])
        outputs = reading.unpack(torch.cat(outputs), h)
        past = (outputs, reading.unpack(torch.cat(cells), c)) if record else ()
        return Recurrence(outputs, reading.end(last_h, h), reading.end(last_c, c), *past)

    def step(self, read, h, c):
        """Take one step of every sequence."""
        i, f, g, o = (read + self.hidden_gates(h)).chunk(4, dim=-1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * new_c.tanh()
        return self._zone_out(h, new_h, KEEP_H), self._zone_out(c, new_c, KEEP_C)

    def _zone_out(self, old, new, keep):
        if self.training:
            return torch.where(torch.rand_like(new) < keep, old, new)
        return keep * old + (1 - keep) * new


def add_zoneout(model: LSTMForCausalLM) -> LSTMForCausalLM:
    """Give the layers of a stacked LSTM zoneout; their parameters stay."""
    for layer in model.model.layers:
        layer.__class__ = ZoneoutLSTMLayer
    return model
