"""The docs' diagrams are the tables in the code. Rewrite them with `python -m tests.shadecast.test_state_diagram`."""

from pathlib import Path

import pytest

from shadecast import calls, connection

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"


def connections() -> list[str]:
    return ["    [*] --> inactive"] + [
        f"    {before} --> {after}: {event}" for (before, event), after in connection.TRANSITIONS.items()
    ]


def calls_() -> list[str]:
    return ["    [*] --> waiting"] + [
        f"    {before} --> {after}: {event}" + (f" / {', '.join(todo)}" if todo else "")
        for (before, event), (after, todo) in calls.TRANSITIONS.items()
    ]


DIAGRAMS = {"states": connections, "calls": calls_}


def begin(name: str) -> str:
    return f"<!-- {name}: generated -->\n"


def end(name: str) -> str:
    return f"<!-- {name}: end -->\n"


def diagram(name: str) -> str:
    return "\n".join(["```mermaid", "stateDiagram-v2", *DIAGRAMS[name](), "```", ""])


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_documented_diagram_is_the_table(name):
    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index(begin(name)) + len(begin(name)) : text.index(end(name))] == diagram(name)


if __name__ == "__main__":
    for each in DIAGRAMS:
        page = PAGE.read_text(encoding="utf-8")
        head, tail = page[: page.index(begin(each)) + len(begin(each))], page[page.index(end(each)) :]
        PAGE.write_text(head + diagram(each) + tail, encoding="utf-8")
