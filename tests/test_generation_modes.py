"""Every mode of `generate()` writes what it is defined to write. tests/test_generation.py has the plain ones."""

import functools

import pytest
import torch
from conftest import CONFIGS, IS_OLDER_TRANSFORMERS, make_ids, make_model
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, GenerationConfig, TextStreamer
from transformers.generation import LogitsProcessor

from hf_lstm import bpe_tokenizer, byte_tokenizer, char_tokenizer, word_tokenizer
from hf_lstm.model.cells_lstm import CELLS

IDS = make_ids(2, 6)
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


COMPILED = [
    (config, "eager") for config in ("stacked", "tied_narrow", "untied", "residual_narrow", "hybrid")
]  # of all configs, in fast tests


def generate(model, ids=IDS, mask=None, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 16, "eos_token_id": None, "do_sample": False} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)


WARPERS = [
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"epsilon_cutoff": 0.02},
    {"eta_cutoff": 0.02},
    {"top_h": 0.5},
]
PROCESSORS = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[7], [8, 9]]},
    {"min_new_tokens": 5, "eos_token_id": 9},
    {"suppress_tokens": [5, 6, 7]},
    {"begin_suppress_tokens": [5, 6, 7]},
    {"forced_eos_token_id": 9},
    {"sequence_bias": [[[4], 3.0]]},
    {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 9},
    {"renormalize_logits": True},
    {"encoder_repetition_penalty": 1.3},
]


@pytest.mark.parametrize(
    ("options", "beams", "cell_type"),
    [
        pytest.param(
            options,
            beams,
            list(CELLS)[index % len(CELLS)],
            marks=[pytest.mark.slow] if beams != (1, 3)[index % 2] else [],
        )
        for index, options in enumerate([{"do_sample": True, **warper} for warper in WARPERS] + PROCESSORS)
        for beams in (1, 3)
    ],
    ids=str,
)
def test_processors_and_warpers(options, beams, cell_type):
    model = make_model(cell_type=cell_type)
    expected = generate(model, mask=MASK, use_cache=False, num_beams=beams, **options)

    assert generate(model, mask=MASK, num_beams=beams, **options).tolist() == expected.tolist()


@pytest.mark.parametrize(("drafts", "do_sample"), [(1, False), (3, True), (10, False)])
def test_prompt_lookup_takes_wrong_drafts_back(model, do_sample, drafts):
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 9, 5, 6]])  # what follows 5 6 is easily mistaken
    options = {"do_sample": do_sample, "max_new_tokens": 40}
    expected = generate(model, ids, **options | {"do_sample": False})

    actual = generate(model, ids, prompt_lookup_num_tokens=drafts, return_dict_in_generate=True, **options)

    if not do_sample:
        assert actual.sequences.tolist() == expected.tolist()
    assert_state_is_that_of(model, actual.sequences, actual.past_key_values)


@pytest.mark.parametrize(
    ("cell_type", "of_assistant", "schedule"),
    [
        ("lstm", "lstm", "constant"),
        ("gru", "lstm", "heuristic"),
        ("mogrifier", "gru", "constant"),
        ("rnn_tanh", "mogrifier", "heuristic"),
        ("rnn_relu", "rnn_tanh", "constant"),
    ],
)
def test_any_cell_drafts_for_any(cell_type, of_assistant, schedule):
    model, assistant = (
        make_model(num_hidden_layers=3, cell_type=cell_type),
        make_model(hidden_size=8, cell_type=of_assistant),
    )
    assistant.generation_config.update(num_assistant_tokens=5, num_assistant_tokens_schedule=schedule)
    ids = IDS[:1]
    expected = generate(model, ids, max_new_tokens=40)

    actual = generate(model, ids, max_new_tokens=40, assistant_model=assistant, return_dict_in_generate=True)

    assert actual.sequences.tolist() == expected.tolist()
    assert_state_is_that_of(model, actual.sequences, actual.past_key_values)


def test_a_perfect_assistant_is_always_right(cell):
    """The same model drafts: every draft is accepted, so the assistant's own state survived its roll-backs."""
    model = make_model(**cell)
    calls, forward = [], model.forward

    @functools.wraps(forward)  # `generate()` reads its signature
    def counted(*arguments, **options):
        calls.append(options["input_ids"].shape[1])
        return forward(*arguments, **options)

    expected = generate(model, IDS[:1], max_new_tokens=40)
    assistant = make_model(**cell)
    assistant.generation_config.update(num_assistant_tokens=4, num_assistant_tokens_schedule="constant")
    assistant.generation_config.update(assistant_confidence_threshold=0.0, eos_token_id=None)
    model.forward = counted
    actual = model.generate(
        IDS[:1],
        attention_mask=torch.ones_like(IDS[:1]),
        max_new_tokens=40,
        eos_token_id=None,
        do_sample=False,
        assistant_model=assistant,
    )

    assert actual.tolist() == expected.tolist()
    assert len(calls) == 8  # 40 tokens, 4 drafted and 1 added at each


