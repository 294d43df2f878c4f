"""From texts to batches: corpora, streams of tokens, lanes and documents."""

from .corpora import load_corpus, load_documents, read_text, standard_library
from .lanes import DocumentDataset, LaneDataset
from .streaming import StreamingLanes
from .streams import TokenStream, as_stream

__all__ = [
    "DocumentDataset",
    "LaneDataset",
    "StreamingLanes",
    "TokenStream",
    "as_stream",
    "load_corpus",
    "load_documents",
    "read_text",
    "standard_library",
]
