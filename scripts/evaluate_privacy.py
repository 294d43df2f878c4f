"""The task `privacy` of scripts/evaluate.py: how much a model remembers of its training text."""

import math
from dataclasses import dataclass
from pathlib import Path

from command_line import flag
from evaluate_common import Arguments, as_json, corpus_of, log, stream_of, write_result
from evaluate_pictures import draw_exposure
from reading import Reading
from transformers import GenerationConfig

from hf_lstm.evaluation import draw_passages, exposure, extraction
from hf_lstm.model_card import add_to_model_card


@dataclass
class Privacy(Reading, Arguments):
    """Passages of the training text that can be extracted, beside unseen text, and the exposure of planted secrets."""

    train_file: str | None = flag("The text that the model was trained on; without it that of the model's own run.")
    validation_file: str | None = flag("Unseen text of the same kind; without it what training kept for validation.")
    join_records: bool = flag("Whether the records are pieces of one text, as in training.", False)
    passages: int = flag("Passages of each text, drawn at random.", 1000)
    prefix_length: int = flag("Tokens of a passage that the model is given.", 50)
    suffix_length: int = flag("Tokens after them that are to be extracted.", 50)
    n: int = flag("Samples drawn for each passage.", 100)
    p: float = flag("Least probability that one of them is the passage.", 0.5)
    temperature: float = flag("Divisor of the logits while sampling.", 1.0)
    top_k: int = flag("Sample from so many most probable tokens; from all by default.", 0)
    top_p: float = flag("Sample from the most probable tokens of this share together.", 1.0)
    seed: int = flag("Seed of the passages, and of the candidates where a sample of them is read.", 0)
    canaries: str | None = flag(
        "A .csv file of secrets planted by `insert_canaries`: its columns `secret` and `count`."
    )
    template: str | None = flag("The text around a secret, with `{}` in its place.")
    alphabet: str = flag("The characters of a secret.", "0123456789")
    start_token: str | None = flag("Token that a canary is predicted from: <eos> for a model trained on documents.")
    card: bool = flag("Whether to write the figures into the model's card too.", False)
    picture: str | None = flag("Where to draw the exposure by the number of copies.")


def privacy(arguments: Privacy, model, tokenizer) -> None:
    if (arguments.canaries is None) != (arguments.template is None):
        raise ValueError("`--canaries` and `--template` belong together: give both, or leave both out.")
    if arguments.picture is not None and arguments.canaries is None:
        raise ValueError("`--picture` shows the exposure of canaries: name their file by `--canaries`.")
    if arguments.card and not (Path(arguments.model) / "run.json").is_file():
        raise ValueError(
            f"`--card` needs the run.json that train.py wrote, and {arguments.model} has none: leave it out."
        )
    canaries = None if arguments.canaries is None else read_canaries(arguments.canaries)
    corpus, _ = corpus_of(arguments)
    result = {"extraction": extractable(arguments, corpus, model, tokenizer)}
    if canaries is not None:
        rows = exposure(
            model,
            tokenizer,
            arguments.template,
            arguments.alphabet,
            len(canaries["secret"][0]),
            canaries["secret"].tolist(),
            arguments.start_token,
            arguments.seed,
        ).assign(count=canaries["count"])
        result["exposure"] = summary(rows, len(arguments.alphabet)) | {"secrets": rows.to_dict("records")}
        for count, found in result["exposure"]["by_count"].items():
            log(f"{count:>5} copies: exposure {found['mean']:.2f} ± {found['standard_error']:.2f} bits")
        log(f"at most {result['exposure']['most']:.2f}, and 1.44 on average for an unseen secret")
    write_result(as_json(result), arguments)
    if arguments.picture is not None:
        draw_exposure(result["exposure"], arguments.picture)
    if arguments.card:
        kept = {name: value for name, value in result.get("exposure", {}).items() if name != "secrets"}
        add_to_model_card(arguments.model, memorisation=result["extraction"] | {"exposure": kept})
        log(f"The card is {Path(arguments.model) / 'README.md'}")


def extractable(arguments: Privacy, corpus, model, tokenizer) -> dict:
    """Measure extraction of training passages and of unseen ones."""
    length = arguments.prefix_length + arguments.suffix_length
    scheme = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    config = GenerationConfig(do_sample=True, **scheme)
    settings = {"n": arguments.n, "p": arguments.p}
    result = settings | scheme | {"prefix_length": arguments.prefix_length, "suffix_length": arguments.suffix_length}
    for name, split in (("training", "train"), ("unseen", "validation")):
        stream = stream_of(corpus[split], model, tokenizer)
        passages = draw_passages(stream, arguments.passages, length, arguments.seed)
        found = extraction(model, passages, arguments.prefix_length, generation_config=config, **settings)
        log(
            f"{name:>8}: {found['extractable']:,} of {found['passages']:,} passages of {arguments.suffix_length} tokens are "
            f"({arguments.n}, {arguments.p:g})-extractable, {found['greedy']:,} by greedy decoding"
        )
        result[name] = found
    return result


def read_canaries(path: str):
    """Read the table that `insert_canaries` returned; digits stay text."""
    import pandas

    rows = pandas.read_csv(path, dtype=str, keep_default_na=False)
    if not {"secret", "count"} <= set(rows.columns) or len(rows) == 0 or not rows["count"].str.fullmatch(r"\d+").all():
        raise ValueError(
            f"`--canaries` {path} must have rows with a `secret` and a `count`: write the table that `insert_canaries` "
            "returned by its `to_csv`."
        )
    return rows.assign(count=rows["count"].astype(int))


def summary(rows, letters: int) -> dict:
    """Summarise exposures by the number of copies: mean, standard error (`None` for a single secret) and number of secrets."""
    groups = rows.groupby("count")["exposure"]
    return {
        "most": len(rows["secret"].iloc[0]) * math.log2(letters),
        "by_count": {
            str(count): {
                "mean": float(group.mean()),
                "standard_error": float(group.std() / math.sqrt(len(group))),
                "secrets": len(group),
            }
            for count, group in groups
        },
    }
