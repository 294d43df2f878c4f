"""`scripts/evaluate.py privacy`: the library's figures as JSON, in a picture and on the model's card."""

import json
import math

import pandas
import pytest
import torch
from conftest import TEXT, make_model, run_script

from hf_lstm import TokenStream, char_tokenizer, load_corpus
from hf_lstm.evaluation import draw_passages, exposure, extraction
from hf_lstm.model_card import describe_run, write_model_card

TOKENIZER = char_tokenizer([TEXT])
CANARIES = pandas.DataFrame({"secret": ["007", "321", "999"], "count": [5, 0, 5]})
LENGTHS = ["--prefix_length", 20, "--suffix_length", 5, "--passages", 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "beer"
    model = make_model(torch.float32, vocab_size=len(TOKENIZER))
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    scores = {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.4, "accuracy": 0.5, "tokens": 99}
    write_model_card(folder, describe_run(folder, model, "beer", {"validation": scores}, "One step.", "train"))
    return folder


@pytest.fixture
def evaluate(run, folder, text_file):
    return lambda *options: run("evaluate.py", "privacy", "--model", folder, "--train_file", text_file, *options)


def test_the_figures_are_the_librarys(evaluate, folder, text_file, tmp_path):
    CANARIES.to_csv(tmp_path / "canaries.csv", index=False)
    options = ["--canaries", tmp_path / "canaries.csv", "--template", "{} bottles", "--card", "true"]
    options += ["--picture", tmp_path / "exposure.png", "--n", 1000, "--p", 0.1]

    result = json.loads(evaluate(*LENGTHS, *options))

    model, corpus = make_model(torch.float32, vocab_size=len(TOKENIZER)), load_corpus(text_file)
    for name, split in (("training", "train"), ("unseen", "validation")):
        stream = TokenStream.from_documents(corpus[split], TOKENIZER)
        found = extraction(model, draw_passages(stream, 30, 25), 20, n=1000, p=0.1)
        assert result["extraction"][name] == found
    rows = exposure(model, TOKENIZER, "{} bottles", "0123456789", 3, CANARIES["secret"].tolist())
    assert [row["rank"] for row in result["exposure"]["secrets"]] == rows["rank"].tolist()
    assert result["exposure"]["most"] == pytest.approx(math.log2(1000))
    five = result["exposure"]["by_count"]["5"]
    assert five["mean"] == pytest.approx((rows["exposure"][0] + rows["exposure"][2]) / 2)
    assert five["standard_error"] == pytest.approx(abs(rows["exposure"][0] - rows["exposure"][2]) / 2)
    assert result["exposure"]["by_count"]["0"]["standard_error"] is None
    assert (tmp_path / "exposure.png").stat().st_size > 5_000
    card = (folder / "README.md").read_text()
    extractable = [result["extraction"][name]["extractable"] for name in ("training", "unseen")]
    assert (
        f"{extractable[0]} of 30 training passages of 5 tokens are (1000, 0.1)-extractable from the 20 tokens before them; "
        f"on unseen text {extractable[1]} of 30." in card
    )
    assert f"5: {five['mean']:.2f} (unseen: 1.44, at most 9.97)" in card
    assert "secrets" not in json.loads((folder / "run.json").read_text())["memorisation"]["exposure"]


def test_without_canaries_there_is_no_exposure(evaluate):
    result = json.loads(evaluate(*LENGTHS, "--temperature", 0.5, "--top_k", 5))

    assert set(result) == {"extraction"}
    assert (result["extraction"]["temperature"], result["extraction"]["top_k"]) == (0.5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--template", "{} bottles"], "belong together"),
        (["--picture", "a.png"], "`--picture` shows the exposure of canaries"),
        (["--canaries", "canaries.csv", "--template", "bottles"], "has 0 slots"),
        (["--canaries", "other.csv", "--template", "{}"], "must have rows with a `secret` and a `count`"),
        (["--n", 0], "`n` (0) must be at least 1"),
        (["--prefix_length", 50_000], "No document has the 50005 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(evaluate, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    CANARIES.to_csv("canaries.csv", index=False)
    CANARIES[["secret"]].to_csv("other.csv", index=False)

    with pytest.raises(SystemExit, match=r"evaluate\.py:") as ended:
        evaluate(*LENGTHS, *options)

    assert message in str(ended.value)


def test_a_card_needs_the_run_it_is_of(folder, text_file, tmp_path):
    bare = tmp_path / "bare"
    make_model(torch.float32, vocab_size=len(TOKENIZER)).save_pretrained(bare)
    TOKENIZER.save_pretrained(bare)

    with pytest.raises(SystemExit, match=r"`--card` needs the run\.json"):
        run_script("evaluate.py", "privacy", "--model", bare, "--train_file", text_file, *LENGTHS, "--card", "true")
