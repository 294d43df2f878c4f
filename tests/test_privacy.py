"""Exposure and extraction are those of brute force, and what cannot be measured is refused."""

import itertools
import math
import random

import numpy
import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from transformers import GenerationConfig

from hf_lstm import TokenStream, bpe_tokenizer, byte_tokenizer, char_tokenizer, surprisal
from hf_lstm.evaluation import (
    draw_passages,
    exposure,
    extraction,
    insert_canaries,
    privacy,
    suffix_probability,
)

TEMPLATE, DIGITS = "the key is {}. it is!", "0123456789"
CHARACTERS = char_tokenizer([TEMPLATE + DIGITS])
PIECES = bpe_tokenizer(["the key is 101. it is! 010", "the key is 001. it is! 110"] * 20, vocab_size=280)


def small_model(tokenizer=CHARACTERS, **config):
    return make_model(**{"vocab_size": len(tokenizer), "hidden_size": 8} | config)


def brute_force(model, tokenizer, template, alphabet, length, start_token=None):
    """The loss of every candidate, each text read whole."""
    texts = [template.format("".join(letters)) for letters in itertools.product(alphabet, repeat=length)]
    rows = surprisal(model, tokenizer, texts, math.e, start_token)
    return rows.groupby("text")["surprisal"].sum().to_numpy()


# A slot in the middle, at the end and at the beginning; candidates of several lengths in pieces of words.
@pytest.mark.parametrize("start_token", [None, "<eos>"])
@pytest.mark.parametrize(
    ("tokenizer", "template", "alphabet", "length"),
    [
        (CHARACTERS, TEMPLATE, "0123", 3),
        (CHARACTERS, "the key is {}", "01", 1),
        (byte_tokenizer(), "{} is the key", "aé", 2),
        (PIECES, "the key is {}. it is!", "01 ", 3),
    ],
)
def test_losses_and_ranks_are_those_of_brute_force(tokenizer, template, alphabet, length, start_token, monkeypatch):
    monkeypatch.setattr(privacy, "MAX_ROWS", 5)
    model = small_model(tokenizer)
    secrets = ["".join(letters) for letters in itertools.product(alphabet, repeat=length)][::-1]

    rows = exposure(model, tokenizer, template, alphabet, length, secrets, start_token)

    losses = brute_force(model, tokenizer, template, alphabet, length, start_token)[::-1]
    numpy.testing.assert_allclose(rows["loss"], losses, rtol=1e-10)
    assert rows["secret"].tolist() == secrets
    assert rows["rank"].tolist() == [
        sum(losses < own - 1e-12) + (sum(abs(losses - own) < 1e-12) + 1) / 2 for own in losses
    ]
    numpy.testing.assert_allclose(rows["exposure"], math.log2(len(secrets)) - numpy.log2(rows["rank"]))
    assert set(rows["method"]) == {"enumeration"}


@pytest.mark.parametrize("config", CONFIGS)
def test_each_kind_of_model_is_read_as_a_tree(config):
    model = make_model(**CONFIGS[config])

    rows = exposure(model, CHARACTERS, TEMPLATE, "01", 2, ["01", "10"])

    losses = brute_force(model, CHARACTERS, TEMPLATE, "01", 2)
    numpy.testing.assert_allclose(rows["loss"], losses[[1, 2]], rtol=1e-10)


def test_a_model_that_reads_backward_shares_the_end_of_the_template():
    model = small_model(direction="backward")

    rows = exposure(model, CHARACTERS, TEMPLATE, "012", 2, ["21"], "<eos>")

    losses = brute_force(model, CHARACTERS, TEMPLATE, "012", 2, "<eos>")
    assert rows["loss"][0] == pytest.approx(losses[7], rel=1e-10)
    assert rows["rank"][0] == (losses <= losses[7]).sum()


def test_ten_thousand_candidates_are_ranked_as_by_brute_force_and_1_442_is_the_mean_of_the_unseen():
    """log2 |R| - log2(|R|!) / |R|, the mean over all ranks."""
    model = small_model(num_hidden_layers=1)
    generator = random.Random(0)
    secrets = [f"{number:04}" for number in generator.sample(range(10_000), 200)]

    rows = exposure(model, CHARACTERS, "key {}", DIGITS, 4, secrets)

    losses = brute_force(model, CHARACTERS, "key {}", DIGITS, 4)
    own = losses[[int(secret) for secret in secrets]]
    assert rows["rank"].tolist() == [(losses <= one).sum() for one in own]
    expected = math.log2(10_000) - math.lgamma(10_001) / math.log(2) / 10_000
    assert expected == pytest.approx(1.442, abs=1e-3)
    error = rows["exposure"].std() / math.sqrt(200)
    assert rows["exposure"].mean() == pytest.approx(expected, abs=3 * error)


