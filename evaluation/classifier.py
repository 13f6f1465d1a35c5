"""Trains a small classifier as feature extractor, for images that are unlike Inception's training images."""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from datamodules.base import SPLITS
from datamodules.images import ImageDataModule
from datamodules.loading.loader import EvaluationLoader
from datamodules.storage.class_order import ClassOrder
from evaluation.command_line import usable_device
from llamagen.files import atomic_file
from llamagen.finite import broken_weight
from llamagen.metrics.classifier import ENTRY, SmallClassifier
from llamagen.metrics.result_names import check_name
from llamagen.output_paths import check_output_file

SHIFT = 2
"""Maximum random shift of training images in pixels, in each direction."""


def train_classifier(
    data: str,
    out: Path,
    name: str,
    image_size: int = 32,
    epochs: int = 6,
    batch_size: int = 64,
    width: int = 32,
    lr: float = 2e-3,
    flip: bool = False,
    num_workers: int = 0,
    seed: int = 0,
    device: str = "cpu",
    class_order: ClassOrder = "auto",
) -> float:
    """Train a classifier. The other commands can use its features instead of Inception's.

    Args:
        data: folder of class folders or shards, with or without ``train`` and ``val``, as for the tokenizer.
        out: file to write, ``.safetensors``.
        name: name of the extractor in result names, for example ``digits-classifier``.
        image_size: side of the images in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        width: channels of the first layer; there are four times as many features.
        lr: maximum learning rate of AdamW with a one-cycle schedule.
        flip: mirror half of the images.
        num_workers: processes that read images.
        seed: seed of weights, order and augmentation.
        device: device on which to train.
        class_order: how class folders are numbered, as in a DataModule.

    Returns:
        Accuracy on the validation images, in [0, 1].

    Raises:
        ValueError: if the images have no classes, or an option is out of range.
        FloatingPointError: if the loss is not finite.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be at least 1")
    check_name(name, "classifier")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}; it must be above 0")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2^63")
    check_output_file(out, (".safetensors",))
    device = usable_device(device)
    torch.manual_seed(seed)
    datamodule = ImageDataModule(
        data,
        image_size,
        batch_size,
        random_crop=False,
        flip=flip,
        num_workers=num_workers,
        seed=seed,
        remainder="drop",
        class_order=class_order,
    )
    datamodule.setup("fit")
    train, validation = datamodule.train_dataloader(), datamodule.val_dataloader()
    labels = np.concatenate([datamodule.datasets[split].examples.labels for split in SPLITS])  # type: ignore[attr-defined]
    if (labels < 0).any():
        raise ValueError(f"some images in {data} have no class; give a dataset with a class for each image")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"all images in {data} are of one class; give a dataset of at least two")
    num_classes = max(len(datamodule.class_names), 1 + int(labels.max()))
    classifier = SmallClassifier(num_classes, image_size, width).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr, weight_decay=0.05)
    steps = epochs * len(train)
    rise = 0.2 if steps != 5 else 0.4  # OneCycleLR divides by zero if the rise is one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=rise)
    started = time.monotonic()
    with tqdm(total=steps, desc="training the classifier", unit="step") as bar:
        for _ in range(epochs):
            for batch in train:
                images = _shifted(_levels(batch["images"], device))
                classes = batch["labels"].to(device)
                loss = F.cross_entropy(classifier(images).biased_logits, classes, label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if not math.isfinite(value := loss.item()):
                    raise FloatingPointError(
                        f"the loss is not finite at step {bar.n} of {steps} of the classifier (precision float32); "
                        f"nothing was written, give a smaller lr than {lr:g}"
                    )
                bar.update()
                bar.set_postfix(loss=f"{value:.3f}")
    if (broken := broken_weight(classifier)) is not None:  # after the last step, whose loss was finite
        raise FloatingPointError(
            f"weight {broken} of the classifier is not finite (precision float32); nothing was written, give a smaller "
            f"lr than {lr:g}"
        )
    accuracy = _accuracy(classifier.eval(), validation, device)
    facts = {
        "name": name,
        "num_classes": num_classes,
        "image_size": image_size,
        "width": width,
        "accuracy": accuracy,
        "epochs": epochs,
        "seed": seed,
    }
    with atomic_file(out) as temporary:
        save_file(
            {key: value.cpu().contiguous() for key, value in classifier.state_dict().items()},
            temporary,
            metadata={ENTRY: json.dumps(facts)},
        )
    print(f"{out}: accuracy {accuracy:.1%} on the validation images, after {time.monotonic() - started:.0f} s")
    return accuracy


def _levels(images: Tensor, device: str) -> Tensor:
    """Convert images in [-1, 1] to the levels 0 … 255 that extractors expect."""
    return ((images.to(device) + 1) * 127.5).round()


def _shifted(images: Tensor) -> Tensor:
    down, right = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    return padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]


@torch.no_grad()
def _accuracy(classifier: SmallClassifier, validation: EvaluationLoader, device: str) -> float:
    right = count = 0
    for batch in validation:
        logits = classifier(_levels(batch["images"], device)).biased_logits
        right += int((logits.argmax(1).cpu() == batch["labels"]).sum())
        count += len(batch["labels"])
    return right / count
