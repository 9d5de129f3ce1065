"""The configuration: bounds, unknown keys, one clear line."""

import pytest

from shadecast.config import Config
from shadecast.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trial": {"mirror_fraction": 0.9}}, ["trial.mirror_fraction", "0.9", "from 0 to 0.5"]),
        ({"trial": {"mirror_fraction": 0.3, "mirror_fraction_max": 0.2}}, ["trial.mirror_fraction_max", "0.2"]),
        ({"trial": {"ramp": [0.5, 0.2]}}, ["trial.ramp", "rising"]),
        ({"trial": {"ramp": [0.5]}}, ["trial.ramp", "1.0"]),
        ({"trial": {"ramp": []}}, ["trial.ramp"]),
        ({"trial": {"ramp": "abc"}}, ["trial.ramp"]),
        ({"trial": {"copy_methods": "infer"}}, ["trial.copy_methods", "list"]),
        ({"trial": {"max_pairs": 10, "min_pairs": 20}}, ["trial.max_pairs", "10", "trial.min_pairs"]),
        ({"balance": {"choices": 2.5}}, ["balance.choices", "2.5", "whole number"]),
        ({"balance": {"tick_s": float("nan")}}, ["balance.tick_s", "nan"]),
        ({"balance": {"tick_s": "1"}}, ["balance.tick_s", "'1'"]),
        ({"balance": {"tick_s": True}}, ["balance.tick_s", "True"]),
        ({"balance": {"tick": 1}}, ["balance.tick", "unknown setting", "tick_s"]),
        ({"balance": {"resume": "not a name"}}, ["balance.resume", "'not a name'", "keyword argument"]),
        ({"balance": {"resume": "from"}}, ["balance.resume", "'from'", "keyword argument"]),
        ({"balance": {"resume": 3}}, ["balance.resume", "3", "keyword argument"]),
        ({"balance": {"resume": None}}, ["balance.resume", "None"]),
        ({"balance": 3}, ["balance", "mapping"]),
        ({"ballance": {}}, ["ballance", "unknown section", "balance"]),
        ([1], ["config", "mapping"]),
    ],
)
def test_a_wrong_value_is_one_line_with_field_and_value(settings, words):
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping(settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_settings_given_as_json_are_taken():
    config = Config.from_mapping({"trial": {"ramp": [0.5, 1.0], "copy_methods": ["infer"]}, "balance": {"tick_s": 1}})
    assert config.trial.ramp == (0.5, 1.0)
    assert config.trial.copy_methods == ("infer",)
    assert config.balance.tick_s == 1


def test_nothing_given_means_the_defaults():
    assert Config.from_mapping(None) == Config() == Config.from_mapping({})
