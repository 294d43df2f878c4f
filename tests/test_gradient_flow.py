"""Norms of the gradient by distance are those of the equations, and refuse what has none."""

import json

import numpy
import pytest
import reference
import torch
from conftest import CONFIGS, SCRIPTS, TEXT, make_ids, make_model, run_script
from reference import Scalar

from hf_lstm import LSTMConfig, LSTMForCausalLM, char_tokenizer
from hf_lstm.evaluation import gradient_flow, gradients

SMALL = {"vocab_size": 31, "hidden_size": 4}
SIZES = {"embedding_size": 3, "output_projection_size": 3, "last_cell_size": 3, "intermediate_size": 5}
IDS = make_ids(2, 8)


def small_model(config, **other):
    config = {name: SIZES.get(name, value) for name, value in CONFIGS[config].items()}
    return make_model(**SMALL | config | other)


@pytest.fixture
def states(monkeypatch):
    """The state after each step of `reference.language_model`, in its order: all that is later is computed from these."""
    states, step = [], reference.cell_step

    def recorded(*arguments):
        state = [[number + Scalar(0.0) for number in part] for part in step(*arguments)]
        states.append(state)
        return state

    monkeypatch.setattr(reference, "cell_step", recorded)
    return states


def norms_of_equations(model, states, ids, last, max_distance):
    """Norms `(L, D + 1)` for the loss of the token after `last` in one row."""
    states.clear()
    layers = model.config.num_hidden_layers
    logits, _ = reference.language_model(ids[: last + 1], reference.weights_of(model), model.config.cell_type)
    found = reference.mean_cross_entropy(logits[-1:], ids[last + 1 : last + 2]).derivatives()
    norms = [numpy.linalg.norm([found.get(n, 0.0) for part in state for n in part]) for state in states]
    return numpy.reshape(norms, (-1, layers)).T[:, ::-1][:, : max_distance + 1]


# Windows that meet at the beginning, overlap, leave one token out, and leave out several.
@pytest.mark.parametrize(("positions", "max_distance"), [(1, 6), (4, 3), (2, 2), (2, 1)])
@pytest.mark.parametrize("config", [name for name in CONFIGS if name != "hybrid"])
def test_norms_are_those_of_the_equations(config, positions, max_distance, states):
    model = small_model(config)

    norms = gradient_flow(model, IDS, positions, max_distance)

    lasts = numpy.linspace(max_distance, 6, positions).astype(int)
    expected = [norms_of_equations(model, states, row, last, max_distance) for row in IDS.tolist() for last in lasts]
    numpy.testing.assert_allclose(norms, numpy.mean(expected, axis=0), rtol=1e-9)


def test_norms_are_finite_differences(states, monkeypatch):
    """Each number of a state is moved after its token, and the rest of the text read again."""
    model, ids, last, step = small_model("untied", hidden_size=3), IDS[:1], 4, 1e-5
    weights, recorded, moved = reference.weights_of(model), reference.cell_step, {}

    def moving(*arguments):
        state = recorded(*arguments)
        part, unit, by = moved.get(len(states) - 1, (0, 0, 0.0))
        state[part][unit] = state[part][unit] + Scalar(by)
        return state

    def loss(place, part, unit, by):
        states.clear()
        moved.clear()
        moved[place] = part, unit, by
        logits, _ = reference.language_model(ids[0, : last + 1].tolist(), weights, model.config.cell_type)
        return reference.mean_cross_entropy(logits[-1:], ids[0, last + 1 : last + 2].tolist()).value

    monkeypatch.setattr(reference, "cell_step", moving)

    norms = gradient_flow(model, ids[:, : last + 2], positions=1, max_distance=last)

    for distance in (0, 1, 3):
        for layer in range(2):
            place = (last - distance) * 2 + layer
            slopes = [
                (loss(place, part, unit, step) - loss(place, part, unit, -step)) / (2 * step)
                for part in range(2)
                for unit in range(3)
            ]
            assert norms[layer, distance] == pytest.approx(numpy.linalg.norm(slopes), rel=1e-6)


def test_the_last_layer_at_distance_0_is_the_output_layer_alone():
    model = make_model(num_hidden_layers=1, tie_word_embeddings=False)
    output = model(IDS[:, :-1])
    shares = output.logits[:, -1].softmax(dim=-1)
    shares[range(2), IDS[:, -1]] -= 1

    norms = gradient_flow(model, IDS, positions=1, max_distance=6)

    expected = (shares @ model.lm_head.weight).norm(dim=1).mean().item()
    assert norms[0, 0] == pytest.approx(expected, rel=1e-9)


def test_the_text_between_two_windows_is_read(monkeypatch):
    """In several parts, and the state at the second window is the one after all of it."""
    monkeypatch.setattr(gradients, "CHUNK", 20)
    model, ids = make_model(), make_ids(1, 60)

    norms = gradient_flow(model, ids, positions=2, max_distance=5)

    parts = [gradient_flow(model, ids[:, :7], 1, 5), gradient_flow(model, ids, positions=1, max_distance=58)[:, :6]]
    numpy.testing.assert_allclose(norms, numpy.mean(parts, axis=0), rtol=1e-7)


