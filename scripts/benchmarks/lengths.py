"""Generation after texts of different lengths, by the model itself, a `Session` and `generate()`."""

import copy
from collections.abc import Callable

import torch
from transformers import DynamicCache

from hf_lstm import Session


@torch.inference_mode()
def states_after(model, lengths: list[int]) -> dict[int, DynamicCache]:
    """Return the state after each number of random tokens, read in chunks."""
    read, states = DynamicCache(config=model.config), {}
    for length in lengths:
        ids = torch.randint(4, model.config.vocab_size, (1, length - read.get_seq_length()))
        for chunk in ids.split(1024, dim=1):
            model(chunk, past_key_values=read, logits_to_keep=1)
        states[length] = copy.deepcopy(read)
    return states


def ways_to_write(model, tokenizer, states: dict[int, DynamicCache], tokens: int) -> dict[str, Callable[[int], None]]:
    """Return functions that generate `tokens` tokens after one of the states, by name."""
    session = Session(model, tokenizer)

    @torch.inference_mode()
    def by_model(length):
        cache, ids = copy.deepcopy(states[length]), torch.tensor([[5]])
        for _ in range(tokens):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(dim=-1)

    def by_session(length):
        session._state = session._state._replace(cache=copy.deepcopy(states[length]), unread=(5,))
        all(session.stream(max_new_tokens=tokens, do_sample=False))

    def by_generate(length):
        ids, cache = torch.full((1, length + 1), 5), copy.deepcopy(states[length])
        options = {"past_key_values": cache, "max_new_tokens": tokens, "do_sample": False}
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return {"model": by_model, "Session": by_session, "generate()": by_generate}
