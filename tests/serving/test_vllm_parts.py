"""The parts of ``serving/vllm/`` that need no vLLM: settings, prompts, noise, versions, folders."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamagen.checkpoints.export import main as export
from llamagen.checkpoints.weights import Weights, read_weights
from llamagen.checkpoints.writing import write_weights
from llamagen.pretrained.exported_config import read_config
from llamagen.pretrained.source import find_source
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.logits import sample_codes
from llamagen.sampling.noise import code_counters, gumbel, seed_tensor
from serving.engine.engine import Work
from serving.engine.spec import WorkerSpec
from serving.vllm import engine as engine_module
from serving.vllm import versions
from serving.vllm.engine import VLLMEngine, _Running, _start_vllm, load_engine
from serving.vllm.export import is_guided, vllm_folder
from serving.vllm.hf_config import LlamaGenConfig, padded_head
from serving.vllm.plugin import register
from serving.vllm.prompts import caption_prompt, condition_tokens, embedder_of, kept_count, label_prompt
from serving.vllm.ranks import BLOCK, cache_bytes, check_ranks
from serving.vllm.settings import RequestSettings, check_vllm_parameters
from serving.vllm.step import Row, add_noise
from tests.golden import normal_input
from tests.small_models import assert_same, condition_for, small_gpt, small_vqgan


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small class model: its weights, its tokenizer, and two exports."""
    folder = tmp_path_factory.mktemp("vllm")
    for name, model in (("gpt", small_gpt()), ("tokenizer", small_vqgan())):
        write_weights(model, Weights(dict(model.state_dict()), None, None, None, name), folder / f"{name}.safetensors")
    arguments = [str(folder / "gpt.safetensors"), "--tokenizer", str(folder / "tokenizer.safetensors"), "--samples=0"]
    export([*arguments, "--to", str(folder / "guided")])
    export([*arguments, "--to", str(folder / "unguided"), "--unguided"])
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("given", [None, {}, {"llamagen": {}}, {"llamagen": "{}"}, {"other": 1}])
def test_missing_settings_are_the_defaults(given: Any) -> None:
    assert RequestSettings.from_extra_args(given) == RequestSettings(SamplingConfig())


def test_settings_are_read_from_what_is_written() -> None:
    settings = RequestSettings(SamplingConfig(top_k=3, guidance_steps=4, guidance_schedule="cosine"), -(2**70), 2**62)
    assert RequestSettings.from_extra_args(settings.extra_args()) == settings
    given = {**settings.extra_args()["llamagen"], "window": "auto"}  # as settings of a model may have it
    assert RequestSettings.from_extra_args({"llamagen": given}) == settings
    as_json = {"llamagen": json.dumps(settings.extra_args()["llamagen"])}
    assert RequestSettings.from_extra_args(as_json) == settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "the settings are not valid JSON"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ("[1]", r"the settings are \[1\]; give a mapping"),
        (7, "the settings are 7; give a mapping"),
        ({"top": 1}, "there is no setting 'top'; the settings are seed, index, temperature"),
        ({1: 1}, "there is no setting 1; the settings are"),
        ({"seed": 1.5}, "seed is 1.5; it must be an integer"),
        ({"seed": True}, "seed is True; it must be an integer"),
        ({"index": -1}, "index is -1; it must be at least 0"),
        ({"index": 2**63}, "index is 9223372036854775808; it must be at most 9223372036854775807"),
        ({"top_p": [1]}, r"top_p is \[1\]; it must be a number"),
        ('{"temperature": NaN}', "temperature is nan; it must be 0 .greedy. or a positive number"),
        ({"guidance_schedule": {}}, "guidance_schedule is {}; it must be constant, linear"),
    ],
)
def test_wrong_settings_are_one_line(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^llamagen: {message}") as caught:
        RequestSettings.from_extra_args({"llamagen": given})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 310


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ValueError, match=r"^llamagen: seed is 'xx") as caught:
        RequestSettings.from_extra_args({"llamagen": {"seed": "x" * 10**6}})
    assert len(str(caught.value)) < 310


def test_vllms_own_sampling_is_refused() -> None:
    check_vllm_parameters(0.0, {"logit_bias": (None, None)})
    with pytest.raises(ValueError, match=r"^temperature is 0.7; set it to 0"):
        check_vllm_parameters(0.7, {})
    with pytest.raises(ValueError, match=r"^logit_bias is \{1: 2\}; leave it out"):
        check_vllm_parameters(0.0, {"logit_bias": ({1: 2}, None)})


