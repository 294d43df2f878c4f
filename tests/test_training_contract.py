"""Requirements of transformers, Trainer and accelerate on a causal language model, besides generation."""

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from conftest import CONFIGS, make_ids, make_model, recompute_activations
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from hf_lstm import LSTMConfig, LSTMForCausalLM

IDS = make_ids(3, 12)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_give_the_same_gradients(model, reentrant):
    """With a state carried in, whose own gradient is cut."""
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.train()
        if checkpointing:
            recompute_activations(model, reentrant)
            model.enable_input_require_grads()
        cache = DynamicCache(config=model.config)
        losses = []
        for ids in IDS.split(6, dim=1):
            losses.append(model(ids, labels=ids, past_key_values=cache).loss)
            losses[-1].backward()
            for layer in cache.layers:
                layer.detach_()
        results.append([*losses, *gradients(model).values()])

    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_the_loss_is_the_mean_over_targets_or_the_sum_over_a_given_number(model):
    mean = model(IDS, labels=IDS).loss

    assert model(IDS, labels=IDS, num_items_in_batch=11).loss.item() == pytest.approx(mean.item() * 33 / 11, rel=1e-6)


def test_shift_labels_give_the_same_loss_as_labels(model):
    shifted = torch.cat([IDS[:, 1:], torch.full((3, 1), -100)], dim=1)

    assert model(IDS, shift_labels=shifted).loss.item() == model(IDS, labels=IDS).loss.item()


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 3, 11])], ids=str)
def test_logits_to_keep_selects_tokens(model, keep):
    expected = model(IDS).logits

    expected = expected[:, -keep:] if isinstance(keep, int) else expected[:, keep]
    torch.testing.assert_close(model(IDS, logits_to_keep=keep).logits, expected, rtol=0, atol=1e-10)


def test_hidden_states_of_every_layer_are_returned(model):
    output = model(IDS, output_hidden_states=True)

    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert all(states.shape[:2] == IDS.shape for states in output.hidden_states)
    with pytest.raises(ValueError, match=r"`output_attentions` \(True\) cannot be returned"):
        model(IDS, output_attentions=True)


@pytest.mark.parametrize("size", [40, 20])
def test_the_vocabulary_can_be_resized(model, size, tmp_path):
    before = model(IDS.clamp(max=19)).logits

    model.resize_token_embeddings(size, mean_resizing=False)

    after = model(IDS.clamp(max=19)).logits
    assert after.shape[-1] == size == model.config.vocab_size
    torch.testing.assert_close(after[..., :20], before[..., :20], rtol=0, atol=1e-10)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded(IDS.clamp(max=19)).logits, after)


def test_a_model_can_be_made_on_the_meta_device(model):
    with init_empty_weights():
        empty = LSTMForCausalLM(model.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}

    empty.to_empty(device="cpu").double().load_state_dict(model.state_dict())

    assert torch.equal(empty.eval()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("place", ["auto", "cpu", "disk"])
def test_models_load_onto_devices_and_disk(model, place, tmp_path):
    model.save_pretrained(tmp_path / "model")
    if place == "disk":
        layers = [f"model.layers.{index}" for index in range(model.config.num_hidden_layers)]
        others = [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
        place = dict.fromkeys([*others, *layers, "lm_head"], "cpu") | {"model.layers.1": "disk"}

    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=place, offload_folder=tmp_path / "offload", dtype=torch.float64
    )

    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-10)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        assert loaded.generate(IDS, **options).tolist() == model.generate(IDS, **options).tolist()


def test_weights_can_be_offloaded(model):
    with torch.no_grad():
        expected = model(IDS).logits

        cpu_offload(model)

        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-10)


def test_a_layer_is_never_split(model):
    """Every class named there is in the model, since accelerate looks for each, to shard it."""
    assert set(model._no_split_modules) == {type(layer).__name__ for layer in model.model.layers}


# Of the norm of the logits: the error of a single one is that of the few rows where rounding is amplified most.
PRECISION = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_low_precision_weights_give_close_logits_and_float32_cells(dtype, kernel, model):
    precision = PRECISION[dtype] * (2 if model.config.cell_type == "mogrifier" else 1)  # five more products a step
    expected = model(IDS).logits
    low = model.to(dtype)

    logits = low(IDS).logits
    logits.float().mean().backward()

    assert logits.dtype == dtype
    assert all(parameter.grad.dtype == dtype and parameter.grad.isfinite().all() for parameter in low.parameters())
    assert (logits.double() - expected).norm() < precision * expected.norm()
    cache = low(IDS, use_cache=True).past_key_values
    types = {"h": dtype, "c": torch.float32, "keys": dtype, "values": dtype, "real": torch.bool}
    for layer, block in zip(cache.layers, low.model.layers, strict=True):
        assert [part.dtype for part in layer.get_state()] == [types[name] for name in block.state_names]
    written = low.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert written.shape == (3, 17)