def test_the_shared_beginning_is_read_once():
    """25 characters and 4 digits: 1 / 24 of the tokens of reading each text whole, and less where the slot ends the text."""
    model, read = small_model(num_hidden_layers=1), []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))

    exposure(model, CHARACTERS, "the key is the key is {}", "0123", 4, ["0123"])

    assert sum(read) == 22 + 4 + 16 + 64


def test_candidates_that_the_tokenizer_cannot_tell_apart_share_the_middle_rank():
    model = small_model()

    rows = exposure(model, CHARACTERS, "key {}", "0xzq", 1, ["x", "q", "0"])

    assert rows["rank"].tolist() in ([2, 2, 4], [3, 3, 1])


def test_a_secret_has_the_loss_of_itself_among_the_candidates(monkeypatch):
    """Also where both would lie in different blocks, whose last bits differ."""
    monkeypatch.setattr(privacy, "MAX_ROWS", 7)
    model, secrets = small_model().float(), [f"{number:02}" for number in range(100)]

    table = exposure(model, CHARACTERS, TEMPLATE, DIGITS, 2, secrets)

    assert sorted(table["rank"]) == list(range(1, 101))


def test_many_candidates_of_one_loss_share_the_middle(monkeypatch):
    monkeypatch.setattr(privacy, "ENUMERATED", 10)
    model = small_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    table = exposure(model, CHARACTERS, TEMPLATE, DIGITS, 2, ["42"])

    assert table["rank"].tolist() == pytest.approx([50])


def test_of_many_candidates_a_sample_is_read(monkeypatch):
    """The skew-normal share of losses close to it is that of the whole space."""
    model = small_model(num_hidden_layers=1)
    secrets = [f"{number:04}" for number in range(0, 10_000, 97)]
    enumerated = exposure(model, CHARACTERS, "key {}", DIGITS, 4, secrets)
    monkeypatch.setattr(privacy, "ENUMERATED", 9_999)
    monkeypatch.setattr(privacy, "SAMPLED", 3_000)

    sampled = exposure(model, CHARACTERS, "key {}", DIGITS, 4, secrets)

    numpy.testing.assert_allclose(sampled["loss"], enumerated["loss"])
    assert set(sampled["method"]) == {"skew-normal"}
    assert sampled["rank"].between(1, 10_000).all()
    assert abs(sampled["rank"] - enumerated["rank"]).mean() < 300


@pytest.mark.parametrize("shape", [-3.0, 0.0, 5.0])
def test_the_skew_normal_distribution_is_scipys(shape):
    stats = pytest.importorskip("scipy.stats")
    values = numpy.array([-12.0, -1.5, 0.0, 0.3, 2.0, 9.0])
    mean, variance, skewness = (float(one) for one in stats.skewnorm.stats(shape, moments="mvs"))
    quantiles = stats.skewnorm.ppf((numpy.arange(5_000) + 0.5) / 5_000, shape)
    sample = (quantiles - quantiles.mean()) / quantiles.std() * math.sqrt(variance) + mean
    assert ((sample - mean) ** 3).mean() / variance**1.5 == pytest.approx(skewness, abs=0.02)

    found = privacy._log_share_below(values, sample)

    numpy.testing.assert_allclose(found[1:], stats.skewnorm.logcdf(values[1:], shape), rtol=0.02, atol=0.05)
    assert found[0] < -70  # far beyond what a float's share could hold, and finite
    assert numpy.isfinite(found).all()


def test_copies_are_documents_at_random_places():
    documents = [f"document {number}" for number in range(50)]

    mixed, canaries = insert_canaries(documents, "the key is {}.", counts=(1, 4, 9, 0), seed=1)

    assert [text for text in mixed if text.startswith("document")] == documents
    assert canaries["count"].tolist() == [1, 4, 9, 0]
    assert canaries["secret"].nunique() == 4
    assert [mixed.count(f"the key is {secret}.") for secret in canaries["secret"]] == [1, 4, 9, 0]
    places = [place for place, text in enumerate(mixed) if text.startswith("the")]
    assert max(places) - min(places) > 20
    again, same = insert_canaries(documents, "the key is {}.", counts=(1, 4, 9, 0), seed=1)
    assert again == mixed
    assert same.equals(canaries)
    assert insert_canaries(documents, "the key is {}.", counts=(1, 4, 9, 0), seed=2)[0] != mixed


