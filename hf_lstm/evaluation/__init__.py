"""How well a model predicts: a corpus, a sentence, one of two sentences; and how it goes on learning meanwhile."""

from .adaptation import DynamicEvaluation, NeuralCache, fit_temperature, gradient_rms
from .stream import evaluate_stream
from .surprisal import minimal_pairs, surprisal, word_surprisal

__all__ = [
    "DynamicEvaluation",
    "NeuralCache",
    "evaluate_stream",
    "fit_temperature",
    "gradient_rms",
    "minimal_pairs",
    "surprisal",
    "word_surprisal",
]
