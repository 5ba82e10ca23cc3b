"""The evaluation loop of [`UniGDTrainer`]: losses over blocks of rows, perplexity and recall."""

import copy
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, denumpify_detensorize

from .arguments import LOSSES
from .batches import count_targets, idle_batch
from .checkpoints import CheckpointingTrainer
from .collator import UniGDDataCollator
from .dataloaders import block_loader
from .evaluation import EvaluationResults, block_metrics, retrieval_prediction
from .pictures import RetrievalPictures


class EvaluatingTrainer(CheckpointingTrainer):
    """A trainer that evaluates the objective, the perplexity and retrieval on rows of any accepted format."""

    control: Any

    def __init__(self, *args, **kwargs):
        self._evaluation_loaders: dict[str | None, tuple[Any, DataLoader]] = {}
        super().__init__(*args, **kwargs)
        self._pictures = RetrievalPictures(self.callback_handler.callbacks)
        self.add_callback(self._pictures)

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is not None and not isinstance(eval_dataset, str):  # rows given to `evaluate`
            return self.get_test_dataloader(eval_dataset)
        rows = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        if rows is None:
            raise ValueError("Evaluation needs rows. Pass `eval_dataset` to the trainer or to `evaluate`.")
        if not self.args.dataloader_persistent_workers:
            return self.get_test_dataloader(rows)
        kept_rows, loader = self._evaluation_loaders.get(eval_dataset, (None, None))
        if kept_rows is not rows:  # persistent workers belong to one dataset
            loader = self.get_test_dataloader(rows)
            self._evaluation_loaders[eval_dataset] = rows, loader
        return loader

    def get_test_dataloader(self, test_dataset):
        examples = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test")
        return block_loader(examples, self.args, self._evaluation_collator)

    @property
    def _evaluation_collator(self) -> UniGDDataCollator:
        """A collator that embeds every anchor and labels every target, even if its loss has no weight."""
        collator = copy.copy(self.data_collator)
        collator.chunk_size = self.args.eval_batch_size
        collator.contrastive = collator.causal_lm = collator.with_items = True
        return collator

    def predict(
        self, test_dataset, ignore_keys=None, metric_key_prefix="test"
    ) -> PredictionOutput | dict[str, PredictionOutput]:
        """
        Returns the embeddings of the rows with a positive, their keys and rankings
        ([`~hf_unigd.trainer.evaluation.retrieval_prediction`]), and the metrics of an evaluation.

        Args:
            test_dataset: Rows of any accepted format, or a `dict` of several datasets.
            ignore_keys (`list[str]`, *optional*): Names of predictions to leave out.
            metric_key_prefix (`str`, *optional*, defaults to `"test"`): Prefix of the names of the metrics.

        Returns:
            `PredictionOutput`, or a `dict` with one per dataset if `test_dataset` is a `dict`.
        """
        if isinstance(test_dataset, dict):
            return {
                name: self.predict(rows, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, rows in test_dataset.items()
            }
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _evaluated(self, dataloader):
        """Yields the batches. Under FSDP, where all processes take part in every forward pass, idle batches follow
        until no process has a batch left."""
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
                    raise ValueError(
                        "Under FSDP, every process needs a row to evaluate. Add rows, or lower `eval_block_size`."
                    )
                batch = idle_batch(previous)
            yield batch

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Computes the losses over blocks of rows, the perplexity of the targets, and recall at 1, 5 and 10 in both
        directions, with the numbers of queries and candidates. If `args.prediction_loss_only` is set, recall and
        predictions are left out; the parameter of that name is ignored."""
        model = self.accelerator.unwrap_model(self.model)
        if getattr(model, "quantization_method", None) is None and not self.is_model_parallel:
            model.to(self.args.device)
        self.callback_handler.eval_dataloader = dataloader  # for the progress bar
        batch_loss_modules = self.contrastive_loss, self.structure_loss
        for module in (model, *batch_loss_modules):
            module.eval()
        if callable(getattr(self.optimizer, "eval", None)):  # schedule-free optimizers
            self.optimizer.eval()
        results = EvaluationResults()
        try:
            for batch in self._evaluated(dataloader):
                self._evaluate_block(model, self._prepare_inputs(batch), results)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            for module in batch_loss_modules:
                module.train()

        results = results.gather()
        metrics = block_metrics(results, {name: getattr(self.args, f"{name}_weight") for name in LOSSES})
        predictions, labels, embedded = {}, {}, results.embedded()
        if embedded is not None:
            prediction, recalls = retrieval_prediction(embedded, self.args.device)
            predictions, labels = prediction.predictions, prediction.label_ids
            self._pictures.keep(dataloader.dataset, predictions, labels, metric_key_prefix)
            metrics |= {**recalls, "rows_without_match": results.num_rows - len(embedded["rows"])}
            if self.compute_metrics is not None:
                metrics |= denumpify_detensorize(self.compute_metrics(prediction))
        kept = {name: array for name, array in predictions.items() if name not in (ignore_keys or [])}
        return EvalLoopOutput(
            predictions=kept or None,
            label_ids=labels or None,
            metrics={_prefixed(name, metric_key_prefix): value for name, value in metrics.items()},
            num_samples=results.num_rows,
        )

    def _evaluate_block(self, model, batch, results: EvaluationResults) -> None:
        with self.accelerator.autocast():
            outputs = model(batches=self._prepare_chunks(model, batch["chunks"]), num_items_in_batch=1)
        if not len(batch["rows"]):
            return
        results.add_block(batch["rows"])
        results.add_next_token_loss(outputs.loss, count_targets(batch))
        parts, _ = self.batch_losses(outputs.embeddings, outputs.inverse_temperature, batch)
        counts = {"contrastive": len(batch["anchor_keys"])}
        if "structure" in batch:
            counts["alignment"] = len(batch["structure"]["lengths"])
        for name, loss in parts.items():
            results.add_batch_loss(name, loss, counts[name])
        if not self.args.prediction_loss_only:
            results.add_embeddings(
                rows=batch["anchor_rows"],
                **{name: batch[name] for name in ("anchor_items", "positive_items")},
                **{name: outputs.embeddings[batch["places"][name]] for name in ("anchors", "positives")},
            )


def _prefixed(name: str, prefix: str) -> str:
    return name if name.startswith(f"{prefix}_") else f"{prefix}_{name}"
