"""PyTorch's word_language_model and its forks: colorlessgreenRNNs (Gulordava et al. 2018), neural-complexity and others.

They save the whole module with torch.save, perhaps within `DataParallel`. It is the model of torch_lstm.py, read with words.
"""

from pathlib import Path

from hf_lstm.convert.source import Source
from hf_lstm.convert.torch_files import read_tensors
from hf_lstm.convert.torch_lstm import Options, make_source


def read(path: Path, options: Options) -> Source:
    """
    Read a module that was saved whole, or its state_dict.

    Raises:
        ValueError: if the file is damaged or refused, or holds another model.
    """
    held = read_tensors(path)
    source = make_source("word_language_model", path, held, options, unit="words")
    rates = {rate for m in held.modules.values() if m.name.endswith(".Dropout") and (rate := m.fields.get("p"))}
    if rates:
        source.notes.append(
            f"The dropout of its training, {', '.join(map(str, rates))}, was not taken over: it drew a new mask at every step, "
            "and the dropouts of this model draw one for all steps of a sequence."
        )
    return source