def test_rows_of_all_settings_sample_the_codes_of_our_sampler() -> None:
    logits = torch.cat([normal_input("vllm/logits", (9, 48)), torch.full((9, 1), -torch.inf)], dim=1)
    logits[3, :48] = -torch.inf  # not finite before: no noise may make a code of it
    logits[3, 48] = 0.0
    settings = [
        RequestSettings(SamplingConfig(temperature=0.5, top_k=5), seed=3, index=1),
        RequestSettings(SamplingConfig(temperature=0.0)),
        RequestSettings(SamplingConfig(top_p=0.5, top_k=9), seed=2**64 + 4, index=2**40),
        RequestSettings(SamplingConfig(top_p=0.5, top_k=9)),
        RequestSettings(SamplingConfig(temperature=0.5, top_k=5), seed=-3, index=0),
        *(RequestSettings(SamplingConfig(temperature=4.0), seed=seed, index=5) for seed in range(4)),
    ]
    rows, steps = (
        {row: Row(each, 16) for row, each in enumerate(settings)},
        dict(enumerate([0, 7, 9, 9, 15, 2, 2, 2, 2])),
    )
    found = add_noise(logits.clone(), rows, steps, code_counters(48)).argmax(-1).tolist()
    again = add_noise(logits.clone(), rows, torch.tensor(list(steps.values())), code_counters(48)).argmax(-1).tolist()
    expected = [
        int(sample_codes(logits[row : row + 1, :48], each.sampling, gumbel(
            seed_tensor(each.seed), torch.tensor([each.index]), torch.tensor(steps[row]), code_counters(48)
        )))
        for row, each in enumerate(settings)
    ]  # fmt: skip
    expected[3] = 48
    assert found == again == expected


def test_prompts_tell_conditions_from_kept_codes() -> None:
    classes, text = small_gpt().config, small_gpt(condition="text")
    assert label_prompt(classes, 6, [4, 5]) == {"prompt_token_ids": [6, 4, 5]}
    assert kept_count(classes, [6, 4, 5]) == 2
    features = condition_for(text, 1)[0]
    prompt = caption_prompt(text.config, embedder_of(text), features, 4, [48 - 1, 0])
    assert prompt["prompt_token_ids"] == [48] * 4 + [47, 0]
    assert prompt["prompt_is_token_ids"] == [False] * 4 + [True] * 2
    assert prompt["prompt_embeds"].shape == (6, 64)
    both = text.cls_embedding(features.expand(2, -1, -1), torch.tensor([False, True]))[:, -4:]
    assert torch.equal(prompt["prompt_embeds"][:4], both.transpose(0, 1).flatten(1))
    assert (condition_tokens(text.config, prompt["prompt_token_ids"], 6), kept_count(text.config, [48, 48, 3])) == (
        4,
        1,
    )
    alone = caption_prompt(text.config, embedder_of(text), features, guided=False)
    assert alone.keys() == {"prompt_embeds"}
    assert alone["prompt_embeds"].shape == (6, 32)
    for tokens in (None, [0, 1, 2], []):  # what runners give for embeddings without ids
        assert condition_tokens(text.config, tokens, 3) == 3
    assert kept_count(text.config, None) == 0


