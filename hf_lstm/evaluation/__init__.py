"""How well a model predicts: a corpus, a sentence, one of two sentences; and how it goes on learning meanwhile."""

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
