"""The examples of docs/extending.md work: their Python becomes a module ``mine``, as a user would write it."""

import base64
import importlib
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import main
from benchmarks.readme_commands import read_commands
from callbacks import FIDMonitor
from datamodules import DigitsDataModule
from evaluation.image_sets import open_images
from evaluation.reference import make_reference
from llamagen import LlamaGen
from llamagen.checkpoints.contents import load_vqgan
from llamagen.class_names import ClassNames
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig
from llamagen.pretrained.loading import Parts
from llamagen.sampling import SamplingConfig, generate
from tests.lightning_modules.runs import evaluator, vqgan_module
from tests.metrics.extractors import SIZE, Everything
from tests.pipeline import TOKENIZER_NET, Pipeline
from tests.serving.running_server import running

PAGE = Path(__file__).resolve().parents[1] / "docs/extending.md"
NET = "--model.init_args.net"


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("mine")
    blocks = [command.text for command in read_commands(PAGE.read_text()) if command.language == "python"]
    (folder / "mine.py").write_text("\n\n".join(blocks))
    sys.path.insert(0, str(folder))
    yield importlib.import_module("mine")
    sys.path.remove(str(folder))
    del sys.modules["mine"]


def test_the_quantiser_and_the_callback_work_in_a_training(
    mine: ModuleType, pipeline: Pipeline, tmp_path: Path
) -> None:
    options = [
        *(f"{NET}.quantizer.class_path=mine.Signs", f"{NET}.quantizer.init_args.dim=5"),
        *("--trainer.max_steps=4", "--trainer.callbacks+=mine.FrequentCodes", "--trainer.callbacks.count=3"),
    ]
    main.main(["fit", *pipeline.tokenizer_arguments(tmp_path / "run"), *options])
    vqgan = load_vqgan(tmp_path / "run/checkpoints/last.ckpt")
    assert isinstance(vqgan.quantize, mine.Signs)
    codes = torch.arange(32).view(2, 4, 4)
    assert torch.equal(vqgan.quantize(vqgan.quantize.lookup(codes)).codes, codes)
    lines = (tmp_path / "run/frequent_codes.csv").read_text().splitlines()
    counts = [int(line.split(",")[1]) for line in lines[1:]]
    assert lines[0] == "code,count"
    assert len(counts) == 3
    assert counts == sorted(counts, reverse=True)


def test_the_data_source_reads_an_archive(mine: ModuleType, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(20) % 3
    np.savez(tmp_path / "images.npz", images, labels)
    data = mine.ArchiveDataModule(
        tmp_path / "images.npz",
        tmp_path / "shards",
        **{"image_size": 8, "batch_size": 20, "num_workers": 0, "val_share": 0.2, "random_crop": False, "flip": False},
    )
    data.prepare_data()
    data.setup("fit")
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    read = {
        key: (image, label)
        for batch in batches
        for key, image, label in zip(batch["keys"], batch["images"], batch["labels"].tolist(), strict=True)
    }
    assert len(read) == 20
    for index in range(20):
        image, label = read[f"{index:06d}"]
        assert label == labels[index]
        expected = torch.from_numpy(images[index]).permute(2, 0, 1).float() / 127.5 - 1
        torch.testing.assert_close(image.float(), expected, atol=1e-3, rtol=0)


def small_gpt() -> GPT:
    config = GPTConfig(dim=32, n_layer=2, n_head=2, block_size=16, vocab_size=32, num_classes=10)
    torch.manual_seed(0)
    gpt = GPT(config).eval()
    torch.nn.init.normal_(gpt.output.weight)
    return gpt


def test_the_guidance_schedule_changes_samples(mine: ModuleType) -> None:
    config = mine.TriangleGuidance(guidance_scale=4.0)
    scales = config.guidance_scales(17)
    assert scales[0] == scales[-1] == 1.0
    assert max(scales) == scales[8] == 4.0
    gpt = small_gpt()
    labels = torch.arange(10)
    assert not torch.equal(generate(gpt, labels, config), generate(gpt, labels, SamplingConfig(guidance_scale=4.0)))


def test_the_metric_is_measured_by_the_fid_monitor(mine: ModuleType, pipeline: Pipeline, tmp_path: Path) -> None:
    images = open_images(pipeline.digits, SIZE, "val")
    make_reference(images, Everything(), "val-digits", "reconstruction").save(tmp_path / "val.npz")
    monitor = FIDMonitor(tmp_path / "val.npz", Everything(), extra_metrics=[mine.FeatureNorm])
    data = DigitsDataModule(pipeline.digits, image_size=SIZE, batch_size=64, num_workers=0)
    logged = evaluator(monitor, default_root_dir=tmp_path).test(vqgan_module(), data, verbose=False)[0]
    assert logged["rfeature_norm_everything"] > 0


def test_the_generation_order_scores_and_generates_column_by_column(mine: ModuleType) -> None:
    assert mine.logits.shape == (4, 16, 32)
    order, codes = mine.order, mine.generated
    with torch.no_grad():
        scores = mine.gpt(codes[:, order][:, :-1], mine.labels, positions=order[:-1], targets=order)
    assert torch.equal(scores.argmax(dim=-1), codes[:, order])


def test_the_engine_answers_requests_of_the_server(mine: ModuleType) -> None:
    tokenizer, names = VQGAN(VQGANConfig(**TOKENIZER_NET)).eval(), ClassNames(tuple("abcdefghij"))
    model = LlamaGen(Parts("small", tokenizer, small_gpt(), SamplingConfig(), "float32", names))
    body = {"prompt": 3, "seed": 1, "n": 2, "guidance_scale": 2.0}
    with running(mine.one_by_one(model)) as server:
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()
        refused = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": 11}, timeout=60)
    images = [Image.open(BytesIO(base64.b64decode(each["b64_json"]))) for each in answer["data"]]
    expected = model.generate(3, images_per_prompt=2, seed=1, guidance_scale=2.0, progress=False)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert refused.status_code == 400
    assert "11" in refused.json()["error"]["message"]
