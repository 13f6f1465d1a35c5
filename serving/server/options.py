"""Limits of a server."""

from dataclasses import dataclass

MAX_BODY = 32 * 2**20
"""Maximum size of a request in bytes: an image of 20 MB in base64, and its settings."""


@dataclass(frozen=True)
class ServerOptions:
    """What a server accepts.

    Attributes:
        max_images: maximum number of images of a request.
        timeout: seconds after which a request that is not finished ends with status 504.
        api_keys: keys of clients; empty to answer everybody.
        has_urls: whether images can be stored for ``response_format`` ``url``. An image is available from the process
            that generated it only, so servers of several processes say no.
        max_body: maximum size of a request in bytes.
        max_bodies: maximum size in bytes of all requests that are being answered.
        body_seconds: time in which a client has to send the body of a request.
    """

    max_images: int = 16
    timeout: float = 300.0
    api_keys: tuple[str, ...] = ()
    has_urls: bool = True
    max_body: int = MAX_BODY
    max_bodies: int = 8 * MAX_BODY
    body_seconds: float = 60.0