def test_all_candidates_can_be_planted():
    _, canaries = insert_canaries([], "{}", alphabet="ab", length=2, counts=(1,) * 4)

    assert sorted(canaries["secret"]) == ["aa", "ab", "ba", "bb"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "no slot"}, "has 0 slots"),
        ({"template": "{} and {}"}, "has 2 slots"),
        ({"alphabet": "a", "length": 9}, "at least two candidates"),
        ({"alphabet": "aa"}, "at least two candidates"),
        ({"length": 0}, r"`length` \(0\) must be at least 1"),
        ({"alphabet": "ab", "length": 1, "counts": (1, 1, 1)}, "asks for 3 distinct secrets"),
        ({"counts": (1, -1)}, r"`counts` holds -1"),
        ({"max_length": 16}, r"up to 17 bytes, and a document is cut after `max_length` \(16\)"),
        ({"documents": "one text"}, "is one str"),
        ({"documents": 5}, r"`texts` \(5\) must be an iterable of texts"),
        ({"documents": ["a", None]}, "Document 1 is None"),
        ({"template": 3}, r"`template` \(3\) must be a str"),
        ({"alphabet": ["1", "2"]}, r"`alphabet` \(\['1', '2'\]\) must be a str"),
        ({"length": "3"}, r"`length` \('3'\) must be an int"),
        ({"counts": 3}, r"`counts` \(3\) must be a list of int"),
        ({"counts": (1, 2.5)}, r"`counts` \(\[1, 2.5\]\) must be a list of int"),
        ({"seed": [1]}, r"`seed` \(\[1\]\) must be an int"),
        ({"max_length": 99.5}, r"`max_length` \(99.5\) must be an int"),
    ],
)
def test_what_cannot_be_planted_is_refused(options, message):
    arguments = {"documents": ["text"], "template": "the key is {}...", "counts": (1,)} | options
    with pytest.raises(ValueError, match=message):
        insert_canaries(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "the key"}, "has 0 slots"),
        ({"alphabet": "1", "secrets": ["1"], "length": 1}, "at least two candidates"),
        ({"secrets": ["12", "123"]}, "holds '123', which is not of 2 characters"),
        ({"secrets": ["1x"]}, "holds '1x'"),
        ({"secrets": "12"}, "must be a list"),
        ({"secrets": []}, "must be a list"),
        ({"secrets": 12}, r"`secrets` \(12\) must be a list"),
        ({"tokenizer": "byte"}, r"`tokenizer` \(str\) must be a model and its tokenizer"),
        ({"start_token": ["<eos>"]}, "is not a token"),
        ({"alphabet": "ßø", "secrets": ["ßø"]}, "writes all candidates"),
        ({"start_token": "<start>"}, "is not a token"),
    ],
)
def test_what_has_no_exposure_is_refused(options, message):
    arguments = {"template": "key {}", "alphabet": "0123", "length": 2, "secrets": ["12"]}
    with pytest.raises(ValueError, match=message):
        exposure(small_model(), **{"tokenizer": CHARACTERS} | arguments | options)


def test_a_loss_that_is_nan_is_refused():
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[CHARACTERS("1")["input_ids"][0]] = math.nan

    with pytest.raises(ValueError, match="loss of a candidate is NaN"):
        exposure(model, CHARACTERS, "key {}", "0123", 2, ["12"])


SCHEMES = [
    {"do_sample": True, "temperature": 0.7, "top_k": 6},
    {"do_sample": True, "top_k": 0, "top_p": 0.8},
    {"do_sample": True},  # transformers' default: the 50 most probable
]


def confident_model():
    """One whose continuations are neither certain nor too rare to be counted."""
    model = make_model(num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.2)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_probability_of_a_suffix_is_its_share_among_samples(scheme):
    model, prefix, samples = confident_model(), [5, 9, 4], 8_000
    config = GenerationConfig(**scheme, max_new_tokens=2, eos_token_id=[], pad_token_id=0)
    torch.manual_seed(0)

    written = model.generate(torch.tensor([prefix]).expand(samples, -1), generation_config=config)[:, 3:]

    suffixes, counts = written.unique(dim=0, return_counts=True)
    assert len(suffixes) > 5
    for suffix, count in list(zip(suffixes.tolist(), counts.tolist(), strict=True))[::7]:
        p = suffix_probability(model, prefix, suffix, config)
        if p > 1e-3:
            # Of hundreds of suffixes some few lie beyond 3 standard errors.
            assert count / samples == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / samples))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_probability_of_a_suffix_is_the_product_of_those_generate_gives(scheme):
    model, prefix = confident_model(), [5, 9, 4, 7]
    config = GenerationConfig(**scheme, max_new_tokens=4, eos_token_id=[])
    config.output_scores = config.return_dict_in_generate = True
    torch.manual_seed(0)

    output = model.generate(torch.tensor([prefix]), generation_config=config)

    suffix = output.sequences[0, 4:].tolist()
    parts = [scores[0].softmax(dim=-1)[token].item() for scores, token in zip(output.scores, suffix, strict=True)]
    assert suffix_probability(model, prefix, suffix, config) == pytest.approx(math.prod(parts), rel=1e-5)


