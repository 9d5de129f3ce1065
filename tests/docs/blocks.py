"""The fenced blocks of README and docs, the shell commands in them, and why some are not run."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {
    "sh": "each command is known and its options exist; run on the served example, unless NOT_RUN says why not",
    "python": "executed",
    "yaml": "taken by Serve's schema, the application's arguments and the router's settings",
    "json": "the router's settings",
    "console": "what a command prints: tests/serve_app/launch/test_explain_command.py",
    "mermaid": "made of the tables that it draws: tests/shadecast/test_state_diagram.py",
    "text": "a drawing, or what is printed",
}
NOT_RUN = {
    r"make (serve|demo|llm|test|clean)\b": "`make serve` starts the example that blocks run against, `make test` asks",
    r"make (bench|test|check|wheel|pictures)-?": "minutes to hours; it is no part of the tests",
    r"pip |examples/[\w/]+\.sh ": "changes an installation; checks/install.py does it in environments of its own",
    r"shadecast up .*--(page-host|page-allow-host)": "opens ports of this machine; tests/serve_app/page",
    r"shadecast up .*--(telemetry-log|retrain|registry)": "tests/cluster/test_forecast_loop.py, test_retraining.py",
    r"shadecast simulate .*--telemetry": "a log of telemetry; tests/serve_app/launch/test_simulate_command.py",
    r"shadecast down": "ends what the other blocks need; tests/cluster/test_upgrade.py",
    r"shadecast report": "ten minutes of requests; tests/serve_app/launch/test_report_command.py",
    r"shadecast forecaster (shadow|promote|rollback)": "changes a registry; tests/models/test_registry.py",
    r"cp -r models/checkpoints ": "a folder that all machines see",
    r"python -m (train|bench)": "minutes to hours; tests/train, tests/bench",
    r"ray (job|up|down|exec|get-auth-token|start)": "a cluster over ssh; tests/cluster/test_cluster_yaml.py",
    r"export RAY_AUTH_MODE|chmod 600 ": "as above",
    r"serve deploy": "Ray's dashboard, which the example does without; tests/cluster/test_deployed_settings.py",
    r"serve run (?!--non-blocking)": "goes on until Ctrl-C; tests/serve_app/test_app.py",
    r"(ssh|kubectl|docker|openssl) ": "other machines, Kubernetes, Docker: there are none here",
}
"""Commands, by how they begin, that are not run, with the reason. Their options are looked at all the same."""
RUN = (
    r"shadecast (up|status|nodes|explain|drain|release|simulate|forecaster (live|list|show))\b",
    r"(curl|serve run --non-blocking|sleep|seq|wait|grep|jq|awk|cat|echo|export PATH=)",
)
"""Commands that may be run against the served example."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README, SECURITY.md, what is in docs, and the examples' page."""
    found = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found += (ROOT / "examples").glob("README.md")
    return [str(path.relative_to(ROOT)) for path in found]


def is_record(page: str) -> bool:
    """Of what was measured and decided then: its commands are only parsed."""
    return page.startswith(("docs/benchmarks/", "docs/decisions/"))


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[Block]:
    text = text_of(page)
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, _language(page, found), textwrap.dedent(found[3]))
        for found in FENCE.finditer(text)
    ]


def _language(page: str, found: re.Match[str]) -> str:
    if not found[2] and is_record(page):
        return "sh" if re.match(r" *(python|make|shadecast) ", found[3]) else "text"
    return {"bash": "sh", "shell": "sh"}.get(found[2].strip(), found[2].strip())


def without_blocks(page: str) -> str:
    """The prose: whatever is in no fenced block."""
    return FENCE.sub("", text_of(page))


def inline_commands(page: str) -> list[str]:
    """Code in prose that is a command of ours, of make or of Ray, on one line or two."""
    spans = re.findall(r"`([^`]+)`", without_blocks(page))
    one_line = (" ".join(span.split()) for span in spans)
    return [span for span in one_line if re.match(r"(shadecast|make|python -m|ray|serve) [a-z-]", span)]


def commands(script: str) -> Iterator[list[str]]:
    """The words of each simple command of a shell script: without pipes, redirections, assignments and comments."""
    line = ""
    for each in script.splitlines():
        line = f"{line}\n{each}" if line else each
        try:
            words = _words(line)
        except ValueError:  # a quote is open
            continue
        if line.endswith("\\"):
            continue
        line = ""
        yield from _simple(words)
    if line:
        raise ValueError(f"a quote is open, or the last line ends with a backslash: {line}")


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    return list(lexer)


def _simple(words: list[str]) -> Iterator[list[str]]:
    return (left for each in _parts(words) if (left := _without_keywords(each)))


def _without_keywords(words: list[str]) -> list[str]:
    """A loop's own words are no command."""
    while words and words[0] in ("do", "done", "then", "while", "if"):
        words = words[1:]
    return [] if words[:1] == ["for"] else words


def _parts(words: list[str]) -> Iterator[list[str]]:
    now: list[str] = []
    redirected = False
    for word in [*words, ";"]:
        if set(word) <= set("();|&"):
            if now:
                yield now
            now = []
        elif set(word) <= set("<>()&"):
            redirected = "(" not in word  # `<(`: a command follows
            if not redirected:
                yield now
                now = []
        elif redirected:
            redirected = False
        elif now or not re.match(r"\w+=", word):
            now.append(word)


def why_not_run(command: list[str]) -> str:
    """The reason, "" if a command may be run. Raises LookupError for one that no rule covers."""
    text = " ".join(command)
    for pattern, reason in NOT_RUN.items():
        if re.match(pattern, text):
            return reason
    if any(re.match(pattern, text) for pattern in RUN):
        return ""
    raise LookupError(f"no rule says what a test does with {text!r}: add one to RUN or NOT_RUN of tests/docs/blocks.py")


def is_served(block: Block) -> bool:
    """Whether a block is run against the served example."""
    if is_record(block.page):
        return False
    if block.language == "python":
        return "localhost:" in block.text
    try:
        return block.language == "sh" and not any(why_not_run(command) for command in commands(block.text))
    except LookupError:
        return False  # tests/docs/test_docs.py says so


def served(*of: str) -> list[Block]:
    """The blocks that are run against the served example, as a reader of these pages, and then of the others, would.

    One that has nothing but commands of blocks before it is left out.
    """
    rest = [page for page in pages() if page not in of]
    found, told = [], set()
    for block in (block for page in (*of, *rest) for block in blocks(page) if is_served(block)):
        said = {" ".join(command) for command in commands(block.text)} if block.language == "sh" else {block.text}
        if said - told:
            found.append(block)
        told |= said
    return found


def module_name(block: Block) -> str:
    """Of a Python block that begins with the comment `# NAME.py`: that of its file, else ""."""
    named = re.match(r"# (\w+)\.py\n", block.text)
    return named[1] if named else ""
