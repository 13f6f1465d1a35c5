"""Training and sampling of the autoregressive model. B batch, L codes, V vocabulary, H × W pixels."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_modules.argen_config import ARGenLossConfig
from lightning_modules.base import model_device
from lightning_modules.code_checks import check_codes
from lightning_modules.generation_order import GenerationOrder, training_orders, validation_orders
from lightning_modules.lora import adapt, keep_trained, restore_frozen
from lightning_modules.optimization import AdamWConfig
from lightning_modules.sampling import SamplingModule
from llamagen.checkpoints.adaptation import adapt_to
from llamagen.checkpoints.weights import ENTRY, classes_of, load_weights, read_weights
from llamagen.cost.lora import training_flops
from llamagen.finite import not_finite
from llamagen.losses import HeadTerm, heads_cross_entropy, heads_token_nll
from llamagen.metrics import CodePrediction
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.lora import LoRAConfig, reset_adapters
from llamagen.models.sharding import shard
from llamagen.option_checks import option_named
from llamagen.sampling import SamplingConfig
from llamagen.sampling.sampler import sharded_settings
from llamagen.text import TextEncoderConfig


class ARGenModule(SamplingModule):
    """A GPT over the codes of a frozen image tokenizer.

    The tokenizer is only needed to decode codes into images, in ``predict`` and in sample grids. It is not part of
    state dict, optimizer or EMA.

    Args:
        net: shape of the model.
        optimizer: settings of AdamW.
        sampling: guidance, temperature, top-k and top-p, in ``predict`` and in sample grids.
        tokenizer: checkpoint of the tokenizer that extracted the codes, or its published name or ``hf://`` address.
        sample_seed: seed of the images of ``predict``.
        image_size: side in pixels to which generated images are resized, at least 1; null keeps the decoded size. The
            paper evaluates models for 384 px on images resized to 256 (arXiv 2406.06525, section 3). The interpolation
            is that of the published code, see :func:`llamagen.sampling.pixels.to_pixels`.
        loss: terms added to the cross entropy.
        init_from: initial weights: a published ``.pt``, a checkpoint of this project, or safetensors; a path, a
            published name such as ``c2i_L_384``, or ``hf://owner/repository/file[@revision]``.
        init_averaged: take the averaged (EMA) weights of ``init_from``, if it has them.
        init_adapt: options that may differ from those of ``init_from``: ``block_size``, for images of another size,
            ``num_classes``, which initialises the class embeddings at random, and ``clean_captions`` of the data.
        max_grad_norm: norm of the gradient before clipping above which the run counts as diverged and stops.
        skip_bad_steps: skip steps with a gradient that is not finite or above ``max_grad_norm``, instead of stopping.
        activation_checkpointing: recompute the blocks in the backward pass: less memory for a third more operations.
        compile: compile the blocks for training and evaluation; takes about a minute at the start.
        text_encoder: encoder of prompts, and of captions without stored features, for a text-conditional model. It is
            loaded at its first use and needs the extra ``text``. By default FLAN-T5-XL, as in the paper.
        order: train in random orders that are annealed to raster order. Sets ``net.target_aware``.
        lora: freeze the weights of ``init_from``, and train adapters of the linear layers, and with ``init_adapt:
            [num_classes]`` the class embeddings. Needs the extra ``lora``. Checkpoints hold only what is trained.
    """

    def __init__(
        self,
        net: GPTConfig,
        optimizer: AdamWConfig | None = None,
        sampling: SamplingConfig | None = None,
        tokenizer: str | Path | None = None,
        sample_seed: int = 0,
        image_size: int | None = None,
        loss: ARGenLossConfig | None = None,
        init_from: str | Path | None = None,
        init_averaged: bool = True,
        init_adapt: Sequence[Literal["block_size", "num_classes", "clean_captions"]] = (),
        max_grad_norm: float | None = None,
        skip_bad_steps: bool = False,
        activation_checkpointing: bool = False,
        compile: bool = False,
        text_encoder: TextEncoderConfig | None = None,
        order: GenerationOrder | None = None,
        lora: LoRAConfig | None = None,
    ) -> None:
        if order is not None:
            net = replace(net, target_aware=True)
        super().__init__(
            net,
            optimizer or AdamWConfig(),
            sampling or SamplingConfig(),
            tokenizer,
            sample_seed,
            image_size,
            text_encoder,
        )
        self.loss_config, self.order = loss or ARGenLossConfig(), order
        if max_grad_norm is not None and not 0 < max_grad_norm < inf:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; it must be positive, or null for no limit")
        self.max_grad_norm, self.skip_bad_steps = max_grad_norm, skip_bad_steps
        self._generator_state = torch.get_rng_state()
        with model_device():
            self.gpt = GPT(net)
        self.gpt.checkpoint_activations(activation_checkpointing)
        self._compile = compile
        self.predictions = nn.ModuleDict(
            {stage: CodePrediction(net.block_size) for stage in ("val", "val_raw", "test")}
        )
        self.random_predictions = nn.ModuleDict(
            {stage: CodePrediction(net.block_size) for stage in (("val", "val_raw", "test") if order else ())}
        )
        self.nats_by_position: dict[str, Tensor] = {}
        with option_named("init_from"):
            whole = lora is None  # adapters of adapters would need two base files
            self._initial_weights = read_weights(init_from, init_averaged, whole) if init_from is not None else None
        self._init_adapt = init_adapt
        if self._initial_weights is not None and len(self._initial_weights.classes or ()) <= net.num_classes:
            self._classes = self._initial_weights.classes
        if self._text is not None and self._initial_weights is not None and self._initial_weights.captions:
            self._text.check_encoder(self._initial_weights.captions, self._initial_weights.source)
        self._load_initial_weights()  # on the meta device this only checks the shapes
        self.lora, trains_classes = lora, "num_classes" in init_adapt
        if lora is not None:
            adapt(self.gpt, lora, init_from, self._initial_weights, trains_classes, self._generator_state)
        if self._initial_weights is None and init_adapt:
            raise ValueError(f"init_adapt is {list(init_adapt)}, but init_from is not given; give the initial weights")

    def _load_initial_weights(self) -> None:
        if self._initial_weights is not None:
            with option_named("init_from"):
                shapes = [name for name in self._init_adapt if name != "clean_captions"]
                state = adapt_to(self.gpt, self._initial_weights, shapes)
                load_weights(self.gpt, state, self._initial_weights.source)

    def configure_model(self) -> None:
        """Compile the blocks, and shard the parameters if the strategy is ``ModelParallelStrategy`` (FSDP2).

        A model on the meta device is initialised here, tensor by tensor, with the weights it would have under any
        other strategy. No device ever holds all of them.

        Raises:
            ValueError: if the strategy asks for tensor parallelism, or precision or window do not work with sharding.
        """
        if self._compile:
            self.gpt.compile_blocks()
            self._compile = False
        if self.device_mesh is not None:
            sharded_settings(self.sampling)  # a window is an error now, not at the first image after hours of training
            mesh, precision = self.device_mesh, self.trainer.precision
            if mesh["tensor_parallel"].size() > 1:
                raise ValueError(
                    f"tensor_parallel_size is {mesh['tensor_parallel'].size()}, but tensor parallelism is not "
                    "supported; set it to 1, and data_parallel_size to the number of ranks"
                )
            if precision not in ("32-true", "bf16-mixed", "bf16-true"):
                raise ValueError(f"trainer.precision {precision} does not work with sharded parameters; use bf16-mixed")
            shard(self.gpt, mesh["data_parallel"], torch.bfloat16 if precision == "bf16-mixed" else None)
            if self.trainer.state.fn == "fit":
                # footgun: parameters gathered in inference mode cannot be trained afterwards.
                self.trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
        if any(parameter.is_meta for parameter in self.gpt.parameters()):
            self.gpt.to_empty(device="cpu" if self.device_mesh is None else self.trainer.strategy.root_device)
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._generator_state)
                self.gpt.reset_parameters()
            self._load_initial_weights()
            reset_adapters(self.gpt)
        if self.device_mesh is not None:
            for buffer in self.gpt.buffers():  # not sharded; initialised at random on each rank
                buffer.copy_(self.trainer.strategy.broadcast(buffer.cpu()))
        self._initial_weights = None

    @property
    def generator(self) -> GPT:
        """The GPT."""
        return self.gpt

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The GPT alone."""
        return {"gpt": self.gpt}

    @property
    def flops_per_sequence(self) -> float:
        """Floating-point operations of a training step per image, see :mod:`llamagen.cost`."""
        return training_flops(self.gpt.config, self.lora)

    def setup(self, stage: str) -> None:
        """Check that codes or requests match the model, before anything is written.

        Raises:
            ValueError: if vocabulary, grid, number of classes, tokenizer or text encoder differ, a request cannot be
                served (:meth:`check_requests`), or the precision does not work for training.
        """
        super().setup(stage)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if (meta := getattr(datamodule, "code_meta", None)) is not None:
            check_codes(self.gpt.config, meta)
            self._check_tokenizer(meta["tokenizer"], "the codes were extracted")
            same_classes = stage != "fit" or "num_classes" not in self._init_adapt
            self._classes = classes_of(meta) or (self._classes if same_classes else None)
            if self._text is not None:
                differs = "clean_captions" in self._init_adapt
                self._text.check_dataset(meta, datamodule.captioned, datamodule.cleaning, differs)
        prompts = getattr(datamodule, "prompts", None)
        if stage == "predict" or hasattr(datamodule, "labels"):
            self.check_requests(getattr(datamodule, "classes", ()), prompts or ())

    def on_fit_start(self) -> None:
        """Check that the order of generation fits the length of the run.

        Raises:
            ValueError: in one line, if it does not.
        """
        super().on_fit_start()
        if self.order is not None:
            self.order.bounds(self.trainer.estimated_stepping_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the tokenizer of the codes, and the names of the classes or the encoder of the captions."""
        super().on_save_checkpoint(checkpoint)
        keep_trained(checkpoint, self)
        checkpoint[ENTRY]["tokenizer"] = self._tokenizer_checksum
        if self._text is not None:
            checkpoint[ENTRY]["captions"] = self._text.metadata
        elif self._classes is not None:
            checkpoint[ENTRY]["classes"] = self._classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint matches model, tokenizer and text encoder.

        Raises:
            ValueError: in one line with the difference, if it does not.
        """
        super().on_load_checkpoint(checkpoint)
        restore_frozen(checkpoint, self)
        self._check_tokenizer(checkpoint[ENTRY]["tokenizer"], "the checkpoint was trained on codes")
        classes = classes_of(checkpoint[ENTRY])
        if self._names_were_used and classes != self._classes:
            raise ValueError(
                "classes were requested by name before the checkpoint with their names was loaded; call "
                "take_class_names of the module with its path first, or request numbers"
            )
        self._classes = self._classes or classes
        if self._text is not None and (metadata := checkpoint[ENTRY].get("captions")):
            self._text.check_checkpoint(metadata)

    def forward(self, codes: Tensor, condition: Tensor, caption_lengths: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of codes (B, L), each given the condition and the previous codes (teacher forcing).

        With ``net.code_factors`` they are log-probabilities and slow to compute, see :meth:`GPT.forward`.
        """
        logits: Tensor = self.gpt(codes[:, :-1], condition, caption_lengths=caption_lengths)
        return logits

    def _terms(self, batch: dict[str, Any], order: Tensor | None) -> list[HeadTerm]:
        """What the heads predict: the B · L codes of a batch, in raster order or in ``order`` (B, L)."""
        codes = batch["codes"] if order is None else batch["codes"].gather(1, order)
        return self.gpt.head_terms(self._hidden(batch, order), codes.flatten())

    def _hidden(self, batch: dict[str, Any], order: Tensor | None = None) -> Tensor:
        """Hidden states (B · L, D) for ``batch["codes"]``, generated in raster order or in ``order`` (B, L)."""
        condition, codes = self.batch_condition(batch), batch["codes"]
        if order is not None:
            codes = codes.gather(1, order)
        hidden = self.gpt.features(
            codes[:, :-1],
            condition.features,
            caption_lengths=condition.lengths,
            positions=None if order is None else order[:, :-1],
            targets=order,
        )
        return hidden.flatten(0, 1)

    def _training_order(self, batch: dict[str, Any]) -> Tensor | None:
        """Orders (B, L) of a training batch; None for raster order."""
        if self.order is None:
            return None
        assert self._step_seed is not None
        probability = self.order.probability(self.global_step, self.trainer.estimated_stepping_batches)
        self.log("train/random_order", probability)
        return training_orders(batch, self._step_seed, self.global_step, probability)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of ``batch["codes"]`` (B, L) int64 given the batch's condition. ``train/loss`` is in nats per code.

        Raises:
            FloatingPointError: if the loss is not finite on any rank.
        """
        config, terms = self.loss_config, self._terms(batch, self._training_order(batch))
        loss, nats = heads_cross_entropy(terms, config.label_smoothing, config.z_loss)
        if not self.skip_bad_steps:  # otherwise configure_gradient_clipping checks the gradient and skips the step
            self.check_finite({"loss": ~loss.detach().isfinite()})
        self.log("train/loss", nats, prog_bar=True, batch_size=len(batch["codes"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Cross entropy, perplexity and accuracies without dropout and label smoothing, under ``val/``."""
        self.evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any] | None:
        """Like :meth:`validation_step`, under ``test/``. Batches of requests generate images, as in ``predict``."""
        if "codes" not in batch:
            return self.predict_step(batch, batch_idx)
        self.evaluate(batch, "test")
        return None

    def evaluate(self, batch: dict[str, Any], stage: str) -> None:
        """Add a batch to the metrics of ``val``, ``val_raw`` (weights without EMA) or ``test``.

        They are logged at the end of the epoch. A model that is trained in random orders is also evaluated in random
        ones: in each evaluation the same, which depend on the example only.

        Raises:
            FloatingPointError: if the cross entropy of a code is not finite.
        """
        self._evaluate(batch, cast(CodePrediction, self.predictions[stage]), None)
        if stage in self.random_predictions:
            self._evaluate(batch, cast(CodePrediction, self.random_predictions[stage]), validation_orders(batch))

    def _evaluate(self, batch: dict[str, Any], prediction: CodePrediction, order: Tensor | None) -> None:
        nats, rank = heads_token_nll(self._terms(batch, order))
        self.stop_unless_finite(
            {"loss": not_finite(nats).any()},
            lambda: [term.head(term.hidden) for term in self._terms(batch, order)],
        )
        prediction.update(nats.view_as(batch["codes"]), rank.view_as(batch["codes"]))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation set over all ranks.

        Raises:
            FloatingPointError: if the loss is not finite during ``fit``, so that these weights are not saved.
        """
        super().on_validation_epoch_end()
        self.nats_by_position.clear()
        self._log_prediction("val")
        if cast(CodePrediction, self.predictions["val_raw"]).update_called:
            self._log_prediction("val_raw")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test set over all ranks."""
        super().on_test_epoch_end()
        self.nats_by_position.clear()
        if cast(CodePrediction, self.predictions["test"]).update_called:
            self._log_prediction("test")

    def _log_prediction(self, stage: str) -> None:
        prediction = cast(CodePrediction, self.predictions[stage])
        result = prediction.compute()
        prediction.reset()
        self.nats_by_position[stage] = result.nats_by_position
        if self.trainer.state.fn == "fit":
            self.check_finite({"loss": ~result.nats.isfinite()}, " in validation")
        self.log(f"{stage}/loss", result.nats, prog_bar=True)
        self.log(f"{stage}/perplexity", result.perplexity)
        self.log(f"{stage}/top1", result.top1)
        self.log(f"{stage}/top5", result.top5)
        if stage in self.random_predictions:
            random_orders = cast(CodePrediction, self.random_predictions[stage])
            nats = random_orders.compute().nats
            random_orders.reset()
            if self.trainer.state.fn == "fit":
                self.check_finite({"loss in random orders": ~nats.isfinite()}, " in validation")
            self.log(f"{stage}/loss_random_order", nats)

    def metric_names(self) -> list[str]:
        """Names of the metrics logged at each validation."""
        names = ["loss", "perplexity", "top1", "top5", *(["loss_random_order"] if self.order else [])]
        return [f"val/{name}" for name in names]
