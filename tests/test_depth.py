"""Depth: twelve residual layers learn at least what two stacked ones do, and twelve stacked ones do not."""

import pytest
import torch
from conftest import standard_library

from hf_lstm import LSTMConfig, LSTMForCausalLM, TokenStream, char_tokenizer, evaluate_stream

STEPS, ROWS, LENGTH, WIDTH = 300, 16, 64, 128


def loss_after_training(tokens, validation, vocab_size, **config):
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=vocab_size, hidden_size=WIDTH, **config)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=generator)
        ids = tokens[starts[:, None] + torch.arange(LENGTH)]
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return evaluate_stream(model, validation, batch_size=16)["loss"]


@pytest.mark.slow
def test_twelve_residual_layers_learn_what_two_stacked_ones_do():
    corpus = standard_library()
    tokenizer = char_tokenizer(corpus["train"]["text"])
    train, validation = (TokenStream.from_documents(corpus[split], tokenizer) for split in ("train", "validation"))
    configs = {
        "2 stacked": {"num_hidden_layers": 2},
        "12 stacked": {"num_hidden_layers": 12},
        "12 residual": {"num_hidden_layers": 12, "block_type": "residual"},
    }

    losses = {
        name: loss_after_training(train[:], validation[:40_000], len(tokenizer), **config)
        for name, config in configs.items()
    }

    print(losses)
    assert losses["12 residual"] <= losses["2 stacked"] < losses["12 stacked"]
