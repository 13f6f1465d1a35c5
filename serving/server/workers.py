"""From the options of the command to the workers of a server."""

import argparse

import torch

from serving.engine.spec import WorkerSpec, default_batch_size, default_window


def worker_specs(options: argparse.Namespace) -> list[WorkerSpec]:
    """The workers of a server, one for each device, or for each group of devices that share a model.

    Args:
        options: those of ``python -m serving.server``.

    Raises:
        ValueError: in one line, if devices are invalid or do not fit the engine.
    """
    devices = _devices(options.devices)
    if options.devices is None and options.engine == "vllm":
        devices = devices[:1]
    parallel = options.tensor_parallel
    if parallel is not None and options.engine != "vllm":
        raise ValueError(
            f"--tensor-parallel {parallel} needs --engine vllm; add it, or leave --tensor-parallel out: the embedded "
            "engine has a copy of the model on each device"
        )
    if options.engine == "vllm" and len(devices) > 1:
        raise ValueError(
            f"--devices {options.devices} are {len(devices)} devices, but --engine vllm takes one; give "
            "--tensor-parallel to share a model, or start a server for each device"
        )
    if options.engine == "vllm" and options.window not in (None, 1):
        raise ValueError(
            f"--window {options.window} needs the embedded engine, because vLLM decides one code of an image in each "
            "pass; leave out --window, or --engine vllm"
        )
    return [
        WorkerSpec(
            options.model,
            tokenizer=options.tokenizer,
            text_encoder=options.text_encoder,
            device=device,
            dtype=options.dtype,
            batch_size=options.batch_size or default_batch_size(device),
            engine=options.engine,
            options={} if parallel is None else {"tensor_parallel": parallel},
            window=1 if options.engine == "vllm" else options.window or default_window(device),
        )
        for device in devices
    ]


def _devices(text: str | None) -> list[str]:
    """Names of devices; all GPUs, or the CPU, by default."""
    if text is None:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        try:
            torch.device(name)
        except RuntimeError:
            raise ValueError(
                f"--devices {text} holds {name!r}, which is not a device; give names like cuda:0"
            ) from None
    if len(names) != len(set(names)) and any(not name.startswith("cpu") for name in names):
        raise ValueError(f"--devices {text} names a GPU twice; give each once")
    return names
