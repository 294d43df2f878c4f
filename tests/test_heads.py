"""Classifiers of texts and of tokens: each text gets its own logits, whatever stands beside it."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from hf_lstm import (
    LSTMConfig,
    LSTMForCausalLM,
    LSTMForSequenceClassification,
    LSTMForTokenClassification,
    LSTMModel,
    char_tokenizer,
)
from hf_lstm.hub import files_to_push

LENGTHS = [9, 5, 3, 1]
IDS = make_ids(4, 9)
POOLINGS = ["last", "max", "mean", "concat"]
KINDS = [LSTMForSequenceClassification, LSTMForTokenClassification]


def make_head(kind=LSTMForSequenceClassification, **config):
    """A random head whose batch norm has statistics, on the layers of `make_model`."""
    torch.manual_seed(0)
    config = {"vocab_size": 31, "hidden_size": 12, "num_labels": 3} | config
    model = kind(LSTMConfig(**config)).double().eval()
    shape = {key: value for key, value in config.items() if key != "num_labels"}
    model.model.load_state_dict(make_model(**shape).model.state_dict())
    if (norm := model.score.norm) is not None:
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return model


def padded(side, pad=0):
    ids, mask = torch.full_like(IDS, pad), torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(9 - length, 9)
        ids[row, place], mask[row, place] = IDS[row, :length], 1
    return ids, mask


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("classifier_hidden_size", [None, 5])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_nothing(pooling, classifier_hidden_size, side):
    model = make_head(classifier_pooling=pooling, classifier_hidden_size=classifier_hidden_size)
    alone = torch.cat([model(IDS[row : row + 1, :length]).logits for row, length in enumerate(LENGTHS)])
    ids, mask = padded(side)

    torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(ids).logits, alone, rtol=0, atol=1e-10)  # without a mask
    model.config.pad_token_id = 3  # the scripts of BabyLM set it to that of <eos>
    torch.testing.assert_close(model(padded(side, pad=3)[0]).logits, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shape_of_a_model_takes_a_head(name):
    model = make_head(**CONFIGS[name], classifier_pooling="concat")
    alone = torch.cat([model(IDS[row : row + 1, :length]).logits for row, length in enumerate(LENGTHS)])

    for side in ("left", "right"):
        ids, mask = padded(side)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone, rtol=0, atol=1e-10)
    assert model(IDS, output_hidden_states=True).hidden_states[-1].shape[-1] == model.config.output_size


@pytest.mark.parametrize("pooling", POOLINGS)
def test_outputs_are_pooled_by_the_equations(pooling):
    model = make_head(classifier_pooling=pooling)
    hidden = model.model(IDS).last_hidden_state
    parts = {"last": hidden[:, 8], "max": hidden.max(dim=1).values, "mean": hidden.sum(dim=1) / 9}
    pooled = torch.cat(list(parts.values()), dim=1) if pooling == "concat" else parts[pooling]

    expected = pooled @ model.score.out_proj.weight.T + model.score.out_proj.bias

    torch.testing.assert_close(model(IDS).logits, expected)


def test_the_block_is_that_of_ulmfit():
    model = make_head(classifier_hidden_size=5)
    head, x = model.score, model.model(IDS).last_hidden_state[:, -1]

    x = (x - head.norm.running_mean) / (head.norm.running_var + head.norm.eps).sqrt()
    x = (x @ head.dense.weight.T + head.dense.bias).clamp(min=0)

    torch.testing.assert_close(model(IDS).logits, x @ head.out_proj.weight.T + head.out_proj.bias)
    model.config.output_dropout = 0.5
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_a_text_may_hold_the_pad_id():
    """Where pad is <eos>: only the runs at the ends of a row are padding."""
    model = make_head(pad_token_id=3, classifier_pooling="mean")
    text = torch.tensor([[5, 3, 3, 6, 3, 7]])
    row = torch.tensor([[3, 3, 5, 3, 3, 6, 3, 7, 3]])

    torch.testing.assert_close(model(row).logits, model(text).logits, rtol=0, atol=1e-12)
    everything = model(text, attention_mask=torch.ones_like(text)).logits
    torch.testing.assert_close(model(text).logits, everything, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [True, False])
def test_a_text_of_no_token_is_refused(kind, masked):
    ids, mask = padded("right")
    ids[2], mask[2] = 0, 0

    with pytest.raises(ValueError, match="Row 2 of the batch holds no token"):
        make_head(kind)(ids, attention_mask=mask if masked else None)


@pytest.mark.parametrize("side", ["right", "left"])
def test_each_token_of_a_batch_gets_its_own_logits(side):
    model = make_head(LSTMForTokenClassification, classifier_hidden_size=5)
    ids, mask = padded(side)

    for inputs in ({"attention_mask": mask}, {}):
        logits = model(ids, **inputs).logits
        for row, length in enumerate(LENGTHS):
            alone = model(IDS[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(logits[row][mask[row] == 1], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_norm_learns_from_tokens_alone(side):
    """While training, padding changes neither the logits of tokens nor the running statistics."""
    ids, mask = padded(side)
    model, plain = (make_head(LSTMForTokenClassification, classifier_hidden_size=5).train() for _ in range(2))
    hidden = plain.model(ids, attention_mask=mask).last_hidden_state
    expected = plain.score(hidden[mask == 1])

    logits = model(ids, attention_mask=mask).logits

    torch.testing.assert_close(logits[mask == 1], expected)
    torch.testing.assert_close(model.score.norm.running_mean, plain.score.norm.running_mean)
    with pytest.raises(ValueError, match="The batch has 1 rows, and batch norm"):
        make_head(classifier_hidden_size=5).train()(IDS[:1])


@pytest.mark.parametrize("wrong", [3, -1, -101])
def test_labels_are_classes(wrong):
    labels, message = (
        torch.tensor([2, wrong, 1, 1]),
        f"`labels` hold {wrong}, and the 3 classes are numbered from 0 to 2",
    )
    for model, given in (
        (make_head(), labels),
        (make_head(LSTMForTokenClassification), labels[:, None].expand_as(IDS)),
    ):
        with pytest.raises(ValueError, match=message):
            model(IDS, labels=given)


def test_a_batch_without_classes_has_a_loss_of_zero():
    for model, shape in ((make_head(), (4,)), (make_head(LSTMForTokenClassification), IDS.shape)):
        for count in (None, 0, torch.tensor(0)):
            model.zero_grad()
            loss = model(IDS, labels=torch.full(shape, -100), num_items_in_batch=count).loss
            loss.backward()

            assert loss == 0
            assert not any(parameter.grad.any() for parameter in model.parameters())


def test_losses_are_those_of_their_labels():
    model, labels = make_head(), torch.tensor([2, 0, 1, 1])
    output = model(IDS, labels=labels)
    assert output.loss.item() == pytest.approx(F.cross_entropy(output.logits, labels).item())
    # Trainer, which accumulates gradients, gives the number of labels of all micro-batches.
    assert model(IDS, labels=labels, num_items_in_batch=8).loss.item() == pytest.approx(output.loss.item() / 2)

    several = make_head()
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]]).double()
    loss = several(IDS, labels=targets).loss.item()
    assert loss == pytest.approx(F.binary_cross_entropy_with_logits(several(IDS).logits, targets).item())
    assert several(IDS, labels=targets, num_items_in_batch=24).loss.item() == pytest.approx(loss / 2)

    tokens = make_head(LSTMForTokenClassification)
    labels = (IDS % 3).masked_fill(padded("right")[1] == 0, -100)
    output = tokens(IDS, labels=labels)
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_starts_anew_on_a_language_model_with_one_warning(tmp_path, caplog, auto, tied):
    language_model = make_model(tie_word_embeddings=tied)
    language_model.save_pretrained(tmp_path)

    model = auto.from_pretrained(tmp_path, num_labels=4, classifier_hidden_size=5, classifier_pooling="last")

    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]
    assert "score.out_proj.weight" in told
    assert "MISSING" in told
    assert type(model) in KINDS
    assert model.score.out_proj.weight.shape == (4, 5)
    assert model.score.out_proj.weight.any()
    assert model.config.vocab_size == 31
    for name, tensor in language_model.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor)
    model.save_pretrained(tmp_path / "head")
    again = auto.from_pretrained(tmp_path / "head")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.num_labels == 4


def test_a_head_is_whole_or_wholly_new(tmp_path):
    make_head(classifier_hidden_size=5, num_labels=2).save_pretrained(tmp_path)

    base = AutoModel.from_pretrained(tmp_path)

    assert type(base) is LSTMModel
    with pytest.raises(ValueError, match=r"other shapes .* leave `num_labels` out if you gave it"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    with pytest.raises(ValueError, match=r"contain, beside those of the model, score\."):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    make_head().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"lack score\.dense"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain", classifier_hidden_size=12)


def test_the_width_of_outputs_is_derived_and_never_saved(tmp_path):
    config = LSTMConfig(vocab_size=31, hidden_size=12, embedding_size=8)
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())

    assert LSTMForCausalLM(config).model(IDS).last_hidden_state.shape[-1] == config.output_size == 8
    assert "output_size" not in fields
    (tmp_path / "config.json").write_text(json.dumps(fields | {"output_size": 8}))
    with pytest.raises(ValueError, match=r"`output_size` \(8\) is derived from other fields"):
        LSTMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, -1])
def test_a_block_has_a_width(size):
    with pytest.raises(Exception, match=rf"`classifier_hidden_size` \({size}\) must be at least 1"):
        LSTMConfig(classifier_hidden_size=size)


def test_a_pipeline_classifies(tmp_path):
    tokenizer = char_tokenizer(["abc "])
    model = make_head(vocab_size=len(tokenizer)).float()
    texts = ["ab c", "b", "cab cab"]

    found = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(texts, batch_size=3)

    for text, label in zip(texts, found, strict=True):
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
        assert label["label"] == f"LABEL_{int(logits.argmax())}"
        assert label["score"] == pytest.approx(logits.softmax(dim=-1).max().item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_of_a_classifier_is_vouched_for_and_can_be_pushed(tmp_path, run, kind):
    make_head(kind, classifier_hidden_size=5).save_pretrained(tmp_path)
    char_tokenizer(["ab"]).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("a classifier")

    assert "All code is that of hf-lstm" in run("verify.py", "--model", tmp_path)
    assert tmp_path / "heads_lstm.py" in files_to_push(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "one", "1": "two"}}))
    with pytest.raises(ValueError, match=r"`score.out_proj.bias` must have the shape \[2\] and has \[3\]"):
        files_to_push(tmp_path)


ELSEWHERE = """
import sys
sys.modules["hf_lstm"] = None  # importing it raises, as where it is not installed
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto")
print(model(torch.tensor(eval(sys.argv[2]))).logits.tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("head", [True, False])
def test_a_head_travels(tmp_path, head):
    """With the code beside it; from a language model's folder too, whose copies hold the heads."""
    model = make_head() if head else make_model()
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-c", ELSEWHERE, tmp_path, str(IDS.tolist())]

    ran = subprocess.run(command, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    if head:
        logits = torch.tensor(json.loads(ran.stdout), dtype=torch.double)
        torch.testing.assert_close(logits, model(IDS).logits, rtol=0, atol=1e-12)
