"""Estimate the cost of training an autoregressive model: ``python -m llamagen.cost --config FILE …``.

The files are those of ``main.py fit``, a base and its overlays; later ones override earlier ones. The command reads the
model's ``net``, ``order``, ``lora`` and ``activation_checkpointing``, the data's ``batch_size``, the trainer's
``precision``, ``devices``, ``num_nodes``, ``strategy`` and ``max_epochs``, and whether there is an ``EMA`` callback.

Memory is that of one GPU. It includes neither CUDA itself (about 2 GB) nor the overhead of PyTorch's allocator (a few
percent) nor temporary memory of single operators in the backward pass.
"""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from llamagen.command import run_command
from llamagen.cost.gpt import (
    PRECISIONS,
    Activations,
    activations,
    cache_bytes_of_adaptive_norms,
    cache_bytes_per_token,
    flops_per_sequence,
    gpu_days,
    head,
    parameters,
    whole_block_parameters,
)
from llamagen.cost.lora import (
    adapter_activations,
    adapter_parameters,
    frozen_head,
    trained_parameters,
    training_flops,
)
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.lora import LoRAConfig, check_rank
from llamagen.parser_errors import OneLineParser

IMAGENET = 1_280_000
"""Training images of ImageNet, rounded."""
SHARDED = ("sharded", "ShardedStrategy", "ModelParallelStrategy")


@dataclass(frozen=True)
class Run:
    """Settings of a training run that determine its cost.

    Attributes:
        net: shape of the model.
        batch_size: number of sequences on each GPU.
        precision: one of :data:`PRECISIONS`.
        checkpointing: whether blocks are recomputed in the backward pass.
        ema: whether an average of the parameters is kept.
        gpus: number of GPUs.
        sharded: whether the parameters are sharded over the GPUs (FSDP2).
        lora: settings of adapters, next to frozen weights; None if all weights are trained.
        trains_classes: whether adapters are trained together with the class embeddings.
        epochs: number of epochs; the paper's if the files do not limit them.
    """

    net: GPTConfig
    batch_size: int
    precision: str = "32-true"
    checkpointing: bool = False
    ema: bool = False
    gpus: int = 1
    sharded: bool = False
    lora: LoRAConfig | None = None
    trains_classes: bool = False
    epochs: int = 300

    @property
    def trained(self) -> int:
        """Number of parameters that are trained."""
        return (
            parameters(self.net) if self.lora is None else trained_parameters(self.net, self.lora, self.trains_classes)
        )