@pytest.mark.parametrize(
    ("label", "kept", "message"),
    [
        (7, [], "class 7 was requested, but the model has classes 0 to 6"),
        (-1, [], "class -1 was requested"),
        (0, [48], "kept holds code 48, but the model has codes 0 to 47"),
        (0, [0] * 16, "kept has 16 codes, but an image has 16; keep fewer"),
    ],
)
def test_wrong_prompts_are_one_line(label: int, kept: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        label_prompt(small_gpt().config, label, kept)


def test_versions_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    versions.check_version("0.32.1")
    for found in ("0.33.0", "0.3.2", "0.320.0"):
        with pytest.raises(ValueError, match=rf"^vLLM is {found}, but 0\.32\.x is needed; install it with pip"):
            versions.check_version(found)
    monkeypatch.setattr(versions, "PACKAGES", ("llamagen-no-such-package",))
    with pytest.raises(ValueError, match=r"^vLLM is not installed; install it with pip"):
        load_engine(WorkerSpec("c2i_B_256"))
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()  # harmless without vLLM


def test_exports_have_what_transformers_and_vllm_need(files: dict[str, Path]) -> None:
    config = LlamaGenConfig(**json.loads((files["guided"] / "config.json").read_text()))
    assert (config.architectures, config.model_type) == (["LlamaGenGPT"], "llamagen")
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (64, 8, 8)
    assert (config.head_dim, config.vocab_size, config.max_position_embeddings) == (32, 49, 17)
    unguided = LlamaGenConfig(**json.loads((files["unguided"] / "config.json").read_text()))
    assert (unguided.hidden_size, unguided.num_attention_heads) == (32, 4)
    assert read_config(files["unguided"])["sampling"] == {"guidance_scale": 1.0}
    assert (is_guided(files["guided"]), is_guided(files["unguided"])) == (True, False)
    assert [padded_head(width) for width in (4, 32, 64, 100, 128, 256)] == [32, 32, 64, 112, 128, 256]
    with pytest.raises(ValueError, match=r"^heads of width 260 are too wide for vLLM"):
        padded_head(260)
    assert str(LlamaGenConfig(gpt=config.gpt, dtype="mixed").dtype) == "torch.bfloat16"
    factors = [2, config.gpt["vocab_size"] // 2]
    for option, value, what in (("adaptive_norm", True, "adaptive norms"), ("code_factors", factors, "code_factors")):
        with pytest.raises(ValueError, match=rf"^the model has {what}, which do not run in vLLM; serve it with"):
            LlamaGenConfig(gpt={**config.gpt, option: value})


def test_an_exported_folder_is_given_to_vllm_and_other_models_are_exported(
    files: dict[str, Path], tmp_path: Path
) -> None:
    with vllm_folder(find_source(files["guided"])) as folder:
        assert folder == files["guided"]
    another = tmp_path / "guided" / "another.safetensors"
    shutil.copytree(files["guided"], another.parent)
    shutil.copy(files["gpt"], another)
    with vllm_folder(find_source(another, files["tokenizer"])) as folder:
        assert folder != another.parent
    old = tmp_path / "old"
    old.mkdir()
    content = json.loads((files["guided"] / "config.json").read_text())
    for name in ("architectures", "model_type", "gpt", "guided"):
        del content[name]  # as earlier versions wrote it
    (old / "config.json").write_text(json.dumps(content))
    for name in content["files"]:
        (old / name).symlink_to(files["guided"] / name)
    for source in (find_source(old), find_source(files["gpt"], files["tokenizer"])):
        with vllm_folder(source) as folder:
            assert read_config(folder)["model_type"] == "llamagen"
            state = read_weights(folder / "model.safetensors").state
            assert_same(dict(state), dict(small_gpt().state_dict()))
        assert not folder.exists()
    with pytest.raises(ValueError, match="is a tokenizer; vLLM needs"), vllm_folder(find_source(files["tokenizer"])):
        pass


def test_devices_must_share_the_heads_and_the_feed_forward_layers() -> None:
    config = small_gpt(n_kv_head=2).config
    for ranks in (1, 2, 4):
        check_ranks(ranks, config)
    with pytest.raises(ValueError, match=r"^tensor_parallel is 3, which does not fit the model's 4 heads and 2 key-v"):
        check_ranks(3, config)
    narrow = replace(config, multiple_of=1, ffn_dim_multiplier=0.39)
    assert narrow.ffn_dim % 4
    with pytest.raises(ValueError, match=rf"^tensor_parallel is 4, which does not divide the width {narrow.ffn_dim} "):
        check_ranks(4, narrow)


def test_the_cache_holds_the_heads_of_both_branches_on_each_device() -> None:
    config = small_gpt(n_kv_head=2).config
    layer = 2 * config.n_layer * (3 + 1) * BLOCK * padded_head(config.head_dim) * 4  # 3 images, less than a block each
    assert [cache_bytes(config, True, 3, ranks, 4) // layer for ranks in (1, 2, 4)] == [4, 2, 2]
    assert [cache_bytes(config, False, 3, ranks, 4) // layer for ranks in (1, 2, 4)] == [2, 1, 1]


def test_vllms_reason_not_to_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise RuntimeError("Engine core initialization failed.\n  See root cause above." + 1000 * "x")

    monkeypatch.setattr(engine_module, "ENVIRONMENT", {})
    for name, content in {
        "vllm": {"ModelRegistry": SimpleNamespace(register_model=lambda *_: None)},
        "vllm.engine.arg_utils": {"EngineArgs": dict},
        "vllm.v1.engine.llm_engine": {"LLMEngine": SimpleNamespace(from_engine_args=start)},
        "serving.vllm.model": {"LlamaGenGPT": None},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    with pytest.raises(ValueError, match=r"^vLLM does not start: Engine core initialization failed. See ro") as caught:
        _start_vllm({"model": "m"})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_preview_that_fails_does_not_end_its_image() -> None:
    class AcceleratorError(RuntimeError):
        """Named as that of PyTorch, after which a device cannot be used."""

    def growing(error: Exception) -> Any:
        def update(*_: object) -> None:
            raise error

        return SimpleNamespace(update=update)

    engine: Any = SimpleNamespace(gpt_config=small_gpt().config, model=SimpleNamespace(device="cpu"))
    running = _Running(Work(0, 1), [0] * 4, growing(RuntimeError("no memory")), None)  # type: ignore[arg-type]
    assert VLLMEngine._preview(engine, running, 1) == ()
    assert running.growing is None
    running.growing = growing(AcceleratorError("illegal access"))
    with pytest.raises(AcceleratorError):
        VLLMEngine._preview(engine, running, 1)


def test_a_tokenizer_has_no_unguided_export(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        export([str(files["tokenizer"]), "--to", str(tmp_path / "out"), "--unguided"])
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()
