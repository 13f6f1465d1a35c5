"""The HTTP server of the page. Nothing on the page is loaded from elsewhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Read when Gradio is imported: no messages to its makers, and no look-up of newer versions.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import uvicorn
from fastapi import FastAPI, Response

from serving.image_store import ImageStore
from serving.page.layout import build_page
from serving.page.markup import CSS
from serving.page.runs import Runs

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; form-action 'self'"
"""Content security policy: browsers refuse to load anything from other machines."""
MAX_UPLOAD = "20mb"
UPLOADS = "GRADIO_TEMP_DIR"
"""Environment variable with the folder of uploads. Gradio reads it when an app is built, and at each request."""
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACE = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]


class _WithPolicy:
    """Adds the policy to all answers."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message["headers"], policy]}
            await send(message)

        await self._app(scope, receive, send_with_policy)


@contextmanager
def upload_folder() -> Iterator[Path]:
    """Keep the uploads of a server in a folder of its own, which is deleted at the end.

    Footgun: all servers of a user share Gradio's folder, and the same file has the same name in it. The end of one
    server would delete files that another one uses.
    """
    before = os.environ.get(UPLOADS)
    with TemporaryDirectory(prefix="llamagen_page_", dir=before, ignore_cleanup_errors=True) as folder:
        os.environ[UPLOADS] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ[UPLOADS]
            else:
                os.environ[UPLOADS] = before


def build_app(runs: Runs) -> FastAPI:
    """Build the application of a page.

    Args:
        runs: runs of the model.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    store: ImageStore = runs.store

    @app.get("/image/{name}.png")
    def image(name: str) -> Response:
        file = store.get(name)
        if file is None:
            return Response("This image is no longer kept; generate it again.", 404, media_type="text/plain")
        return Response(file, media_type="image/png", headers={"Cache-Control": "private, max-age=86400, immutable"})

    theme = gr.themes.Default(primary_hue="indigo", font=FONTS, font_mono=MONOSPACE)
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")  # readable contrast
    page = build_page(runs)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        show_error=False,
        max_file_size=MAX_UPLOAD,
        theme=theme,
        css=CSS,
    )
    app.add_middleware(_WithPolicy)
    return app


def build_server(app: FastAPI) -> uvicorn.Server:
    """Server of an application, for ``Server.run(sockets=[…])``. It ends within seconds, also with open pages."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, proxy_headers=True, ws="none"
    )
    return uvicorn.Server(config)
