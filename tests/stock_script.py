"""A script that knows nothing of us but `import hf_lstm`: shuffled blocks, the stock collator, the stock Trainer."""

import json
import sys

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_lstm

output_dir = sys.argv[1]
set_seed(0)
texts = [f"{number} green bottles hanging on the wall" for number in range(64)]
tokenizer = hf_lstm.char_tokenizer(texts)
tokenizer.padding_side = "right"  # as the README says
tokenized = Dataset.from_dict({"text": texts}).map(lambda row: tokenizer(row["text"]), remove_columns="text")
model = AutoModelForCausalLM.from_config(
    AutoConfig.for_model("hf_lstm", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1)
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        num_train_epochs=4,
        logging_steps=8,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    ),
    train_dataset=tokenized,
    eval_dataset=tokenized,
    processing_class=tokenizer,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
trainer.save_model()
if trainer.is_world_process_zero():
    print(json.dumps({"before": before, "after": after, "processes": trainer.args.world_size}))
