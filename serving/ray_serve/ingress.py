"""The ingress: the HTTP application, in an actor of its own."""

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serving.ray_serve.backend import RayBackend
from serving.ray_serve.replicas import ServeReplicas
from serving.server.app import build_app
from serving.server.metrics import Metrics
from serving.server.options import ServerOptions


@serve.ingress()
class Ingress:
    """An HTTP server of the application of ``serving/server``.

    Args:
        model: handle of the deployment of replicas.
        options: what the server accepts.
        queue: maximum number of images that wait.
    """

    # Ray Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self, model: DeploymentHandle[Any], options: ServerOptions, queue: int
    ) -> None:
        replicas = ServeReplicas(model)
        self._options, self._metrics = options, Metrics()
        self._backend = RayBackend(await replicas.describe(), replicas, queue=queue, observer=self._metrics)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        return build_app(self._backend, self._options, self._metrics)

    async def drain(self, seconds: float) -> None:
        """Accept no more requests, and finish the accepted ones for at most so many seconds."""
        await asyncio.to_thread(self._backend.close, seconds)
