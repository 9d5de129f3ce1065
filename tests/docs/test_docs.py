"""Commands and blocks of README and docs are what parsers, schemas and settings take; links lead somewhere.

Blocks that need a cluster are run in tests/cluster/test_serve_command.py.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import pytest
import yaml
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import ServeDeploySchema

from serve_app.app import AppArgs
from serve_app.gateway.model_server import ModelInfo
from shadecast.config import Config, retired_settings, sections
from tests.docs.blocks import (
    LANGUAGES,
    NOT_RUN,
    ROOT,
    Block,
    blocks,
    commands,
    inline_commands,
    is_record,
    is_served,
    module_name,
    pages,
    text_of,
    why_not_run,
    without_blocks,
)
from tests.docs.parsers import WrongCommandError, check

PAGES = pages()
LIVING = [page for page in PAGES if not is_record(page)]
BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> list[Any]:
    return [pytest.param(block, id=block.where) for block in BLOCKS if block.language in languages]


# ---------------------------------------------------------------- blocks


def test_each_block_says_its_language_and_nothing_is_code_by_being_indented() -> None:
    assert [block.where for block in BLOCKS if block.language not in LANGUAGES] == []
    for page in LIVING:
        assert re.findall(r"\n\n    (?:shadecast|make|python|ray|serve) .*", without_blocks(page)) == [], page


@pytest.mark.parametrize("block", of("sh"))
def test_each_command_of_a_block_has_a_rule_and_the_parser_takes_it(block: Block) -> None:
    found = list(commands(block.text))
    assert found, "no command"
    for command in found:
        if not is_record(block.page):
            why_not_run(command)
        check(command, strictly=not is_record(block.page))
        check_files(command)


def check_files(command: list[str]) -> None:
    """What lies in this repository is there; an extra that is installed is one."""
    for word in command:
        if re.match(r"(deploy|examples|models|docs)/[\w./-]+$|cluster\.yaml$", word):
            assert (ROOT / word).exists(), word
        if command[0] == "pip" and (extras := re.search(r"(?:shadecast.*|\.)\[([\w,]+)\]", word)):
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(extras[1].split(",")) <= set(known), word


@pytest.mark.parametrize("page", PAGES)
def test_each_command_in_prose_exists_with_its_options(page: str) -> None:
    for text in inline_commands(page):
        for script in re.split(r" \| | ?`", text.replace("...", "").replace("[.", "[")):
            for command in commands(script):
                check(command, strictly=False)
                check_files(command)


@pytest.mark.parametrize(
    "script",
    [
        "shadecast nowhere",
        "shadecast status --watchh",
        "shadecast up --page-port a-word",
        "shadecast drain",
        "python -m bench.nothing",
        "python -m examples.nothing",
        "python -m train --telemetri x",
        "make nothing",
        "ray upp cluster.yaml",
        "serve deploy --nothing x.yaml",
        "ray job submit -- python -m train --nothing",
    ],
)
def test_a_command_that_is_wrong_is_found(script: str) -> None:
    (command,) = commands(script)
    with pytest.raises(WrongCommandError):
        check(command, strictly=True)


def test_a_command_without_a_rule_is_found() -> None:
    with pytest.raises(LookupError, match="no rule"):
        why_not_run(["rm", "-rf", "somewhere"])


def test_no_rule_is_left_over() -> None:
    told = [
        " ".join(command)
        for block in BLOCKS
        if block.language == "sh" and not is_record(block.page)
        for command in commands(block.text)
    ]
    unused = [rule for rule in NOT_RUN if not any(re.match(rule, text) for text in told)]
    assert unused == []


# ---------------------------------------------------------------- Python


class Configured:
    """In place of a class of `ray.serve.llm`, which needs an engine: what is given must suit a deployment."""

    def __init__(self, **given: Any) -> None:
        options = given.get("deployment_config", {})
        serve.deployment(type("Server", (), {})).options(**options)
        if "request_router_config" in options:
            check_settings(options["request_router_config"])


def prelude() -> dict[str, Any]:
    return {
        "__name__": "documented",
        "serve": serve,
        "RequestRouterConfig": RequestRouterConfig,
        "LLMConfig": Configured,
        "LLMServer": object,
    }


def check_settings(given: RequestRouterConfig | Mapping[str, Any]) -> None:
    """The router's class is ours and loads, and its settings are valid."""
    config = given if isinstance(given, RequestRouterConfig) else RequestRouterConfig(**given)
    assert config.request_router_class.startswith("serve_app.router:")  # type: ignore[union-attr]
    assert config.get_request_router_class() is not None
    Config.from_mapping(sections(config.request_router_kwargs))


@pytest.mark.parametrize("block", [each for each in of("python") if not is_served(each.values[0])])
def test_each_python_block_runs_and_its_settings_are_valid(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RequestRouterConfig] = []
    made = RequestRouterConfig.__init__

    def noted(self: RequestRouterConfig, *args: Any, **given: Any) -> None:
        made(self, *args, **given)
        seen.append(self)

    monkeypatch.setattr(RequestRouterConfig, "__init__", noted)
    names = prelude()
    exec(compile(block.text, block.where, "exec"), names)
    monkeypatch.undo()
    for config in seen:
        if isinstance(config.request_router_class, str) and config.request_router_class.startswith("serve_app"):
            check_settings(config)
    for value in list(names.values()):
        if isinstance(value, type) and hasattr(value, "infer"):
            assert ModelInfo.of(value).infers
    assert "request_router_class" not in block.text or seen or "LLM" in block.text


