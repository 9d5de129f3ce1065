"""The configuration: bounds, unknown keys, one clear line."""

import pytest

from shadecast.config import Config, retired_settings
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
        ({"trial": {"ramp": 5}}, ["trial.ramp", "5"]),
        ({"trial": {"ramp": None}}, ["trial.ramp", "None"]),
        ({"trial": {"ramp": ["a", 1.0]}}, ["trial.ramp"]),
        ({"trial": {"copy_methods": 5}}, ["trial.copy_methods", "5", "list"]),
        ({"trial": {"copy_methods": None}}, ["trial.copy_methods", "None", "list"]),
        ({"trial": {"copy_methods": {"infer": True}}}, ["trial.copy_methods", "list"]),
        ({"trial": {"copy_methods": ["infer", 5]}}, ["trial.copy_methods", "list"]),
        ({"trial": {"compare": 5}}, ["trial.compare", "5"]),
        ({"trial": {"min_pairs": 2.5}}, ["trial.min_pairs", "2.5", "whole number"]),
        ({"trial": None}, ["trial", "None", "mapping"]),
        ({"balance": {"slots": float("nan")}}, ["balance.slots", "nan"]),
        ({"balance": {"slots": "1"}}, ["balance.slots", "'1'"]),
        ({"balance": {"slots": True}}, ["balance.slots", "True"]),
        ({"balance": {"slot": 1}}, ["balance.slot", "unknown setting", "slots"]),
        ({"balance": {"cost": 5}}, ["balance.cost", "5"]),
        ({"balance": {"resume": "not a name"}}, ["balance.resume", "'not a name'", "keyword argument"]),
        ({"balance": {"resume": "from"}}, ["balance.resume", "'from'", "keyword argument"]),
        ({"balance": {"resume": 3}}, ["balance.resume", "3", "keyword argument"]),
        ({"balance": {"resume": None}}, ["balance.resume", "None"]),
        ({"balance": 3}, ["balance", "mapping"]),
        ({"ballance": {}}, ["ballance", "unknown section", "balance"]),
        ([1], ["config", "mapping"]),
        (["a"], ["config", "mapping"]),
        ("balance", ["config", "mapping"]),
        ({5: {}}, ["5", "unknown section"]),
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
    given = {"trial": {"ramp": [0.5, 1.0], "copy_methods": ["infer"], "min_pairs": 4.0}, "balance": {"slots": 1}}
    config = Config.from_mapping(given)
    assert config.trial.ramp == (0.5, 1.0)
    assert config.trial.copy_methods == ("infer",)
    assert config.balance.slots == 1
    assert type(config.trial.min_pairs) is int, "a whole number is one, however it was written"


def test_nothing_given_means_the_defaults():
    assert Config.from_mapping(None) == Config() == Config.from_mapping({})


def test_a_setting_of_a_former_version_is_left_out_and_named_and_the_others_count():
    given = {"balance": {"tick_s": 0.25, "choices": 4.0, "slots": 3.0}, "trial": {"copy_methods": ["infer"]}}
    config = Config.from_mapping(given)
    assert (config.balance.slots, config.trial.copy_methods) == (3.0, ("infer",))
    assert retired_settings(given) == ["balance.tick_s", "balance.choices"]
    assert retired_settings(None) == retired_settings({}) == []
