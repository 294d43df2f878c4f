"""On a GPU: the same numbers as on a CPU, and every precision learns. `pytest -m gpu`; skipped without one."""

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from test_tbptt import BPTT, LANES, make_trainer

from hf_lstm import LaneDataset, byte_tokenizer, evaluate_stream, surprisal
from hf_lstm.evaluation import DynamicEvaluation, NeuralCache, gradient_rms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

IDS = make_ids(3, 40)
SONG = make_ids(1, 30)[0].repeat(40)
REGULARIZATION = {
    "embedding_dropout": 0.05,
    "input_dropout": 0.1,
    "hidden_dropout": 0.1,
    "output_dropout": 0.1,
    "weight_dropout": 0.1,
    "activation_regularization": 0.1,
    "temporal_activation_regularization": 0.1,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_numbers_are_those_of_a_cpu(name):
    gradients = []
    for device in ("cpu", "cuda"):
        model = make_model(**CONFIGS[name]).to(device)
        output = model(IDS.to(device), labels=IDS.to(device))
        output.loss.backward()
        gradients.append([output.loss.cpu(), *(parameter.grad.cpu() for parameter in model.parameters())])

    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"fp16": True}, {"torch_compile": True}], ids=str)
def test_every_precision_learns_with_regularisation(tmp_path, options):
    model = make_model(torch.float32, hidden_size=64, **REGULARIZATION)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(4)
    trainer, losses = make_trainer(
        tmp_path,
        model,
        LaneDataset(SONG, LANES, BPTT),
        optim="adamw_torch",
        learning_rate=0.01,
        num_train_epochs=8,
        use_cpu=False,
        **options,
    )
    trainer.train()

    assert sum(losses.train[-20:]) < 0.5 * sum(losses.train[:20])


def test_evaluation_finds_what_it_finds_on_a_cpu():
    results = []
    for device in ("cpu", "cuda"):
        model = make_model(vocab_size=260).to(device)
        learning = DynamicEvaluation(gradient_rms(model, SONG, lanes=5))
        adapted = evaluate_stream(
            model, SONG, batch_size=2, neural_cache=NeuralCache(50, 0.1), dynamic_evaluation=learning
        )
        sentences = surprisal(model, byte_tokenizer(), ["to be", "or not to be"], start_token="<eos>")
        results.append([evaluate_stream(model, SONG)["loss"], adapted["loss"], *sentences["surprisal"]])

    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_compiled_decoding_writes_what_plain_decoding_writes():
    """A static cache keeps its addresses, so that `generate()` compiles the step and replays it as a CUDA graph."""
    model = make_model(torch.float32, hidden_size=64).to("cuda")
    ids = IDS.to("cuda")

    plain = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
    static = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, cache_implementation="static")

    assert torch.equal(plain, static)


@pytest.mark.parametrize(
    "options", [{"loss_chunk_size": 7}, {"adaptive_softmax_cutoffs": [8, 20], "tie_word_embeddings": False}], ids=str
)
def test_losses_without_logits_are_those_of_a_cpu(options):
    found = []
    for device in ("cpu", "cuda"):
        model = make_model(hidden_size=32, **options).to(device).train()
        loss = model(IDS.to(device), labels=IDS.to(device)).loss
        loss.backward()
        found.append([loss.cpu(), *(parameter.grad.cpu() for parameter in model.parameters())])

    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_a_training_step_waits_for_nothing():
    model = make_model(torch.float32, hidden_size=64).to("cuda").train()
    ids = IDS.to("cuda")
    model(ids, labels=ids).loss.backward()  # what is made once, is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, shift_labels=ids).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
