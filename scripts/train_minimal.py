"""Train a character LSTM in one short file: copy it, change the constants, make it yours.

python scripts/train_minimal.py
"""

import os
import sys
from pathlib import Path

from transformers import Trainer, default_data_collator, set_seed

from hf_lstm import LaneDataset, LSTMConfig, LSTMForCausalLM, TokenStream, char_tokenizer, evaluate_stream
from hf_lstm.training import LSTMTrainingArguments, TruncatedBPTTCallback

FILES = sorted(Path(os.__file__).parent.glob("*.py"))  # Python's standard library; or [Path("tinyshakespeare.txt")]
OUTPUT_DIR = "runs/minimal"
PROMPT = "def "
HIDDEN_SIZE, NUM_LAYERS, DROPOUT = 384, 1, 0.0
LANES, BPTT_LENGTH = 16, 64  # places that are read side by side; tokens that gradients run back through
MAX_STEPS, LEARNING_RATE = 1500, 4e-3

sys.stdout.reconfigure(errors="backslashreplace")  # a screen or file may lack some character
set_seed(0)
text = "".join(file.read_text(encoding="utf-8") for file in FILES)
cut = int(0.9 * len(text))  # the last tenth is for validation
tokenizer = char_tokenizer([text[:cut]])
train, validation = (TokenStream.from_documents([part], tokenizer) for part in (text[:cut], text[cut:]))
config = LSTMConfig(
    vocab_size=len(tokenizer),
    hidden_size=HIDDEN_SIZE,
    num_hidden_layers=NUM_LAYERS,
    output_dropout=DROPOUT,
)
trainer = Trainer(
    model=LSTMForCausalLM(config),
    args=LSTMTrainingArguments(
        OUTPUT_DIR,
        per_device_train_batch_size=LANES,
        max_steps=MAX_STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, MAX_STEPS // 10),
        logging_steps=50,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=LaneDataset(train, LANES, BPTT_LENGTH),
    data_collator=default_data_collator,
    processing_class=tokenizer,
    callbacks=[TruncatedBPTTCallback()],  # carries the state from batch to batch
)
trainer.train()
trainer.save_model()

scores = evaluate_stream(trainer.model, validation)
print(f"validation: {scores['loss']:.4f} nats per character, {scores['bits_per_byte']:.4f} bits per byte")
prompt = tokenizer(PROMPT, return_tensors="pt").to(trainer.model.device)
written = trainer.model.generate(**prompt, do_sample=True, temperature=0.7, max_new_tokens=300, eos_token_id=None)
print(tokenizer.decode(written[0]))
