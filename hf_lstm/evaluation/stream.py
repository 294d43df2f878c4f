"""How well a model predicts a corpus."""

import math

import numpy
import torch
from transformers import DynamicCache

from .adaptation import DynamicEvaluation, NeuralCache
from .reading import evaluating, nats_of, predict, read_chunks, scored_logits, stream_for

BLOCKS = 200  # at most: consecutive parts of the text, of which the bootstrap draws
DRAWS = 1_000


def evaluate_stream(
    model,
    tokens,
    batch_size: int = 1,
    bptt_length: int | None = None,
    reset_at_documents: bool = False,
    reset_every: int | None = None,
    temperature: float = 1.0,
    neural_cache: NeuralCache | None = None,
    dynamic_evaluation: DynamicEvaluation | None = None,
) -> dict[str, float | int | list[float]]:
    """
    Predict every token of a stream but the first, exactly once, with the state carried from chunk to chunk.

    Args:
        model (`LSTMForCausalLM`): Left as it was, in training or evaluation mode; dropout is off meanwhile.
        tokens (`TokenStream`, `torch.Tensor` or array): The stream, a single dimension of integers.
        batch_size (`int`, defaults to 1):
            Parts of equal length that are read side by side. Each part begins without a history: 1 is the exact figure.
        bptt_length (`int`, *optional*):
            Tokens read at once, 1024 by default; it changes the memory needed, not the result. Dynamic evaluation reads
            as many as lie between two of its steps.
        reset_at_documents (`bool`, defaults to `False`): Whether the state starts anew with every document.
        reset_every (`int`, *optional*): Start the state anew after so many tokens, to see what a long memory is worth.
        temperature (`float`, defaults to 1.0): What the logits are divided by; [`fit_temperature`] finds the best.
        neural_cache ([`NeuralCache`], *optional*): What was read lately, mixed into each prediction.
        dynamic_evaluation ([`DynamicEvaluation`], *optional*):
            Goes on learning from what was read, in a copy of the model.

    Returns:
        `dict`: `loss` (nats per token), `loss_interval` (its 95 % confidence interval: bootstrap over at most 200
        consecutive blocks of the text, Carlstein 1986), `perplexity`, `bits_per_token`, `accuracy` (share of tokens that were the most
        probable), `tokens` (how many were predicted) and `tokens_without_history` (how many of them from a single token,
        where a state began from zero). Where the stream knows its text, also `bits_per_byte`, `bits_per_character`,
        `bits_per_word` and `word_perplexity`, which is 2 to its power: all bits over the words between white space, the
        same measure however many tokens a word becomes (Mielke 2019).

    Raises:
        ValueError: for fewer than two tokens, ids outside the vocabulary, numbers below 1, a temperature that is not
            above 0, a `bptt_length` beside dynamic evaluation, or predictions that are not numbers.
    """
    for name, value in (("batch_size", batch_size), ("bptt_length", bptt_length), ("reset_every", reset_every)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` ({value}) must be at least 1.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` ({temperature}) must be a number above 0.")
    stream = stream_for(model, tokens)
    if dynamic_evaluation is not None:
        if bptt_length is not None:
            raise ValueError(
                f"`bptt_length` ({bptt_length}) and `dynamic_evaluation` exclude each other: set its `segment_length`."
            )
        bptt_length = dynamic_evaluation.segment_length
    learner = None if dynamic_evaluation is None else dynamic_evaluation.learner(model)
    memory = None if neural_cache is None else neural_cache.memory()

    targets = len(stream) - 1
    batch_size = min(batch_size, targets)
    part = math.ceil(targets / batch_size)
    firsts = (torch.arange(batch_size) * part).clamp(max=targets)
    chunks = read_chunks(
        stream, firsts, (firsts + part).clamp(max=targets), bptt_length or 1024, reset_at_documents, reset_every
    )
    reader = model if learner is None else learner.model
    state = DynamicCache(config=model.config)
    block = math.ceil(targets / BLOCKS)
    nats, counts = torch.zeros(2, math.ceil(targets / block), dtype=torch.float64)  # of each block
    correct = fresh = 0
    with evaluating(reader), torch.set_grad_enabled(learner is not None):
        for chunk in chunks:
            outputs = predict(reader, chunk, state, output_hidden_states=memory is not None)
            logits = scored_logits(outputs.logits, chunk)  # (N, V)
            scores = logits.detach() / temperature if temperature != 1 else logits.detach()
            if memory is not None:
                scores = memory.mix(scores, outputs.hidden_states[-1].detach().to(scores.dtype), chunk)
            costs = nats_of(scores, chunk)
            blocks = chunk.indices[chunk.scored] // block
            nats.index_add_(0, blocks, costs)
            counts.index_add_(0, blocks, torch.ones_like(costs))
            correct += (scores.argmax(dim=-1).cpu() == chunk.targets[chunk.scored]).sum().item()
            fresh += (chunk.positions[chunk.scored] == 0).sum().item()
            if learner is not None:
                learner.learn(logits, chunk, state)
    total = nats.sum().item()

    loss = total / targets
    result = {
        "loss": loss,
        "loss_interval": _interval(nats.numpy(), counts.numpy()),
        "perplexity": _exp(loss),
        "bits_per_token": loss / math.log(2),
        "accuracy": correct / targets,
        "tokens": targets,
        "tokens_without_history": fresh,
    }
    if stream.num_bytes > 0:
        result["bits_per_byte"] = total / math.log(2) / stream.num_bytes
    if stream.num_characters > 0:
        result["bits_per_character"] = total / math.log(2) / stream.num_characters
    if stream.num_words > 0:
        result["bits_per_word"] = total / math.log(2) / stream.num_words
        result["word_perplexity"] = _exp(total / stream.num_words)
    return result


@torch.no_grad()
def losses_by_position(
    model, tokens, bptt_length: int = 1024, reset_at_documents: bool = False, reset_every: int | None = None
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """
    What the tokens cost that are predicted from 1, 2, ... P tokens since the state began from zero: the sum of the nats
    of each number, and how many there are, both `(P,)`. The quotient shows what a memory so long is worth.
    """
    stream = stream_for(model, tokens)
    targets = len(stream) - 1
    nats, counts = torch.zeros(2, targets, dtype=torch.float64)
    state = DynamicCache(config=model.config)
    with evaluating(model):
        for chunk in read_chunks(
            stream, torch.tensor([0]), torch.tensor([targets]), bptt_length, reset_at_documents, reset_every
        ):
            costs = nats_of(scored_logits(predict(model, chunk, state).logits, chunk), chunk)
            nats.index_add_(0, chunk.positions.flatten(), costs)
            counts.index_add_(0, chunk.positions.flatten(), torch.ones_like(costs))
    reached = int(counts.nonzero().max()) + 1
    return nats[:reached].numpy(), counts[:reached].numpy()


def _interval(nats: numpy.ndarray, tokens: numpy.ndarray) -> list[float]:
    """Between which two losses 95 % of those lie that as many blocks have, drawn with replacement."""
    if numpy.isinf(nats).any():  # something happened that the model holds impossible
        return [math.inf, math.inf]
    drawn = numpy.random.default_rng(0).integers(len(nats), size=(DRAWS, len(nats)))
    losses = nats[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    return numpy.quantile(losses, [0.025, 0.975]).tolist()


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf  # beyond a float
