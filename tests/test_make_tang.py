"""scripts/make_tang.py on a folder laid out like the chinese-poetry repository."""

import json

import pytest


def poem(number, **changes):
    lines = [f"白日依山盡第{number}，黃河入海流。", "欲窮千里目，更上一層樓。"]
    return {"author": "王之渙", "paragraphs": lines, "title": f"登樓 {number}", "id": str(number)} | changes


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "chinese-poetry" / "全唐诗"
    folder.mkdir(parents=True)
    files = {
        "poet.tang.0.json": [poem(number) for number in range(30)],
        "poet.tang.1000.json": [
            *map(poem, range(30, 50)),
            poem(3, title="again"),
            poem(0, paragraphs=["春眠不覺曉。"]),
        ],
        "poet.song.0.json": [poem(60)],
        "poet.tang.0.simplified.json": [poem(61)],
        "authors.tang.json": [{"name": "王之渙", "desc": ""}],
    }
    for name, poems in files.items():
        (folder / name).write_text(json.dumps(poems, ensure_ascii=False), encoding="utf-8")
    return folder.parent


def read(folder):
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "validation", "test")
    }


def test_each_poem_is_in_one_part(repository, tmp_path, run):
    printed = run("make_tang.py", repository, "--output_dir", tmp_path / "tang")

    parts = read(tmp_path / "tang")
    assert {name: len(poems) for name, poems in parts.items()} == {"train": 46, "validation": 2, "test": 2}
    found = [record for poems in parts.values() for record in poems]
    expected = [
        {"title": one["title"], "author": one["author"], "text": "\n".join(one["paragraphs"])}
        for one in map(poem, range(50))
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)  # those of Song, and the short one, are left out
    assert "train.jsonl: 46 poems" in printed


def test_the_parts_do_not_depend_on_the_files(repository, tmp_path, run):
    run("make_tang.py", repository, "--output_dir", tmp_path / "tang")
    folder = repository / "全唐诗"
    poems = json.loads((folder / "poet.tang.0.json").read_text(encoding="utf-8"))
    (folder / "poet.tang.0.json").write_text(json.dumps(poems[:10]), encoding="utf-8")
    (folder / "poet.tang.200.json").write_text(json.dumps(poems[10:][::-1]), encoding="utf-8")

    run("make_tang.py", repository, "--output_dir", tmp_path / "other")

    assert read(tmp_path / "other") == read(tmp_path / "tang")


def test_no_more_poems_are_taken_than_the_recipe_has(repository, tmp_path, run):
    poems = [poem(number) for number in range(25_000)]
    (repository / "全唐诗" / "poet.tang.2000.json").write_text(json.dumps(poems), encoding="utf-8")

    run("make_tang.py", repository, "--output_dir", tmp_path / "tang")

    assert {name: len(poems) for name, poems in read(tmp_path / "tang").items()} == {
        "train": 22_000,
        "validation": 1_000,
        "test": 1_000,
    }


def test_other_folders_are_refused_and_nothing_is_written(repository, tmp_path, run):
    output = tmp_path / "tang"
    with pytest.raises(SystemExit, match=r"holds no 全唐诗/poet\.tang\.0\.json: name a clone, made by `git clone"):
        run("make_tang.py", tmp_path, "--output_dir", output)
    damaged = repository / "全唐诗" / "poet.tang.1000.json"
    for text in ("[", "[1]", '[{"title": "", "author": ""}]', '[{"title": "", "author": "", "paragraphs": [1]}]'):
        damaged.write_text(text)
        with pytest.raises(SystemExit, match=r"poet\.tang\.1000\.json is not a list of poems .*: restore it"):
            run("make_tang.py", repository, "--output_dir", output)
    damaged.write_text("[]")
    (repository / "全唐诗" / "poet.tang.0.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"There are 0 poems of at least 16 characters, and three parts"):
        run("make_tang.py", repository, "--output_dir", output)
    assert not list(tmp_path.glob("tang*"))

    output.mkdir()
    with pytest.raises(SystemExit, match=r"tang exists already: name another folder"):
        run("make_tang.py", repository, "--output_dir", output)
