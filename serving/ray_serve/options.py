"""Options of the application, of the command and of configuration files of ``serve run`` and ``serve deploy``."""

import argparse
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from serving.start import window_size


def _window(value: object) -> int | Literal["auto"]:
    """Check a window. ``serve run`` passes numbers as text; pydantic's int would also be 1 for true and 2 for 2.0.

    Raises:
        ValueError: in one line, if it is neither an integer of at least 1 nor ``auto``.
    """
    try:
        return window_size(str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


class Options(BaseModel):
    """What runs on the cluster.

    Attributes:
        model: published name, repository of the hub, or path of the model; every node must reach it.
        tokenizer: file or published name; None for the model's.
        text_encoder: name or folder of the T5; None for the model's.
        device: ``cpu`` or ``cuda``; None for GPUs if the cluster has some. A replica on GPUs has one.
        dtype: ``float32``, ``bfloat16`` or ``mixed``; None for the model's.
        batch_size: maximum number of images that a replica generates at a time; None for 4 on CPUs, 16 on GPUs.
        window: codes of an image that a pass may decide, or ``auto``; it changes no image. None for ``auto`` on CPUs, 1
            on GPUs.
        replicas: number of replicas; with ``max_replicas`` the least number.
        max_replicas: greatest number of replicas; None not to change their number with the load.
        target: calls in progress that a replica should have, on average; the number of replicas follows it. A call is
            one image, or up to a quarter of ``batch_size`` images of one request. None for half of ``batch_size``.
        cpus: CPUs of a replica.
        servers: number of HTTP servers (ingress replicas).
        queue: maximum number of images that wait, for each server.
        max_images: maximum number of images of a request.
        timeout: seconds after which a request ends with status 504.
        api_key_file: file with API keys, one a line, read where the application is built; None for no keys.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    tokenizer: str | None = None
    text_encoder: str | None = None
    device: Literal["cpu", "cuda"] | None = None
    dtype: str | None = None
    batch_size: int | None = Field(None, ge=1)
    window: Annotated[int | Literal["auto"], PlainValidator(_window)] | None = None
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    target: float | None = Field(None, gt=0)
    cpus: float = Field(1.0, gt=0)
    servers: int = Field(1, ge=1)
    queue: int = Field(256, ge=1)
    max_images: int = Field(16, ge=1)
    timeout: float = Field(300.0, gt=0)
    api_key_file: str | None = None