def test_without_sampling_the_probability_is_1_or_0():
    model, prefix = make_model(), [5, 9]
    written = model.generate(torch.tensor([prefix]), max_new_tokens=3, eos_token_id=[])[0, 2:].tolist()
    config = GenerationConfig(do_sample=False)

    assert suffix_probability(model, prefix, written, config) == 1
    assert suffix_probability(model, prefix, [*written[:2], 30 - written[2] // 2], config) == 0


def test_extraction_counts_the_passages():
    """(n, p) by the definition, and greedy decoding by `generate()`."""
    model, passages = confident_model(), make_ids(40, 6)
    written = model.generate(passages[:3, :4], max_new_tokens=2, do_sample=False, eos_token_id=[])
    passages[:3] = written  # as a model that knows them
    config = GenerationConfig(do_sample=True, top_k=0)

    found = extraction(model, passages, prefix_length=4, n=20, p=0.3)

    each = [suffix_probability(model, row[:4], row[4:], config) for row in passages.tolist()]
    extractable = sum(1 - (1 - p) ** 20 >= 0.3 for p in each)
    greedy = model.generate(passages[:, :4], max_new_tokens=2, do_sample=False, eos_token_id=[])
    assert 0 < extractable < 40
    assert found == {
        "passages": 40,
        "extractable": extractable,
        "extractable_share": extractable / 40,
        "greedy": (greedy == passages).all(dim=1).sum().item(),
        "greedy_share": found["greedy"] / 40,
    }
    assert found["greedy"] >= 3


def test_passages_lie_within_documents():
    texts = ["abcdefgh", "ij", "klmnopqrstuvw", "xyz"]
    tokenizer = char_tokenizer(texts)
    stream = TokenStream.from_documents(texts, tokenizer)

    passages = draw_passages(stream, 1_000, 5)

    found = {tokenizer.decode(row) for row in passages}
    whole = [f"<eos>{text}<eos>" for text in texts]
    ids = [tokenizer(text, split_special_tokens=False)["input_ids"] for text in whole]
    assert found == {tokenizer.decode(row[begin : begin + 5]) for row in ids for begin in range(len(row) - 4)}
    assert len(passages) == len(found)
    assert draw_passages(stream, 3, 5, seed=1).shape == (3, 5)
    with pytest.raises(ValueError, match="No document has the 40 tokens"):
        draw_passages(stream, 3, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, r"`n` \(0\) must be at least 1"),
        ({"p": 0}, r"`p` \(0\) must be a probability"),
        ({"p": 1.5}, r"`p` \(1.5\) must be a probability"),
        ({"p": "0.5"}, r"`p` \('0.5'\) must be a probability"),
        ({"n": 1.5}, r"`n` \(1.5\) must be an int"),
        ({"passages": [[1, 2, 3]]}, r"`passages` \(list\) must be a `torch.LongTensor`"),
        ({"passages": torch.rand(2, 6)}, r"`passages` \(torch.float32\) must be a `torch.LongTensor`"),
        ({"generation_config": {"top_k": 3}}, r"`generation_config` \({'top_k': 3}\) must be a `GenerationConfig`"),
        ({"model": "runs/first"}, r"`model` \(str\) must be a model"),
        ({"prefix_length": 6}, r"rows of more than `prefix_length` \(6\)"),
        ({"generation_config": GenerationConfig(repetition_penalty=1.2)}, r"`repetition_penalty` \(1.2\)"),
        ({"generation_config": GenerationConfig(num_beams=2)}, r"`num_beams` \(2\)"),
        ({"generation_config": GenerationConfig(min_new_tokens=2)}, r"`min_new_tokens` \(2\)"),
    ],
)
def test_what_cannot_be_extracted_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        extraction(**{"model": make_model(), "passages": make_ids(2, 6), "prefix_length": 4} | options)


@pytest.mark.parametrize("name", ["prefix_ids", "suffix_ids"])
def test_what_is_not_a_list_of_ids_is_refused(name):
    parts, model = {"prefix_ids": [5], "suffix_ids": [5]}, make_model()
    with pytest.raises(ValueError, match=f"`{name}` is empty"):
        suffix_probability(model, **parts | {name: []})
    for ids in (5, None, "abc", [1.5], [[5]], [5, [6]], ["a"], [2**70]):
        with pytest.raises(ValueError, match=f"`{name}` .* must be a list of token ids, each an int"):
            suffix_probability(model, **parts | {name: ids})
