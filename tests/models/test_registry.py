"""The registry hands out whole, fitting versions or says in one line why not; the champion stays whatever happens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from models.features import N_EXTENDED_FEATURES
from models.forecaster import OnlineForecaster
from models.grid import CHANNELS, EXTENDED
from models.lstm import ForecastNet, LstmConfig
from models.registry import SHIPPED, Registry, RegistryError
from shadecast.errors import ConfigError
from tests.models.conftest import small_model, wave


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Two versions, the second the champion."""
    registry = Registry(str(tmp_path / "registry"))
    registry.save(small_model("a", prior=0.2, seed=1), {"created_wall_s": 1.0})
    registry.save(small_model("b", seed=2), {"created_wall_s": 2.0}, plot_png=b"png")
    registry.promote("a")
    registry.promote("b")
    return registry


def test_a_version_comes_back_exactly(registry: Registry) -> None:
    saved, loaded = small_model("b", seed=2), registry.load("b")
    for (name, before), (other, after) in zip(
        saved.net.state_dict().items(), loaded.net.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(before, after)
    assert np.array_equal(saved.residuals, loaded.residuals)
    assert loaded.version == "b"
    assert np.isnan(loaded.prior_skill).all()


def test_a_version_with_further_channels_comes_back_and_runs_beside_one_without(registry: Registry) -> None:
    wide = replace(
        small_model("wide"), net=ForecastNet(LstmConfig(features=N_EXTENDED_FEATURES, hidden=8, mlp=8)).eval()
    )
    registry.save(wide, {})
    assert registry.card("wide")["channels"] == [*CHANNELS, *EXTENDED]
    forecaster = OnlineForecaster(small_model("usual"))
    rows = np.concatenate([wave(40)[0], np.ones((40, len(EXTENDED)), np.float32)], axis=1)
    for at, row in enumerate(rows):
        if at == 20:
            forecaster.swap(registry.load("wide"))
        prediction = forecaster.step(row[None])
    assert np.isfinite(prediction.quantiles).all()
    forecaster.swap(small_model("usual"))
    assert np.isfinite(forecaster.step(rows[0][None]).quantiles).all()


def test_versions_are_listed_oldest_first_and_the_champion_is_the_last_promoted(registry: Registry) -> None:
    assert registry.versions() == ["a", "b"]
    assert registry.champion() == "b"
    assert registry.history() == ["a"]


def test_rollback_returns_to_the_champion_before_and_then_there_is_none_left(registry: Registry) -> None:
    assert registry.rollback() == "a"
    assert registry.champion() == "a"
    with pytest.raises(RegistryError, match="no champion before"):
        registry.rollback()


def test_promoting_the_champion_again_changes_nothing(registry: Registry) -> None:
    registry.promote("b")
    assert registry.history() == ["a"]


def test_a_version_is_never_overwritten(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="never change"):
        registry.save(small_model("a"), {})


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 65, "ü"])
def test_a_name_that_is_no_file_name_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(RegistryError, match="version ="):
        registry.save(small_model(name), {})
    with pytest.raises(RegistryError, match="version ="):
        registry.load(name)


def weights(registry: Registry) -> Path:
    return Path(registry.uri) / "b" / "weights.safetensors"


def card(registry: Registry) -> Path:
    return Path(registry.uri) / "b" / "card.json"


def edit_card(registry: Registry, **changes: object) -> None:
    content = json.loads(card(registry).read_text())
    card(registry).write_text(json.dumps(content | changes))


