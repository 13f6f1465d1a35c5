"""Options of the application and of the command, without a cluster."""

import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")

import ray
from pydantic import ValidationError
from ray import serve

from llamagen.command import run_command
from serving.engine.spec import WorkerSpec
from serving.ray_serve import __main__ as command
from serving.ray_serve import app
from serving.ray_serve.app import ModelReplica, StartError, complete, ingress_deployment, model_deployment
from serving.ray_serve.options import Options


def options(**values: Any) -> Options:
    return complete(Options(**{"model": "c2i_B_256", "device": "cpu", **values}))


def test_options_become_those_of_the_deployments() -> None:
    fixed = model_deployment(options(replicas=3, batch_size=8, cpus=2.5, timeout=20))
    assert (fixed.num_replicas, fixed.max_ongoing_requests) == (3, 16)
    assert fixed.ray_actor_options["num_cpus"] == 2.5
    assert fixed.ray_actor_options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"
    assert not fixed.ray_actor_options["num_gpus"]
    assert ingress_deployment(options(servers=2)).num_replicas == 2
    on_gpus = model_deployment(options(device="cuda"))
    assert (on_gpus.ray_actor_options["num_gpus"], on_gpus.max_ongoing_requests) == (1, 32)


@pytest.mark.parametrize(("target", "expected"), [(None, 4), (1.5, 1.5)])
def test_the_number_of_replicas_may_follow_the_load(target: float | None, expected: float) -> None:
    scaled = model_deployment(options(replicas=2, max_replicas=6, target=target, batch_size=8))
    config = scaled._deployment_config.autoscaling_config
    assert config is not None
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 6, expected)


def test_fewer_replicas_at_most_than_at_least_are_an_error() -> None:
    with pytest.raises(ValueError, match="max_replicas is 2, less than replicas, 3"):
        model_deployment(options(replicas=3, max_replicas=2))


def test_the_command_writes_a_file_that_the_application_reads(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    arguments = ["c2i_B_256", "--replicas", "2", "--max-replicas", "8", "--port", "8001", "--address", "auto"]
    arguments += ["--window", "6"]
    command.main([*arguments, "--write-config", str(path)])
    config = yaml.safe_load(path.read_text())
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8001}
    (application,) = config["applications"]
    assert application["import_path"] == "serving.ray_serve.app:build"
    assert Options(**application["args"]) == Options(model="c2i_B_256", replicas=2, max_replicas=8, window=6)


@pytest.mark.parametrize(("given", "expected"), [(3, 3), ("3", 3), ("auto", "auto")])
def test_a_file_may_give_a_window(given: Any, expected: Any) -> None:
    assert options(window=given).window == expected
    assert options().window == "auto"


@pytest.mark.parametrize("given", [True, 2.0, 0, "wide", ["auto"]])
def test_a_wrong_window_of_a_file_is_one_error_of_one_line(given: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Options(model="c2i_B_256", window=given)
    [error] = caught.value.errors()
    assert (error["loc"], error["msg"]) == (
        ("window",),
        f"Value error, {given} is not a window; give a number of codes (1, 2, …) or auto",
    )


def test_a_written_file_has_whole_paths_and_no_fewer_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("keys", "vq.safetensors", "t5"):
        Path(name).touch()
    arguments = ["c2i_B_256", "--address", "auto", "--write-config", "serve.yaml", "--tokenizer", "vq.safetensors"]
    monkeypatch.setenv("LLAMAGEN_API_KEY", "secret")
    with pytest.raises(ValueError, match=r"^LLAMAGEN_API_KEY is set, but the file of --write-config has no keys"):
        command.main(arguments)
    command.main([*arguments, "--api-key-file", "keys", "--text-encoder", "t5"])
    text = Path("serve.yaml").read_text()
    (application,) = yaml.safe_load(text)["applications"]
    paths = {name: application["args"][name] for name in ("tokenizer", "text_encoder", "api_key_file")}
    assert list(paths.values()) == [str(tmp_path.resolve() / name) for name in ("vq.safetensors", "t5", "keys")]
    assert "secret" not in text


@pytest.mark.parametrize("option", [["--address", "auto"], ["--write-config", "serve.yaml"]])
def test_a_free_port_is_one_of_this_start_on_this_machine(option: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^--port 0 .*; give a number with --"):
        command.main(["c2i_B_256", "--port", "0", *option])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a command that serves does to Ray, without Ray."""
    done: list[str] = []

    def note(name: str) -> Any:
        return lambda *_, **options: done.append(f"{name} {options.get('_blocking', '')}".strip())

    monkeypatch.setattr(command, "_set_up_environment", lambda is_local: None)
    monkeypatch.setattr(command, "_Interrupt", lambda: SimpleNamespace(wait=note("wait")))
    for name in ("_connect", "_run", "_drain"):
        monkeypatch.setattr(command, name, note(name))
    monkeypatch.setattr(app, "build", note("build"))
    monkeypatch.setattr(serve, "start", note("start"))
    monkeypatch.setattr(serve, "delete", note("delete"))
    monkeypatch.setattr(ray, "shutdown", note("shutdown"))
    return done


RUNNING = ["_connect", "build", "start", "_run"]


def raising(error: BaseException) -> Any:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def test_an_interrupted_command_finishes_and_deletes_its_application(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command.main(["c2i_B_256", "--address", "auto"])
    assert calls == [*RUNNING, "wait", "_drain", "delete True", "shutdown"]
    calls.clear()
    monkeypatch.setattr(serve, "delete", raising(TimeoutError("it takes longer than a minute")))
    command.main(["c2i_B_256", "--address", "auto"])
    assert calls[-1] == "shutdown"


@pytest.mark.parametrize("place", ["_drain", "_run"])
def test_a_second_interruption_ends_at_once(place: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, place, raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        command.main(["c2i_B_256", "--address", "auto"])
    assert calls[-2:] == ["delete False", "shutdown"]


def test_a_wrong_option_does_not_end_what_runs_already(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "build", raising(ValueError("max_replicas is 2")))
    with pytest.raises(ValueError, match="max_replicas is 2"):
        command.main(["c2i_B_256", "--address", "auto"])
    assert calls == ["_connect", "shutdown"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "0"], "error: --replicas 0: the input should be greater than or equal to 1"),
        (["--device", "cuda:1"], "error: --device cuda:1: the input should be 'cpu' or 'cuda'"),
        (["--timeout", "-1"], "error: --timeout -1.0: "),
    ],
)
def test_a_wrong_option_is_an_error_of_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serving.ray_serve", "c2i_B_256", *arguments])
    with pytest.raises(SystemExit) as end:
        run_command(command.main)
    assert end.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_a_replica_that_cannot_load_the_model_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartError) as raised:
        ModelReplica(WorkerSpec(str(tmp_path / "nothing")), 8)
    assert "cannot load the model: " in str(raised.value)
    assert "every node must reach it" in str(raised.value)

    def run(*_: object, **__: object) -> None:
        raise RuntimeError("Deploying application llamagen failed")

    # As Ray Serve reports it: in a traceback, which is the message of the deployment.
    status = SimpleNamespace(message=f"Traceback\n  …\nserving.ray_serve.app.StartError: {raised.value}\n")
    application = SimpleNamespace(deployments={"Model": status})
    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"llamagen": application}))
    with pytest.raises(ValueError) as reported:
        command._run(object(), "llamagen")  # type: ignore[arg-type]
    assert str(reported.value) == str(raised.value)


def test_an_address_without_a_cluster_is_an_error_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"there is no Ray cluster at --address {address} .*refused"):
            command._connect(address, options())