def test_the_cell_state_is_accumulated_in_float32():
    """Small amounts added ten thousand times to a large one: bfloat16 alone would stay where it was."""
    model = make_model(torch.bfloat16, num_hidden_layers=1)
    layer = model.model.layers[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        i, f, g, _ = layer.input_gates.bias.chunk(4)
        i.fill_(20.0)
        f.fill_(20.0)
        g.fill_(0.001)
        c = torch.ones(1, 12)
        h = torch.zeros(1, 12, dtype=torch.bfloat16)
        for _ in range(1000):
            _, h, c, *_ = layer(torch.zeros(1, 1, 12, dtype=torch.bfloat16), h, c)

    assert c.mean().item() == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("length", [1, 12])
def test_autocast_on_a_cpu_gives_close_logits(model, kernel, length):
    model = model.float()
    ids = IDS[:, :length]
    expected = model(ids).logits

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=IDS[:, :length] if length > 1 else None, use_cache=True)
        cache = output.past_key_values
        model(ids, past_key_values=cache)
    if length > 1:
        output.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    precision = PRECISION[torch.bfloat16] * (2 if model.config.cell_type == "mogrifier" else 1)
    assert (output.logits.float() - expected).norm() < precision * expected.norm()
    cells = [layer for layer, kind in zip(cache.layers, model.config.layer_types, strict=True) if kind == "hf_lstm"]
    assert {layer.values.dtype for layer in cells if layer.values is not None} <= {torch.float32}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at one
@pytest.mark.parametrize("block", [pytest.param("stacked", marks=pytest.mark.slow), "residual_narrow"])
def test_a_compiled_training_step_gives_the_same_gradients(block):
    torch._dynamo.reset()
    model = make_model(**CONFIGS[block]).train()
    model(IDS, labels=IDS).loss.backward()
    expected = gradients(model)
    model.zero_grad()

    compiled = torch.compile(model, backend="aot_eager")
    compiled(IDS, labels=IDS).loss.backward()

    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("block", CONFIGS)
def test_one_token_can_be_exported(block):
    class Step(torch.nn.Module):
        """A token and states in, logits and states out."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, *states):
            cache = DynamicCache(config=self.model.config)
            parts = iter(states)
            for own, layer in zip(self.model.model.layers, cache.layers, strict=True):
                layer.update(*(next(parts) for _ in own.state_names))
            logits = self.model(ids, past_key_values=cache).logits
            return logits, *(state for layer in cache.layers for state in layer.get_state())

    model = make_model(**CONFIGS[block])
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        states = [state for layer in cache.layers for state in layer.get_state()]
        exported = torch.export.export(Step(model), (IDS[:, :1], *states))
        actual = exported.module()(IDS[:, :1], *states)

        expected = model(IDS[:, :1], past_key_values=cache).logits

    torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(actual[1], cache.layers[0].keys, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_type": "dense"}, "block_type"),
        ({"intermediate_size": 8}, r'`intermediate_size` \(8\) needs `block_type="residual"`'),
        ({"block_type": "residual", "intermediate_size": 0}, r"`intermediate_size` \(0\) must be at least 1"),
        ({"block_type": "residual", "hidden_act": "sulu"}, r"`hidden_act` \(sulu\) must be one of"),
    ],
    ids=str,
)
def test_invalid_fields_of_blocks_are_refused(config, message):
    from huggingface_hub.errors import StrictDataclassError

    with pytest.raises(StrictDataclassError, match=message):
        LSTMConfig(**config)


def test_a_layer_may_be_split_between_cpu_and_disk(model, tmp_path):
    """With such a device map the modules of the layer are called one by one."""
    model.save_pretrained(tmp_path / "model")
    parts = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
    on_disk = "input_gates" if hasattr(model.model.layers[1], "input_gates") else "self_attn.k_proj"
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=parts | {f"model.layers.1.{on_disk}": "disk"},
        offload_folder=tmp_path / "offload",
        dtype=torch.float64,
    )

    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-10)


def test_a_quantiser_that_is_not_installed_is_named(tmp_path):
    make_model(torch.float32).save_pretrained(tmp_path)

    with pytest.raises(ImportError, match="bitsandbytes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
