"""Flags of train.py that follow from others: a recipe by its name, a text without its flag, and steps that fit each other."""

import math
from argparse import ArgumentError, Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

RECIPES = Path(__file__).parent / "recipes"
STEPS = ("save_steps", "eval_steps", "logging_steps")


def recipe_file(name: str) -> Path:
    """Find a recipe by its file, or by its name in scripts/recipes."""
    path = Path(name)
    if not path.is_file() and path.parent == Path("."):
        path = RECIPES / f"{path.name.removesuffix('.args')}.args"
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.args")))
        raise ValueError(f"`--recipe` {name} must be a file of flags, or one of scripts/recipes: {known}.")
    return path


def given_flags(arguments: list[str], groups: tuple[type, ...]) -> tuple[dict[str, Any], list[str]]:
    """
    Return the flags that were typed, and the words that belong to none of them; nothing for a command line that the parser
    itself has to refuse.
    """
    parser = HfArgumentParser(groups, add_help=False, allow_abbrev=False, exit_on_error=False)
    nothing = Namespace(**{flag.name: None for group in groups for flag in fields(group)})  # instead of defaults
    try:
        namespace, words = parser.parse_known_args(arguments, nothing)
    except ArgumentError:
        return {}, []
    if any(word.startswith("-") for word in words):
        return {}, []
    return {name: value for name, value in vars(namespace).items() if value is not None}, words


def with_train_file(arguments: list[str], groups: tuple[type, ...]) -> list[str]:
    """Name the flag of a text that was typed without one, `train.py mytext.txt`. Raises `ValueError` for several."""
    given, words = given_flags(arguments, groups)
    if not words:
        return arguments
    if len(words) > 1 or "train_file" in given:
        raise ValueError(
            f"`{words[0]}` is one text too many: name one file, a folder, or a pattern in quotation marks, such as "
            f"`--train_file '{Path(words[0]).parent / '*'}{Path(words[0]).suffix}'`."
        )
    others = ([*arguments[:place], *arguments[place + 1 :]] for place in range(len(arguments)))
    # A flag may have the same value as the word.
    without = next(rest for rest in others if given_flags(rest, groups) == (given, []))
    return ["--train_file", words[0], *without]


def with_following(arguments: list[str], groups: tuple[type, ...]) -> tuple[list[str], list[str]]:
    """
    Add the flags of evaluations, checkpoints and logs that were not given, where the defaults do not fit those that were,
    and a sentence for each reason. Raises `ValueError` where those given do not fit each other.
    """
    given, _ = given_flags(arguments, groups)
    defaults = {flag.name: flag.default for group in groups for flag in fields(group)}
    followers, reasons = [], []
    for names, following in ((("eval_strategy", "save_strategy"), _strategies), (STEPS, _steps)):
        found = following(given, defaults | given)
        if found:
            given |= found
            typed = [f"`--{name} {_typed(given[name])}`" for name in names if name in given and name not in found]
            shown = [f"`--{name} {_typed(value)}`" for name, value in found.items()]
            reasons.append(f"{' and '.join(shown)} {'follow' if len(shown) > 1 else 'follows'} {' and '.join(typed)}.")
            followers += [word for name, value in found.items() for word in (f"--{name}", _typed(value))]
    if "--load_best_model_at_end" in followers:
        reasons.append("The model of the last step is the result, since none is known to be the best.")
    return [*arguments, *followers], reasons


def _typed(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).lower()


def _strategies(given: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Return the strategies to change: to keep the best model, each evaluation needs a checkpoint."""
    evaluates, saves = asked["eval_strategy"], asked["save_strategy"]
    if not asked["load_best_model_at_end"] or evaluates == saves != "no" or (saves == "best" and evaluates != "no"):
        return {}
    if "no" in (evaluates, saves):
        if "load_best_model_at_end" in given:
            raise ValueError(
                f"`--load_best_model_at_end true` needs evaluations and checkpoints, and not `--eval_strategy {evaluates}` "
                f"with `--save_strategy {saves}`: leave one of them out."
            )
        return {"load_best_model_at_end": False}
    if "eval_strategy" in given and "save_strategy" in given:
        raise ValueError(
            f"`--eval_strategy` {evaluates} and `--save_strategy` {saves} must be the same, so that the best model is saved: "
            "leave one of them out, or add `--load_best_model_at_end false`."
        )
    leader, follower = ("eval", "save") if "eval_strategy" in given else ("save", "eval")
    strategy = asked[f"{leader}_strategy"]
    if f"{follower}_steps" in given and strategy != "steps":
        raise ValueError(
            f"`--{leader}_strategy` {strategy} and `--{follower}_steps` ({_typed(given[f'{follower}_steps'])}) exclude each other, "
            "since evaluations and checkpoints come together: leave one of them out."
        )
    return {f"{follower}_strategy": strategy}


def _steps(given: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """
    Return the steps to change: `save_steps` must be a multiple of `eval_steps`, so that the best model is saved, and of
    `logging_steps`.
    """
    typed = {name: given[name] for name in STEPS if name in given}
    if not typed or asked["save_strategy"] != "steps":
        return {}
    parts = ["eval_steps"] if asked["load_best_model_at_end"] and asked["eval_strategy"] == "steps" else []
    if any(value <= 0 or (value > 1 and value % 1) for value in typed.values()):  # which Trainer refuses
        return {}
    if any(value < 1 for value in typed.values()):  # shares of the run, alike for evaluations and checkpoints
        shares = [value for name, value in typed.items() if name in ("save_steps", *parts)]
        return {name: shares[0] for name in ("save_steps", *parts) if shares and name not in typed}
    parts += ["logging_steps"] if asked["logging_strategy"] == "steps" else []
    wanted = {name: int(asked[name]) for name in ("save_steps", *parts)}
    if "save_steps" not in typed:
        multiple = math.lcm(*(wanted[name] for name in parts if name in typed))
        wanted["save_steps"] = max(1, round(wanted["save_steps"] / multiple)) * multiple
    saves = wanted["save_steps"]
    divisors = [
        part for number in range(1, math.isqrt(saves) + 1) if saves % number == 0 for part in (number, saves // number)
    ]
    for name in parts:
        if name not in typed:
            wanted[name] = min(part for part in divisors if part >= min(wanted[name], saves))
    if saves % wanted.get("eval_steps", 1):
        raise ValueError(
            f"`--save_steps` ({saves}) must be a multiple of `--eval_steps` ({wanted['eval_steps']}), so that the best model "
            "is saved: leave one of them out."
        )
    return {name: value for name, value in wanted.items() if value != asked[name]}
