"""Requests that schemathesis makes from the gateway's own OpenAPI document, right ones and wrong ones."""

from __future__ import annotations

import psutil
import pytest

from bench.schema import send
from tests.serve_app.gateway.local_server import everything, served


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_two_thousand_requests_made_from_the_description_give_no_5xx_and_answers_as_described() -> None:
    api, _ = everything()
    with served(api) as address:
        send(f"http://{address}", 100)
        before_bytes = psutil.Process().memory_info().rss
        statuses = send(f"http://{address}", 2600)  # of some kinds there are fewer
        grown_bytes = psutil.Process().memory_info().rss - before_bytes
    assert statuses.total() >= 2000
    by_path = {(method, path) for method, path, status in statuses if status == 200}
    for action in ("", "/ready", "/config", "/stats"):
        assert ("GET", f"/v2/models/{{model}}/versions/{{version}}{action}") in by_path
    for action in ("infer", "generate", "generate_stream"):
        assert ("POST", f"/v2/models/{{model}}/{action}") in by_path
    assert {("POST", "/v2/repository/index"), ("GET", "/v2/models/stats"), ("GET", "/v2")} <= by_path
    assert api.bodies.held_bytes == 0
    assert grown_bytes < 150 * 2**20, "this process, the maker of the requests included"
