"""A stream of an OpenAI server through Serve: its replica is killed, and its reader has what it would have had."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from shadecast.tokens import chunks
from tests.cluster.conftest import deploy

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(150)]

BODY = {"model": "m", "messages": [{"role": "user", "content": "count"}], "stream": True, "max_tokens": 60}


async def answer(handle, **more):
    """All chunks, in order."""
    return [chunk async for item in handle.options(stream=True).chat.remote({**BODY, **more}) for chunk in chunks(item)]


def text_of(found):
    return "".join(choice["delta"].get("content", "") for chunk in found for choice in chunk["choices"])


def test_a_greedy_answer_whose_replica_is_killed_is_the_same(cluster, tmp_path):
    shutil.copy(Path(__file__).parent / "token_app.py", tmp_path / "token_app.py")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    handle = deploy(tmp_path, "token_app:app", "tokens", {"PYTHONPATH": path}, name="Greedy", num_replicas=2)
    whole = asyncio.run(answer(handle))
    found = asyncio.run(answer(handle, user="fragile"))
    assert text_of(found) == text_of(whole)
    assert [chunk["usage"] for chunk in found if "usage" in chunk] == [c["usage"] for c in whole if "usage" in c]
    assert len({chunk["id"] for chunk in found if "id" in chunk}) == 1, "one answer, by whoever it was made"
    router = handle._router._asyncio_router.request_router
    assert router.calls.ledger.totals["resumed"] == 1