def memory(run: Run) -> dict[str, int]:
    """Bytes on each GPU by purpose. Their sum is the peak of a step, without the memory that is not included (see top).

    With DDP each GPU also holds gradient buckets. With sharding each GPU holds its part of parameters, gradients and
    optimizer state, and temporarily the gathered parameters: embeddings, last norm and head with their gradients, two
    blocks in the dtype of their products, and the gradients of one block, also in float32.

    Args:
        run: the run.
    """
    width, compute = PRECISIONS[run.precision]
    shards = run.gpus if run.sharded else 1
    adapters = 0 if run.lora is None else adapter_parameters(run.net, run.lora)
    weights = -(-width * (parameters(run.net) + adapters) // shards)
    size = -(-width * run.trained // shards)
    block = whole_block_parameters(run.net)
    ends = parameters(run.net) - run.net.n_layer * block
    gathered = 2 * width * ends + (3 * compute + 4) * block
    kept = _activations(run, run.checkpointing)
    loss = (head if run.lora is None else frozen_head)(run.net, run.batch_size, run.precision)
    return {
        "weights": weights,
        "gradients": size,
        "buckets of DDP": size if run.gpus > 1 and not run.sharded else 0,
        "moments of AdamW": 2 * size,
        "EMA": size if run.ema else 0,
        "activations": kept.kept,
        "one recomputed block": kept.recomputed,
        "autocast's weights": 0 if run.sharded else kept.narrow_weights,
        "gathered parameters": gathered if run.sharded else 0,
        "gradients of the loss": loss.kept,
        "logits, temporarily": loss.temporary,
    }


def _activations(run: Run, checkpointing: bool) -> Activations:
    if run.lora is not None:
        return adapter_activations(run.net, run.lora, run.batch_size, run.precision, checkpointing)
    return activations(run.net, run.batch_size, run.precision, checkpointing)


def merge(base: Any, overlay: Any) -> Any:
    """Merge two configurations: mappings are merged key by key, other values are replaced by ``overlay``."""
    if isinstance(base, dict) and isinstance(overlay, dict):
        return base | {key: merge(base.get(key), value) for key, value in overlay.items()}
    return overlay


def read_run(
    paths: list[Path], batch_size: int | None = None, precision: str | None = None, gpus: int | None = None
) -> Run:
    """Read the settings of a run from configurations of ``main.py fit``.

    Args:
        paths: YAML files; later ones override earlier ones.
        batch_size: overrides that of the files.
        precision: overrides that of the files.
        gpus: overrides that of the files; 8 if they give no number.

    Raises:
        ValueError: in one line, if a file cannot be read, or a setting is missing or invalid.
    """
    tree: Any = {}
    for path in paths:
        try:
            overlay = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read as YAML ({' '.join(str(error).split())})") from error
        if not isinstance(overlay, dict):
            raise ValueError(f"{path} is not a mapping of keys; pass a configuration of main.py fit")
        tree = merge(tree, overlay)

    def at(*keys: str) -> Any:
        value = tree
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    devices, nodes, strategy, epochs = (
        at("trainer", key) for key in ("devices", "num_nodes", "strategy", "max_epochs")
    )
    if gpus is None:
        gpus = devices * (nodes or 1) if isinstance(devices, int) and isinstance(nodes, int | None) else 8
    callbacks = at("trainer", "callbacks")
    entries = callbacks if isinstance(callbacks, list) else [callbacks]
    classes = [_last_name(entry) for entry in entries]
    run = Run(
        net=_net(at("model", "init_args", "net"), at("model", "init_args", "order") is not None),
        batch_size=at("data", "init_args", "batch_size") if batch_size is None else batch_size,
        precision=precision or str(at("trainer", "precision") or "32-true"),
        checkpointing=at("model", "init_args", "activation_checkpointing") or False,
        ema="EMA" in classes,
        gpus=gpus,
        sharded=_last_name(strategy) in SHARDED,
        lora=_lora(at("model", "init_args", "lora")),
        trains_classes="num_classes" in (at("model", "init_args", "init_adapt") or ()),
        epochs=epochs if isinstance(epochs, int) and epochs > 0 else Run.epochs,
    )
    if run.lora is not None:
        check_rank(run.net, run.lora)
    if not isinstance(run.batch_size, int) or run.batch_size < 1:
        raise ValueError(
            f"batch_size is {run.batch_size}; set data.init_args.batch_size or --batch_size, at least 1 for each GPU"
        )
    if run.gpus < 1:
        raise ValueError(f"gpus is {run.gpus}; it must be above 0")
    if run.precision not in PRECISIONS:
        raise ValueError(f"precision is {run.precision}; it must be one of {', '.join(PRECISIONS)}")
    if not isinstance(run.checkpointing, bool):
        raise ValueError(f"activation_checkpointing is {run.checkpointing!r}; it must be true or false")
    return run


def _last_name(entry: Any) -> str:
    """Name, without its module, of the class in an entry of a configuration."""
    return str(entry.get("class_path") if isinstance(entry, dict) else entry).split(".")[-1]


def _lora(values: Any) -> LoRAConfig | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"model.init_args.lora is {values!r}; it must be null, or hold rank, alpha and dropout")
    try:
        return LoRAConfig(**values)
    except TypeError as error:
        raise ValueError(f"model.init_args.lora is not a valid configuration ({error})") from error


def _net(values: Any, in_random_orders: bool) -> GPTConfig:
    if not isinstance(values, dict):
        raise ValueError("model.init_args.net is missing; pass the configuration of an autoregressive model")
    types = {field.name: field.type for field in fields(GPTConfig)}
    if unknown := [name for name in values if name not in types]:
        raise ValueError(f"model.init_args.net has no {unknown[0]!r}; it has {', '.join(types)}")
    # footgun: YAML 1.1 reads 1e-5 as a string.
    numbers: dict[str, Any] = {
        name: float(v) if types[name] is float and isinstance(v, str) else v for name, v in values.items()
    }
    if in_random_orders:  # as ARGenModule does
        numbers["target_aware"] = True
    try:
        return GPTConfig(**numbers)
    except TypeError as error:
        raise ValueError(f"model.init_args.net is not a valid configuration ({error})") from error


def report(run: Run, images: int, mfu: float, peak_tflops: float) -> str:
    """Format all estimates as text.

    Args:
        run: the run.
        images: number of training images times epochs.
        mfu: model FLOPs utilization, a fraction of the peak.
        peak_tflops: peak of one GPU, in 10¹² operations per second.

    Raises:
        ValueError: if an argument is out of range.
    """
    if not 0.0 < mfu <= 1.0:
        raise ValueError(f"mfu is {mfu}; it must be above 0 and at most 1, a fraction of the peak")
    for name, value in (("images", images), ("peak_tflops", peak_tflops)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be above 0 and finite")
    net, flops = run.net, training_flops(run.net, run.lora)
    days = gpu_days(net, images, mfu, peak_tflops) * flops / flops_per_sequence(net)
    cached = cache_bytes_of_adaptive_norms(net)
    gpus = f"{run.gpus} GPU{'s' if run.gpus > 1 else ''}{', parameters sharded' if run.sharded else ''}"
    rows = [
        ("parameters", f"{parameters(net):,}"),
        *([("trained parameters", f"{run.trained:,}")] if run.lora is not None else []),
        ("training FLOPs per token", f"{flops / net.block_size:.4g}"),
        ("training FLOPs per sequence", f"{flops:.4g} ({net.block_size} codes)"),
        ("GPU days", f"{days:,.4g} for {images:,} images at {mfu:g} of {peak_tflops:g} TFLOP/s"),
        ("days on all GPUs", f"{days / run.gpus:,.4g} on {run.gpus}"),
        ("KV cache per token", f"{cache_bytes_per_token(net, run.precision):,} bytes"),
        *([("adaptive norms in the cache", f"{cached:,} bytes per sequence")] if cached else []),
        ("", ""),
        ("memory of a GPU", f"batch of {run.batch_size}, {run.precision}, {gpus}"),
    ]
    parts = memory(run)
    rows += [(f"  {name}", f"{size / 1e9:8.2f} GB") for name, size in parts.items() if size]
    rows += [("  total", f"{sum(parts.values()) / 1e9:8.2f} GB")]
    for checkpointing, words in ((False, "without"), (True, "with")):
        kept = _activations(run, checkpointing)
        size = kept.kept + kept.recomputed
        rows.append((f"activations {words} checkpointing", f"{size / 1e9:.2f} GB"))
    return "\n".join(f"{name:34}{value}".rstrip() for name, value in rows)


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: arguments; those of the command line by default.
    """
    parser = OneLineParser(
        "python -m llamagen.cost",
        "Parameters, operations, memory and GPU days of an autoregressive model, before it is trained.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", type=Path, action="append", required=True, help="as for fit; later ones override")
    parser.add_argument("--batch_size", type=int, help="sequences on each GPU; overrides the configuration")
    parser.add_argument(
        "--images",
        type=int,
        help=f"images times epochs, else {IMAGENET:,} (ImageNet) times max_epochs of the configuration, or times "
        f"{Run.epochs} if it has none",
    )
    parser.add_argument("--mfu", type=float, default=0.5, help="fraction of the peak that training reaches")
    parser.add_argument(
        "--peak_tflops",
        type=float,
        default=989.0,
        help="10^12 operations per second of the GPU, from its data sheet for dense (not sparse) bfloat16 products: "
        "989 for H100 and H200 SXM, 312 for A100; with 32-true the value for float32 or TF32",
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="overrides the configuration")
    parser.add_argument("--gpus", type=int, help="number of GPUs; overrides the configuration, else 8")
    options = parser.parse_args(args)
    try:
        run = read_run(options.config, options.batch_size, options.precision, options.gpus)
        images = run.epochs * IMAGENET if options.images is None else options.images
        text = report(run, images, options.mfu, options.peak_tflops)
    except ValueError as error:
        parser.error(str(error))
    print(text)


if __name__ == "__main__":
    run_command(main)
