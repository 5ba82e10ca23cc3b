"""`UniGDTrainer`: one step, one objective."""

import math
from collections import defaultdict
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..data import RowParser, SliceFeatures, Teachers, make_examples
from ..evaluation import retrieval_metrics
from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from .adapters import add_adapter
from .arguments import UniGDTrainingArguments
from .collator import UniGDDataCollator
from .losses import InfoNCELoss, StructureLoss
from .prefixes import PrefixSampler


class ClampLogitScale(TrainerCallback):
    """Limits the temperature after each optimizer step, as CLIP does."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.clamp_logit_scale_()


class UniGDTrainer(Trainer):
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
        if peft_config is not None:
            model = add_adapter(model, processing_class, peft_config)
        parser = RowParser(
            lambda text: len(processing_class.tokenizer(text, add_special_tokens=False)["input_ids"]),
            short_caption_max_tokens=args.short_caption_max_tokens,
            long_caption_max_tokens=args.long_caption_max_tokens,
            image_folder=args.image_folder,
        )
        splitter, slice_features = None, None
        self.teachers: Teachers | None = None
        if args.alignment_weight:
            splitter = args.splitter
            if args.slice_features:
                slice_features = SliceFeatures.load(args.slice_features, args)
                self._spaces = slice_features.spaces(args.triple_kernel)
            else:
                self.teachers = Teachers(args, args.device)
                self._spaces = self.teachers.spaces(args.triple_kernel)

        def examples_of(rows, parser=parser, slice_features=None):
            if isinstance(rows, dict):
                return {name: examples_of(part) for name, part in rows.items()}
            if rows is None:
                return None
            return make_examples(rows, parser, args.skip_bad_rows, args.check_rows, slice_features)

        prefixes = PrefixSampler(args.alignment_positions, args.seed, keep_all=args.alignment_similarity == "kernel")
        collator = UniGDDataCollator(processing_class, args.max_length, args.skip_bad_rows, splitter, prefixes)
        kwargs.setdefault("data_collator", collator)
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples_of(train_dataset, replace(parser, splitter=splitter), slice_features),
            eval_dataset=examples_of(eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # Trainer sets it with each batch
        self.add_callback(ClampLogitScale())
        self.contrastive_loss = InfoNCELoss(model.config.matryoshka_dims)
        self.structure_loss = StructureLoss(
            target=args.alignment_target,
            normalization=args.alignment_normalization,
            bandwidth=args.alignment_bandwidth,
            one_slice=args.alignment_one_slice,
            similarity=args.alignment_similarity,
        )
        self._logged: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        self._check_batches()

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel):  # PEFT saves no config, and the head's shape is in it
            self.model.config.save_pretrained(output_dir or self.args.output_dir)

    # Saving gives a backbone's tensors their native names, which only `from_pretrained` translates back: Trainer reads
    # the file itself, finds no such names in the model, and leaves the weights as they are without a word.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._loads_whole_models:
            self._load_whole_model(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if self._loads_whole_models:
            self._load_whole_model(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    @property
    def _loads_whole_models(self) -> bool:
        return not (isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_whole_model(self, folder) -> None:
        saved = type(self.model).from_pretrained(folder, dtype=self.model.vlm.dtype)
        self.model.load_state_dict(saved.state_dict())

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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        parts, metrics, outputs = self._losses(model, inputs, num_items_in_batch)
        # DDP averages over processes, but the next-token loss is divided by the tokens of all of them; Trainer adds up
        # accumulation steps, but the contrastive loss is a mean of its own in each.
        scales = {
            "causal_lm": self.args.causal_lm_weight * self.accelerator.num_processes,
            "contrastive": self.args.contrastive_weight / self.current_gradient_accumulation_steps,
            "alignment": self.args.alignment_weight / self.current_gradient_accumulation_steps,
        }
        weighted = {name: scales[name] * part for name, part in parts.items()}
        # DDP waits for a gradient of all that its outputs depend on: every output takes part, if with weight 0.
        idle = [outputs.embeddings, outputs.candidate_embeddings, outputs.logit_scale]
        idle_loss = sum(output.sum() * 0.0 for output in idle if output is not None)
        loss = torch.stack(list(weighted.values())).sum() + idle_loss
        if not torch.isfinite(loss):
            self._stop_at_non_finite_loss(parts, inputs)
        if model.training:
            interval = self.args.loss_gradient_norm_steps
            if interval and self.state.global_step % interval == 0:
                self._log_gradient_norms(model, weighted)
            # Logged per optimizer step: the token-normalised parts of accumulation steps add up to its loss.
            for name, part in parts.items():
                share = scales[name] / getattr(self.args, f"{name}_weight")
                self._logged[f"{name}_loss"].append((self.state.global_step, (part * share).detach()))
            for name, value in metrics.items():
                value = value / self.current_gradient_accumulation_steps
                self._logged[name].append((self.state.global_step, value.detach()))
        return (loss, outputs) if return_outputs else loss

    def _losses(self, model, inputs, num_items_in_batch):
        """Unweighted losses by name, values to log, and the output of the anchors' forward."""
        anchors = dict(inputs["anchors"])
        if not self.args.causal_lm_weight:
            anchors.pop("labels", None)
        outputs = model(
            **anchors,
            candidates=inputs.get("candidates") if self.args.contrastive_weight else None,
            num_items_in_batch=num_items_in_batch,
            skip_logits=True,
            use_cache=False,
        )
        parts, metrics = {}, {}
        if self.args.causal_lm_weight:
            parts["causal_lm"] = outputs.logit_scale * 0.0 if outputs.loss is None else outputs.loss
        if self.args.contrastive_weight:
            queries = outputs.embeddings[: len(inputs.get("anchor_keys", ()))]
            candidates = queries[:0] if outputs.candidate_embeddings is None else outputs.candidate_embeddings
            no_keys = torch.zeros(0, dtype=torch.long, device=queries.device)
            candidate_keys = inputs.get("candidate_keys", no_keys)
            contrastive = self.contrastive_loss(
                queries,
                candidates[: len(queries)],
                outputs.logit_scale,
                candidates[len(queries) :],
                query_keys=inputs.get("anchor_keys", no_keys),
                positive_keys=candidate_keys[: len(queries)],
                negative_keys=candidate_keys[len(queries) :],
            )
            parts["contrastive"] = contrastive.pop("loss")
            metrics = {**contrastive, "temperature": 1 / outputs.logit_scale}
        if self.args.alignment_weight:
            structure = dict(inputs["structure"])
            if self.teachers is not None:
                structure["features"] = self.teachers(structure.pop("slices"))
            positions = outputs.embeddings[len(inputs.get("anchor_keys", ())) :]
            alignment = self.structure_loss(positions, **structure, spaces=self._spaces)
            parts["alignment"] = alignment.pop("loss")
            metrics |= alignment
        return parts, metrics, outputs

    def _stop_at_non_finite_loss(self, parts, inputs):
        self._save_checkpoint(self.model, trial=None)
        values = ", ".join(f"{name} {part.item()}" for name, part in parts.items())
        raise FloatingPointError(
            f"The loss is not finite at step {self.state.global_step} ({values}), in the batch of rows "
            f"{inputs['rows'].tolist()}. The state before this step is saved as "
            f"checkpoint-{self.state.global_step} in {self.args.output_dir}. Look at these rows, lower the learning "
            "rate, or train in bfloat16 or float32."
        )

    def _log_gradient_norms(self, model, weighted) -> None:
        """Gradient norm of each weighted loss over this process's rows, without touching `.grad`.

        Over accumulation steps the norms are added: an upper bound of the norm of the accumulated gradient.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for name, part in weighted.items():
            gradients = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
            squares = sum(gradient.float().square().sum() for gradient in gradients if gradient is not None)
            self._logged[f"{name}_gradient_norm"].append((self.state.global_step, torch.as_tensor(squares).sqrt()))

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

    def _get_num_items_in_batch(self, batch_samples, device):
        """Labelled tokens of the accumulated batch over all processes, at least 1."""
        labels = [batch["anchors"]["labels"] for batch in batch_samples if "labels" in batch["anchors"]]
        count = torch.tensor(sum((part[:, 1:] != -100).sum().item() for part in labels), device=device)
        return self.accelerator.reduce(count, reduction="sum").clamp(min=1)

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("logit_scale")]

    def get_eval_dataloader(self, eval_dataset=None):
        # `dataloader_drop_last` is about negatives in training; evaluation leaves no row out.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Recall at 1, 5 and 10 both ways, and perplexity of the targets."""
        model = self.accelerator.unwrap_model(self.model)
        model.to(self.args.device).eval()
        gathered: dict[str, list] = defaultdict(list)
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                gathered["rows"].append(batch["rows"].cpu())
                if "labels" in batch["anchors"]:
                    tokens = (batch["anchors"]["labels"][:, 1:] != -100).sum()
                    outputs = model(**batch["anchors"], skip_logits=True, use_cache=False, num_items_in_batch=1)
                    anchors = outputs.embeddings
                    gathered["loss"].append(outputs.loss.double().cpu())
                    gathered["tokens"].append(tokens.cpu())
                else:
                    anchors = model.embed(**batch["anchors"])
                if "candidates" in batch:
                    gathered["anchors"].append(anchors.cpu())
                    gathered["positives"].append(model.embed(**batch["candidates"])[: len(anchors)].cpu())
                    gathered["anchor_keys"].append(batch["anchor_keys"].cpu())
                    gathered["positive_keys"].append(batch["candidate_keys"][: len(anchors)].cpu())
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        # One list an item, so that a process without any still takes part in the exchange.
        everywhere = {
            name: gather_object(gathered[name])
            for name in ("rows", "loss", "tokens", "anchors", "positives", "anchor_keys", "positive_keys")
        }
        metrics = {}
        if everywhere["tokens"]:
            loss = torch.stack(everywhere["loss"]).sum().item() / sum(int(count) for count in everywhere["tokens"])
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


def vision_parameters(model: UniGDForConditionalGeneration) -> list[torch.nn.Parameter]:
    """Parameters of the backbone outside its language model: the vision tower and its projector."""
    language = {id(parameter) for parameter in model.vlm.get_decoder().parameters()}
    language |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    return [parameter for parameter in model.vlm.parameters() if id(parameter) not in language]
