"""The task `noise` of scripts/evaluate.py: how a model predicts and writes after wrong characters."""

from dataclasses import dataclass, field

from command_line import flag
from evaluate_common import Arguments, as_json, corpus_of, log, write_result
from evaluate_pictures import draw_noise
from reading import Reading

from hf_lstm.data.lanes import check_at_least_one
from hf_lstm.evaluation.noise import KINDS, add_character_noise, loss_after_noise, share_of_known_words


@dataclass
class Noise(Reading, Arguments):
    """The loss, and the share of written words that occur in the training text, with noise in the text before them."""

    train_file: str | None = flag("The text that the model was trained on; without it that of the model's own run.")
    validation_file: str | None = flag("The text to corrupt; without it what training kept for validation.")
    join_records: bool = flag("Whether the records are pieces of one text, as in training.", False)
    shares: list[float] = field(
        default_factory=lambda: [0.0, 0.01, 0.02, 0.05, 0.1], metadata={"help": "Shares of characters to corrupt."}
    )
    characters: int = flag("Characters of the text whose loss is measured.", 20_000)
    prompts: int = flag("Pieces of it that the model goes on with.", 20)
    prompt_length: int = flag("Characters of each.", 200)
    seed: int = flag("Seed of the noise and of the sampling.", 0)
    picture: str | None = flag("Where to draw both by the share.")


def noise(arguments: Noise, model, tokenizer) -> None:
    check_at_least_one(
        characters=arguments.characters, prompts=arguments.prompts, prompt_length=arguments.prompt_length
    )
    corpus, _ = corpus_of(arguments)
    words = {word for text in corpus["train"]["text"] for word in (text or "").split()}
    text = "\n".join(text or "" for text in corpus["validation"]["text"])[: arguments.characters]
    step = max(1, (len(text) - arguments.prompt_length) // arguments.prompts)
    pieces = [text[number * step :][: arguments.prompt_length] for number in range(arguments.prompts)]
    result = {}
    for kind in KINDS:
        result[kind] = {}
        for share in arguments.shares:
            prompts = [add_character_noise(piece, share, kind, arguments.seed)[0] for piece in pieces]
            result[kind][str(share)] = found = {
                "loss": loss_after_noise(model, tokenizer, text, share, kind, arguments.seed),
                "known_words": share_of_known_words(model, tokenizer, prompts, words, seed=arguments.seed),
            }
            log(f"{kind:>12} {share:6.1%}: {found['loss']:.4f} nats per token, {found['known_words']:.1%} known words")
    write_result(as_json(result), arguments)
    if arguments.picture is not None:
        draw_noise(result, arguments.picture)
