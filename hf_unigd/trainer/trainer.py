"""`UniGDTrainer`: one step, one objective."""

import math
from collections import defaultdict
from dataclasses import replace

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..data import ExampleDataset, IterableExampleDataset, RowParser, SliceFeatures, Teachers, make_examples
from ..data.lengths import sequence_length
from ..evaluation import retrieval_metrics
from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.modeling_unigd import UniGDHead
from .adapters import add_adapter
from .arguments import UniGDTrainingArguments
from .batches import count_targets, idle_batch, idle_chunk, join_batches
from .callbacks import ClampLogitScale, SetEpoch
from .checkpoints import CheckpointingTrainer
from .collator import UniGDDataCollator
from .gradient_cache import RandomState, embed_chunks
from .losses import InfoNCELoss, StructureLoss
from .prefixes import PrefixSampler
from .sampler import EpochLengthGroupedSampler
from .vision import VisionFeatureCache, tower_key, vision_parameters, with_image_features


class UniGDTrainer(CheckpointingTrainer):
    r"""
    Trains embeddings and generation together:

        L = contrastive_weight · InfoNCE + alignment_weight · structure + causal_lm_weight · next-token

    An anchor (an image, its prompt, then its long caption) is run once: causal attention lets its embedding be read at
    the last prompt token and its caption be scored in the same forward. The sequences that it is contrasted with are
    the second forward. The next-token loss is normalised by the labelled tokens of the whole accumulated global batch,
    the contrastive loss takes its negatives from all processes, and so does the structure loss its positions: ends of
    slices of the anchors and their captions, read in the same forward.

    Args:
        model ([`UniGDForConditionalGeneration`]): The model.
        args ([`UniGDTrainingArguments`]): The arguments.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`, *optional*): Rows of any accepted format
            ([`~hf_unigd.data.RowParser`]). Evaluation reports recall at 1, 5 and 10 both ways over examples with a
            positive, and the perplexity of the targets.
        processing_class ([`UniGDProcessor`]): The processor, with its prompts.
        peft_config (`LoraConfig`, *optional*): Trains an adapter ([`add_adapter`]) instead of the whole model.
        kwargs: Anything else that [`~transformers.Trainer`] takes.

    Raises:
        ValueError: arguments that cannot train: no negatives in a batch of one, fewer rows than a batch.
        RowError: a bad row, before training starts where rows can be read twice.
        FloatingPointError: a loss is not finite. A checkpoint is saved first.
    """

    # The two losses are normalised differently over accumulation steps; `compute_loss` does both.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: UniGDForConditionalGeneration,
        args: UniGDTrainingArguments,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: UniGDProcessor | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        if not isinstance(processing_class, UniGDProcessor):
            raise ValueError(
                f"`processing_class` must be a UniGDProcessor, got {type(processing_class).__name__}. "
                "`UniGDProcessor.from_vlm_pretrained(...)` makes one from a model's own processor."
            )
        if args.freeze_vision_tower:
            for parameter in vision_parameters(model):
                parameter.requires_grad_(False)
        model.processor = processing_class  # saved with the model
        if peft_config is not None:
            model = add_adapter(model, processing_class, peft_config)
        vision_is_frozen = not any(parameter.requires_grad for parameter in vision_parameters(model))
        if args.vision_cache is not None and not vision_is_frozen:
            raise ValueError(
                "`vision_cache` keeps what a frozen vision tower computes, and this one is trained. Set "
                "`freeze_vision_tower=True`, keep LoRA out of it, or leave `vision_cache` out."
            )
        if args.ddp_find_unused_parameters is None:  # a process without pictures does not use the tower
            args.ddp_find_unused_parameters = not vision_is_frozen
        parser = RowParser(
            lambda text: len(processing_class.tokenizer(text, add_special_tokens=False)["input_ids"]),
            # Without a contrastive loss a short caption would be read by none.
            short_caption_max_tokens=args.short_caption_max_tokens if args.contrastive_weight else 0,
            long_caption_max_tokens=args.long_caption_max_tokens,
            image_folder=args.image_folder,
        )
        splitter, slice_features = None, None
        self.teachers: Teachers | None = None
        if args.alignment_weight:
            splitter = args.splitter
            if args.slice_features:
                slice_features = SliceFeatures.load(args.slice_features, args)
                self._modality_columns = slice_features.modality_columns(args.triple_kernel)
            else:
                self.teachers = Teachers(args, args.device)
                self._modality_columns = self.teachers.modality_columns(args.triple_kernel)

        def examples_of(rows, parser=parser, slice_features=None, length_of=None):
            if isinstance(rows, dict):
                return {name: examples_of(part) for name, part in rows.items()}
            if rows is None:
                return None
            return make_examples(rows, parser, args.skip_bad_rows, args.check_rows, slice_features, length_of)

        length_of = None
        if args.train_sampling_strategy == "group_by_length":

            def length_of(example):
                return sequence_length(processing_class, example.anchor, example.target)

        prefixes = PrefixSampler(args.alignment_positions, args.seed, keep_all=args.alignment_similarity == "kernel")
        collator = UniGDDataCollator(
            processing_class,
            args.max_length,
            args.skip_bad_rows,
            splitter,
            prefixes,
            with_image_keys=args.vision_cache is not None,
        )
        kwargs.setdefault("data_collator", collator)
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples_of(train_dataset, replace(parser, splitter=splitter), slice_features, length_of),
            eval_dataset=examples_of(eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # Trainer sets it with each batch
        self.add_callback(ClampLogitScale())
        self._epoch_sampler: EpochLengthGroupedSampler | None = None
        self.add_callback(SetEpoch(self))
        self.contrastive_loss = InfoNCELoss(model.config.matryoshka_dims)
        self.structure_loss = StructureLoss(
            target=args.alignment_target,
            normalization=args.alignment_normalization,
            bandwidth=args.alignment_bandwidth,
            one_slice=args.alignment_one_slice,
            similarity=args.alignment_similarity,
        )
        self._vision_features: VisionFeatureCache | None = None
        self._logged: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        self._vision_is_frozen = vision_is_frozen
        if self.is_deepspeed_enabled and self._uses_gradient_cache:
            raise ValueError(
                "The gradient cache (`gradient_cache_chunk_size`, `negatives_across_accumulation`) does not combine "
                "with DeepSpeed, which takes an optimizer step with the backward pass. Train with DDP or FSDP2, or "
                "without the cache."
            )
        if self.accelerator.is_fsdp2:
            self._prepare_fsdp()
        self._check_batches()

    def _prepare_fsdp(self) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "`fsdp_cpu_ram_efficient_loading: true` shards a frozen vision tower, which has to stay whole on each "
                "process. Set it to false, as in examples/accelerate/fsdp2.yaml."
            )
        # By itself, and so in float32; whole until the backward pass, as the temperature is read after it has run.
        for head in [module for module in self.model.modules() if isinstance(module, UniGDHead)]:
            fully_shard(head, reshard_after_forward=False)
        if plugin.mixed_precision_policy is not None:
            # accelerate rounds what the model returns and adds gradients up in bfloat16, which DDP does not.
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
            )
        if self._vision_is_frozen:
            # Kept whole on every process, outside FSDP: it runs by itself, and only where there are pictures.
            decoder = {type(module).__name__ for module in self.model.vlm.get_decoder().modules()}
            plugin.ignored_modules = [torch.nn.ParameterList(vision_parameters(self.model))]
            plugin.transformer_cls_names_to_wrap = sorted(decoder & set(self.model._no_split_modules))

    def _check_batches(self) -> None:
        """Refuses, before training, batches that cannot train."""
        batch_size = self.args.train_batch_size * self.args.world_size
        if self.args.contrastive_weight and self.train_dataset is not None and batch_size == 1:
            raise ValueError(
                "A batch of one row has no negatives, so the contrastive loss cannot train. Raise "
                "`per_device_train_batch_size`, or set `contrastive_weight=0`."
            )
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset) or self.train_dataset is None:
            return
        rows = len(self.train_dataset)
        if self.args.dataloader_drop_last and rows < batch_size:
            raise ValueError(
                f"{rows} rows make no batch of {batch_size}, and `dataloader_drop_last` drops the rest. Lower "
                "`per_device_train_batch_size`, or give more rows."
            )
        if self.args.contrastive_weight and not self.args.dataloader_drop_last and rows % batch_size == 1:
            raise ValueError(
                f"The last of {rows} rows would be a batch of its own ({batch_size} a batch), without negatives. Set "
                "`dataloader_drop_last=True`, or choose another batch size."
            )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.current_gradient_accumulation_steps = len(batches)
        if self.args.negatives_across_accumulation and batches:
            # Of the micro-steps only the last does anything, with the rows of all.
            batches = [{}] * (len(batches) - 1) + [join_batches(batches)]
        # A backward pass of DeepSpeed's takes an optimizer step.
        interval = 0 if self.is_deepspeed_enabled else self.args.loss_gradient_norm_steps
        if batches and interval and self.state.global_step % interval == 0:
            self._log_gradient_norms([batch for batch in batches if batch], num_items_in_batch)
        return batches, num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples, device):
        """Labelled tokens of the accumulated batch over all processes, at least 1."""
        count = torch.tensor(sum(map(count_targets, batch_samples)), device=device)
        return self.accelerator.reduce(count, reduction="sum").clamp(min=1)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not inputs:
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.reduce((~torch.isfinite(loss)).long(), reduction="sum"):  # all processes stop, or none
            self._stop_at_non_finite_loss(loss, inputs)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Does all of a step but the last backward pass, whose loss it returns, with the value of the whole step's."""
        if return_outputs:
            raise ValueError("`return_outputs=True` is not supported: a step has several forward passes.")
        scales = self._scales
        loss, parts, metrics = self._step(model, inputs, num_items_in_batch, scales)
        # Logged per optimizer step: the token-normalised parts of accumulation steps add up to its loss.
        for name, part in parts.items():
            share = scales[name] / getattr(self.args, f"{name}_weight")
            self._logged[f"{name}_loss"].append((self.state.global_step, part.detach() * share))
        for name, value in metrics.items():
            self._logged[name].append((self.state.global_step, value.detach() / self._objectives_per_step))
        return loss

    @property
    def _objectives_per_step(self) -> int:
        return 1 if self.args.negatives_across_accumulation else self.current_gradient_accumulation_steps

    @property
    def _scales(self) -> dict[str, float]:
        """What each loss is multiplied by, of those with a weight."""
        # DDP averages over processes, but the next-token loss is divided by the tokens of all of them; Trainer adds up
        # accumulation steps, but the other losses are means of their own in each.
        scales = {
            "contrastive": self.args.contrastive_weight / self._objectives_per_step,
            "alignment": self.args.alignment_weight / self._objectives_per_step,
            "causal_lm": self.args.causal_lm_weight * self.accelerator.num_processes,
        }
        return {name: scale for name, scale in scales.items() if scale}

    def _step(self, model, inputs, num_items_in_batch, scales):
        """The loss to call `backward` on, and detached: unweighted losses by name, values to log."""
        inner = self.accelerator.unwrap_model(model)
        chunks = self._prepare_chunks(inner, inputs["chunks"])

        def forward(model, chunks):
            return model(batches=chunks, num_items_in_batch=num_items_in_batch)

        def batch_loss(embeddings, inverse_temperature):
            parts, metrics = self.batch_losses(embeddings, inverse_temperature, inputs)
            # DDP waits for a gradient of all that its outputs depend on: every output takes part, if with weight 0.
            loss = embeddings.sum() * 0.0 + inverse_temperature * 0.0
            return loss + sum(scales.get(name, 0.0) * part for name, part in parts.items()), parts, metrics

        if not self._uses_gradient_cache:
            outputs = forward(model, chunks)
            loss, parts, metrics = batch_loss(outputs.embeddings, outputs.inverse_temperature)
            loss = loss + scales.get("causal_lm", 0.0) * outputs.loss
            causal_lm = outputs.loss.detach()
        else:
            # All chunks but the last bypass DDP, so that gradients are exchanged once.
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
        """What is done once a step: frozen vision features, and under FSDP chunks as many as on any process."""
        if self._vision_is_frozen:
            with self.accelerator.autocast():
                chunks = [with_image_features(model, chunk, self._vision_cache(model)) for chunk in chunks]
        if not self.is_fsdp_enabled:
            return chunks
        pictured = torch.tensor(["pixel_values" in chunk for chunk in chunks], device=self.args.device)
        everywhere = gather_object([pictured.tolist()])
        longest = max(everywhere, key=len)
        if any(each != longest[: len(each)] for each in everywhere):
            raise ValueError(
                "Under FSDP every process runs the same layers, and here some have pictures for a vision tower that "
                "others have none for. Freeze it (`freeze_vision_tower=True`), or train without FSDP."
            )
        return chunks + [idle_chunk(chunks[0])] * (len(longest) - len(chunks))

    def _vision_cache(self, model):
        if self.args.vision_cache is None:
            return None
        if self._vision_features is None:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, model.dtype)
            tower = tower_key(model, self.processing_class, dtype)
            self._vision_features = VisionFeatureCache(self.args.vision_cache, tower)
        return self._vision_features

    def batch_losses(
        self, embeddings: torch.Tensor, inverse_temperature: torch.Tensor, batch: dict
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """
        The losses that compare embeddings with each other. They see the whole batch at once, however many forward
        passes it took to embed it.

        Args:
            embeddings (`torch.FloatTensor` of shape `(num_spans, embedding_dim)`): Of all chunks, in their order.
            inverse_temperature (`torch.FloatTensor` of shape `()`): Inverse temperature.
            batch (`dict`): As [`UniGDDataCollator`] makes it.

        Returns:
            Unweighted losses by name, and values to log.
        """
        parts, metrics = {}, {}
        at = {name: embeddings[places] for name, places in batch["places"].items()}
        if self.args.contrastive_weight:
            keys = {
                "query_keys": batch["anchor_keys"],
                "positive_keys": batch["positive_keys"],
                "negative_keys": batch["negative_keys"],
            }
            contrastive = self.contrastive_loss(
                at["anchors"], at["positives"], inverse_temperature, at["negatives"], **keys
            )
            parts["contrastive"] = contrastive.pop("loss")
            metrics = {**contrastive, "temperature": 1 / inverse_temperature}
        if self.args.alignment_weight:
            structure = dict(batch["structure"])
            if self.teachers is not None:
                before = self.teachers.truncated
                structure["features"] = self.teachers(structure.pop("slices"))
                metrics["truncated_texts"] = embeddings.new_tensor(self.teachers.truncated - before)
            alignment = self.structure_loss(at["slices"], **structure, modality_columns=self._modality_columns)
            parts["alignment"] = alignment.pop("loss")
            metrics |= alignment
        return parts, metrics

    def _stop_at_non_finite_loss(self, loss, inputs):
        self._save_checkpoint(self.model, trial=None)
        found = [(self.args.process_index, loss.item(), inputs["rows"].tolist())]
        culprits = [entry for entry in gather_object(found) if not math.isfinite(entry[1])]
        named = "; ".join(
            f"{value} on process {process}, in the batch of rows {rows}" for process, value, rows in culprits
        )
        raise FloatingPointError(
            f"The loss is not finite at step {self.state.global_step} ({named}). The state before this step is saved: "
            f"checkpoint-{self.state.global_step} in {self.args.output_dir}. Look at these rows, lower the learning "
            "rate, or train in bfloat16 or float32."
        )

    def _log_gradient_norms(self, batches, num_items_in_batch) -> None:
        """Norm of each weighted loss's gradient over the whole accumulated global batch.

        Called while nothing is in `.grad`. Costs the forward and backward passes of the step once more for each loss.
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
            gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
            if not self.is_fsdp_enabled:  # which has averaged them already
                gradients = self.accelerator.reduce(gradients, reduction="mean")
            norm = torch.nn.utils.get_total_norm(gradients)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if self.accelerator.scaler is not None:
                norm = norm / self.accelerator.scaler.get_scale()
            self._logged[f"{name}_gradient_norm"].append((self.state.global_step, norm))
            model.zero_grad()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:  # a training log, neither an evaluation's nor the final one
            for name, entries in self._logged.items():
                by_step: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
                for step, value in entries:
                    by_step[step] += value.float()
                mean = self.accelerator.reduce(torch.stack(list(by_step.values())).mean(), reduction="mean")
                logs[name] = mean.item()
            self._logged.clear()
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("logit_scale")]

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, **kwargs):
        if not isinstance(dataset, IterableExampleDataset):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, **kwargs)
        # Each process reads a part of its own. Left to accelerate it would read all of the stream for it.
        loader = DataLoader(
            dataset.shard(self.args.world_size, self.args.process_index, endless=is_training),
            batch_size=batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        # Not dispatched, which is accelerate's default for streams: the first process would read for all.
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, ExampleDataset):
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._epoch_sampler = EpochLengthGroupedSampler(batch_size, dataset.lengths or [], seed)
        return self._epoch_sampler

    @property
    def train_collator(self) -> UniGDDataCollator:
        """The collator, for what this training needs of a row."""
        return replace(
            self.data_collator,
            chunk_size=self.args.gradient_cache_chunk_size,
            contrastive=bool(self.args.contrastive_weight),
            causal_lm=bool(self.args.causal_lm_weight),
        )

    def get_train_dataloader(self):
        collator = self.data_collator
        self.data_collator: UniGDDataCollator = self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_eval_dataloader(self, eval_dataset=None):
        # Evaluation leaves no row out (`dataloader_drop_last` is about negatives in training), and repeats none.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        even_batches, self.accelerator.even_batches = self.accelerator.even_batches, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last, self.accelerator.even_batches = drop_last, even_batches

    def _evaluated(self, dataloader):
        """The batches; under FSDP, where all processes have to take part, as many as on any of them."""
        batch = None
        batches = iter(dataloader)
        while True:
            previous, batch = batch, next(batches, None)
            if self.is_fsdp_enabled and not any(gather_object([batch is not None])):
                return
            if batch is None:
                if not self.is_fsdp_enabled:
                    return
                if previous is None:
                    raise ValueError("Under FSDP every process needs a row to evaluate. Give more rows.")
                batch = idle_batch(previous)
            yield batch

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Recall at 1, 5 and 10 both ways, and perplexity of the targets."""
        model = self.accelerator.unwrap_model(self.model)
        model.to(self.args.device).eval()
        gathered: dict[str, list] = defaultdict(list)
        for batch in self._evaluated(dataloader):
            batch = self._prepare_inputs(batch)
            gathered["rows"].append(batch["rows"].cpu())
            with self.accelerator.autocast():
                outputs = model(batches=self._prepare_chunks(model, batch["chunks"]), num_items_in_batch=1)
            if tokens := count_targets(batch):
                gathered["tokens"].append(tokens)
                gathered["loss"].append(outputs.loss.double().cpu())
            if len(batch["anchor_keys"]):
                for name in ("anchors", "positives"):
                    gathered[name].append(outputs.embeddings[batch["places"][name]].cpu())
                for name in ("anchor_keys", "positive_keys"):
                    gathered[name].append(batch[name].cpu())
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        # One list an item, so that a process without any still takes part in the exchange.
        everywhere = {
            name: gather_object(gathered[name])
            for name in ("rows", "loss", "tokens", "anchors", "positives", "anchor_keys", "positive_keys")
        }
        metrics = {}
        if everywhere["tokens"]:
            loss = torch.stack(everywhere["loss"]).sum().item() / sum(everywhere["tokens"])
            metrics["causal_lm_loss"], metrics["perplexity"] = loss, math.exp(min(loss, 700.0))
        if everywhere["anchors"]:
            metrics |= retrieval_metrics(
                torch.cat(everywhere["anchors"]),
                torch.cat(everywhere["positives"]),
                torch.cat(everywhere["anchor_keys"]),
                torch.cat(everywhere["positive_keys"]),
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=sum(map(len, everywhere["rows"]))
        )
