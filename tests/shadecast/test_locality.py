"""Serve's own preferences within what is eligible: each is tried once per request, and what is gone is in none."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast.locality import Locality


@dataclass
class Replica:
    node_id: str = "far"
    availability_zone: str | None = None
    multiplexed_model_ids: set[str] = field(default_factory=set)


@dataclass
class Tried:
    tried_first_multiplexed_models: bool = False
    tried_fewest_multiplexed_models: bool = False
    tried_same_node: bool = False
    tried_same_az: bool = False


REPLICAS = [
    Replica("here", "zone", {"m"}),
    Replica("here", "zone", {"m", "n"}),
    Replica("there", "zone"),
    Replica("there", "other", {"n"}),
    Replica("there", None),
]


def asked(locality, model_id="", tries=4):
    """What one request is given to pick from, time after time."""
    tried = Tried()
    return [locality.pool(model_id, tried) for _ in range(tries)]


def test_the_own_node_comes_first_then_the_own_zone_then_all():
    locality = Locality(range(5), REPLICAS, "here", "zone")
    assert locality.any_near
    assert asked(locality) == [[0, 1], [0, 1, 2], None, None]


def test_no_preference_holds_on_to_a_replica_that_has_collapsed():
    locality = Locality(range(5), REPLICAS, "here", "zone", collapsed={0, 3})
    assert asked(locality) == [[1], [1, 2], None, None]
    assert asked(locality, "n", 1) == [[1]]
    assert asked(Locality(range(5), REPLICAS, None, None, collapsed={0, 1}), "m", 1) == [[2, 4]]
    assert asked(Locality(range(2), REPLICAS, None, None, collapsed={0, 1}), "m", 1) == [[0, 1]], "better than nobody"


@pytest.mark.parametrize(
    ("node", "zone", "pools"),
    [
        ("here", None, [[0, 1], None]),
        (None, "zone", [[0, 1, 2], None]),
        (None, "other", [[3], None]),
        (None, None, [None, None]),
        ("elsewhere", "nowhere", [None, None]),
        ("elsewhere", "zone", [[0, 1, 2], None]),
    ],
)
def test_a_preference_that_is_not_wanted_or_that_nothing_meets_costs_no_try(node, zone, pools):
    locality = Locality(range(5), REPLICAS, node, zone)
    assert asked(locality, tries=2) == pools
    assert locality.any_near is (pools[0] is not None)


def test_preferences_are_kept_within_what_is_eligible():
    locality = Locality([1, 3], REPLICAS, "here", "zone")
    assert asked(locality) == [[1], [1], None, None]
    assert asked(locality, "m", 3) == [[1], [3], None]
    assert not Locality([3, 4], REPLICAS, "here", "zone").any_near


@pytest.mark.parametrize(
    ("model_id", "pools"),
    [("m", [[0, 1], [2, 4], None]), ("n", [[1, 3], [2, 4], None]), ("new", [[2, 4], None, None])],
)
def test_replicas_that_have_the_model_come_first_then_those_with_the_fewest(model_id, pools):
    assert asked(Locality(range(5), REPLICAS, None, None), model_id, 3) == pools


def test_a_request_for_a_model_goes_by_the_model_not_by_the_node():
    locality = Locality(range(5), REPLICAS, "here", "zone")
    tried = Tried()
    assert locality.pool("n", tried) == [1, 3]
    assert not tried.tried_same_node


def test_what_was_tried_is_marked_on_the_request_and_on_no_other():
    locality = Locality(range(5), REPLICAS, "here", "zone")
    first, second = Tried(), Tried()
    assert locality.pool("", first) == [0, 1]
    assert (first.tried_same_node, first.tried_same_az) == (True, False)
    assert locality.pool("", second) == [0, 1]


def test_nobody_is_eligible():
    locality = Locality([], REPLICAS, "here", "zone")
    assert not locality.any_near
    assert asked(locality) == [None] * 4
    assert asked(locality, "m", 3) == [None] * 3


@given(
    st.lists(
        st.builds(
            Replica,
            st.sampled_from(["here", "there"]),
            st.sampled_from(["zone", "other", None]),
            st.sets(st.sampled_from("mn")),
        ),
        max_size=6,
    ),
    st.sets(st.integers(0, 5)),
    st.sampled_from([None, "here", "elsewhere"]),
    st.sampled_from([None, "zone", "nowhere"]),
    st.sampled_from(["", "m", "q"]),
)
def test_pools_are_eligible_not_empty_in_rising_order_and_end_after_two(replicas, eligible, node, zone, model_id):
    eligible = sorted(i for i in eligible if i < len(replicas))
    locality = Locality(eligible, replicas, node, zone)
    pools = asked(locality, model_id)
    assert pools[2:] == [None, None]
    for pool in pools[:2]:
        if pool is not None:
            assert pool
            assert pool == sorted(pool)
            assert set(pool) <= set(eligible)
