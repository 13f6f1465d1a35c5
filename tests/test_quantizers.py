"""Each quantiser in a tokenizer: training, resume, ranks, files, codes, the autoregressive model, the page."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import main
from lightning_modules import VQGANModule
from llamagen import LlamaGen
from llamagen.checkpoints.contents import load_vqgan
from llamagen.checkpoints.export import export
from llamagen.models.vqgan import VQGAN, VQGANConfig
from serving.image_store import ImageStore
from serving.page.form import Form
from serving.page.generation import GenerationRequest
from serving.page.local import local_backend
from serving.page.reconstruction import Reconstruction
from serving.page.runs import Runs
from serving.page.uploads import read_upload
from tests.lightning_modules.runs import assert_moved_alike, state_of, train, vqgan_module
from tests.pipeline import TOKENIZER_NET, CreatedOnce, Pipeline
from tests.ranks import succeeds, two_processes
from tests.serving.page.visitor import an_image, same

NET = "--model.init_args.net"
PACKAGE = "llamagen.models.quantizers"
VECTOR = "llamagen.models.vector_quantizer.VectorQuantizer"
KINDS: dict[str, dict[str, Any]] = {
    "FSQ": {"levels": [4, 4, 3]},
    "LFQ": {"bits": 5},
    "IBQ": {"codebook_size": 48, "codebook_dim": 4},
    "SimVQ": {"codebook_size": 48, "codebook_dim": 4},
    "EMAVectorQuantizer": {"codebook_size": 48, "codebook_dim": 4},
    "Residual": {"level": VECTOR, "level_args": {"codebook_size": 8, "codebook_dim": 4}, "depth": 2},
}
SIZES = {"FSQ": 48, "LFQ": 32, "IBQ": 48, "SimVQ": 48, "EMAVectorQuantizer": 48, "Residual": 64}
ENTROPY = ("LFQ", "IBQ")
each_kind = pytest.mark.parametrize("kind", KINDS)


def spec(kind: str) -> dict[str, Any]:
    return {"class_path": f"{PACKAGE}.{kind}", "init_args": KINDS[kind]}


def module_of(kind: str, seed: int = 0) -> VQGANModule:
    net = VQGANConfig(**TOKENIZER_NET, dropout=0.1, quantizer=spec(kind))
    return vqgan_module(seed, {"net": net}, entropy_weight=0.1 if kind in ENTROPY else 0.0)


def options(kind: str) -> list[str]:
    """Options of the quantiser on the command line."""
    entropy = [f"--model.init_args.loss.entropy_weight={0.1 if kind in ENTROPY else 0.0}"]
    return [f"{NET}.quantizer={spec(kind)}", *entropy, "--trainer.max_steps=4"]


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, pipeline: Pipeline, created_once: CreatedOnce) -> tuple[str, Path]:
    """Folder with a tokenizer, its codes, and an autoregressive model of them."""
    kind = request.param

    def create(folder: Path) -> None:
        tokenizer = folder / "tokenizer/checkpoints/last.ckpt"
        main.main(["fit", *pipeline.tokenizer_arguments(folder / "tokenizer"), *options(kind)])
        main.main([*pipeline.extract_arguments(folder / "codes"), *options(kind), f"--ckpt_path={tokenizer}"])
        own = (f"{NET}.vocab_size={SIZES[kind]}", f"--model.init_args.tokenizer={tokenizer}", "--trainer.max_steps=2")
        fit = ["fit", *pipeline.argen_arguments(folder / "argen"), *own, f"--data.init_args.root={folder / 'codes'}"]
        main.main(fit)
        sample = [*pipeline.sample_arguments(folder / "samples"), *own]
        main.main([*sample, f"--ckpt_path={folder / 'argen/checkpoints/last.ckpt'}"])

    return kind, created_once(f"quantizer_{kind}", create)


@each_kind
def test_images_are_decoded_from_their_codes_and_gradients_reach_all_trained_weights(kind: str) -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(**TOKENIZER_NET, quantizer=spec(kind)))
    assert (vqgan.config.codebook_size, vqgan.config.codebook_dim) == (SIZES[kind], vqgan.quantize.dim)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    reconstruction, encoding = vqgan(images)
    torch.testing.assert_close(vqgan.decode_codes(encoding.codes), reconstruction, rtol=1e-4, atol=1e-5)
    assert encoding.codes.dtype == torch.int64
    assert 0 <= int(encoding.codes.min()) <= int(encoding.codes.max()) < SIZES[kind]
    (reconstruction.square().mean() + sum(encoding.losses.values())).backward()
    assert [
        name for name, parameter in vqgan.named_parameters() if parameter.requires_grad and parameter.grad is None
    ] == []


@each_kind
def test_unused_codes_are_revived_or_the_option_is_refused(kind: str) -> None:
    net = VQGANConfig(**TOKENIZER_NET, quantizer=spec(kind))
    if kind in ("IBQ", "EMAVectorQuantizer"):
        assert VQGANModule(net, lpips_weights=None, revive_codes_every=5).revival is not None
        return
    with pytest.raises(
        ValueError, match=f"revive_codes_every is 5, but {kind} does not support code revival; set it to 0"
    ):
        VQGANModule(net, lpips_weights=None, revive_codes_every=5)


@pytest.mark.slow
@each_kind
def test_a_resumed_run_ends_in_the_same_weights(kind: str, pipeline: Pipeline, tmp_path: Path) -> None:
    whole = module_of(kind)
    expected = state_of(whole, train(whole, pipeline, tmp_path / "whole", max_steps=11))
    train(module_of(kind), pipeline, tmp_path / "first", max_steps=5)
    last, resumed = tmp_path / "first/checkpoints/last.ckpt", module_of(kind, seed=99)
    found = state_of(resumed, train(resumed, pipeline, tmp_path / "second", ckpt_path=last, max_steps=11))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
@each_kind
def test_two_ranks_train_to_the_weights_of_one_process(kind: str, pipeline: Pipeline, tmp_path: Path) -> None:
    def arguments(name: str, batch_size: int) -> list[str]:
        net = [f"{NET}.channels=64", f"--data.init_args.batch_size={batch_size}"]
        return ["fit", *pipeline.tokenizer_arguments(tmp_path / name), *net, *options(kind)]

    main.main(arguments("one", 32))
    succeeds(two_processes(arguments("two", 16)))
    one, two = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    )
    start = main.main([*arguments("start", 32), "--trainer.max_steps=0"]).model.state_dict()
    assert_moved_alike(start, one, two)


@pytest.mark.slow
def test_exported_weights_give_the_same_codes_and_images(run: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = run
    trained = load_vqgan(folder / "tokenizer/checkpoints/last.ckpt")
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    for name in ("weights.pt", "weights.safetensors"):
        export(folder / "tokenizer/checkpoints/last.ckpt", tmp_path / name)
        loaded = load_vqgan(tmp_path / name)
        assert loaded.config == trained.config
        assert type(loaded.quantize).__name__ == kind
        codes = loaded.encode(images).codes
        assert torch.equal(codes, trained.encode(images).codes)
        assert torch.equal(loaded.decode_codes(codes), trained.decode_codes(codes))
        module = VQGANModule(trained.config, init_from=tmp_path / name, lpips_weights=None)
        assert torch.equal(module.vqgan.encode(images).codes, codes)


@pytest.mark.slow
def test_an_autoregressive_model_of_its_codes_samples_and_serves_the_page(
    run: tuple[str, Path], tmp_path: Path
) -> None:
    kind, folder = run
    assert np.load(folder / "samples/samples.npz")["arr_0"].shape == (30, 8, 8, 3)
    model = LlamaGen.from_pretrained(folder / "argen")
    assert model.gpt.config.vocab_size == SIZES[kind]
    backend = local_backend(str(folder / "argen"), batch_size=2)
    try:
        runs = Runs(backend, ImageStore())
        request = GenerationRequest((3, 7), 1, 5, {"top_k": 0})
        updates = list(runs.run("me", "generate", Form(runs.facts, "generation"), request))
        assert "Finished 2 images" in str(updates[-1].status)
        shown = next(each.finished for each in reversed(updates) if each.finished)
        files = [runs.store.get(part.partition(".png")[0]) or b"" for part in shown.split('<img src="image/')[1:]]
        assert same(files, model.generate([3, 7], seed=5, top_k=0, progress=False))
        upload = read_upload(str(an_image(tmp_path)), runs.facts)
        *_, result = runs.reconstruct("me", "reconstruct", upload)
        assert isinstance(result, Reconstruction)
        assert np.array_equal(result.codes, model.encode(upload)[0])
    finally:
        backend.close()
