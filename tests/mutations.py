"""Shows that the fast tests catch small wrong changes of the package, and which test says so first.

python tests/mutations.py [NAME ...]

Each change is made alone, in a copy of the checkout, whose fast tests run until one fails: first those of the file that
should notice, then all others. Before, these files pass without a change. Fails if a change survives, or no longer fits
the code. Takes some fifteen minutes.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass
class Mutation:
    """
    A wrong change of one place.

    Args:
        name (`str`): What is wrong.
        path (`str`): The file below hf_lstm/.
        old, new (`str`): The text, which occurs once in the file, and what it becomes.
        noticed_by (`str`): The file below tests/ that should fail.
    """

    name: str
    path: str
    old: str
    new: str
    noticed_by: str

    def apply(self, root: Path) -> None:
        """Raises `ValueError` unless the text occurs exactly once."""
        file = root / "hf_lstm" / self.path
        text = file.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"The mutation `{self.name}` changes {self.old!r}, which occurs {count} times in hf_lstm/{self.path} and "
                "must occur once: adapt it to the code."
            )
        file.write_text(text.replace(self.old, self.new), encoding="utf-8")


MUTATIONS = [
    Mutation(
        "two gates are swapped",
        "model/cells_lstm.py",
        "i, f, g, o = (read",
        "f, i, g, o = (read",
        "test_reference.py",
    ),
    Mutation(
        "a GRU's reset comes before the product",
        "model/cells_lstm.py",
        "n = (x_n + r * h_n).tanh()",
        "n = (x_n + gates.hidden(r * h).chunk(3, dim=-1)[2]).tanh()",
        "test_reference.py",
    ),
    Mutation(
        "the rounds of a Mogrifier are swapped",
        "model/cells_lstm.py",
        "if index % 2 == 0:",
        "if index % 2:",
        "test_reference.py",
    ),
    Mutation(
        "the bias of U is dropped",
        "model/cells_lstm.py",
        "self.input_gates.bias, self.hidden_gates.bias, rounds)",
        "self.input_gates.bias, None, rounds)",
        "test_reference.py",
    ),
    Mutation(
        "the bias is added twice",
        "model/cells_lstm.py",
        "weights = [W, U, b, torch.zeros_like(b) if",
        "weights = [W, U, b, b if",
        "test_reference.py",
    ),
    Mutation(
        "no word is dropped where distinct tokens are projected once",
        "model/modeling_lstm.py",
        "embeddings = word_dropout(self.embed_tokens(words), words, vocab_size, p)",
        "embeddings = self.embed_tokens(words)",
        "test_lookup.py",
    ),
    Mutation(
        "the forget gates of a new model are closed",
        "model/modeling_lstm.py",
        "biases[cell.forget_gate] = self.config.forget_gate_bias",
        "biases[cell.input_gate] = self.config.forget_gate_bias",
        "test_reference.py",
    ),
    Mutation(
        "the mask is ignored",
        "model/recurrence_lstm.py",
        "return (attention_mask[:, -shape[1] :] != 0).to(device)",
        "return torch.ones(shape, dtype=torch.bool, device=device)",
        "test_padding.py",
    ),
    Mutation(
        "padding is pooled",
        "model/heads_lstm.py",
        "hidden.masked_fill(~real, -torch.inf)",
        "hidden",
        "test_heads.py",
    ),
    Mutation(
        "the entropy after a token is that before it",
        "evaluation/distributions.py",
        "before - entropies[places]",
        "before - entropies[places - 1]",
        "test_entropy.py",
    ),
    Mutation(
        "padding is a target",
        "model/training_lstm.py",
        "return targets.masked_fill(~follows[:, kept].to(targets.device), ignore_index)",
        "return targets",
        "test_padding.py",
    ),
    Mutation(
        "a document continues the one before it",
        "model/recurrence_lstm.py",
        "restarts = restarts & real",
        "restarts = torch.zeros_like(real)",
        "test_documents.py",
    ),
    Mutation(
        "a beam keeps the state of another",
        "model/cache_lstm.py",
        "self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))",
        "pass",
        "test_generation.py",
    ),
    Mutation(
        "a token attends to one too many",
        "model/attention_lstm.py",
        "seen = (at <= now) & (at > now - window)",
        "seen = (at <= now) & (at >= now - window)",
        "test_attention.py",
    ),
    Mutation(
        "padding stays in the window",
        "model/attention_lstm.py",
        "kept = self.real & (document == document[:, -1:])",
        "kept = document == document[:, -1:]",
        "test_attention.py",
    ),
    Mutation(
        "documents see each other in the window",
        "model/attention_lstm.py",
        "near & same & entries.real[:, None]",
        "near & entries.real[:, None]",
        "test_attention.py",
    ),
    Mutation(
        "one token too few is taken back",
        "model/cache_lstm.py",
        "past.shape[1] - 1 - removed",
        "past.shape[1] - removed",
        "test_cache.py",
    ),
    Mutation(
        "a static cache is not reset",
        "model/cache_lstm.py",
        "state.fill_(initial)",
        "pass",
        "test_cache.py",
    ),
    Mutation(
        "the copy of the weights outlives a change",
        "model/generation_lstm.py",
        "for places, name, part in self.parts) and self._key() == self.key",
        "for places, name, part in self.parts)",
        "test_plain_step.py",
    ),
    Mutation(
        "rows that have ended go on reading",
        "model/generation_lstm.py",
        "mask = None if criteria is None else criteria.mask()",
        "mask = None",
        "test_generation.py",
    ),
    Mutation(
        "dropout does not scale what it keeps",
        "model/training_lstm.py",
        ".mul_(2**16 / (2**16 - dropped))",
        "",
        "test_regularization.py",
    ),
    Mutation(
        "the chunked loss divides by all positions",
        "model/training_lstm.py",
        "count = kept.sum() if num_items_in_batch is None",
        "count = kept.numel() if num_items_in_batch is None",
        "test_large_vocabularies.py",
    ),
    Mutation(
        "the gradient runs back into the step before",
        "training/tbptt.py",
        "layer.detach_()",
        "pass",
        "test_tbptt.py",
    ),
    Mutation(
        "a resumed run starts from a zero state",
        "training/tbptt.py",
        "load_state_tensors(self._caches[True], tensors)",
        "pass",
        "test_resume.py",
    ),
    Mutation(
        "an evaluation uses the state of training",
        "training/tbptt.py",
        "cache = self._caches[module.training]",
        "cache = self._caches[True]",
        "test_tbptt.py",
    ),
    Mutation(
        "a lane begins a token late",
        "data/lanes.py",
        "lane_starts = lanes[:, None] * self.lane_length  #",
        "lane_starts = lanes[:, None] * self.lane_length + (lanes[:, None] > 0)  #",
        "test_data.py",
    ),
    Mutation(
        "a token belongs to the document before it",
        "data/streams.py",
        "torch.searchsorted(self.document_starts, indices, right=True) - 1]",
        "torch.searchsorted(self.document_starts, indices) - 1]",
        "test_data.py",
    ),
    Mutation(
        "an empty document separates two others twice",
        "data/streams.py",
        "if begins and len(ids) == 0:",
        "if False:",
        "test_data.py",
    ),
    Mutation(
        "a word that two rows share is counted twice",
        "data/streams.py",
        "self.within_word = not text[-1].isspace()",
        "self.within_word = False",
        "test_data.py",
    ),
    Mutation(
        "a text read backward begins with its first piece",
        "data/streams.py",
        "numpy.lexsort((-row, document))",
        "numpy.lexsort((row, document))",
        "test_direction.py",
    ),
    Mutation(
        "a pickle may name anything",
        "convert/pickles.py",
        "            self.refused[path] = None",
        "            pass",
        "test_convert_pickles.py",
    ),
    Mutation(
        "an old LSTM's second bias is lost",
        "convert/source.py",
        "biases = [biases[0] + biases[1]]",
        "biases = [biases[0]]",
        "test_convert.py",
    ),
    Mutation(
        "padding is made of a line end",
        "convert/vocabulary.py",
        'if self.unit != "words":',
        "if True:",
        "test_convert_vocabulary.py",
    ),
    Mutation(
        "half a character is shown",
        "decoding.py",
        "return self._characters(held + spelt)[0]",
        "return (held + spelt).decode(errors='replace')",
        "test_tokenizers.py",
    ),
    Mutation(
        "the first token of a text is predicted from another text",
        "evaluation/surprisal.py",
        "predicted[starts] = predicted[-1] = False",
        "predicted[-1] = False",
        "test_surprisal.py",
    ),
    Mutation(
        "bits per byte are nats per byte",
        "evaluation/corpus.py",
        'result["bits_per_byte"] = total / math.log(2) / stream.num_bytes',
        'result["bits_per_byte"] = total / stream.num_bytes',
        "test_evaluation.py",
    ),
    Mutation(
        "an evaluation leaves the model in evaluation mode",
        "evaluation/scoring.py",
        "model.train(was_training)",
        "pass",
        "test_evaluation.py",
    ),
    Mutation(
        "no gradient arrives from the layers above",
        "evaluation/gradients.py",
        "layer.activate_past_recording()",
        "pass",
        "test_gradient_flow.py",
    ),
    Mutation(
        "a gradient leaves out that by the cell",
        "evaluation/gradients.py",
        "_norm([h, *others])",
        "_norm([h])",
        "test_gradient_flow.py",
    ),
]

RUN = """
import sys, pytest
sys.path.insert(0, sys.argv[1])
import hf_lstm
assert hf_lstm.__file__.startswith(sys.argv[1]), hf_lstm.__file__
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning", *sys.argv[2:]]))
"""


def copy_checkout(folder: Path) -> None:
    """Copy the files that git knows or would add into a new folder."""
    folder.mkdir()
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)  # some tests ask git for the files
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)


def run_tests(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    fits = "tests/test_architecture.py::test_mutations_fit_the_code"  # it would notice each
    command = [sys.executable, "-c", RUN, str(folder), "--deselect", fits, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)


def main(names: list[str]) -> None:
    """Make each change and say which test notices it."""
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    survivors = []
    print("| wrong change | in | noticed by | seconds |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        unchanged = Path(temporary) / "unchanged"
        copy_checkout(unchanged)
        ran = run_tests(unchanged, *sorted({f"tests/{mutation.noticed_by}" for mutation in chosen}))
        if ran.returncode != 0:
            sys.exit(f"mutations.py: the tests fail without a change: mend them first.\n{ran.stdout[-2000:]}")
        for mutation in chosen:
            folder = Path(temporary) / "copy"
            copy_checkout(folder)
            mutation.apply(folder)
            start = time.perf_counter()
            ran = run_tests(folder, f"tests/{mutation.noticed_by}")
            if ran.returncode == 0:
                ran = run_tests(folder)
            failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", ran.stdout, flags=re.MULTILINE)
            if ran.returncode != 1 or failed is None:
                survivors.append(mutation.name)
                print(ran.stdout[-2000:], ran.stderr[-2000:], file=sys.stderr)
            noticed = f"`{failed[1].split('[')[0]}`" if failed else "**no test**"
            seconds = time.perf_counter() - start
            print(f"| {mutation.name} | {mutation.path} | {noticed} | {seconds:.0f} |", flush=True)
            shutil.rmtree(folder)
    if survivors:
        sys.exit(f"mutations.py: no test notices: {', '.join(survivors)}.")
    print(f"\nNoticed: {len(chosen)} of {len(chosen)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the changes to make; by default all")
    names = parser.parse_args().names
    if unknown := set(names) - {mutation.name for mutation in MUTATIONS}:
        parser.error(f"NAME ({', '.join(sorted(unknown))}) must be that of a change: see MUTATIONS in this file.")
    main(names)
