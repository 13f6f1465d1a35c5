"""Codes of a tokenizer with more codes than uint16 can hold: written, read again and described."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from callbacks import CodeWriter
from datamodules import CodeDataModule, ImageDataModule
from datamodules.inspection import inspect
from datamodules.storage.tar_index import index_shard
from llamagen.models.vqgan import VQGANConfig
from tests.datamodules.shard_files import grey_image, write_shards
from tests.lightning_modules.runs import evaluator, vqgan_module
from tests.pipeline import TOKENIZER_NET


def test_codes_of_a_large_vocabulary_are_stored_and_read(tmp_path: Path) -> None:
    quantizer = {"class_path": "tests.rounding.Rounding", "init_args": {"levels": 512}}
    tokenizer = vqgan_module(options={"net": VQGANConfig(**TOKENIZER_NET, quantizer=quantizer)})
    examples = [(f"{number}", {"png": grey_image(number * 60, 8), "cls": b"0"}) for number in range(4)]
    for split in ("train", "val"):
        write_shards(tmp_path / "images" / split, examples)
    images = ImageDataModule(tmp_path / "images", image_size=8, batch_size=4, num_workers=0, views="flip")
    evaluator(CodeWriter(4), default_root_dir=tmp_path / "out").predict(tokenizer, images, return_predictions=False)
    with torch.no_grad():
        expected = tokenizer.eval().predict_step(next(iter(images.predict_dataloader()[0])), 0)  # (4, 2, 4, 4)
    assert int(expected.max()) >= 2**16
    (shard,) = (tmp_path / "out/train").glob("*.tar")
    stored = np.stack([np.load(BytesIO(example.read("npy"))) for example in index_shard(shard)])
    assert stored.dtype == np.uint32
    assert stored.tolist() == expected.tolist()
    codes = CodeDataModule(tmp_path / "out", batch_size=4, num_workers=0)
    codes.setup("fit")
    assert next(iter(codes.val_dataloader()))["codes"].tolist() == expected[:, 0].flatten(1).tolist()
    (batch,) = codes.train_dataloader()  # either view of each image
    for key, row in zip(batch["keys"], batch["codes"], strict=True):
        assert (expected[int(key)].flatten(1) == row).all(1).any()
    assert inspect(str(tmp_path / "out"))[0].startswith(
        f"{tmp_path / 'out'}: codes, 4 × 4 per image, vocabulary 262144 (uint32), 2 views"
    )
