"""How the scripts read texts: the flags that say so."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Reading:
    """The column, encoding and delimiter of files of text."""

    text_column: str | None = field(
        default=None,
        metadata={
            "help": "The column of the records that holds the text; by default `text`, or the only one with text."
        },
    )
    encoding: str = field(
        default="utf-8",
        metadata={"help": "The encoding of the files of text, as Python names it: cp1252, utf-16, gb18030, ..."},
    )
    csv_delimiter: str = field(
        default=",", metadata={"help": r"The character between the columns of .csv files: `;`, or `\t` for a tab."}
    )

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of `load_corpus` and `load_documents` that these are."""
        return {name: getattr(self, name) for name in ("text_column", "encoding", "csv_delimiter")}
