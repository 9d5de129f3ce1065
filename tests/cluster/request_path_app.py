"""The application that the request path is tested with; copied to a folder of its own, as a user's would be."""

import asyncio
import os
import signal

from ray import serve
from ray.serve.config import RequestRouterConfig

from serve_app.copying import copy_safe
from serve_app.mirror import is_shadow

ROUTER = RequestRouterConfig(
    request_router_class="serve_app.router:PredictiveRouter",
    request_router_kwargs={
        "config": {
            "trial": {"compare": "exact", "mirror_deadline_s": 3.0, "mirror_concurrency": 8},
            "balance": {"bootstrap_s": 3.0, "resume": "had"},
            "session": {"repin_ratio": 100.0},  # on a machine that all share, a hot replica is noise
        }
    },
)


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=8,
    health_check_period_s=1,
    graceful_shutdown_timeout_s=10,
    request_router_config=ROUTER,
)
class Model:
    def __init__(self):
        self.me = serve.get_replica_context().replica_id.unique_id
        self.hung = self.wrong = False
        self.shadows = 0
        self.pid = os.getpid()

    async def set(self, **values):
        self.__dict__.update(values)

    async def get(self, name):
        return getattr(self, name)

    async def who(self, pause_s=0.0):
        await asyncio.sleep(pause_s)
        return self.me

    @copy_safe
    async def predict(self, x, pause_s=0.002):
        self.shadows += is_shadow()
        if self.hung and is_shadow():
            await asyncio.Event().wait()
        await asyncio.sleep(pause_s)
        if isinstance(x, str) and x == "bad":
            raise ValueError("user code")
        size = len(x) if isinstance(x, bytes) else x
        return size + 1 if self.wrong else size

    @copy_safe
    async def generate(self, n, gap_s=0.01, fail_at=None, had=()):
        self.shadows += is_shadow()
        for i in range(len(had), n):
            if i == fail_at:
                raise ValueError("user code")
            yield i
            await asyncio.sleep(gap_s)

    async def buy(self, x):
        assert not is_shadow(), "a method that nobody declared safe was copied"
        return x

    async def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    @serve.multiplexed(max_num_models_per_replica=2)
    async def load(self, model_id):
        return model_id

    async def which(self):
        await self.load(serve.get_multiplexed_model_id())
        return self.me


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.1}, request_router_config=ROUTER)
class Caller:
    """Holds a router of its own, as a gateway does."""

    def __init__(self, model):
        self.model = model

    async def where(self, session):
        me = serve.get_replica_context().replica_id.unique_id
        return me, await self.model.options(session_id=session).who.remote(pause_s=0.02)

    async def twice(self, x):
        return sum(await asyncio.gather(self.model.predict.remote(x), self.model.predict.remote(x)))


app = Caller.bind(Model.bind())
