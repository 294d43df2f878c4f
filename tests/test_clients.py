"""Libraries for adapters, quantization and training (`pip install -e ".[clients]"`)."""

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from hf_lstm import byte_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
IDS = make_ids(4, 12)
TARGETS = {
    "gates": ["input_gates", "hidden_gates"],
    "all-linear": "all-linear",
    "attention": ["q_proj", "k_proj", "v_proj", "self_attn.o_proj"],
}
CASES = [(block, name) for block in ("stacked", "tied_narrow", "residual_narrow") for name in ("gates", "all-linear")]
CASES += [("hybrid", "attention"), ("hybrid", "all-linear")]


def test_lora_works_on_the_embedding():
    import peft

    model = make_model(torch.float32)
    expected = model(IDS).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens", "input_gates"])
    )

    torch.testing.assert_close(adapted(input_ids=IDS).logits, expected)
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        assert adapted.eval()(input_ids=IDS[:, :1]).logits.shape == (*IDS[:, :1].shape, model.config.vocab_size)


@pytest.mark.parametrize(("block", "targets"), CASES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_lora_learns_and_survives_saving_and_merging(tmp_path, block, targets, dora):
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS[targets], use_dora=dora)
    make_model(torch.float32, **CONFIGS[block]).save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    optimizer = torch.optim.Adam([tensor for tensor in model.parameters() if tensor.requires_grad], lr=0.03)
    losses = []
    for _ in range(30):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert losses[-1] < 0.85 * losses[0]  # 0.60 to 0.81 of it in residual models of 16 seeds
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())
    adapted = "self_attn.k_proj" if targets == "attention" else "hidden_gates"
    assert any(f"{adapted}.lora" in name for name, _ in model.named_parameters())

    model.eval()
    expected = model(input_ids=IDS).logits
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    written = model.generate(input_ids=IDS, **options)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(loaded.eval()(input_ids=IDS).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert merged.generate(IDS, **options).tolist() == written.tolist()


def test_generate_lets_an_adapter_write(run, tmp_path):
    """scripts/generate.py, given the folder of the adapter."""
    import peft

    tokenizer = byte_tokenizer()
    model = make_model(torch.float32, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["hidden_gates"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    adapted.save_pretrained(tmp_path / "lora")
    prompt = tokenizer("the", return_tensors="pt")
    written = [one.generate(**prompt, do_sample=False, max_new_tokens=20)[0] for one in (adapted, model)]
    command = ["generate.py", "--prompt", "the", "--max_new_tokens", 20, "--temperature", 0, "--model"]

    printed = run(*command, tmp_path / "lora")

    assert printed.removesuffix("\n") == tokenizer.decode(written[0], skip_special_tokens=True)
    assert written[0].tolist() != written[1].tolist()


def test_lora_refuses_a_module_that_does_not_exist():
    import peft

    with pytest.raises(ValueError, match=r"Target modules .*q_proj.* not found in the base model"):
        peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))


def test_prompt_tuning_works_and_prefix_tuning_is_refused():
    import peft

    shape = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "num_attention_heads": 1,
        "num_layers": 2,
        "token_dim": 12,
    }
    prompted = peft.get_peft_model(make_model(torch.float32), peft.PromptTuningConfig(**shape))
    prompted(input_ids=IDS, labels=IDS).loss.backward()
    assert prompted.generate(input_ids=IDS, max_new_tokens=3, eos_token_id=None).shape == (4, 15)

    prefixed = peft.get_peft_model(make_model(torch.float32), peft.PrefixTuningConfig(**shape))
    with pytest.raises(ValueError, match=r"not the state of an LSTM.*prefix tuning"):
        prefixed(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("block", ["stacked", "residual_narrow"])
def test_torchao_quantizes_a_model(block):
    torchao = pytest.importorskip("torchao.quantization")
    model = make_model(torch.float32, **CONFIGS[block] | {"hidden_size": 32, "embedding_size": 32})
    with torch.no_grad():
        expected = model(IDS).logits
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())

        logits = model(IDS).logits
        written = model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)

    assert "Int8" in type(model.model.layers[0].hidden_gates.weight).__name__
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert written.shape == (4, 18)


def test_torchao_quantizes_a_model_while_loading(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model = make_model(torch.float32, hidden_size=64)
    model.save_pretrained(tmp_path)

    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig())
    )

    assert "Int8" in type(quantized.model.layers[1].input_gates.weight).__name__
    expected = model(IDS).logits
    assert (quantized(IDS).logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert quantized.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None).shape == (4, 18)


@pytest.mark.parametrize("packing", [True, False])
def test_trl_trains_with_and_without_packing(tmp_path, packing):
    import trl
    from datasets import Dataset

    tokenizer = byte_tokenizer()
    texts = [f"{number} green bottles hanging on the wall" for number in range(64)]
    model = make_model(torch.float32, vocab_size=260, hidden_size=48, num_hidden_layers=1)
    model.init_weights()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(tmp_path),
            packing=packing,
            max_length=128,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            num_train_epochs=8,
            logging_steps=4,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]


CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<eos>{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "messages"])
def test_a_model_tuned_with_trl_learns_to_stop(tmp_path, chat):
    """TRL writes `<eos>` and chat templates write roles as text; training must see their special tokens."""
    import trl
    from datasets import Dataset

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    answer = "ten green bottles"
    messages = [{"role": "user", "content": "Sing"}, {"role": "assistant", "content": answer}]
    rows = {"messages": [messages] * 32} if chat else {"text": [answer] * 32}
    torch.manual_seed(0)
    model = make_model(torch.float32, vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=1)
    model.init_weights()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(tmp_path / "run"),
            packing=False,
            per_device_train_batch_size=4,
            learning_rate=0.02,
            num_train_epochs=12,
            assistant_only_loss=chat,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    spelt = [4 + byte for byte in answer.encode()]
    question = [260, *(4 + byte for byte in b"Sing"), 261]
    assert list(trainer.train_dataset[0]["input_ids"]) == (question if chat else []) + [*spelt, 3]

    trainer.train()

    prompt = question if chat else spelt[:1]
    written = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0].tolist()
    assert written == (question if chat else []) + [*spelt, 3]
