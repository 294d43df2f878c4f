"""Rules of the source tree: direction of imports, length of files, places of files, words."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import mutations
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_lstm"
# A name imports only what stands to its left.
ORDER = [
    "model",
    "unknown",
    "tokenizers",
    "decoding",
    "data",
    "evaluation",
    "generation",
    "model_card",
    "hub",
    "convert",
    "training",
]
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "hf_lstm", "tests", "scripts", "model_cards"}


def tracked(pattern="*"):
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / line for line in listed.splitlines() if (ROOT / line).exists()]


def imported_modules(path):
    """Absolute names of the modules a file imports, wherever it does."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            yield ".".join(part for part in (prefix, node.module) if part)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    if path in (PACKAGE / "__init__.py", PACKAGE / "__main__.py"):
        return
    own = ORDER.index(path.relative_to(PACKAGE).with_suffix("").parts[0])
    for name in imported_modules(path):
        if name.split(".")[0] == "hf_lstm":
            assert name != "hf_lstm", f"{path.name} imports the package itself"
            assert ORDER.index(name.split(".")[1]) <= own, f"{path.name} imports {name}"


def test_a_source_file_has_less_than_500_lines():
    for path in tracked("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        ceiling = 800 if path.is_relative_to(ROOT / "tests") else 500
        assert lines < ceiling, f"{path}: {lines} lines"
        assert path.name != "utils.py"


def test_the_top_level_is_fixed():
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}

    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_the_travelling_files_can_travel():
    """transformers copies the siblings that `from .sibling import name` names beside the weights, and nothing else."""
    files = sorted((PACKAGE / "model").glob("*.py"))
    siblings = {path.stem for path in files}
    for path in files:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (node.level, node.module in siblings) == (1, True), f"{path.name}: {ast.unparse(node)}"
            if isinstance(node, ast.Call):
                assert "register" not in ast.unparse(node.func), f"{path.name}: {ast.unparse(node)} as a side effect"
        absolute = {line for line in text.splitlines() if re.match(r"\s*(from|import) hf_lstm", line)}
        assert not absolute, f"{path.name}: {absolute}"
        relative = re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)
        assert set(relative) <= siblings, f"{path.name}: a docstring line that looks like an import"


def test_model_files_are_named_for_a_flat_folder():
    for path in (PACKAGE / "model").glob("*.py"):
        assert path.stem == "__init__" or path.stem.endswith("_lstm")


QUIET_IMPORT = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["datasets"] = sys.modules["matplotlib"] = None
import hf_lstm, hf_lstm.training, hf_lstm.model_card
"""


def test_import_is_quiet_and_needs_no_datasets():
    ran = subprocess.run([sys.executable, "-c", QUIET_IMPORT], capture_output=True, text=True)

    assert (ran.returncode, ran.stdout) == (0, "")
    assert "hf_lstm" not in ran.stderr


def test_the_public_names_exist():
    import hf_lstm

    assert hf_lstm.__all__ == sorted(hf_lstm.__all__)
    assert all(hasattr(hf_lstm, name) for name in hf_lstm.__all__)


@pytest.mark.parametrize("name", ["xlstm", "rwkv", "minimax", "reformer", "xlnet", "mamba"])
def test_no_class_name_misleads_transformers(name):
    """`generate()` denies a cache, or gives another, to classes whose names contain these."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ClassDef) and name in node.name.lower())


FOREIGN_FIRST_WORD = re.compile(r"(What|As|Whoever)\b")
# "x is no number", "as X has them"; "there is no `text` column" and "is no longer" are plain English.
FOREIGN_PHRASE = re.compile(
    r"(?<![Tt]here )\b(is|are|was|were) (no|none)\b(?! (longer|more|less|larger|smaller)\b)"
    r"|\bas [^,.;:]{1,40} (has|have|had) (it|them)\b"
)


def foreign_words(source: str) -> list[str]:
    """Docstrings whose first word, and texts of which a phrase, is not how transformers' documentation writes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node) or ""
            found += [docstring] if FOREIGN_FIRST_WORD.match(docstring) else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [node.value] if FOREIGN_PHRASE.search(" ".join(node.value.split())) else []
    return found


@pytest.mark.parametrize("folder", ["hf_lstm", "scripts"])
def test_docstrings_and_messages_are_in_plain_english(folder):
    found = {path: foreign_words(path.read_text(encoding="utf-8")) for path in tracked(f"{folder}/*.py")}

    assert {path: texts for path, texts in found.items() if texts} == {}


@pytest.mark.parametrize(
    "source",
    [
        '"""What a file holds."""',
        'def f():\n    """\n    As `g`, but slower.\n    """',
        '"""Whoever asks."""',
        'raise ValueError(f"{path} is no JSON: save it.")',
        'x = "holds numbers in `x` that are\\n none"',
        '"""Gates in the order i, f, g, o, as torch has them."""',
    ],
)
def test_foreign_words_are_found(source):
    assert len(foreign_words(source)) == 1


@pytest.mark.parametrize(
    "text", ["There is no `text` column.", "The file is no longer there.", "Whether it is None.", "As is."]
)
def test_plain_english_is_not_foreign(text):
    assert foreign_words(f"x = {text!r}") == []


IMPORTED_AS = {
    "llama_cpp": "llama-cpp-python",
    "huggingface_hub": "huggingface-hub",
}  # where the name to install is another one
BY_TRANSFORMERS = {"starlette", "uvicorn"}  # of its extra `serving`


def test_every_imported_package_is_declared():
    """In the dependencies what hf_lstm imports; in an extra what scripts import, and what a function does for one format."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required, optional = (
        {re.match(r"[\w-]+", line)[0].replace("_", "-") for line in lines}
        for lines in (
            project["dependencies"],
            [line for name in ("convert", "train", "onnx", "serve", "privacy", "benchmarks") for line in extras[name]],
        )
    )
    for folder, allowed in (
        ("hf_lstm/*.py", required | {"h5py", "matplotlib", "onnx", "onnxruntime", "opacus"}),
        ("scripts/*.py", required | optional | BY_TRANSFORMERS),
    ):
        for path in tracked(folder):
            own = {other.stem for other in [*path.parent.glob("*.py"), *(ROOT / "scripts").glob("*.py")]} | {"hf_lstm"}
            names = {name.split(".")[0] for name in imported_modules(path)} - sys.stdlib_module_names - own
            assert {IMPORTED_AS.get(name, name) for name in names} <= allowed, path


def test_pre_commit_runs_the_pinned_ruff():
    pin = re.search(r"^ruff==(\S+)$", (ROOT / "scripts/constraints.txt").read_text(), flags=re.MULTILINE)[1]

    assert f"rev: v{pin} " in (ROOT / ".pre-commit-config.yaml").read_text()


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutations_fit_the_code(mutation):
    """tests/mutations.py shows that each is noticed, and tests/README.md repeats by which test."""
    assert (PACKAGE / mutation.path).read_text(encoding="utf-8").count(mutation.old) == 1
    row = f"| {mutation.name} | `{mutation.path}` | `{mutation.noticed_by}::"
    described = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    (test,) = re.findall(f"^{re.escape(row)}(\\w+)` \\|$", described, flags=re.MULTILINE)
    assert f"\ndef {test}(" in (ROOT / "tests" / mutation.noticed_by).read_text(encoding="utf-8")


def test_only_the_flag_runs_the_type_checker(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import check

    tools = {types: [command[0] for command in check.commands(types)] for types in (False, True)}

    assert tools == {False: ["ruff", "ruff", "pytest"], True: ["ruff", "ruff", "mypy", "pytest"]}
