"""Remote shards on real servers at the loopback address."""

import hashlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from datamodules import CodeDataModule, ImageDataModule
from datamodules.storage import remote
from datamodules.storage.remote import ShardCache, check_address, check_presence
from datamodules.storage.shards import META_FILE
from lightning_modules import ARGenModule
from llamagen.models.gpt import GPTConfig
from tests.datamodules.code_datasets import write_codes
from tests.datamodules.shard_files import assert_one_line, grey_image, write_images, write_shards


class Server(ThreadingHTTPServer):
    """Serves a folder and counts requests; the first ``failures`` answers for each path are errors."""

    def __init__(self, folder: Path, failures: int = 0, cut_off: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.failures, self.cut_off = failures, cut_off
        self.asked: Counter[str] = Counter()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        """Address of the folder."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    """Handler that fails as configured in the server."""

    server: Server

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        if self.server.asked[self.path] > self.server.failures:
            super().do_GET()
        elif self.server.cut_off:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"only this")
        else:
            self.send_error(503)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.0)


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Server] = []

    def start(folder: Path, **options: Any) -> Server:
        servers.append(Server(folder, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def first_keys(root: str, folder: Path) -> list[str]:
    """The keys of the first training batch, read as in a run."""
    data = CodeDataModule(root, 4, cache_dir=folder / "cache", num_workers=0)
    data.prepare_data()
    data.setup("fit")
    keys: list[str] = next(iter(data.train_dataloader()))["keys"]
    return keys


def train_a_step(root: str, folder: Path) -> list[str]:
    """Train for one step. Returns the keys of the batch."""
    net = GPTConfig(dim=8, n_layer=1, n_head=1, multiple_of=4, vocab_size=8, block_size=4, num_classes=5)
    module, seen = ARGenModule(net), []

    class Keys(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.extend(args[3]["keys"])

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[Keys()], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, CodeDataModule(root, 4, cache_dir=folder / "cache", num_workers=0))
    return seen


def test_training_reads_shards_from_a_web_server(tmp_path: Path, serve: Any) -> None:
    write_codes(tmp_path / "codes", train=9, val=3)
    server = serve(tmp_path / "codes")
    assert len(train_a_step(server.address, tmp_path)) == 4
    shards = [path for path in server.asked if path.endswith(".tar")]
    assert len(shards) == 4
    asked = server.asked.copy()
    assert len(first_keys(server.address, tmp_path)) == 4
    assert {path for path in server.asked if server.asked[path] > asked[path]} == {f"/{META_FILE}"}  # kept in the cache


def test_training_reads_shards_from_an_s3_compatible_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs
    from moto.server import ThreadedMotoServer

    write_codes(tmp_path / "codes", train=9, val=3)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in (
            ("AWS_ENDPOINT_URL", endpoint), ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        files = s3fs.S3FileSystem()
        files.mkdir("images")
        files.put(str(tmp_path / "codes"), "images/codes", recursive=True)
        assert len(train_a_step("s3://images/codes", tmp_path)) == 4
        with pytest.raises(ValueError) as error:
            first_keys("s3://images/nowhere", tmp_path)
        assert_one_line(error, "s3://images/nowhere/meta.json")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


@pytest.mark.parametrize("cut_off", [False, True], ids=["error 503", "half an answer"])
def test_server_that_fails_twice_is_retried(tmp_path: Path, serve: Any, cut_off: bool) -> None:
    write_codes(tmp_path / "codes", train=4, val=3)
    server = serve(tmp_path / "codes", failures=2, cut_off=cut_off)
    assert len(first_keys(server.address, tmp_path)) == 4
    assert min(server.asked.values()) >= 3
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_failing_server_is_an_error_with_the_address(tmp_path: Path, serve: Any) -> None:
    write_images(tmp_path / "set", train=3, val=3)
    server = serve(tmp_path / "set", failures=1000)
    shard = f"{server.address}/train/train-000000.tar"
    with pytest.raises(ValueError) as error:
        ImageDataModule(train=shard, val=shard, cache_dir=tmp_path / "cache").setup("fit")
    assert_one_line(error, shard, "after 5 attempts")
    assert server.asked["/train/train-000000.tar"] >= 5
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_missing_server_is_an_error_with_the_address(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}/train-{{000..001}}.tar"
    with pytest.raises(ValueError) as error:
        ImageDataModule(train=address, val=address, cache_dir=tmp_path).setup("fit")
    assert_one_line(error, address.split("-")[0], "could not be downloaded", "after 5 attempts")


def test_unresponsive_server_is_an_error_with_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "READ_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/train.tar"
        with pytest.raises(ValueError) as error:
            ShardCache(tmp_path).fetch(address)
    assert_one_line(error, address, "after 5 attempts")


def test_shard_missing_on_the_server_is_an_error_without_retries(tmp_path: Path, serve: Any) -> None:
    write_images(tmp_path / "set", train=6, val=0)
    server = serve(tmp_path / "set")
    with pytest.raises(ValueError) as error:
        ImageDataModule(train=f"{server.address}/train/train-{{000000..000002}}.tar", cache_dir=tmp_path).setup("fit")
    assert_one_line(error, f"{server.address}/train/train-000002.tar", "could not be downloaded")
    assert server.asked["/train/train-000002.tar"] == 1


def test_shard_with_another_checksum_than_in_meta_json_is_refused(tmp_path: Path, serve: Any) -> None:
    write_codes(tmp_path / "codes", train=3, val=3)
    shard = tmp_path / "codes/train/train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError) as error:
        first_keys(serve(tmp_path / "codes").address, tmp_path)
    assert_one_line(error, "train-000000.tar", "SHA-256")


def test_shard_written_again_is_downloaded_again(tmp_path: Path, serve: Any) -> None:
    (tmp_path / "shards").mkdir()
    address, cache = f"{serve(tmp_path / 'shards').address}/a.tar", ShardCache(tmp_path / "cache")
    for content in (b"first", b"second"):
        (tmp_path / "shards/a.tar").write_bytes(content)
        copy = cache.fetch(address, hashlib.sha256(content).hexdigest())
        assert copy.read_bytes() == content


def test_images_are_read_from_a_server_by_pattern(tmp_path: Path, serve: Any) -> None:
    write_images(tmp_path / "set", train=7, val=3)
    address = serve(tmp_path / "set").address
    data = ImageDataModule(
        train=f"{address}/train/train-{{000000..000002}}.tar", val=[f"{address}/val/val-000000.tar"],
        image_size=4, num_workers=0, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    data.setup("fit")
    keys = [key for batch in data.train_dataloader() for key in batch["keys"]]
    assert sorted(keys) == [f"train/{number}" for number in range(7)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_of_resampled_shards_respects_the_cache_size(tmp_path: Path, serve: Any, num_workers: int) -> None:
    write_images(tmp_path / "set", train=40, val=3)
    address = serve(tmp_path / "set").address
    shard_bytes = (tmp_path / "set/train/train-000000.tar").stat().st_size
    data = ImageDataModule(
        train=f"{address}/train/train-{{000000..000013}}.tar", val=f"{address}/val/val-000000.tar", image_size=4,
        batch_size=10, num_workers=num_workers, cache_dir=tmp_path / "cache", resampled_epoch=400,
        cache_gb=2.5 * shard_bytes / 1e9,
    )  # fmt: skip
    data.setup("fit")
    keys = [key for batch in data.train_dataloader() for key in batch["keys"]]
    assert len(keys) == 400
    assert len(set(keys)) == 40  # every shard has been sampled
    assert len(list((tmp_path / "cache/shards").glob("*.tar"))) <= 3


def test_stream_checks_that_every_shard_exists_before_training(tmp_path: Path, serve: Any) -> None:
    write_images(tmp_path / "set", train=6, val=3)
    address = serve(tmp_path / "set").address
    data = ImageDataModule(
        train=f"{address}/train/train-{{000000..000005}}.tar", val=f"{address}/val/val-000000.tar",
        resampled_epoch=400, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        data.setup("fit")
    assert_one_line(error, f"{address}/train/train-00000", "could not be downloaded")


def test_command_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "set", [("0", {"png": grey_image(3)})])
    command = f"pipe:cat {shard}; touch {tmp_path}/ran"
    with pytest.raises(ValueError) as error:
        ImageDataModule(train=command, val=str(shard)).setup("fit")
    assert_one_line(error, "pipe:", "allow_pipe")
    assert not (tmp_path / "ran").exists()
    data = ImageDataModule(train=command, val=str(shard), allow_pipe=True, cache_dir=tmp_path / "cache", num_workers=0)
    data.setup("fit")
    assert [batch["keys"] for batch in data.train_dataloader()] == [["0"]]
    assert (tmp_path / "ran").exists()


def test_command_that_fails_is_an_error_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        ShardCache(tmp_path, allow_pipe=True).fetch("pipe:exit 3")
    assert_one_line(error, "pipe:exit 3", "after 5 attempts")
    assert not list(tmp_path.rglob("*.tar*"))


@pytest.mark.parametrize(
    "address", ["ftp://host/a.tar", "file:///etc/a.tar", "filecache::s3://a/b.tar", "python://x.tar"]
)
def test_unknown_scheme_is_refused(address: str) -> None:
    with pytest.raises(ValueError) as error:
        check_address(address, allow_pipe=True)
    assert_one_line(error, address, "unknown scheme")


def test_missing_package_of_a_scheme_names_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(*args: Any, **options: Any) -> None:
        raise ImportError("no such module")

    monkeypatch.setattr(remote.fsspec.core, "url_to_fs", absent)
    with pytest.raises(ValueError) as error:
        ShardCache(tmp_path).fetch("gs://bucket/a.tar")
    assert_one_line(error, "gs://bucket/a.tar", '".[gs]"')


def test_missing_local_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        check_presence([str(tmp_path / "none.tar")])
    assert_one_line(error, tmp_path / "none.tar", "does not exist")
