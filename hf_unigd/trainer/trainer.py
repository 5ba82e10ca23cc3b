"""`UniGDTrainer`, which trains the joint objective."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from peft import PeftConfig
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from ..data import DatasetMixture, ExampleDataset, ExampleStream, MixedDataset, SliceFeatures, Teachers
from ..data.dataset import Rows
from ..modeling import UniGDProcessor
from .arguments import UniGDTrainingArguments
from .batches import check_batch_size, count_targets, count_tokens, join_batches
from .callbacks import ClampLogitScale, KeepImageFeatures, SetEpoch, WarnOfPlateau
from .collator import UniGDDataCollator, collator_for_objective
from .dataloaders import stream_loader
from .evaluating import EvaluatingTrainer
from .examples import prepare_examples
from .gradient_cache import RandomState, embed_chunks
from .loading import prepare_model, resolve_model
from .losses import InfoNCELoss, StructureLoss
from .sampler import make_sampler
from .sharding import add_idle_chunks, prepare_fsdp2
from .step_logs import StepLogs, gradient_norm
from .stream_positions import StreamPositions
from .vision import is_frozen, open_vision_cache, with_image_features
from .vision_cache import VisionFeatureCache


class UniGDTrainer(EvaluatingTrainer):
    r"""
    Trains embeddings and generation with one objective:

        L = contrastive_weight · InfoNCE + alignment_weight · structure + causal_lm_weight · next-token

    An anchor (an image, its prompt, then its long caption) runs once. Because attention is causal, one forward pass
    gives its embedding at the last prompt token, the loss of its caption, and the embeddings at the ends of its
    slices, which the structure loss compares. (A chat that is embedded at a prompt and answered is two sequences.) A
    second forward pass embeds the sequences that the anchors are contrasted with. The next-token loss is normalised
    by the labelled tokens of the whole accumulated global batch. The contrastive loss takes its negatives, and the
    structure loss its positions, from all processes.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig

    from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, UniGDTrainer, UniGDTrainingArguments

    model = UniGDForConditionalGeneration.from_vlm_pretrained("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
    processor = UniGDProcessor.from_vlm_pretrained("llava-hf/llava-1.5-7b-hf")
    trainer = UniGDTrainer(
        model=model,
        args=UniGDTrainingArguments(output_dir="vladva", per_device_train_batch_size=32, bf16=True),
        train_dataset=load_dataset("you/captions", split="train"),
        processing_class=processor,
        peft_config=LoraConfig(r=16, lora_alpha=16),
    )
    trainer.train()
    ```

    Args:
        model (`UniGDForConditionalGeneration`, `PeftModel` or `str`, *optional*):
            The model, or a `PeftModel` of it whose adapter holds the embedding head and the soft prompts, or the Hub
            id or folder of a checkpoint or of a plain vision-language model, which gets a new head.
        args ([`UniGDTrainingArguments`] or `TrainingArguments`, *optional*):
            The arguments. Plain `TrainingArguments` are converted. By default, the default arguments are used.
        data_collator ([`UniGDDataCollator`], *optional*):
            A collator of your own. The trainer uses a copy and sets the fields that the objective determines
            (`chunk_size`, `contrastive`, `causal_lm`, `splitter`, `prefixes`, `with_image_keys`, `stored_images`).
            Defaults to the collator of [`get_data_collator`].
        train_dataset (`Dataset`, `IterableDataset`, map-style torch `Dataset` or `list[dict]`, *optional*):
            Rows of any accepted format ([`~hf_unigd.data.RowParser`]), or a [`~hf_unigd.data.DatasetMixture`] of them.
        eval_dataset (the same, or a `dict` or `DatasetDict` of them, *optional*):
            Rows to evaluate. Evaluation reports `eval_loss` (the objective over blocks of `eval_block_size` rows),
            each of its losses, the perplexity of the targets, and recall at 1, 5 and 10 in both directions for rows
            with a positive.
        processing_class ([`UniGDProcessor`], *optional*):
            The processor with its prompts. Defaults to the processor of the model.
        model_init (`Callable`, *optional*):
            Makes the model at construction and at the start of every training, as in [`~transformers.Trainer`]. It
            requires `processing_class`.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Computes further metrics from the embeddings, keys and rankings of an evaluation
            ([`~hf_unigd.trainer.evaluation.retrieval_prediction`]). [`predict`] returns the same arrays.
        callbacks, optimizers, optimizer_cls_and_kwargs:
            As in [`~transformers.Trainer`].
        compute_loss_func, preprocess_logits_for_metrics:
            Refused, because the objective has several losses ([`batch_losses`]) and evaluation computes no logits.
        peft_config (`PeftConfig`, *optional*):
            Settings of an adapter ([`add_adapter`]) to train instead of the whole model.

    Raises:
        TypeError, ValueError: an argument is of another kind or would have no effect, or nothing can be trained: a
            batch of one row has no negatives, there are fewer rows than a batch, or every parameter is frozen.
        RowError: a row is bad. With `check_rows`, the rows of a map-style dataset are checked at construction.
        FloatingPointError: a loss is not finite. A checkpoint is saved first.
    """

    train_dataset: Any
    # `compute_loss` scales each loss for gradient accumulation, because they are normalised differently.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: UniGDDataCollator | None = None,
        train_dataset: Rows | DatasetMixture | None = None,
        eval_dataset: Rows | DatasetMixture | dict[str, Rows | DatasetMixture] | None = None,
        processing_class: UniGDProcessor | None = None,
        model_init: Callable[..., Any] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: PeftConfig | None = None,
    ):
        args = UniGDTrainingArguments.from_training_arguments(args)
        if compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported, because the objective has several losses on embeddings and "
                "tokens. Subclass UniGDTrainer and override `batch_losses`."
            )
        if preprocess_logits_for_metrics is not None:
            raise ValueError(
                "`preprocess_logits_for_metrics` is not supported, because evaluation computes no logits. "
                "`compute_metrics` receives the embeddings."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would split batches, whose rows are compared with each other. "
                "Start one process per GPU (`accelerate launch`, `torchrun`), or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        self._peft_config = peft_config
        if model_init is None:
            resolved, processing_class = resolve_model(model, processing_class, args, peft_config)
            model = prepare_model(resolved, processing_class, args, peft_config)
        elif not isinstance(processing_class, UniGDProcessor):
            raise ValueError("`model_init` needs `processing_class`, the UniGDProcessor of its models.")
        # `call_model_init` needs these before Trainer sets them.
        self.processing_class = processing_class
        self._keep_features = KeepImageFeatures()
        if args.ddp_find_unused_parameters is None:  # a process may have no images for the tower
            args.ddp_find_unused_parameters = not (
                is_frozen(model) if model_init is None else args.freeze_vision_tower
            )
        self.slice_features = (
            SliceFeatures.load(args.slice_features, args) if args.alignment_weight and args.slice_features else None
        )
        if data_collator is None:
            data_collator = self.get_data_collator(args, processing_class)
        context_length = None if model is None else model.config.context_length
        self.data_collator = collator_for_objective(data_collator, args, context_length)  # it tells which rows are bad
        if train_dataset is not None:
            train_dataset = self._prepare_dataset(train_dataset, processing_class, args, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_dataset(rows, processing_class, args, f"eval_{name}")
                for name, rows in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, processing_class, args, "eval")
        super().__init__(
            model=model,
            args=args,
            data_collator=self.data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if model_init is not None:  # the length of its context is known only now
            self.data_collator = collator_for_objective(self.data_collator, args, self.model.config.context_length)
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # Trainer sets it per batch
        self._set_epoch = SetEpoch()
        for callback in (ClampLogitScale(), WarnOfPlateau(), self._keep_features, self._set_epoch):
            self.add_callback(callback)
        self.contrastive_loss = InfoNCELoss(self.model.config.matryoshka_dims)
        self.structure_loss = StructureLoss(
            target=args.alignment_target,
            normalization=args.alignment_normalization,
            bandwidth=args.alignment_bandwidth,
            one_slice=args.alignment_one_slice,
            similarity=args.alignment_similarity,
        )
        self._step_logs = StepLogs(self.accelerator)
        self._stream_positions = StreamPositions(args)
        if self.is_deepspeed_enabled and (self._uses_gradient_cache or args.loss_gradient_norm_steps):
            raise ValueError(
                "The gradient cache (`gradient_cache_chunk_size`, `negatives_across_accumulation`) and "
                "`loss_gradient_norm_steps` do not work with DeepSpeed, whose backward pass takes an optimizer step. "
                "Train with DDP or FSDP2, or leave them out."
            )
        if self.accelerator.is_fsdp2:
            if model_init is not None:
                raise ValueError("`model_init` does not work with FSDP2. Pass `model`.")
            prepare_fsdp2(self.accelerator, self.model)
        if self.train_dataset is not None:
            if not any(parameter.requires_grad for parameter in self.model.parameters()):
                raise ValueError(
                    "No parameter of `model` is trained. Load the adapter with `is_trainable=True`, or pass "
                    "`peft_config`."
                )
            self._check_batch_size()
            if args.alignment_weight and self.slice_features is None:
                _ = self.teachers  # a teacher that cannot be loaded fails here instead of in the first step

    def _check_batch_size(self) -> None:
        check_batch_size(self.train_dataset, self._train_batch_size * self.args.world_size, self.args)

    def call_model_init(self, trial=None):
        made = super().call_model_init(trial)
        self._keep_features.cache = None  # the features of the previous model's tower
        model, processor = resolve_model(made, self.processing_class, self.args, self._peft_config)
        return prepare_model(model, processor, self.args, self._peft_config)

    def _prepare_dataset(
        self,
        dataset: Rows | DatasetMixture,
        processing_class: UniGDProcessor,
        args: UniGDTrainingArguments,
        dataset_name: str,
    ) -> ExampleDataset | MixedDataset | ExampleStream:
        """
        Turns rows of any accepted format into examples. It is called for the datasets of the constructor, [`evaluate`]
        and [`predict`]. Subclasses may override it. Examples are returned as they are.

        Args:
            dataset: The rows.
            processing_class: The processor.
            args: The arguments.
            dataset_name: `"train"`, `"eval"`, or `"eval_NAME"` for one of several evaluation datasets, in the
                constructor; `"test"` in [`evaluate`] and [`predict`].

        Raises:
            TypeError, ValueError: the dataset is of another kind, or has no accepted format.
            RowError: a row is bad and `skip_bad_rows` is off.
        """
        is_training = dataset_name == "train"
        slice_features = self.slice_features if is_training else None
        try:
            return prepare_examples(dataset, processing_class, args, self.data_collator, slice_features, is_training)
        except TypeError as error:
            raise TypeError(f"`{dataset_name}_dataset`: {error}") from error

    def get_data_collator(self, args: UniGDTrainingArguments, processing_class: UniGDProcessor) -> UniGDDataCollator:
        """Makes the default collator. Subclasses may override it. The trainer uses a copy with the fields set that the
        objective determines."""
        return UniGDDataCollator(processing_class, args.max_length, args.skip_bad_rows)

    @cached_property
    def teachers(self) -> Teachers:
        """The encoders of the structure loss. They are loaded on first use."""
        return Teachers(self.args, self.args.device)

    @cached_property
    def _modality_columns(self):
        source = self.teachers if self.slice_features is None else self.slice_features
        return source.modality_columns(self.args.triple_kernel)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._stream_positions.use(batches)
        self.current_gradient_accumulation_steps = len(batches)
        if self.args.negatives_across_accumulation and batches:
            # The last accumulation step runs with the rows of all; the others do nothing.
            batches = [{}] * (len(batches) - 1) + [join_batches(batches)]
        interval = self.args.loss_gradient_norm_steps
        if batches and interval and self.state.global_step % interval == 0:
            self._log_gradient_norms([batch for batch in batches if batch], num_items_in_batch)
        return batches, num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples, device):
        """Counts the labelled tokens of the accumulated batch over all processes. Returns at least 1."""
        count = torch.tensor(sum(map(count_targets, batch_samples)), device=device)
        return self.accelerator.reduce(count, reduction="sum").clamp(min=1)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not inputs:
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.reduce((~torch.isfinite(loss)).long(), reduction="sum"):  # all processes stop together
            self._stream_positions.undo_step()
            self._stop_at_non_finite_loss(loss.item(), inputs["rows"].tolist())
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Runs the step up to its last backward pass. Returns the loss for that backward pass; its value is the loss
        of the full step."""
        if return_outputs:
            raise ValueError("`return_outputs=True` is not supported, because a step has several forward passes.")
        scales = self._scales
        loss, parts, metrics = self._step(model, inputs, num_items_in_batch, scales)
        # The logs add up the accumulation steps of an optimizer step, so each adds its share of the loss.
        for name, part in parts.items():
            share = scales[name] / getattr(self.args, f"{name}_weight")
            self._step_logs.add(f"{name}_loss", self.state.global_step, part.detach() * share)
        for name, value in metrics.items():
            self._step_logs.add(name, self.state.global_step, value.detach() / self._objectives_per_step)
        return loss

    @property
    def _objectives_per_step(self) -> int:
        """How often the batch losses are computed per optimizer step."""
        return 1 if self.args.negatives_across_accumulation else self.current_gradient_accumulation_steps

    @property
    def _scales(self) -> dict[str, float]:
        """The factor of each loss that has a weight."""
        # DDP averages over processes, but the next-token loss is already divided by the tokens of all of them. Trainer
        # sums over accumulation steps, but the other losses are means over each step.
        scales = {
            "contrastive": self.args.contrastive_weight / self._objectives_per_step,
            "alignment": self.args.alignment_weight / self._objectives_per_step,
            "causal_lm": self.args.causal_lm_weight * self.accelerator.num_processes,
        }
        return {name: scale for name, scale in scales.items() if scale}

    def _step(self, model, inputs, num_items_in_batch, scales):
        """Returns the loss to call `backward` on and, by name, the unweighted losses and the values to log."""
        inner = self.accelerator.unwrap_model(model)
        if cache := self._open_vision_cache():
            cache.expect_images(inputs, self.train_dataset)
        chunks = self._prepare_chunks(inner, inputs["chunks"])

        def forward(model, chunks):
            return model(
                batches=chunks,
                num_items_in_batch=num_items_in_batch,
                label_smoothing=self.args.label_smoothing_factor,
            )

        def batch_loss(embeddings, inverse_temperature):
            parts, metrics = self.batch_losses(embeddings, inverse_temperature, inputs)
            # DDP waits for the gradient of every parameter that the outputs depend on, so each output takes part.
            loss = embeddings.sum() * 0.0 + inverse_temperature * 0.0
            return loss + sum(scales.get(name, 0.0) * part for name, part in parts.items()), parts, metrics

        if not self._uses_gradient_cache:
            outputs = forward(model, chunks)
            loss, parts, metrics = batch_loss(outputs.embeddings, outputs.inverse_temperature)
            loss = loss + scales.get("causal_lm", 0.0) * outputs.loss
            causal_lm = outputs.loss.detach()
        else:
            # Only the last chunk goes through DDP, so that gradients are reduced once.
            embedded = embed_chunks(lambda chunk: forward(inner, [chunk]), chunks, self.args.device)
            batch_part, parts, metrics = batch_loss(embedded.embeddings, embedded.inverse_temperature)
            embedded.differentiate(batch_part)
            causal_lm = torch.zeros((), device=self.args.device)
            for place, chunk in enumerate(chunks):
                is_last = place == len(chunks) - 1
                with embedded.states[place].replayed():
                    outputs = forward(model if is_last else inner, [chunk])
                causal_lm = causal_lm + outputs.loss.detach()
                loss = embedded.surrogate(place, outputs) + scales.get("causal_lm", 0.0) * outputs.loss
                if not is_last:
                    self.accelerator.backward(loss)
            whole = batch_part + scales.get("causal_lm", 0.0) * causal_lm
            loss = loss + (whole - loss).detach()
        if self.args.causal_lm_weight:
            parts["causal_lm"] = causal_lm
        return loss, parts, metrics

    @property
    def _uses_gradient_cache(self) -> bool:
        return self.args.gradient_cache_chunk_size is not None or self.args.negatives_across_accumulation

    def _prepare_chunks(self, model, chunks):
        """Computes the features of a frozen vision tower, once per step, and adds idle chunks under FSDP."""
        if is_frozen(model):
            with self.accelerator.autocast():
                chunks = [with_image_features(model, chunk, self._open_vision_cache()) for chunk in chunks]
        return add_idle_chunks(chunks) if self.is_fsdp_enabled else chunks

    def _open_vision_cache(self) -> VisionFeatureCache | None:
        """The stored features of the vision tower, if they are wanted."""
        folder, dtype = self.args.vision_cache, self.args.vision_cache_dtype
        if self._keep_features.cache is None and folder is not None:
            model, precision = self.accelerator.unwrap_model(self.model), self.accelerator.mixed_precision
            self._keep_features.cache = open_vision_cache(folder, dtype, model, self.data_collator, precision)
        return self._keep_features.cache

    def batch_losses(
        self, embeddings: torch.Tensor, inverse_temperature: torch.Tensor, batch: dict
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """
        Computes the losses that compare embeddings with each other. They always cover the whole batch, even if it was
        embedded in several forward passes. Subclasses may override this method.

        Args:
            embeddings (`torch.FloatTensor` of shape `(num_spans, embedding_dim)`): Embeddings of all chunks, in order.
            inverse_temperature (`torch.FloatTensor` of shape `()`): Inverse temperature.
            batch (`dict`): A batch of [`UniGDDataCollator`].

        Returns:
            The unweighted losses and the values to log, each by name.
        """
        parts, metrics = {}, {}
        at = {name: embeddings[places] for name, places in batch["places"].items()}
        if self.args.contrastive_weight:
            keys = {
                "query_keys": batch["anchor_keys"],
                "positive_keys": batch["positive_keys"],
                "negative_keys": batch["negative_keys"],
                "match_keys": batch["caption_keys"],
            }
            contrastive = self.contrastive_loss(
                at["anchors"], at["positives"], inverse_temperature, at["negatives"], **keys
            )
            parts["contrastive"] = contrastive.pop("loss")
            metrics = {**contrastive, "temperature": 1 / inverse_temperature}
        if self.args.alignment_weight:
            structure = dict(batch.get("structure") or self._empty_structure(embeddings))
            if "slices" in structure:
                before = self.teachers.truncated
                structure["features"] = self.teachers(structure.pop("slices"))
                metrics["truncated_texts"] = embeddings.new_tensor(self.teachers.truncated - before)
            slices = at.get("slices", embeddings[:0])
            alignment = self.structure_loss(slices, **structure, modality_columns=self._modality_columns)
            parts["alignment"] = alignment.pop("loss")
            metrics |= alignment
        return parts, metrics

    def _empty_structure(self, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs of the structure loss for a batch without rows, with which a process joins the others."""
        width = max(end for _, end in self._modality_columns.values())
        names = ("modalities", "starts", "lengths", "sample_keys")
        none = embeddings.new_empty(0, dtype=torch.long)
        return {"features": embeddings.new_empty(0, width, dtype=torch.float32), **dict.fromkeys(names, none)}

    def _log_gradient_norms(self, batches, num_items_in_batch) -> None:
        """Logs the norm of each weighted loss's gradient over the whole accumulated global batch.

        It is called while `.grad` is empty, and runs the forward and backward passes of the step once per loss.
        """
        model = self.accelerator.unwrap_model(self.model_wrapped)
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        state = RandomState(self.args.device)
        for name, scale in self._scales.items():
            with state.replayed():
                for batch in batches:
                    loss, _, _ = self._step(model, self._prepare_inputs(batch), num_items_in_batch, {name: scale})
                    self.accelerator.backward(loss)
            norm = gradient_norm(parameters, self.accelerator, self.is_fsdp_enabled)
            self._step_logs.add(f"{name}_gradient_norm", self.state.global_step, norm)
            model.zero_grad()

    def _save_rng_state(self, output_dir):  # by every process, and of resumable checkpoints alone
        super()._save_rng_state(output_dir)
        self._stream_positions.save(output_dir)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:  # a log of training steps, not of an evaluation or of the end of training
            logs |= self._step_logs.pop_means()
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("logit_scale")]

    def _track_num_input_tokens(self, inputs):
        if self.args.include_num_input_tokens_seen != "no" and inputs:
            tokens = count_tokens(inputs, with_padding=self.args.include_num_input_tokens_seen == "all")
            count = torch.tensor(tokens, device=self.args.device)
            self.state.num_input_tokens_seen += self.accelerator.reduce(count, reduction="sum").item()

    def floating_point_ops(self, inputs):
        return sum(super(UniGDTrainer, self).floating_point_ops(chunk) for chunk in inputs.get("chunks", []))

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if not isinstance(dataset, ExampleStream):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        resumed_from = None if self.args.ignore_data_skip else self.resumed_from
        positions = self._stream_positions if is_training else None
        return stream_loader(dataset, self.args, self.data_collator, batch_size, is_training, positions, resumed_from)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self._set_epoch.sampler = make_sampler(dataset, self.args)
        return self._set_epoch.sampler or super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self):
        if self.train_dataset is not None:
            self.train_dataset = self._prepare_dataset(self.train_dataset, self.processing_class, self.args, "train")
            self._check_batch_size()  # again, because `auto_find_batch_size` lowers it
            self._open_vision_cache()
        return super().get_train_dataloader()
