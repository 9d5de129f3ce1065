"""Decision records: whoever names one finds it, the index has them all, and the commands in them exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.simulate.scenario import find

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "decisions" / "README.md"
RECORDS = sorted(INDEX.parent.glob("[0-9]*.md"))
NUMBERS = {path.name[:4]: path.name for path in RECORDS}
FOLDERS = ("shadecast", "models", "actors", "serve_app", "train", "bench", "examples", "checks", "docs")


def _texts() -> Iterator[tuple[Path, str]]:
    within = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md"))
    paths = [*ROOT.glob("*.md"), *within]
    return ((path, path.read_text(encoding="utf-8")) for path in paths)


def test_every_decision_that_code_or_docs_name_is_there():
    missing = [
        f"{path.relative_to(ROOT)}: {number}{name}"
        for path, text in _texts()
        for number, name in re.findall(r"decisions/(\d{4})(-[\w-]+\.md)?", text)
        if number not in NUMBERS or (name and NUMBERS[number] != number + name)
    ]
    assert not missing
    assert RECORDS


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name[:4])
def test_a_record_names_only_records_and_commands_that_exist(record):
    text = record.read_text(encoding="utf-8")
    assert text.startswith(f"# {record.name[:4]}: ")
    assert set(re.findall(r"(?<![\w.,])00\d\d\b", text)) <= NUMBERS.keys()
    for module, rest in re.findall(r"`python -m ([\w.]+)([^`]*)`", text):
        base = ROOT / module.replace(".", "/")
        sources = list(base.glob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
        source = "".join(path.read_text(encoding="utf-8") for path in sources)
        assert source, module
        for option in re.findall(r" --([a-z][a-z-]*)", rest):
            assert f'"--{option}"' in source or f"    {option.replace('-', '_')}: Annotated" in source, (module, option)
        for scenario in re.findall(r" --scenario (\S+)", rest) if module == "bench.simulate" else ():
            assert scenario == "NAME" or find(scenario)


def test_the_index_names_every_record_once():
    assert sorted(re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", INDEX.read_text(encoding="utf-8"))) == [*NUMBERS.values()]
