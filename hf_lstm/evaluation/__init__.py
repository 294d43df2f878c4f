"""Evaluation: loss of a corpus, surprisal, minimal pairs, adaptation at test time, gradients, and memorisation.

Texts may have any length here. lm-evaluation-harness reads at most 2,048 tokens at once from a model whose config and
tokenizer set no maximum length, and truncates longer texts. `max_length=100000` among its `model_args`, or any other number,
raises this; memory has to hold V logits per token.
"""

from hf_lstm.tokenizers import check_tokenizer, start_ids

from .adaptation import DynamicEvaluation, NeuralCache, fit_temperature, gradient_rms
from .corpus import evaluate_stream, losses_by_position
from .gradients import gradient_flow
from .passages import draw_passages, extraction, suffix_probability
from .privacy import exposure, insert_canaries
from .surprisal import minimal_pairs, surprisal, word_surprisal

__all__ = [
    "DynamicEvaluation",
    "NeuralCache",
    "check_tokenizer",
    "draw_passages",
    "evaluate_stream",
    "exposure",
    "extraction",
    "fit_temperature",
    "gradient_flow",
    "gradient_rms",
    "insert_canaries",
    "losses_by_position",
    "minimal_pairs",
    "start_ids",
    "suffix_probability",
    "surprisal",
    "word_surprisal",
]
