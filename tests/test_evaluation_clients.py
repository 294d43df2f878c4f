"""lm-evaluation-harness and minicons agree with our evaluation (`pip install -e ".[clients]"`)."""

import copy
import json
import math

import numpy
import pytest
import torch
from conftest import make_model

from hf_lstm import bpe_tokenizer, surprisal

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

TEXTS = [
    "the horse raced past the barn fell",
    "the old man the boat",
    "a horse is a horse",
    "the barn fell on the old man, the boat and the horse; " * 60,  # a long one
]
QUESTIONS = [
    {"question": "the old man the", "choices": [" boat", " barn fell"], "gold": 0},
    {"question": "the horse raced past the", "choices": [" man", " old", " barn"], "gold": 2},
]
TASKS = {
    "rolling": (
        [{"text": text} for text in TEXTS],
        """
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{text}}'
metric_list:
- metric: bits_per_byte
""",
    ),
    "choosing": (
        QUESTIONS,
        """
output_type: multiple_choice
doc_to_text: '{{question}}'
doc_to_choice: '{{choices}}'
doc_to_target: gold
target_delimiter: ''
metric_list:
- metric: acc
""",
    ),
    "writing": (
        QUESTIONS,
        """
output_type: generate_until
doc_to_text: '{{question}}'
doc_to_target: ' x'
generation_kwargs: {max_gen_toks: 8, do_sample: false, until: ['@']}
metric_list:
- metric: exact_match
""",
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer(TEXTS * 3, vocab_size=290)


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(torch.float32, vocab_size=len(tokenizer), hidden_size=24)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """Results of all three kinds of request, for local tasks, with `--model hf`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = tmp_path_factory.mktemp("tasks")
    for name, (records, rules) in TASKS.items():
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (tasks / f"{name}.yaml").write_text(
            f"task: hf_lstm_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{tasks / name}.jsonl'}}}}\n"
            f"test_split: test\n{rules}"
        )
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},device=cpu,dtype=float32,trust_remote_code=True",
        tasks=["hf_lstm_rolling", "hf_lstm_choosing", "hf_lstm_writing"],
        task_manager=TaskManager(include_path=str(tasks)),
        batch_size=2,
        bootstrap_iters=0,
        log_samples=True,
    )


def responses(results, task):
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [[response[0] for response in sample["resps"]] for sample in samples]


def test_the_harness_finds_the_same_rolling_log_likelihoods(results, model, tokenizer):
    tokens = surprisal(model, tokenizer, TEXTS, math.e, start_token="<bos>")
    expected = -tokens.groupby("text")["surprisal"].sum()

    found = [response[0] for response in responses(results, "hf_lstm_rolling")]

    numpy.testing.assert_allclose(found[:3], expected[:3], rtol=1e-4)
    assert len(tokenizer(TEXTS[3])["input_ids"]) < 2048  # within what the harness reads at once
    numpy.testing.assert_allclose(found[3], expected[3], rtol=1e-4)
    bits = results["results"]["hf_lstm_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-expected.sum() / math.log(2) / sum(len(text.encode()) for text in TEXTS), rel=1e-4)


def test_the_harness_reads_a_long_text_whole_with_max_length(folder, model, tokenizer):
    """The default is 2,048 tokens, because neither config nor tokenizer sets a maximum."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    text = TEXTS[3] * 3
    expected = -surprisal(model, tokenizer, [text], math.e, start_token="<bos>")["surprisal"].sum()
    options = {"pretrained": str(folder), "device": "cpu", "dtype": "float32", "trust_remote_code": True}
    request = Instance("loglikelihood_rolling", {}, (text,), 0)

    stock, whole, cut = HFLM(**options), HFLM(**options, max_length=100_000), HFLM(**options, max_length=7)

    assert len(tokenizer(text)["input_ids"]) > 2048 == stock.max_length
    assert whole.loglikelihood_rolling([request])[0] == pytest.approx(expected, rel=1e-5)
    assert cut.loglikelihood_rolling([request])[0] != pytest.approx(expected, rel=1e-3)


def test_the_harness_finds_the_same_choices(results, model, tokenizer):
    right = 0
    for question, found in zip(QUESTIONS, responses(results, "hf_lstm_choosing"), strict=True):
        start = len(question["question"])
        scores = []
        for choice, response in zip(question["choices"], found, strict=True):
            tokens = surprisal(model, tokenizer, [question["question"] + choice], math.e)
            scores.append(-tokens[tokens["start"] >= start]["surprisal"].sum())
            log_probability = response[0] if isinstance(response, (list, tuple)) else response
            assert log_probability == pytest.approx(scores[-1], rel=1e-4)
        right += max(range(len(scores)), key=scores.__getitem__) == question["gold"]

    assert results["results"]["hf_lstm_choosing"]["acc,none"] == right / len(QUESTIONS)


def test_the_harness_generates_the_same_greedy_text(results, model, tokenizer):
    for question, (written,) in zip(QUESTIONS, responses(results, "hf_lstm_writing"), strict=True):
        prompt = tokenizer(question["question"], return_tensors="pt")
        expected = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        assert written == tokenizer.decode(expected[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_harness_encodes_special_tokens_in_text(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), device="cpu")

    assert harness.tok_encode("the<eos>horse") == [*tokenizer("the")["input_ids"], 3, *tokenizer("horse")["input_ids"]]


@pytest.mark.parametrize("with_bos", [False, True])
def test_minicons_finds_the_same_surprisals(model, tokenizer, with_bos):
    from minicons.scorer import IncrementalLMScorer

    scorer = IncrementalLMScorer(model, "cpu", tokenizer=copy.deepcopy(tokenizer))  # it types "<bos>" and pads

    found = scorer.token_score(TEXTS[:3], surprisal=True, base_two=True, bos_token=with_bos)

    ids = scorer.encode(TEXTS[:3], bos_token=with_bos)["input_ids"]
    tokens = surprisal(model, tokenizer, TEXTS[:3], start_token="<bos>" if with_bos else None)
    for number, text in enumerate(found):
        read = [index for index in ids[number].tolist() if index != tokenizer.pad_token_id]
        assert read == [2] * with_bos + tokenizer(TEXTS[number])["input_ids"]
        expected = tokens[tokens["text"] == number]["surprisal"].to_numpy()
        scores = [score for _, score in text][1:]  # its first, of the first token or of <bos>, is 0
        numpy.testing.assert_allclose(scores, expected if with_bos else expected[1:], rtol=1e-4)
