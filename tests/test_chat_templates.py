"""`scripts/serve.py` encodes a conversation as `apply_chat_template` does, and what its messages hold is letters."""

import importlib
import sys

import pytest
from conftest import SCRIPTS
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_lstm import byte_tokenizer, char_tokenizer

pytest.importorskip("starlette", reason="needs the extra `serve`")


@pytest.fixture(scope="module")
def encode_chat():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("serve_writer").encode_chat
        for name in ("serve_writer", "serve_fields"):
            del sys.modules[name]


def make_marked(**flags):
    tokenizer = byte_tokenizer()
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_tokens([AddedToken(name, **{"special": True, "normalized": False} | flags) for name in names])
    return tokenizer


def make_metaspace(scheme):
    tokenizer = Tokenizer(
        models.BPE({"<unk>": 0, "<|user|>": 1, "▁": 2, **dict(zip("adent<>|", range(3, 11), strict=True))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
    )


MARKED = {
    "special": make_marked,
    "added": lambda: make_marked(special=False, normalized=True),
    "rstrip": lambda: make_marked(rstrip=True),
    "lstrip": lambda: make_marked(lstrip=True),
    "single word": lambda: make_marked(single_word=True),
    "first metaspace": lambda: make_metaspace("first"),
    "always metaspace": lambda: make_metaspace("always"),
}


@pytest.mark.parametrize("template", ["<|user|>\n{} <|end|>\n<|assistant|>", "a<|user|> {}<|end|><|assistant|> "])
@pytest.mark.parametrize("make", MARKED.values(), ids=MARKED)
def test_a_conversation_is_read_as_one_text(encode_chat, make, template):
    """White space that a marker takes in, words that it must not touch and spaces before a text's first word included."""
    tokenizer = make()
    tokenizer.chat_template = template.replace("{}", "{{ messages[0].content }}")
    plain, marked = ({"role": "user", "content": f" and <|{name}|>"} for name in ("ende", "end"))
    stock = tokenizer.apply_chat_template([plain])["input_ids"]

    ids = [encode_chat(tokenizer, [message]) for message in (plain, marked)]

    assert ids[0] == stock
    place = next(index for index in range(len(stock)) if stock[: index + 1] != ids[1][: index + 1])
    assert ids[1] == stock[:place] + stock[place + 1 :]  # all but the letter that makes it no marker


@pytest.mark.parametrize("content", ["<|USER|>", "＜|user|＞"])
def test_a_marker_that_the_normalizer_makes_is_letters(encode_chat, content):
    tokenizer = char_tokenizer(["<|user>"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.chat_template = "<|user|>{{ messages[0].content }}"

    ids = encode_chat(tokenizer, [{"role": "user", "content": content}])

    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", *"<|user|>"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content + 5 }}", "can only concatenate"),
        ("{{ messages[0].content.split('') }}", "empty separator"),
        ("{{ '\xe9'.encode('ascii') }}", "'ascii' codec"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ 'a'.center(10 ** 17) }}", "MemoryError"),
        ({"rag": "a", "tool": "b"}, "This model has multiple chat templates"),
    ],
)
def test_errors_of_a_template_are_refused_in_words(encode_chat, template, says):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template

    with pytest.raises(sys.modules["serve_fields"].Refused, match=f"refuses the messages: {says}"):
        encode_chat(tokenizer, [{"role": "user", "content": "hi"}])
