"""The interface of an ingress to its replicas, through a handle of Ray Serve."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import ReplicaUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from serving.engine.facts import ModelFacts
from serving.engine.requests import Event, Load, Request
from serving.ray_serve.backend import ReplicaLost

LOST = (
    *(RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError),  # killed, out of memory, machine gone
    *(ReplicaUnavailableError, TaskCancelledError, RequestCancelledError),  # stopped: update, or fewer replicas
)
"""What Ray raises for a call whose replica is gone. Their common base classes also stand for errors of the replica."""

LOAD_SECONDS = 5.0
"""Time limit of the question how busy the replicas are."""


class ServeReplicas:
    """Replicas behind a handle; see :class:`~serving.ray_serve.backend.Replicas`.

    Args:
        handle: handle of the deployment of :class:`~serving.ray_serve.replica.Replica`.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)

    async def describe(self) -> ModelFacts:
        """Description of the model; waits until one replica has loaded it."""
        facts = await self._handle.describe.remote()
        assert isinstance(facts, ModelFacts)
        return facts

    async def generate(self, request: Request, seconds: float | None) -> AsyncGenerator[tuple[Event, ...], None]:
        """Send a request to a replica."""
        stream: Any = self._streams.generate.remote(request, seconds)
        is_complete = False
        try:
            async for events in stream:
                yield events
            is_complete = True
        except LOST as error:
            replica = error.actor_id if isinstance(error, ActorDiedError) else None
            raise ReplicaLost(type(error).__name__, replica) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ReplicaLost("the call was cancelled") from error  # footgun: by Ray, and not by the owner
        finally:
            if not is_complete:
                stream.cancel()

    async def loads(self) -> list[Load]:
        """How busy each replica is; without those that have just died."""
        answers = await self._handle.broadcast("load").results_async(timeout_s=LOAD_SECONDS, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, Load)]
