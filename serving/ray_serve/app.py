"""The application for Ray Serve: ``serve run serving.ray_serve.app:build source=…``."""

import socket
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from llamagen.command import fault_of
from llamagen.cores import WAIT_SETTINGS
from serving.engine.dispatcher import Dispatcher
from serving.engine.embedded import load_engine
from serving.engine.spec import WorkerSpec
from serving.ray_serve.ingress import Ingress
from serving.ray_serve.options import Options
from serving.ray_serve.replica import Replica
from serving.server.keys import read_keys
from serving.server.options import ServerOptions

NAME = "llamagen"
"""Name of the application."""

HEALTH_SECONDS = 5.0, 10.0
"""Time between two checks of an actor, and their time limit. Three failed ones replace an actor that hangs; the death
of a process is noticed at once."""


MAX_CONNECTIONS = 2048
"""Requests that an ingress answers at a time: it must see a request to refuse it with status 429."""

LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Without a line for each call: an ingress asks every replica each second how busy it is."""


class StartError(Exception):
    """A replica cannot load the model. Its text is one sentence for the person who started it."""


class ModelReplica(Replica):
    """A replica with our engine in a thread of its actor.

    Args:
        spec: what it loads.
        queue: maximum number of images that wait in the replica.
    """

    def __init__(self, spec: WorkerSpec, queue: int) -> None:
        try:
            super().__init__(Dispatcher(lambda: load_engine(spec), queue=queue))
        except Exception as error:
            if (fault := fault_of(error)) is None:
                raise
            raise StartError(
                f"{socket.gethostname()} cannot load the model: {fault.message}; every node must reach it: give a "
                "published name, a repository of the hub or a shared folder"
            ) from None

    def __del__(self) -> None:
        """Called by Ray Serve after the calls in progress have ended."""
        if hasattr(self, "_backend"):  # the model was loaded
            self.close()


def build(options: Options) -> Application:
    """The application. Called by ``serve run`` and ``serve deploy`` with their arguments.

    Raises:
        ValueError: in one line, if options do not fit together.
    """
    device = options.device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
    model, ingress = model_deployment(options, device), ingress_deployment(options)
    server = ServerOptions(
        max_images=options.max_images, timeout=options.timeout, api_keys=read_keys(options.api_key_file), has_urls=False
    )
    return ingress.bind(model.bind(_spec(options, device), _calls(options) * options.batch_size), server, options.queue)


def model_deployment(options: Options, device: str) -> serve.Deployment:
    """The replicas with the model.

    Args:
        options: of the application.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: in one line, if options do not fit together.
    """
    threads = str(max(int(options.cpus), 1))
    actor = {
        "num_cpus": options.cpus,
        "num_gpus": float(device == "cuda"),
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, **WAIT_SETTINGS}},
    }
    return serve.deployment(ModelReplica).options(
        name="Model",
        ray_actor_options=actor,
        max_ongoing_requests=_calls(options),
        graceful_shutdown_timeout_s=options.timeout,
        max_constructor_retry_count=2,
        **_number_of_replicas(options),
        **_common(),
    )


def ingress_deployment(options: Options) -> serve.Deployment:
    """The HTTP servers."""
    return serve.deployment(Ingress).options(
        name="Ingress",
        num_replicas=options.servers,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_CONNECTIONS,
        graceful_shutdown_timeout_s=options.timeout,
        **_common(),
    )


def _calls(options: Options) -> int:
    """Calls in progress of a replica: one batch runs, and the next one waits there.

    All others wait in the ingress for the first replica that has room.
    """
    return 2 * options.batch_size


def _spec(options: Options, device: str) -> WorkerSpec:
    return WorkerSpec(
        options.source,
        tokenizer=options.tokenizer,
        text_encoder=options.text_encoder,
        device=device,
        dtype=options.dtype,
        batch_size=options.batch_size,
    )


def _number_of_replicas(options: Options) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.replicas}
    if options.max_replicas < options.replicas:
        raise ValueError(
            f"max_replicas is {options.max_replicas}, less than replicas, {options.replicas}; exchange the two"
        )
    return {
        "autoscaling_config": {
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target or options.batch_size,
        }
    }


def _common() -> dict[str, Any]:
    return {
        "health_check_period_s": HEALTH_SECONDS[0],
        "health_check_timeout_s": HEALTH_SECONDS[1],
        "logging_config": LOGGING,
    }