def test_the_first_layers_draft_for_all(model):
    expected = generate(model, IDS[:1], max_new_tokens=30)

    if len(set(model.config.cell_sizes)) > 1:
        fewer, last = model.config.num_hidden_layers - 1, model.config.cell_sizes[-1]
        message = f"The first {fewer} layers have outputs of width 12, and the output layer takes {last}"
        with pytest.raises(ValueError, match=message):
            generate(model, IDS[:1], assistant_early_exit=fewer)
        if fewer > 1:
            with pytest.raises(
                StrictDataclassError, match=r"must equal `hidden_size` .* also under `assistant_early_exit=1`"
            ):
                generate(model, IDS[:1], assistant_early_exit=1)
        return
    assert generate(model, IDS[:1], max_new_tokens=30, assistant_early_exit=1).tolist() == expected.tolist()


@pytest.mark.parametrize(("mask", "cell_type"), [(None, "gru"), (MASK, "mogrifier"), (MASK, "lstm")], ids=str)
def test_classifier_free_guidance_weighs_two_states(mask, cell_type):
    """By its definition, token by token without a cache: logits of the unconditional text and of the text."""
    model, scale, negative = make_model(cell_type=cell_type), 1.7, IDS[:, -1:]
    written = IDS.clone()
    read = torch.ones_like(IDS) if mask is None else mask
    for step in range(8):
        conditional = model(written, attention_mask=torch.cat([read, torch.ones(2, step)], dim=1)).logits[:, -1]
        text = torch.cat([negative, written[:, 6:]], dim=1)
        unconditional = model(text).logits[:, -1].log_softmax(dim=-1)
        guided = scale * (conditional.log_softmax(dim=-1) - unconditional) + unconditional
        written = torch.cat([written, guided.argmax(dim=-1, keepdim=True)], dim=1)

    actual = generate(model, mask=mask, guidance_scale=scale, max_new_tokens=8)

    assert actual.tolist() == written.tolist()


def test_guidance_with_a_negative_prompt():
    model = make_model()
    options = {"guidance_scale": 2.0, "negative_prompt_ids": IDS[:, :3], "max_new_tokens": 8}
    expected = generate(model, use_cache=False, **options)

    assert generate(model, **options).tolist() == expected.tolist()


def test_streamers_see_every_token(capsys):
    model, tokenizer = make_model(vocab_size=260), byte_tokenizer()
    inputs = tokenizer("ab", return_tensors="pt")

    written = generate(model, inputs.input_ids, streamer=TextStreamer(tokenizer))

    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(written[0]).rstrip("\n")


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_scores_and_hidden_states_are_those_of_the_text(model, options):
    result = generate(
        model,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        output_hidden_states=True,
        max_new_tokens=7,
        **options,
    )

    assert len(result.logits) == len(result.scores) == len(result.hidden_states) == 7
    layers = model.config.num_hidden_layers + 1
    assert all(len(states) == layers for states in result.hidden_states)
    if "num_beams" not in options:
        whole = model(result.sequences, output_hidden_states=True)
        torch.testing.assert_close(
            torch.stack(result.logits, dim=1).double(), whole.logits[:, 5:-1], rtol=0, atol=1e-5
        )
        for layer in range(layers):
            steps = torch.cat([states[layer] for states in result.hidden_states], dim=1)
            torch.testing.assert_close(steps, whole.hidden_states[layer][:, :-1], rtol=0, atol=1e-10)
    else:
        scores = model.compute_transition_scores(result.sequences, result.scores, result.beam_indices)
        # float32 inside `generate()`
        torch.testing.assert_close(scores.sum(dim=1) / 7, result.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "backend"),
    [
        pytest.param(config, backend, marks=[pytest.mark.slow] if (config, backend) not in COMPILED else [])
        for config in CONFIGS
        for backend in ("eager", "aot_eager")
    ],
)
def test_compiled_decoding_is_one_graph(config, backend):
    model = make_model(**CONFIGS[config])
    expected = generate(model)
    from transformers import CompileConfig

    compile_config = CompileConfig(fullgraph=True, backend=backend, dynamic=False)
    compile_config._compile_all_devices = True  # `generate()` compiles by itself on accelerators only

    torch._dynamo.reset()
    actual = generate(model, cache_implementation="static", compile_config=compile_config)

    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("chunk", [1, 4, 5])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=str)
