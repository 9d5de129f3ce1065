"""One deployment whose code calls two others: `Inner` has our router, `Plain` has Serve's own."""

import asyncio
import contextvars
import threading

from ray import serve
from ray.serve.config import RequestRouterConfig

from serve_app.copying import copy_safe
from serve_app.mirror import is_shadow

NO_CPU = {"num_cpus": 0}
ROOM = 256
"""Copies that do not fit are dropped: here none may be, however slow the machine."""
ROUTER = RequestRouterConfig(
    request_router_class="serve_app.router:PredictiveRouter",
    request_router_kwargs={"config": {"balance": {"bootstrap_s": 600.0}, "trial": {"mirror_concurrency": ROOM}}},
)


@serve.deployment(ray_actor_options=NO_CPU, num_replicas=2, max_ongoing_requests=ROOM, request_router_config=ROUTER)
class Inner:
    def __init__(self):
        self.seen = []

    @copy_safe
    async def predict(self, how, x):
        self.seen.append((how, x, is_shadow()))
        if x == "bad" and is_shadow():
            raise ValueError("only for copies")
        return x

    @copy_safe
    async def generate(self, how, n):
        for i in range(n):
            self.seen.append((how, i, is_shadow()))
            yield i

    async def calls(self):
        return self.seen


@serve.deployment(ray_actor_options=NO_CPU, num_replicas=2, max_ongoing_requests=ROOM, request_router_config=ROUTER)
class Outer:
    """Every method calls one of `inner` and `plain`, on one of the ways in which user code may."""

    def __init__(self, inner, plain):
        self.handles = {"inner": inner, "plain": plain}
        self.me = serve.get_replica_context().replica_id.unique_id
        self.batches = []

    async def who(self):
        return self.me

    @copy_safe
    async def call(self, which, how, x):
        return await getattr(self, how)(self.handles[which], how, x)

    @copy_safe
    async def stream(self, which, n):
        async for item in self.handles[which].options(method_name="generate", stream=True).remote("stream", n):
            yield item

    @copy_safe
    def blocking(self, which, x):
        return self.handles[which].predict.remote("blocking", x).result(timeout_s=30)

    async def plainly(self, handle, how, x):
        return await handle.predict.remote(how, x)

    async def of_session(self, handle, how, x):
        return await handle.options(session_id=f"s{x}").predict.remote(how, x)

    async def in_a_task(self, handle, how, x):
        return await asyncio.create_task(self.plainly(handle, how, x))

    async def in_to_thread(self, handle, how, x):
        return await asyncio.to_thread(lambda: handle.predict.remote(how, x).result(timeout_s=30))

    async def in_a_thread(self, handle, how, x, run=lambda call: call()):
        done = asyncio.get_running_loop().create_future()

        def work():
            answer = run(lambda: handle.predict.remote(how, x).result(timeout_s=30))
            done.get_loop().call_soon_threadsafe(done.set_result, answer)

        threading.Thread(target=work).start()
        return await done

    async def in_a_thread_with_its_context(self, handle, how, x):
        return await self.in_a_thread(handle, how, x, contextvars.copy_context().run)

    @copy_safe
    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.01)
    async def batched(self, which, x):
        self.batches.append(is_shadow())
        return x

    async def batch_marks(self):
        return self.batches


plain = Inner.options(name="Plain", request_router_config=RequestRouterConfig())
app = Outer.bind(Inner.bind(), plain.bind())
