"""Loss and perplexity of a corpus."""

import math

import numpy
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_lstm.data.lanes import check_at_least_one
from hf_lstm.data.streams import Tokens

from .adaptation import DynamicEvaluation, NeuralCache
from .scoring import checked_stream, evaluating, read_chunks, run_chunk, scored_logits, token_losses

BLOCKS = 200  # at most: consecutive parts of the text that the bootstrap draws from
DRAWS = 1_000
LARGEST_WORD_PERPLEXITY = 1e6  # a choice among more words than a large vocabulary has


def evaluate_stream(
    model: PreTrainedModel,
    tokens: Tokens,
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
        model (`LSTMForCausalLM`): The model, in either mode; it is not changed, and dropout is off.
        tokens (`TokenStream`, `torch.Tensor` or array): The stream, integers in a single dimension.
        batch_size (`int`, defaults to 1):
            Parts of equal length that are read side by side. Each part begins from a zero state: 1 is exact.
        bptt_length (`int`, *optional*):
            Tokens read at once, 1024 by default; it changes the memory needed, not the result. Dynamic evaluation reads
            the tokens of one of its segments instead.
        reset_at_documents (`bool`, defaults to `False`): Whether the state restarts at every document.
        reset_every (`int`, *optional*): Restart the state after this many tokens, to measure the value of a longer memory.
        temperature (`float`, defaults to 1.0): Divisor of the logits; [`fit_temperature`] finds the best.
        neural_cache ([`NeuralCache`], *optional*): Cache of recent tokens, mixed into each prediction.
        dynamic_evaluation ([`DynamicEvaluation`], *optional*):
            Learns from the text after predicting it, in a copy of the model.

    Returns:
        `dict`: `loss` (nats per token), `loss_interval` (its 95 % confidence interval: bootstrap over at most 200
        consecutive blocks of the text, Carlstein 1986), `perplexity`, `bits_per_token`, `accuracy` (share of tokens that were the most
        probable), `tokens` (the number predicted) and `tokens_without_history` (the number of them predicted from a single
        token, from a zero state). Where the stream knows its text, also `bits_per_byte`, `bits_per_character`,
        `bits_per_word` and `word_perplexity`, which is 2 to its power: all bits over the words between white space, the
        same measure however many tokens a word becomes (Mielke 2019). A perplexity above a million is left out: it says
        only that the text has no white space between words, or that the model knows none of them.

    Raises:
        ValueError: for fewer than two tokens, ids outside the vocabulary, numbers below 1, a temperature that is not
            above 0, `bptt_length` together with dynamic evaluation, or predictions that are NaN.
    """
    check_at_least_one(batch_size=batch_size, bptt_length=bptt_length, reset_every=reset_every)
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` ({temperature}) must be a number above 0.")
    stream = checked_stream(model, tokens)
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
            outputs = run_chunk(reader, chunk, state, output_hidden_states=memory is not None)
            logits = scored_logits(outputs.logits, chunk)  # (N, V)
            scores = logits.detach() / temperature if temperature != 1 else logits.detach()
            if memory is not None:
                scores = memory.mix(scores, outputs.hidden_states[-1].detach().to(scores.dtype), chunk)
            costs = token_losses(scores, chunk)
            blocks = chunk.indices[chunk.scored] // block
            nats.index_add_(0, blocks, costs)
            counts.index_add_(0, blocks, torch.ones_like(costs))
            correct += int((scores.argmax(dim=-1).cpu() == chunk.targets[chunk.scored]).sum())
            fresh += int((chunk.positions[chunk.scored] == 0).sum())
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
        word_perplexity = _exp(total / stream.num_words)
        if word_perplexity <= LARGEST_WORD_PERPLEXITY:
            result["word_perplexity"] = word_perplexity
    return result


@torch.no_grad()
def losses_by_position(
    model: PreTrainedModel,
    tokens: Tokens,
    bptt_length: int = 1024,
    reset_at_documents: bool = False,
    reset_every: int | None = None,
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """
    Compute the loss by the number of tokens read since a zero state, 1, 2, ... P: the sum of the losses at each number, in
    nats, and the number of tokens, both `(P,)`. Their quotient shows the value of a memory of that length.
    """
    stream = checked_stream(model, tokens)
    targets = len(stream) - 1
    nats, counts = torch.zeros(2, targets, dtype=torch.float64)
    state = DynamicCache(config=model.config)
    with evaluating(model):
        for chunk in read_chunks(
            stream, torch.tensor([0]), torch.tensor([targets]), bptt_length, reset_at_documents, reset_every
        ):
            costs = token_losses(scored_logits(run_chunk(model, chunk, state).logits, chunk), chunk)
            nats.index_add_(0, chunk.positions.flatten(), costs)
            counts.index_add_(0, chunk.positions.flatten(), torch.ones_like(costs))
    reached = int(counts.nonzero().max()) + 1
    return nats[:reached].numpy(), counts[:reached].numpy()


def _interval(nats: numpy.ndarray, tokens: numpy.ndarray) -> list[float]:
    """Bootstrap the 95 % confidence interval of the loss over blocks."""
    if numpy.isinf(nats).any():  # a token of probability 0
        return [math.inf, math.inf]
    drawn = numpy.random.default_rng(0).integers(len(nats), size=(DRAWS, len(nats)))
    losses = nats[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    return numpy.quantile(losses, [0.025, 0.975]).tolist()


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf  # beyond a float
