"""`python -m examples.llm`: two replicas of a tiny language model behind Shadecast's router, and one question to them.

It needs neither a GPU nor a download: the model is random, and made on the spot. Ctrl-C stops all.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from examples.llm.serving import MODEL, OURS, application, environment, missing

_QUESTION = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "You are a tiny model. " * 20},
        {"role": "user", "content": "What do you say?"},
    ],
    "max_tokens": 40,
    "temperature": 0,
}


def main() -> None:
    """Serve, ask, and say where to look."""
    parser = argparse.ArgumentParser(prog="python -m examples.llm", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--replicas", type=int, default=2, help="3 GB of memory and a core each")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--page-port", type=int, default=8500, help="of the live page; 0: none")
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    args = parser.parse_args()
    if what := missing():
        print(what, file=sys.stderr)
        raise SystemExit(2)
    with tempfile.TemporaryDirectory(prefix="tiny-llm-") as folder:
        _serve(Path(folder), args)


def _serve(folder: Path, args: argparse.Namespace) -> None:
    import ray  # noqa: PLC0415 - after the check
    from ray import serve  # noqa: PLC0415

    from examples.llm.model import make_model  # noqa: PLC0415
    from serve_app.launch.control_plane import start_control_plane  # noqa: PLC0415

    print("Making the model ...", flush=True)
    make_model(folder)
    began_s = time.monotonic()
    ray.init(
        address="local",
        num_cpus=2 * args.replicas + 4,  # Ray LLM asks for two a replica
        include_dashboard=False,
        namespace="shadecast",
        object_store_memory=200_000_000,
        runtime_env={"env_vars": environment()},
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        plane = start_control_plane(page_port=args.page_port)
        serve.start(http_options={"host": "127.0.0.1", "port": args.port})
        print(f"Starting {args.replicas} engines (about a minute) ...", flush=True)
        serve.run(application(folder, args.replicas, OURS))
        print(f"Up after {time.monotonic() - began_s:.0f} s.")
        url = f"http://127.0.0.1:{args.port}/v1"
        answer = _ask(f"{url}/chat/completions")
        print(f"\nThe answer (noise: the model is random): {answer['choices'][0]['message']['content']}")
        print(f"Tokens: {answer['usage']['prompt_tokens']} asked, {answer['usage']['completion_tokens']} answered")
        print(f"\nClients of OpenAI's API: base_url={url} model={MODEL}")
        if plane.page_url:
            print(f"What the router does: {plane.page_url}, or `shadecast status` in another shell")
        if not args.once:
            print("Ctrl-C stops all.", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("\nStopping ...")
    finally:
        serve.shutdown()
        ray.shutdown()


def _ask(url: str) -> dict[str, Any]:
    import httpx  # noqa: PLC0415 - vLLM has brought it

    answer = httpx.post(url, json=_QUESTION, timeout=60.0)
    answer.raise_for_status()
    return answer.json()  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