def test_a_setting_that_is_wrong_is_found() -> None:
    with pytest.raises(Exception, match="unknown setting"):
        Configured(
            deployment_config={
                "request_router_config": {
                    "request_router_class": "serve_app.router:PredictiveRouter",
                    "request_router_kwargs": {"config": {"balance": {"prefixes": "auto"}}},
                }
            }
        )


# ---------------------------------------------------------------- YAML, JSON, settings in prose


@pytest.mark.parametrize("block", of("yaml", "json"))
def test_each_configuration_is_what_serve_and_the_application_take(block: Block) -> None:
    given = yaml.safe_load(block.text) if block.language == "yaml" else json.loads(block.text)
    if set(given) <= SECTIONS:
        Config.from_mapping(given)
        return
    ServeDeploySchema.model_validate({"applications": [], **given})
    for application in given.get("applications", ()):
        if application["import_path"] == "serve_app.app:build":
            AppArgs.model_validate(application["args"])
            Config.from_mapping(application["args"].get("config"))
        for deployment in application.get("deployments", ()):
            check_settings(deployment["request_router_config"])


SECTIONS = {each.name for each in fields(Config)}


def settings_in(page: str) -> Iterator[Any]:
    """JSON objects in prose whose keys are sections of the configuration, `{"config": {...}}` around them or not."""
    for span in re.findall(r"`([^`]*\{[^`]*\}[^`]*)`", without_blocks(page)):
        text = span[span.index("{") : span.rindex("}") + 1]
        try:
            given = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            continue
        given = given.get("config", given) if isinstance(given, dict) else {}
        if isinstance(given, dict) and given and set(given) <= SECTIONS:
            yield given


@pytest.mark.parametrize("page", LIVING)
def test_each_setting_in_prose_is_one(page: str) -> None:
    for given in settings_in(page):
        Config.from_mapping(given)
    config = Config()
    for section, name in re.findall(r"\b(balance|trial|session|forecast)\.([a-z_]+)\b(?!\.)", without_blocks(page)):
        if name in ("md", "json", "png", "py"):
            continue
        known = hasattr(getattr(config, section), name) or retired_settings({section: {name: None}})
        assert known, f"{section}.{name}"


def test_the_settings_that_the_tables_name_are_there_with_their_defaults() -> None:
    page, config = text_of("docs/adopt.md"), Config()
    told = re.findall(r"^\| `(balance|trial)\.` \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert [section for section, _ in told] == ["balance", "trial"]
    for section, rows in told:
        for row in rows.splitlines():
            names = re.findall(r"`([a-z_]+)`", row.split("|")[1])
            values = [getattr(getattr(config, section), name) for name in names]
            default = re.findall(r"(?<![\w.])[\d.]+", row.split("|")[3])
            if default:
                flat = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
                assert [float(each) for each in default] == flat, row


# ---------------------------------------------------------------- links, and the shape of the whole


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip()).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_link_leads_to_a_file_and_a_heading_that_are_there(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            assert path.startswith(("https:", "http:", "mailto:")), target
            continue
        there = (folder / path).resolve() if path else ROOT / page
        assert there.exists(), f"{page}: {target}"
        assert there.is_relative_to(ROOT), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(str(there.relative_to(ROOT))), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_each_page_of_docs_that_is_named_in_words_is_there(page: str) -> None:
    for path in re.findall(r"(?<![\w/.])(?:docs/[\w/]+\.(?:md|json)|tests/[\w/]+\.py)\b", text_of(page)):
        assert (ROOT / path).exists() or path in ("docs/protocol/extension_model_configuration.md",), f"{page}: {path}"


def test_code_and_manifests_name_pages_that_are_there() -> None:
    ours = ("shadecast", "models", "actors", "serve_app", "train", "bench", "examples", "deploy", "tests", "checks")
    files = [path for folder in ours for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".sh")]
    for path in [*files, ROOT / "cluster.yaml", ROOT / "Makefile", ROOT / "constraints.txt"]:
        if "triton" in path.name:
            continue  # names pages of Triton's
        for page in re.findall(r"\bdocs/[a-z_]+\.md\b", path.read_text(encoding="utf-8")):
            assert (ROOT / page).exists(), f"{path}: {page}"


def test_the_index_has_each_page_and_the_readme_fits_on_a_screen() -> None:
    index = set(re.findall(r"\]\(([^)]+)\)", text_of("docs/README.md")))
    own = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    measured = {f"benchmarks/{path.name}" for path in (ROOT / "docs/benchmarks").glob("*.md")}
    assert own | {name for name in measured if not name.endswith(("-notes.md", "README.md"))} <= index
    readme = text_of("README.md").splitlines()
    assert len(readme) <= 75
    assert text_of("README.md").count("| measured |") == 1


def test_files_that_blocks_name_have_names_of_their_own() -> None:
    named = [module_name(block) for block in BLOCKS if module_name(block)]
    assert len(set(named)) == len(named)