Damage = Callable[[Registry], object]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "weights gone": (lambda r: weights(r).unlink(), "cannot be read"),
    "weights cut short": (lambda r: weights(r).write_bytes(weights(r).read_bytes()[:100]), "corrupt"),
    "one bit flipped": (lambda r: weights(r).write_bytes(weights(r).read_bytes()[:-1] + b"\x7f"), "corrupt"),
    "card gone": (lambda r: card(r).unlink(), "no version 'b'"),
    "card no JSON": (lambda r: card(r).write_text("{"), "is not JSON"),
    "card a list": (lambda r: card(r).write_text("[]"), "must be a JSON object"),
    "other schema": (lambda r: edit_card(r, card_schema=99), "card_schema = 99"),
    "other targets": (lambda r: edit_card(r, targets=["cpu"]), "targets = "),
    "other horizons": (lambda r: edit_card(r, horizons_s=[1.0]), "horizons_s = "),
    "other shape": (
        lambda r: edit_card(r, lstm={"features": 3, "anchors": 1, "hidden": 4, "layers": 1, "mlp": 4}),
        "does not fit",
    ),
    "no shape": (lambda r: edit_card(r, lstm={}), "must have exactly"),
    "bad prior": (lambda r: edit_card(r, prior_skill=[[1.0]]), "prior_skill has shape"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_version_is_refused_in_one_line_and_the_champion_stays(registry: Registry, what: str) -> None:
    damage, words = DAMAGES[what]
    registry.rollback()
    damage(registry)
    for attempt in (registry.load, registry.promote):
        with pytest.raises((RegistryError, ConfigError), match=words) as caught:
            attempt("b")
        assert "\n" not in str(caught.value).strip()
    assert registry.champion() == "a"
    assert registry.load("a").version == "a"


def test_a_net_that_has_the_former_slow_head_is_loaded_without_it(registry: Registry) -> None:
    raw = safetensors.torch.load(weights(registry).read_bytes())
    former = dict(raw)
    for name in ("net.head.weight", "net.head.bias"):
        former[name] = torch.cat([raw[name], torch.full_like(raw[name][:1], 7.0)])
    weights(registry).write_bytes(safetensors.torch.save(former))
    edit_card(registry, weights_sha256=hashlib.sha256(weights(registry).read_bytes()).hexdigest())
    loaded = registry.load("b").net.state_dict()
    assert all(torch.equal(tensor, raw[f"net.{name}"]) for name, tensor in loaded.items())


def test_a_version_made_for_other_features_is_refused_before_it_runs(registry: Registry) -> None:
    shape = json.loads(card(registry).read_text())["lstm"]
    edit_card(registry, lstm={**shape, "features": shape["features"] - 3})
    with pytest.raises(RegistryError, match=r"lstm\.features = \d+: this code makes \d+"):
        registry.load("b")


def test_a_challenger_waits_beside_the_champion_until_it_is_promoted_or_taken_back(registry: Registry) -> None:
    registry.rollback()
    assert registry.challenger() == ""
    registry.challenge("b")
    assert (registry.champion(), registry.challenger()) == ("a", "b")
    registry.promote("b")
    assert (registry.champion(), registry.challenger()) == ("b", "")
    registry.challenge("a")
    assert registry.history() == ["a"]
    registry.challenge("")
    assert registry.challenger() == ""


def test_a_damaged_version_or_the_champion_cannot_be_a_challenger(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="is the champion already"):
        registry.challenge("b")
    registry.rollback()
    weights(registry).unlink()
    with pytest.raises(RegistryError, match="cannot be read"):
        registry.challenge("b")
    assert registry.challenger() == ""


def test_an_error_says_which_command_makes_a_checkpoint(tmp_path: Path) -> None:
    empty = Registry(str(tmp_path / "nothing"))
    assert empty.versions() == []
    for attempt in (empty.champion, lambda: empty.load("v1")):
        with pytest.raises(RegistryError, match=r"python -m train"):
            attempt()


def test_a_version_whose_card_was_not_yet_written_does_not_exist(registry: Registry) -> None:
    half = Path(registry.uri) / "c"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(weights(registry).read_bytes())
    assert registry.versions() == ["a", "b"]


def test_a_filesystem_uri_works_as_a_folder_does(tmp_path: Path) -> None:
    registry = Registry(f"file://{tmp_path}/r")
    registry.save(small_model("a"), {})
    registry.promote("a")
    assert Registry(str(tmp_path / "r")).champion() == "a"


def test_an_unknown_scheme_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"registry = 'nosuch://x'"):
        Registry("nosuch://x")


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    broken = small_model("nan")
    with torch.no_grad():
        broken.net.head.weight[0, 0] = float("nan")
    registry = Registry(str(tmp_path))
    registry.save(broken, {})
    with pytest.raises(RegistryError, match="not finite"):
        registry.load("nan")


def test_the_shipped_champion_loads_and_its_card_says_how_it_was_made() -> None:
    registry = Registry()
    champion = registry.champion()
    assert registry.load(champion).version == champion
    made = registry.card(champion)
    assert made["command"].startswith("python -m train")
    assert made["rows"] > 1000
    assert len(made["data_sha256"]) == 64
    assert Path(registry.uri) == SHIPPED


def test_a_rollback_to_the_version_in_shadow_ends_its_trial(registry: Registry) -> None:
    for version in ("one", "two"):
        registry.save(small_model(version), {})
        registry.promote(version)
    registry.challenge("one")
    assert registry.rollback() == "one"
    assert (registry.champion(), registry.challenger()) == ("one", "")
