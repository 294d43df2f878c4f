"""How well a model predicts: a corpus, a sentence, one of two sentences; and how it goes on learning meanwhile.

Texts may have any length here. lm-evaluation-harness reads at most 2,048 tokens at once of a model whose config and
tokenizer name no longest text, as ours do not, and cuts what is longer. With `max_length=100000` among its `model_args`, or any
other number, it reads as many: memory has to hold the V logits of each.
"""

from .adaptation import DynamicEvaluation, NeuralCache, fit_temperature, gradient_rms
from .sentences import check_tokenizer, minimal_pairs, start_ids, surprisal, word_surprisal
from .stream import evaluate_stream, losses_by_position

__all__ = [
    "DynamicEvaluation",
    "NeuralCache",
    "check_tokenizer",
    "evaluate_stream",
    "fit_temperature",
    "gradient_rms",
    "losses_by_position",
    "minimal_pairs",
    "start_ids",
    "surprisal",
    "word_surprisal",
]
