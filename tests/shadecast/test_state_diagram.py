"""The diagram in the docs is the table in the code. Rewrite it with `python -m tests.shadecast.test_state_diagram`."""

from pathlib import Path

from shadecast.connection import TRANSITIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
BEGIN, END = "<!-- states: generated -->\n", "<!-- states: end -->\n"


def diagram() -> str:
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> inactive"]
    lines += [f"    {before} --> {after}: {event}" for (before, event), after in TRANSITIONS.items()]
    return "\n".join([*lines, "```", ""])


def test_the_documented_state_diagram_is_the_table():
    text = PAGE.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == diagram()


if __name__ == "__main__":
    page = PAGE.read_text()
    head, tail = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    PAGE.write_text(head + diagram() + tail)
