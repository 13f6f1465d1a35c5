"""Registers the model with vLLM: the entry point of group ``vllm.general_plugins``."""

from typing import TYPE_CHECKING

from serving.vllm.versions import check_version

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

PROCESSORS = "serving.vllm.processor"


def register() -> None:
    """Register configuration, model and logits processors.

    vLLM calls this in each of its processes, for any model. With another version of vLLM it does nothing but warn, so
    that other models keep working.
    """
    try:
        import vllm
        from vllm.logger import init_logger
    except ImportError:
        return
    try:
        check_version(vllm.__version__)
    except ValueError as error:
        init_logger("vllm.llamagen").warning("LlamaGen models are not registered: %s", error)
        return
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from llamagen.pretrained.exported_config import ARCHITECTURE
    from serving.vllm.hf_config import LlamaGenConfig

    AutoConfig.register(LlamaGenConfig.model_type, LlamaGenConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = LlamaGenDefaults
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # A name, not the class: vLLM imports the model in a process of its own, before CUDA is initialized.
        ModelRegistry.register_model(ARCHITECTURE, f"serving.vllm.model:{ARCHITECTURE}")


class LlamaGenDefaults:
    """Sets the options of vLLM that each of our models needs, so that users need not."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """There is no tokenizer of text; captions come as embeddings."""
        model_config.skip_tokenizer_init = True
        text = model_config.hf_config.gpt.get("condition") == "text"
        if model_config.enable_prompt_embeds and not text:
            raise ValueError("enable_prompt_embeds is for text models; this one is class-conditional, leave it out")
        model_config.enable_prompt_embeds = text

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Codes are sampled by our logits processor, which the model runner at hand needs in its own form."""
        for option, value in (
            ("speculative_config", vllm_config.speculative_config),
            ("lora_config", vllm_config.lora_config),
        ):
            if value is not None:
                raise ValueError(f"{option} is set, but LlamaGen models do not support it; leave it out")
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("pipeline_parallel_size is above 1; use tensor_parallel_size for LlamaGen models")
        version = "V2" if vllm_config.use_v2_model_runner else ""
        module = f"{PROCESSORS}_v2" if version else PROCESSORS
        branches = "" if vllm_config.model_config.hf_config.guided else "Unguided"
        name = f"{module}:{branches}CodeProcessor{version}"
        processors = [each for each in vllm_config.model_config.logits_processors or () if each != name]
        vllm_config.model_config.logits_processors = [*processors, name]