def test_the_prompt_can_be_read_in_chunks(model, chunk, cache):
    expected = generate(model, mask=MASK)

    assert generate(model, mask=MASK, prefill_chunk_size=chunk, **cache).tolist() == expected.tolist()


def test_a_conversation_of_three_turns(model):
    cache, text = DynamicCache(config=model.config), torch.empty(2, 0, dtype=torch.long)
    for turn in range(3):
        text = torch.cat([text, make_ids(2, 4, seed=turn)], dim=1)
        expected = generate(model, text, max_new_tokens=5)
        text = generate(model, text, max_new_tokens=5, past_key_values=cache)
        assert text.tolist() == expected.tolist()


def test_beams_need_a_state_each(cell):
    model = make_model(**cell)
    cache = model(IDS[:, :3]).past_key_values

    with pytest.raises(ValueError, match="holds the state of 2 rows and the input has 6"):
        generate(model, past_key_values=cache, num_beams=3)

    cache.batch_repeat_interleave(3)
    assert generate(model, past_key_values=cache, num_beams=3).tolist() == generate(model, num_beams=3).tolist()


def test_what_needs_keys_and_values_is_refused(model):
    with pytest.raises(ValueError, match=r"only supported for models with only full attention layers.*hf_lstm"):
        generate(model, cache_implementation="quantized")
    refused = "num_attention_heads could not be found" if IS_OLDER_TRANSFORMERS else "Invalid layer type: hf_lstm"
    with pytest.raises(ValueError, match=refused):
        model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=3))


def test_constraints_of_the_user_s_own(model):
    class OnlyEven(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 1::2] = -torch.inf
            return scores

    written = generate(model, logits_processor=[OnlyEven()], num_beams=2)

    assert not (written[:, 6:] % 2).any()


def assert_state_is_that_of(model, sequences, cache):
    """The state is that of a text without its last token, which has not been read."""
    expected = model(sequences[:, : cache.get_seq_length()]).past_key_values
    assert cache.get_seq_length() == sequences.shape[1] - 1
    for layer, wanted in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.get_state(), wanted.get_state(), rtol=0, atol=1e-10)


VOCABULARIES = {
    "Chinese characters": lambda: char_tokenizer(["春眠不覺曉，處處聞啼鳥。"]),
    "Chinese characters or bytes": lambda: char_tokenizer(["春眠不覺曉，處處聞啼鳥。"], byte_fallback=True),
    "white space": lambda: char_tokenizer(["\n \t"]),
    "DNA": lambda: char_tokenizer(["ACGT\n"]),
    "words": lambda: word_tokenizer(["the quick brown fox jumps over\nlazy dogs"]),
    "words of raw text": lambda: word_tokenizer(["the quick brown fox jumps over\nlazy dogs"], split="unicode"),
    "bytes": byte_tokenizer,
    "pieces": lambda: bpe_tokenizer(["the quick brown fox jumps over the lazy dogs"] * 3, 280),
}


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_stop_strings_stop_at_their_last_token(vocabulary, length):
    tokenizer = VOCABULARIES[vocabulary]()
    model = make_model(vocab_size=len(tokenizer))
    ids = torch.randint(4, len(tokenizer), (2, 3), generator=torch.Generator().manual_seed(0))
    free = generate(model, ids[:1], suppress_tokens=[0, 1, 2, 3])[0]
    texts = [tokenizer.decode(free[:end]) for end in range(len(free) + 1)]
    stop = texts[-1][len(texts[3]) + 2 :][:length].replace("\ufffd", "\n") or "x"

    options = {"stop_strings": [stop, "~~"], "tokenizer": tokenizer, "suppress_tokens": [0, 1, 2, 3]}
    written = [generate(model, ids[:1], use_cache=cached, **options)[0].tolist() for cached in (True, False)]

    ends = [end for end in range(4, 19) if texts[end].rfind(stop) > len(texts[end - 1]) - len(stop)]
    assert written == [free[: ends[0] if ends else 19].tolist()] * 2


def test_stop_strings_need_the_tokenizer():
    with pytest.raises(ValueError, match="you must pass the model's tokenizer"):
        generate(make_model(), stop_strings=["x"])
