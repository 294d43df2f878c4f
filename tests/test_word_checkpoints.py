"""Checkpoints by the number of words read: complete folders at the words of the schedule, however often a run is killed."""

import json

import pytest
import torch
from conftest import SMALL, TEXT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from hf_lstm import LaneDataset, LSTMConfig, LSTMForCausalLM, TokenStream, byte_tokenizer
from hf_lstm.training import LSTMTrainingArguments, TruncatedBPTTCallback
from hf_lstm.training.words import BABYLM, WordCheckpointCallback, checkpoint_name

WORDS = len(TEXT.split())


@pytest.fixture
def train(tmp_path, run):
    """Run train.py on TEXT."""
    (tmp_path / "train.txt").write_text(TEXT)
    files = ["--train_file", tmp_path / "train.txt", "--validation_file", tmp_path / "train.txt"]

    def train(*more):
        run("train.py", *files, *SMALL, "--num_train_epochs", 2, "--output_dir", tmp_path / "run", *more)

    return train


def train_twice(folder, schedule, **options):
    """Two epochs of five steps by the stock Trainer, on a corpus of 100 words."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(hidden_size=8, num_hidden_layers=1))
    stream = TokenStream.from_documents(["the horse raced past the barn fell " * 7], tokenizer)
    arguments = LSTMTrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        save_steps=2,
        save_strategy=options.pop("save_strategy", "steps"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    callbacks = [
        TruncatedBPTTCallback(),
        WordCheckpointCallback(schedule, 100, tokenizer, options.pop("as_far_as_read", False)),
        *options.pop("callbacks", ()),
    ]
    lanes = LaneDataset(stream, lanes=2, bptt_length=len(stream) // 10)
    assert len(lanes) == 10
    Trainer(model, arguments, train_dataset=lanes, callbacks=callbacks).train(**options)
    return model


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_schedule_is_that_of_babylm():
    assert [checkpoint_name(words) for words in BABYLM] == [
        f"chck_{number}M" for number in (*range(1, 11), *range(20, 101, 10), *range(200, 1001, 100))
    ]


def test_no_two_numbers_of_words_share_a_name():
    names = {
        50: "0.05K",
        500: "0.5K",
        1000: "1K",
        250_000: "250K",
        999_999: "999.999K",
        1e6: "1M",
        1_000_001: "1.000001M",
    }

    assert {words: checkpoint_name(words) for words in names} == {words: f"chck_{names[words]}" for words in names}
    numbers = [10**power + more for power in range(8) for more in range(-1, 2) if 10**power + more > 0]
    assert len({checkpoint_name(words) for words in numbers}) == len(set(numbers))


def test_a_run_leaves_complete_folders_at_their_words(tmp_path):
    """A step of five reads 20 words: 50 are read in step 3, 100 in step 5, 200 in the last."""
    model = train_twice(tmp_path, [50, 60, 200, 100])

    names = [checkpoint_name(words) for words in (50, 60, 100, 200)]
    assert sorted(path.name for path in tmp_path.glob("chck_*")) == sorted(names)
    saved = [weights(tmp_path / name) for name in names]
    assert all(tensor.equal(saved[1][key]) for key, tensor in saved[0].items())
    assert not any(tensor.equal(saved[2][key]) for key, tensor in saved[0].items())
    assert all(tensor.equal(model.state_dict()[key]) for key, tensor in saved[3].items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / names[0])
    assert loaded.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / names[0]))
    assert (tmp_path / names[0] / "modeling_lstm.py").is_file()


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_a_killed_run_resumes_its_schedule(tmp_path):
    """Killed in step 7, it resumes from step 6, though it has written the folder of 140 words."""
    whole, killed, schedule = tmp_path / "whole", tmp_path / "killed", [50, 140, 160, 200]
    train_twice(whole, schedule)
    with pytest.raises(KeyboardInterrupt):
        train_twice(killed, schedule, callbacks=[Kill()])
    names = sorted(path.name for path in whole.glob("chck_*"))
    assert len(list(killed.glob("chck_*"))) == 2
    (killed / f"{checkpoint_name(160)}.unfinished").mkdir()

    train_twice(killed, schedule, resume_from_checkpoint=str(killed / "checkpoint-6"))

    assert sorted(path.name for path in killed.glob("chck_*")) == names
    for name in names:
        expected = weights(whole / name)
        assert all(tensor.equal(expected[key]) for key, tensor in weights(killed / name).items())


def test_a_resumed_run_writes_no_folder_for_words_that_it_read_before(tmp_path):
    """Else `chck_0.05K` would hold the weights after 160 words."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train_twice(whole, [50, 140, 200])
    moved.mkdir()
    (whole / "checkpoint-6").rename(moved / "checkpoint-6")

    train_twice(moved, [50, 140, 200], resume_from_checkpoint=str(moved / "checkpoint-6"))

    assert {path.name for path in moved.glob("chck_*")} == {checkpoint_name(140), checkpoint_name(200)}


def test_a_preset_ends_with_the_run(tmp_path):
    train_twice(tmp_path, [50, 150, 1000], as_far_as_read=True)

    assert {path.name for path in tmp_path.glob("chck_*")} == {checkpoint_name(50), checkpoint_name(150)}


def test_a_schedule_beyond_the_run_is_refused(train):
    with pytest.raises(
        SystemExit, match=f"The run reads {2 * WORDS:,} words, and a checkpoint is wanted after 100,000"
    ):
        train("--checkpoint_at_words", "1e5")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["one"], "`--checkpoint_at_words` one must be numbers, or `babylm` alone"),
        (["9", "0.4"], "The number of words 0.4 must be whole: give 1e6 for a million"),
        (["0"], r"The numbers of words \[0.0\] must be above 0"),
        (["babylm"], r"The run reads [\d,]+ words, and a checkpoint is wanted after 1,000,000: leave it out"),
        (
            ["9", "--word_counts", "counts.txt"],
            "holds 2 numbers, and the training data 1 documents: write one for each",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(train, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counts.txt").write_text("12\n5\n")

    with pytest.raises(SystemExit, match=message):
        train("--checkpoint_at_words", *flags)


def test_chinese_words_are_counted_by_a_file(tmp_path, run):
    poems = [{"text": "春眠不覺曉處處聞啼鳥夜來風雨聲花落知多少\n" * 4} for _ in range(20)]
    file = tmp_path / "poems.jsonl"
    file.write_text("".join(json.dumps(poem) + "\n" for poem in poems))
    (tmp_path / "counts.txt").write_text("50\n" * 20)
    command = ["train.py", "--train_file", file, "--validation_file", file, *SMALL, "--max_steps", 4]
    command += ["--output_dir", tmp_path / "run"]
    command += ["--prompt", "", "--checkpoint_at_words", "50"]

    with pytest.raises(SystemExit, match="counts words between white space, which this text does not write"):
        run(*command)
    run(*command, "--word_counts", tmp_path / "counts.txt")

    assert (tmp_path / "run/chck_0.05K/config.json").is_file()


@pytest.mark.parametrize("words", [0, -5])
def test_a_corpus_without_words_is_refused(words):
    with pytest.raises(ValueError, match=f"The corpus holds {words} words"):
        WordCheckpointCallback([1], words)
