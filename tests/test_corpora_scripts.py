"""scripts/train.py on every kind of tokenizer, batch and corpus; what it says of them, and what it refuses."""

import json
from pathlib import Path

import pytest
from conftest import SMALL, TEXT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lstm import char_tokenizer

POEMS = [f"第{number}首，春風又綠江南岸。\n明月何時照我還？" for number in range(60)]


@pytest.fixture
def poems(tmp_path):
    path = tmp_path / "poems.jsonl"
    path.write_text("".join(json.dumps({"text": poem}) + "\n" for poem in POEMS), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["byte"], "vocabulary of 260"),
        (["char", "--byte_fallback", "true"], "vocabulary of 286"),
        (["char", "--nfc", "true"], "vocabulary of 30"),
        (["word"], "vocabulary of 101"),
        (["unicode_word", "--vocab_size", "50"], "vocabulary of 50"),
        (["bpe", "--vocab_size", "280"], "vocabulary of 280"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_tokenizer_trains_and_writes(run, tmp_path, text_file, flags, expected):
    folder = tmp_path / "run"
    printed = run(
        *("train.py", "--train_file", text_file, "--output_dir", folder, "--max_steps", 2, *SMALL),
        *("--bptt_length", 8, "--per_device_train_batch_size", 2, "--tokenizer", *flags),
    )

    assert expected in printed
    assert "tokens per byte" in printed
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_bits_per_byte"] > 0
    written = run("generate.py", "--model", folder, "--prompt", "99 bottles", "--max_new_tokens", 5)
    assert written
    measured = json.loads(
        run("evaluate.py", "stream", "--model", folder, "--file", text_file, "--split", "validation")
    )
    assert measured["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def foreign_tokenizers():
    """Of the kinds that the Hub has: as GPT-2's, without `<pad>`, and as BERT's, without `<eos>`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    gpt2 = Tokenizer(models.BPE())
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.decoder = decoders.ByteLevel()
    gpt2.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"]))
    specials = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    yield "gpt2", PreTrainedTokenizerFast(tokenizer_object=gpt2, **specials)

    bert = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bert.normalizer = normalizers.BertNormalizer()
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bert.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    bert.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=80, special_tokens=names))
    bert.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert.enable_truncation(4)  # as some files on the Hub do
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    yield "bert", PreTrainedTokenizerFast(tokenizer_object=bert, **dict(zip(roles, names, strict=True)))


@pytest.mark.parametrize(("name", "tokenizer"), list(foreign_tokenizers()), ids=["gpt2", "bert"])
@pytest.mark.parametrize("batching", ["lanes", "padded"])
def test_tokenizers_of_others_work_in_all_scripts(run, tmp_path, text_file, name, tokenizer, batching):
    tokenizer.save_pretrained(tmp_path / name)
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    folder = tmp_path / "run"

    run(
        *("train.py", "--train_file", lines, "--output_dir", folder, "--max_steps", 2, *SMALL, "--prompt", "99"),
        *("--bptt_length", 8, "--tokenizer", tmp_path / name, "--batching", batching),
    )

    assert run("generate.py", "--model", folder, "--prompt", "99 bottles", "--max_new_tokens", 5)
    measured = json.loads(run("evaluate.py", "stream", "--model", folder, "--file", lines))
    assert measured["tokens"] > 800  # nothing was cut off
    assert AutoTokenizer.from_pretrained(folder).eos_token == ("[SEP]" if name == "bert" else "<|endoftext|>")


@pytest.mark.parametrize("batching", ["packed", pytest.param("padded", marks=pytest.mark.slow)])
def test_documents_train_and_resume(run, tmp_path, poems, batching):
    runs = [tmp_path / "whole", tmp_path / "broken"]
    common = ["--train_file", poems, "--batching", batching, "--prompt", "", "--max_steps", 12, *SMALL]
    common += ["--save_total_limit", 5]
    for folder in runs:
        printed = run("train.py", "--output_dir", folder, *common)
    for step in (8, 12):
        for path in (runs[1] / f"checkpoint-{step}").iterdir():
            path.unlink()
        (runs[1] / f"checkpoint-{step}").rmdir()
    run("train.py", "--output_dir", runs[1], "--resume_from_checkpoint", "true", *common)

    assert f"validation, {batching}," in printed
    assert f"12 steps of 4 documents, {batching}" in (runs[0] / "README.md").read_text()
    for name, tensor in load_file(runs[0] / "model.safetensors").items():
        assert (load_file(runs[1] / "model.safetensors")[name] == tensor).all()


def test_a_run_goes_on_with_its_own_data_only(run, tmp_path, text_file):
    """Another text of the same length, or another kind of batch, is refused in one sentence."""
    folder, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text(TEXT.replace("99", "98"))
    run("train.py", "--output_dir", folder, "--train_file", text_file, "--max_steps", 8, *SMALL)
    resume = ["--output_dir", folder, "--resume_from_checkpoint", "true", "--max_steps", 12, *SMALL]

    with pytest.raises(SystemExit, match=r"train.py: `digest` was .* resume with the same model, text") as stopped:
        run("train.py", "--train_file", other, *resume)
    assert "\n" not in str(stopped.value)
    with pytest.raises(SystemExit, match="holds no complete checkpoint"):
        run("train.py", "--train_file", text_file, "--batching", "packed", *resume)


def test_shuffled_poems_learn_other_batches(run, tmp_path, poems):
    metrics = []
    for shuffle in ("true", "false"):
        folder = tmp_path / shuffle
        flags = ["--shuffle_documents", shuffle, "--prompt", "", "--max_steps", 4, *SMALL]
        run("train.py", "--train_file", poems, "--output_dir", folder, *flags)
        metrics.append(json.loads((folder / "metrics.json").read_text())["eval_loss"])

    assert metrics[0] != metrics[1]


def test_streamed_poems_train_and_resume(run, tmp_path, poems):
    runs = [tmp_path / "whole", tmp_path / "broken"]
    flags = ["--train_file", poems, "--validation_file", poems, "--streaming", "true", "--shuffle_documents", "true"]
    flags += ["--prompt", "", "--max_steps", 12, *SMALL]
    for folder in runs:
        printed = run("train.py", "--output_dir", folder, *flags)
    (runs[1] / "checkpoint-12" / "lstm_state_rank0.safetensors").unlink()
    run("train.py", "--output_dir", runs[1], "--resume_from_checkpoint", "true", *flags)

    assert "train: streamed" in printed
    for name, tensor in load_file(runs[0] / "model.safetensors").items():
        assert (load_file(runs[1] / "model.safetensors")[name] == tensor).all()
    assert AutoModelForCausalLM.from_pretrained(runs[0]).generation_config.bos_token_id == 3


def test_a_mismatched_corpus_is_warned_of_once(run, tmp_path, text_file, poems, monkeypatch):
    warnings = []
    monkeypatch.setattr("sys.stderr.write", warnings.append, raising=False)
    common = ["--max_steps", 1, *SMALL, "--bptt_length", 8]
    other = tmp_path / "other.txt"
    other.write_text("ÄÖÜ" * 40 + TEXT)
    char_tokenizer([chr(0x4E00 + index) for index in range(3000)] + POEMS).save_pretrained(tmp_path / "large")

    def train(name, *flags):
        warnings.clear()
        run("train.py", "--output_dir", tmp_path / name, *common, *flags)
        return [line for line in "".join(warnings).splitlines() if line.startswith("Warning: ")]

    assert train("fine", "--train_file", text_file) == []
    (unknown,) = train("unknown", "--train_file", other, "--validation_file", poems, "--prompt", "9")
    assert "83.2% of the validation tokens are unknown" in unknown
    (unused,) = train("unused", "--train_file", poems, "--tokenizer", tmp_path / "large", "--prompt", "")
    assert "tokens of the vocabulary never occur in the training data" in unused
    (inside,) = train("inside", "--train_file", poems, "--validation_file", poems, "--prompt", "")
    assert "8 of 8 passages of the validation data stand in the training data too" in inside


BAD = {
    "no batching": (["--batching", "rows"], "`--batching` rows must be `lanes`, `packed` or `padded`"),
    "lanes or not": (
        ["--batching", "packed", "--random_bptt", "true"],
        "`--random_bptt` belongs to lanes: leave it out, or `--batching` packed",
    ),
    "a fallback of words": (
        ["--tokenizer", "word", "--byte_fallback", "true"],
        "`--byte_fallback` means nothing to `--tokenizer` word: it is for char",
    ),
    "a size of characters": (["--vocab_size", "99"], "`--vocab_size` means nothing to `--tokenizer` char"),
    "a small vocabulary": (
        ["--train_file", "beer.txt", "--tokenizer", "bpe", "--vocab_size", "100"],
        "`vocab_size` (100) must be at least 261, to hold the 4 special tokens, 256 bytes and a pair",
    ),
    "streaming without end": (
        ["--train_file", "beer.txt", "--validation_file", "beer.txt", "--streaming", "true", "--max_steps", "-1"],
        "`--streaming` needs `--max_steps`",
    ),
    "streaming without validation": (
        ["--train_file", "beer.txt", "--streaming", "true"],
        "`--streaming` needs `--validation_file`",
    ),
    "streaming nothing": (["--streaming", "true"], "`--streaming` needs a corpus"),
    "shuffling one text": (
        ["--train_file", "beer.txt", "--shuffle_documents", "true"],
        "A stream of a single document cannot be shuffled",
    ),
    "NUL": (["--train_file", "nul.txt"], "nul.txt is not text, since byte 9 is NUL"),
    "not JSON": (["--train_file", "broken.jsonl"], "broken.jsonl cannot be read as jsonl: line 3 is not JSON"),
    "mixed records": (["--train_file", "mixed.jsonl"], "mixed.jsonl has no `text` in line 2, only body"),
    "no records": (["--train_file", "list.jsonl"], "line 2 is list, not an object"),
    "no text": (["--train_file", "blank.jsonl"], "The corpus holds fewer than two documents with text"),
    "no text to learn from": (
        ["--train_file", "blank.jsonl", "--validation_file", "beer.txt"],
        "`texts` contain no characters",
    ),
    "no text for bytes": (
        ["--train_file", "blank.jsonl", "--validation_file", "beer.txt", "--tokenizer", "byte"],
        "The corpus holds no text, since every document is empty",
    ),
    "no text to stream": (
        ["--train_file", "blank.jsonl", "--validation_file", "beer.txt", "--tokenizer", "byte", "--streaming", "true"],
        "Process 0 of 1 finds no text",
    ),
    "not UTF-8, streamed": (
        ["--train_file", "latin.txt", "--validation_file", "beer.txt", "--tokenizer", "byte", "--streaming", "true"],
        "latin.txt is not UTF-8 (byte 100003: ",
    ),
    "an unset variable": (["--train_file", ""], "`--train_file` is empty: name a corpus, or leave the flag out"),
    "a folder below a file": (["--output_dir", "beer.txt/run"], "`--output_dir` beer.txt/run cannot be made"),
    "little for validation": (
        ["--train_file", "beer.txt", "--bptt_length", "600"],
        "`--bptt_length` (600) must be at most 512 for the validation text, which has 513 tokens: lower it, or give",
    ),
    "two texts": (
        ["beer.txt", "blank.jsonl"],
        "`beer.txt` is one text too many: name one file, a folder, or a pattern",
    ),
    "no such folder": (
        ["--train_file", "books"],
        "`--train_file` books does not exist: name a file, a folder or a pattern, or a data set on the Hub by",
    ),
    "a pattern of nothing": (["--train_file", "*.tex"], "No file matches *.tex: correct the pattern"),
    "an empty folder": (["--train_file", "empty"], "The folder empty holds neither a .txt file nor a data set"),
    "another delimiter": (
        ["--train_file", "rows.csv"],
        "columns seem to be separated by ';', so add `--csv_delimiter ';'`",
    ),
    "no such encoding": (
        ["--train_file", "beer.txt", "--encoding", "utf-81"],
        "`encoding` (utf-81) must be an encoding of text that Python knows",
    ),
    "half a prompt": (["--prompt", "a\udcff"], "`--prompt` 'a\\udcff' is not UTF-8"),
    "not UTF-8": (
        ["--train_file", "latin.txt"],
        "latin.txt is not UTF-8 (byte 100003: invalid continuation byte): name its encoding, such as `--encoding cp1252`",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_corpora_are_refused_before_training(run, tmp_path, text_file, monkeypatch, case):
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    Path("nul.txt").write_bytes(b"some text\0\0\0\0\0")
    Path("broken.jsonl").write_text('{"text": "a"}\n\n{"text": \n{"text": "b"}\n')
    Path("mixed.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n' * 3)
    Path("list.jsonl").write_text('{"text": "a"}\n["b"]\n')
    Path("blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n{"text": ""}\n')
    Path("empty").mkdir()
    Path("rows.csv").write_text("id;text\n1;one, two\n")
    Path("latin.txt").write_bytes(b"x" * 100_000 + b"caf\xe9 au lait" * 99)

    with pytest.raises(SystemExit) as stopped:
        run(
            "train.py",
            *(() if "--output_dir" in arguments else ("--output_dir", "run")),
            "--max_steps",
            1,
            *SMALL,
            *arguments,
        )

    assert str(stopped.value).startswith("train.py: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not Path("run").exists()


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path, text_file, poems):
    folder = tmp_path / "run"
    run("train.py", "--train_file", text_file, "--output_dir", folder, "--max_steps", 1, *SMALL)
    char_tokenizer([chr(0x4E00 + index) for index in range(300)] + [TEXT, *POEMS]).save_pretrained(folder)

    with pytest.raises(
        SystemExit, match=r"evaluate.py: The tokenizer has ids up to \d+, and the model a vocabulary of"
    ):
        run("evaluate.py", "stream", "--model", folder, "--file", poems)
    with pytest.raises(SystemExit, match=r"generate.py: The tokenizer gives the token id \d+"):
        run("generate.py", "--model", folder, "--prompt", "一丁丂")
