"""The page and the summary of all benchmarks are what the committed rows say."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import typer.main

import bench.micro
import bench.scale
import bench.simulate.__main__
from bench.live import __main__ as live
from bench.live.arms import find_arms
from bench.live.scenario import find_scenarios
from bench.llm import __main__ as llm
from bench.llm.rules import RULES
from bench.llm.settings import settings
from bench.results import Row
from bench.simulate.arms import ARMS as SIMULATED
from bench.simulate.scenario import find
from bench.summary.__main__ import DOCS, mark
from bench.summary.entries import read_all
from bench.summary.page import PICTURES, document, page

README = Path(__file__).resolve().parents[2] / "README.md"
MAINS = {
    "bench.live": live.main,
    "bench.simulate": bench.simulate.__main__.main,
    "bench.micro": bench.micro.main,
    "bench.scale": bench.scale.main,
    "bench.llm": llm.main,
}


@pytest.fixture(scope="module")
def committed():
    return read_all(DOCS)


def test_page_and_summary_are_what_the_command_writes_from_the_committed_rows(committed):
    again = "run `python -m bench.summary` and commit what it writes"
    assert (DOCS / "README.md").read_text(encoding="utf-8") == page(committed), again
    assert (DOCS / "summary.json").read_text(encoding="utf-8") == document(committed), again
    for name in PICTURES:
        assert (DOCS / name).read_text(encoding="utf-8").startswith("<?xml"), again


def test_every_row_names_a_file_that_is_there_and_a_command_that_parses(committed):
    rows = json.loads(document(committed))["rows"]
    assert len(rows) > 500
    for row in rows:
        assert (DOCS.parents[1] / row["source"]).is_file(), row["key"]
    for command in {row["command"] for row in rows}:
        python, option, module, *arguments = shlex.split(command)
        assert (python, option) == ("python", "-m")
        if module == "bench.forecast":
            assert arguments in ([], ["--champion", "--json", "again.json"])
            continue
        app = typer.Typer()
        app.command()(MAINS[module])
        given = typer.main.get_command(app).make_context(module, arguments).params
        if module == "bench.live":
            assert find_scenarios(given["scenario"])
            assert find_arms(given["arms"])
        elif module == "bench.simulate":
            assert find(given["scenario"], exact=True)
            assert given["arms"] in SIMULATED
        elif module == "bench.llm":
            assert set(given["setting"]) <= {each.name for each in settings()}
            assert set(given["rule"]) <= RULES.keys()


def hog(arm, seeds, p999_s, code="c1"):
    values = {"requests": 2000.0, "slo_miss_fraction": 0.01, "p99_s": p999_s / 2.0, "p999_s": p999_s, "errors": 0.0}
    return [Row("hog", arm, seed, name, value, code) for seed in seeds for name, value in values.items()]


def summary_of(folder, rows):
    (folder / "live.json").write_text(json.dumps([row.as_dict() for row in rows]))
    return read_all(folder)


def test_seeds_that_are_added_later_replace_those_of_older_code_and_stand_beside_the_same_seeds(tmp_path):
    old = hog("default", (0, 1), 20.0) + hog("shadecast", (0, 1), 0.5, "before 0059")
    summary = summary_of(tmp_path, old)
    assert "| CPU hog on one of four nodes: p99.9 | 20 s | **500 ms**° |" in page(summary)
    assert summary.get("hog", "p999_s", "shadecast").older
    new = hog("default", (7, 8), 10.0, "c2") + hog("shadecast", (7, 8), 1.0, "c2")
    summary = summary_of(tmp_path, old + new)
    assert "| CPU hog on one of four nodes: p99.9 | 10 s | **1 s** |" in page(summary)
    assert summary.ratio(summary.get("hog", "p999_s", "shadecast")) == pytest.approx(0.1)
    assert summary.get("hog", "p999_s", "default").seeds == (7, 8)


def test_what_is_better_by_a_tenth_and_in_every_common_seed_is_told_as_a_loss(tmp_path):
    ours = hog("shadecast", (0,), 1.0) + hog("shadecast", (1,), 2.0)
    found = page(summary_of(tmp_path, [*ours, *hog("round_robin", (0,), 0.5), *hog("round_robin", (1,), 1.0)]))
    assert "loses: CPU hog on one of four nodes: p99.9 (round robin 750 ms, Shadecast 1.50 s)" in found
    assert "| **750 ms** | 1.50 s |" in found
    found = page(summary_of(tmp_path, [*ours, *hog("round_robin", (0,), 0.2), *hog("round_robin", (1,), 2.1)]))
    assert "loses: in no row by more than a tenth" in found
    assert "| **1.15 s** | **1.50 s** |" in found
    assert "oracle that is told" not in found, "a sentence whose rows are missing is left out"


def test_rows_are_marked_as_older_by_the_number_of_a_decision_but_only_ours(tmp_path):
    summary_of(
        tmp_path, hog("default", (0,), 20.0) + hog("shadecast", (0,), 0.5) + hog("oracle", (0,), 0.4, "before 0052")
    )
    assert mark(tmp_path / "live.json", "0062", ["hog"]) == 5
    codes = {row["arm"]: row["code"] for row in json.loads((tmp_path / "live.json").read_text())}
    assert codes == {"default": "c1", "shadecast": "before 0062", "oracle": "before 0052"}
    with pytest.raises(typer.BadParameter, match="calm: no rows"):
        mark(tmp_path / "live.json", "0062", ["calm"])


def test_rules_for_language_models_are_a_table_once_their_rows_are_there(tmp_path):
    rows = [
        {
            "setting": "tool agents",
            "rule": rule,
            "seed": seed,
            "slo_fraction": in_slo,
            "ttft_p50_s": 1.0,
            "ttft_p99_s": 9.0,
        }
        for rule, in_slo in (("power of two (Serve)", 0.25), ("Ray prefix router", 0.5), ("Shadecast", 0.75))
        for seed in (0, 1)
    ]
    (tmp_path / "llm_simulation.json").write_text(json.dumps({"code": "c1", "rows": rows}))
    found = page(read_all(tmp_path))
    assert "| | Serve's default | Ray's prefix router | **Shadecast, prefix on** |" in found
    assert "| tool agents: requests that miss | 75 % | 50 % | **25 %** |" in found
    assert "25 % of the requests miss" in found


CLAIMS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "hog beside one of four|takes the CPU of one of four": (("hog/p999_s/",), {"99.9"}),
    "what four hosts can do|more requests than": (("overload/p99_s/", "overload/slo_miss_fraction/"), {"2"}),
    "new replica that is well|new host is well": (
        ("newcomer-well/newcomer_f", "newcomer-well/p99_s/", "scale-up-under-load/newcomer_f"),
        {"20"},
    ),
    "fails 20 %|fails every fifth": (("newcomer-failing/error_fraction/",), {"20"}),
    "may go on elsewhere": (("streams/slo_misses/", "streams/requests/", "streams/errors_timeout/"), set()),
    "every minute": (("streams-periodic/slo_miss", "streams-periodic/requests/"), set()),
    "cut off": (("node-kill/errors/", "partition/errors/"), set()),
    "nothing happens": (("calm/p99_s/", "calm/p50_s/"), {"99"}),
    "noisy neighbours, simulated": (
        tuple(f"simulated {name}/slo_miss_fraction/" for name in ("tokens-antagonist", "periodic", "replay")),
        set(),
    ),
    "pauses of 1 s": (("simulated short-pauses/p999_s/",), set()),
    "never seen": (("forecast/pinball_skill",), set()),
    "one decision|on its way to its replica": (("decision, ", "way_to_a_replica, "), {"8", "1,000"}),
    "language models": (("llm tool agents/slo_miss",), set()),
    "1,000 replicas, 100 routers": (("scale 1000x100/",), set()),
}
"""Words of a row of README that links to benchmarks -> what it tells of, and numbers that were not measured."""


def measured_rows():
    lines = README.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("|") and "(docs/benchmarks/" in line]
    return [(row[0].strip(), " ".join(row[1:-1])) for row in cells]


def numbers(text):
    """Those of a sentence, with their digits after the point; names of quantiles are none."""
    text = re.sub(r"\bp\d+(\.\d+)?", "", text)
    for found in re.findall(r"(?<![\w.])(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?=x?(?:\W|$))", text):
        number = found.replace(",", "")
        yield found, float(number), len(number.partition(".")[2])


@pytest.mark.parametrize(("what", "result"), measured_rows())
def test_each_number_of_readmes_table_is_a_row_of_the_summary(committed, what, result):
    known = [words for words in CLAIMS if re.search(words, what)]
    assert known, f"README's row {what!r}: say in CLAIMS which rows of the summary it tells of"
    keys, given = CLAIMS[known[0]]
    told = set()
    for entry in committed.entries.values():
        if entry.key.startswith(keys):
            ratios = [committed.ratio(entry, other) for other in ("default", "live_capacity")]
            found = [entry.value, entry.total, *entry.by_seed, *(each for each in ratios if each is not None)]
            default = committed.get(entry.scenario, entry.metric, "default")
            if default is not None and default.seeds == entry.seeds:  # sooner, later by
                found += [abs(a - b) for a, b in zip(entry.by_seed, default.by_seed, strict=True)]
            told |= {scale * value for value in found for scale in (1.0, 100.0, 1000.0)}
            told |= {100.0 - 100.0 * value for value in found if entry.unit == "fraction"}
    assert told, f"{what!r}: no rows {keys}"
    for text, number, digits in numbers(result):
        near = min(told, key=lambda value: abs(value - number))
        assert text in given or abs(near - number) <= 0.501 * 10.0**-digits, f"{what}: {text} is not among {keys}"


def test_readme_tells_what_was_measured():
    assert len(measured_rows()) >= 8
