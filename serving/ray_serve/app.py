"""The application for Ray Serve: ``serve run serving.ray_serve.app:build model=…``."""

import socket
from typing import Any, cast

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.schema import LoggingConfig

from llamagen.command import fault_of
from llamagen.cores import WAIT_SETTINGS
from serving.engine.dispatcher import Dispatcher
from serving.engine.embedded import load_engine
from serving.engine.spec import WorkerSpec, default_batch_size, default_window
from serving.ray_serve.ingress import Ingress
from serving.ray_serve.options import Options
from serving.ray_serve.parts import images_per_call
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
    options = complete(options)
    assert options.batch_size is not None
    assert options.window is not None
    server = ServerOptions(
        max_images=options.max_images, timeout=options.timeout, api_keys=read_keys(options.api_key_file), has_urls=False
    )
    spec = WorkerSpec(
        options.model,
        tokenizer=options.tokenizer,
        text_encoder=options.text_encoder,
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        window=options.window,
    )
    model = model_deployment(options).bind(spec, calls(options) * images_per_call(spec.batch_size))
    return ingress_deployment(options).bind(model, server, options.queue)


def complete(options: Options) -> Options:
    """The options with what depends on the cluster."""
    device = options.device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
    count = options.batch_size or default_batch_size(device)
    window = options.window or default_window(device)
    return options.model_copy(update={"device": device, "batch_size": count, "window": window})


def model_deployment(options: Options) -> Deployment:
    """The replicas with the model.

    Args:
        options: of the application, complete.

    Raises:
        ValueError: in one line, if options do not fit together.
    """
    threads = str(max(int(options.cpus), 1))
    actor = {
        "num_cpus": options.cpus,
        "num_gpus": float(options.device == "cuda"),
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, **WAIT_SETTINGS}},
    }
    return _deployment(ModelReplica).options(
        name="Model",
        ray_actor_options=actor,
        max_ongoing_requests=calls(options),
        graceful_shutdown_timeout_s=options.timeout,
        max_constructor_retry_count=2,
        **_number_of_replicas(options),
        **_common("ERROR"),  # a warning says only that a replica has enough to do
    )


def ingress_deployment(options: Options) -> Deployment:
    """The HTTP servers."""
    return _deployment(Ingress).options(
        name="Ingress",
        num_replicas=options.servers,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_CONNECTIONS,
        graceful_shutdown_timeout_s=options.timeout,
        **_common("WARNING"),
    )


def _deployment(kind: type[Any]) -> Deployment:
    return cast(Deployment, serve.deployment(kind))  # its declared type is that of a decorator


def calls(options: Options) -> int:
    """Greatest number of calls in progress of a replica: one batch runs, and the next one waits there.

    All others wait in the ingress for the first replica that has room. Calls may be of a single image.
    """
    assert options.batch_size is not None
    assert options.window is not None
    return 2 * options.batch_size


def _number_of_replicas(options: Options) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.replicas}
    if options.max_replicas < options.replicas:
        raise ValueError(f"max_replicas is {options.max_replicas}, less than replicas, {options.replicas}; swap them")
    return {
        "autoscaling_config": {
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target or calls(options) / 4,
        }
    }


def _common(log_level: str) -> dict[str, Any]:
    # Without a line for each call: an ingress asks every replica each second how busy it is.
    return {
        "health_check_period_s": HEALTH_SECONDS[0],
        "health_check_timeout_s": HEALTH_SECONDS[1],
        "logging_config": LoggingConfig(log_level=log_level, enable_access_log=False),
    }
