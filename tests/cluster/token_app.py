"""A tiny model behind OpenAI's interface, as vLLM answers: greedy, so that its answers are known."""

import asyncio
import json
import os
import signal
import zlib

from ray import serve
from ray.serve.config import RequestRouterConfig

ROUTER = RequestRouterConfig(
    request_router_class="serve_app.router:PredictiveRouter",
    request_router_kwargs={"config": {"balance": {"prefix": "auto", "resume": "openai"}}},
)
WORDS = (" one", " two", " three", " four", ",", ".", " fünf")


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.1}, request_router_config=ROUTER)
class Greedy:
    async def chat(self, body):
        """Batches of events, as `ray.serve.llm` gives them. Dies of a user "fragile" in the middle of an answer."""
        goes_on = body.get("continue_final_message", False)
        prompt = "".join(f"<{each['role']}>{each['content']}" for each in body["messages"])
        text = prompt if goes_on else prompt + "<assistant>"
        yield [_event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})]
        for written in range(1, body["max_tokens"] + 1):
            word = WORDS[zlib.crc32(text.encode()) % len(WORDS)]
            word = word.strip() if text.endswith(">") else word
            text += word
            usage = {"prompt_tokens": len(prompt), "completion_tokens": written, "total_tokens": len(prompt) + written}
            reason = "length" if written == body["max_tokens"] else None
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": reason}
            yield [_event({"id": f"pid-{os.getpid()}", "choices": [choice], "usage": usage})]
            await asyncio.sleep(0.005)
            if body.get("user") == "fragile" and not goes_on and written == 20:
                await asyncio.sleep(0.3)  # what was given is on its way
                os.kill(os.getpid(), signal.SIGKILL)
        yield ["data: [DONE]\n\n"]


def _event(chunk):
    return f"data: {json.dumps(chunk)}\n\n"


app = Greedy.bind()
