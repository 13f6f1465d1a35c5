"""``docs/http_api.md`` has every option, field, status, metric and path."""

import re
from pathlib import Path

from serving.server.__main__ import _parser
from serving.server.app import build_app
from serving.server.description import ERRORS
from serving.server.fields import GenerationBody, ReconstructionBody
from serving.server.metrics import Metrics
from tests.serving.fake_backend import FakeBackend

PAGE = (Path(__file__).resolve().parents[3] / "docs/http_api.md").read_text()


def test_the_reference_is_complete() -> None:
    backend, metrics = FakeBackend(), Metrics()
    app = build_app(backend, metrics=metrics)
    backend.close()
    names = [*GenerationBody.model_fields, *ReconstructionBody.model_fields]
    names += [
        option for action in _parser()._actions for option in action.option_strings if option not in ("-h", "--help")
    ]
    helped = re.findall(r"^# HELP (\w+)", metrics.text().decode(), re.MULTILINE)
    names += [name for name in helped if not name.endswith("_created")]  # times of the library
    assert len(names) > 50
    assert [name for name in names if not re.search(rf"`{name}[`{{]", PAGE)] == []
    assert [status for status in ERRORS if not re.search(rf"^\| .*{status}.* \|", PAGE, re.MULTILINE)] == []
    paths = [path.replace("/{name}", "/NAME").replace("/{file}", "/NAME.FORMAT") for path in app.openapi()["paths"]]
    assert [path for path in paths if path not in PAGE] == []
