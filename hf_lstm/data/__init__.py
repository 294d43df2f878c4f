"""Data: corpora, token streams, lanes with a carried state, and single documents."""

from .corpora import joined, load_corpus, load_documents, one_split
from .lanes import DocumentDataset, LaneDataset
from .readers import read_text
from .records import read_records
from .streaming import StreamingLanes
from .streams import TokenStream, as_stream

__all__ = [
    "DocumentDataset",
    "LaneDataset",
    "StreamingLanes",
    "TokenStream",
    "as_stream",
    "joined",
    "load_corpus",
    "load_documents",
    "one_split",
    "read_records",
    "read_text",
]