def test_an_adaptive_softmax_has_gradients_too():
    model = make_model(hidden_size=16, tie_word_embeddings=False, adaptive_softmax_cutoffs=[10, 20])

    norms = gradient_flow(model, IDS, positions=2, max_distance=3)

    assert norms.shape == (2, 4)
    assert (norms > 0).all()


def test_half_precision_is_computed_in_float32():
    model = make_model().bfloat16()

    norms = gradient_flow(model, IDS, positions=2, max_distance=3)

    numpy.testing.assert_allclose(norms, gradient_flow(model.float(), IDS, positions=2, max_distance=3))


def test_the_model_is_left_as_it_was():
    model = make_model(hidden_dropout=0.5, output_dropout=0.5)
    expected = gradient_flow(model, IDS, positions=2, max_distance=3)
    model.train().requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    with torch.no_grad():
        norms = gradient_flow(model, IDS, positions=2, max_distance=3)

    numpy.testing.assert_array_equal(norms, expected)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_gradients_too_small_for_squares_are_not_0():
    model = make_model(torch.float32, num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-30)

    norms = gradient_flow(model, IDS, positions=1, max_distance=4)

    assert (norms > 0).all()
    assert (norms < 1e-20).all()


def test_gradients_explode_visibly():
    model = make_model(torch.float32, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].hidden_gates.weight.fill_(float("nan"))

    assert numpy.isnan(gradient_flow(model, IDS, positions=1, max_distance=4)).all()


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS[0], {}, r"`ids` of shape \(8,\) must be of shape \(rows, tokens\)"),
        (IDS, {}, r"`ids` \(8 tokens a row\) must hold at least 233"),
        (IDS, {"positions": 4, "max_distance": 4}, "must hold at least 9"),
        (IDS, {"positions": 0}, r"`positions` \(0\) must be at least 1"),
        (IDS, {"max_distance": 0}, r"`max_distance` \(0\) must be at least 1"),
        (IDS + 20, {}, "they must lie within the model's vocabulary of 31"),
    ],
)
def test_input_without_a_flow_is_refused(ids, options, message):
    with pytest.raises(ValueError, match=message):
        gradient_flow(make_model(), ids, **options)


def test_attention_is_refused():
    """Its window holds many tokens, so the state after one of them does not pass through that of the next alone."""
    with pytest.raises(
        ValueError, match=r"`layer_types` \(\['hf_lstm', .*\]\) has attention, whose gradients reach all"
    ):
        gradient_flow(make_model(**CONFIGS["hybrid"]), IDS, 1, 6)


def test_another_model_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    )

    with pytest.raises(ValueError, match="The model is a 'gpt2'"):
        gradient_flow(model, IDS, positions=1, max_distance=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models with the same tokenizer; the gradients of one are 0 from a few tokens on."""
    folders, tokenizer = [], char_tokenizer([TEXT])
    for name, bias in (("one", 1.0), ("forgetful", -60.0)):
        torch.manual_seed(0)
        config = LSTMConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=2, forget_gate_bias=bias)
        model, folder = LSTMForCausalLM(config), tmp_path_factory.mktemp("models") / name
        with torch.no_grad():
            for layer in model.model.layers:
                layer.hidden_gates.weight.mul_(1e-3 if bias < 0 else 1.0)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders


def test_models_are_compared_and_drawn(folders, text_file, tmp_path, capsys):
    options = ["--tokens", 100, "--positions", 4, "--max_distance", 30, "--picture", tmp_path / "flow.png"]

    run_script("evaluate.py", "gradients", "--model", *folders, "--file", text_file, *options)

    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert list(result) == [str(folder) for folder in folders]
    ids = torch.tensor([char_tokenizer([TEXT])(TEXT)["input_ids"][:100]])
    for folder in folders:
        expected = gradient_flow(LSTMForCausalLM.from_pretrained(folder), ids, 4, 30)
        assert result[str(folder)]["tokens"] == 100
        numpy.testing.assert_allclose(result[str(folder)]["norms"], expected, rtol=1e-5)
    assert result[str(folders[1])]["norms"][0][-1] == 0
    assert "one, layer 1" in printed.err
    assert (tmp_path / "flow.png").stat().st_size > 5_000


def test_too_few_tokens_are_refused_by_their_flag(folders, text_file):
    with pytest.raises(SystemExit, match=r"evaluate.py: `--tokens` \(100\) must be at least 233"):
        run_script("evaluate.py", "gradients", "--model", folders[0], "--file", text_file, "--tokens", 100)


def test_zeros_and_infinities_are_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    from evaluate_pictures import draw_gradients, short_names

    draw_gradients(
        {"a/x": [[1.0, 0.0, 0.0], [numpy.inf, numpy.nan, 1.0]], "b/x": [[0.0] * 3]}, str(tmp_path / "x.png")
    )

    assert (tmp_path / "x.png").stat().st_size > 5_000
    assert "The picture is in" in capsys.readouterr().err
    assert short_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert short_names(["a/x", "b/x"]) == ["a/x", "b/x"]
    assert short_names(["x", "x"]) == ["x", "x"]


def test_integers_of_any_type_and_inference_mode():
    model = make_model()
    expected = gradient_flow(model, IDS, positions=2, max_distance=3)

    with torch.inference_mode():
        found = gradient_flow(model, IDS.int() + 0, positions=2, max_distance=3)

    assert (found == expected).all()
