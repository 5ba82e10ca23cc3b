"""Arguments of scripts and commands, parsed by TRL's `TrlParser` from YAML and flags."""

import os
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments

from ..data import load_rows
from ..data.teachers import TeacherArguments


LOSSES = ("contrastive", "alignment", "causal_lm")

# Arguments of `TrainingArguments` that would have no effect here: the only value that is accepted, and the reason.
WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "average_tokens_across_devices": (True, "the next-token loss is always normalised over all processes"),
    "batch_eval_metrics": (False, "retrieval is measured over the whole evaluation set, not per batch"),
    "bf16_full_eval": (False, "it would round the weights in place; `bf16=True` evaluates in bfloat16 without that"),
    "enable_jit_checkpoint": (False, "every run already saves a checkpoint when it receives SIGTERM"),
    "eval_accumulation_steps": (None, "embeddings move to the CPU after every block of rows"),
    "eval_do_concat_batches": (True, "predictions are always returned as whole arrays"),
    "fp16_full_eval": (False, "it would round the weights in place; `fp16=True` evaluates in float16 without that"),
    "include_for_metrics": ([], "`compute_metrics` receives embeddings, keys and rankings, not inputs or losses"),
    "label_names": (None, "the collator builds the labels"),
    "length_column_name": ("length", "lengths are measured from the rows themselves"),
    "liger_kernel_config": (None, "`use_liger_kernel` is not supported"),
    "remove_unused_columns": (False, "it would remove every column: rows are parsed whole"),
    "use_cache": (False, "training never uses the key-value cache"),
    "use_liger_kernel": (False, "Liger patches model types that it knows, and does nothing to a composed model"),
}


@dataclass
class UniGDTrainingArguments(TeacherArguments, TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] plus the joint objective. VladVA is the default; Sugar has `alignment_weight=1`
    and `contrastive_weight=0`.

    Args:
        > Parameters of the objective

        contrastive_weight (`float`, *optional*, defaults to 1.0):
            Weight of the symmetric InfoNCE loss over examples with a positive. 0 leaves it out.
        causal_lm_weight (`float`, *optional*, defaults to 1.0):
            Weight of the next-token loss over long captions and answers. 0 leaves it out. VladVA names no weight; 1:1
            is our reading.
        alignment_weight (`float`, *optional*, defaults to 0.0):
            Weight of the structure loss ([`StructureLoss`]). Sugar's α, whose value the paper does not give.
        gradient_cache_chunk_size (`int`, *optional*):
            Run so many rows at a time through the model, twice, so that memory is that of one chunk while the batch
            losses see the whole batch ([`~hf_unigd.trainer.gradient_cache`]).
        negatives_across_accumulation (`bool`, *optional*, defaults to `False`):
            Contrast the rows of all accumulation steps with each other, by the gradient cache with an accumulation
            step's anchors or candidates as a chunk unless that is smaller. By default each step is contrasted in
            itself.
        loss_gradient_norm_steps (`int`, *optional*, defaults to 0):
            Log the norm of each weighted loss's gradient over the whole accumulated global batch every this many
            steps. Each time, the step runs once more per loss. 0 turns it off.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Train neither the vision tower nor its projector.

        eval_block_size (`int`, *optional*, defaults to 64):
            Number of rows that are compared with each other in `eval_loss`. Evaluation computes the contrastive and
            the structure loss over consecutive blocks of this many rows, so `eval_loss` does not depend on
            `per_device_eval_batch_size` or the number of processes. At most this many rows run at a time.

        > Parameters of the structure loss

        alignment_positions (`int`, *optional*, defaults to 4):
            At how many slice ends of a sequence the loss looks, chosen anew in each epoch.
        alignment_target (`str`, *optional*, defaults to `"kernel"`):
            What similarities are regressed onto: `"kernel"`, or `"mean_slice"` ("w/o GAK").
        alignment_normalization (`str`, *optional*, defaults to `"content"`):
            Of the kernel: `"cosine"`, or `"content"`, which also takes out what the lengths alone explain.
        alignment_bandwidth (`float`, *optional*, defaults to 1.0):
            δ of the kernel's bandwidth.
        alignment_one_slice (`str`, *optional*, defaults to `"cosine"`):
            Target of two prefixes of one slice: `"cosine"` or `"kernel"`.
        alignment_similarity (`str`, *optional*, defaults to `"cosine"`):
            The model's own similarities: `"cosine"` of embeddings, or (ours) the `"kernel"` of those of all slices.
        triple_kernel (`bool`, *optional*, defaults to `True`):
            Compare images by the image teacher and texts by the text teacher; otherwise everything by the cross-modal
            one ("w/o TK").
        slice_features (`str`, *optional*):
            Folder that `hf-unigd embed-slices` wrote for the training rows. Without it the teachers run in training.
        image_teacher, text_teacher, cross_teacher, teacher_pooling, sentence_language:
            As in [`TeacherArguments`].

        vision_cache (`str`, *optional*):
            Folder in which the features of a frozen vision tower are kept, by picture and tower, for later epochs and
            runs.

        > Parameters of the data

        max_length (`int`, *optional*):
            Longest row in tokens, images and target included. A longer row is an error, never cut.
        short_caption_max_tokens (`int`, *optional*, defaults to 30):
            A `caption` of fewer tokens is a contrastive positive, a longer one a next-token target.
        long_caption_max_tokens (`int`, *optional*, defaults to 500):
            Longest caption allowed.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Leave bad rows out, counted in the log, instead of stopping at the first.
        check_rows (`bool`, *optional*, defaults to `True`):
            Read every row of a map-style dataset once before training.
        image_folder (`str`, *optional*):
            Where relative image paths start.

    Defaults that differ from [`~transformers.TrainingArguments`]: `learning_rate` 1e-4 and a cosine schedule (both
    papers), `logging_steps` 10, `dataloader_drop_last` `True` (a last, smaller batch would have fewer negatives), and
    `remove_unused_columns` `False`. Arguments that would have no effect are refused ([`WITHOUT_EFFECT`]).
    `label_smoothing_factor` applies to the next-token loss in training; evaluation reports it without smoothing.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X updates steps."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last incomplete batch, which would have fewer negatives."}
    )
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Not used: rows are read whole."})

    contrastive_weight: float = field(default=1.0, metadata={"help": "Weight of the symmetric InfoNCE loss."})
    causal_lm_weight: float = field(default=1.0, metadata={"help": "Weight of the next-token loss."})
    alignment_weight: float = field(default=0.0, metadata={"help": "Weight of the structure loss (Sugar's alpha)."})
    alignment_positions: int = field(
        default=4, metadata={"help": "At how many slice ends of a sequence the structure loss looks."}
    )
    alignment_target: str = field(
        default="kernel",
        metadata={"help": "What similarities are regressed onto.", "choices": ["kernel", "mean_slice"]},
    )
    alignment_normalization: str = field(
        default="content", metadata={"help": "Normalisation of the kernel.", "choices": ["cosine", "content"]}
    )
    alignment_bandwidth: float = field(default=1.0, metadata={"help": "Delta of the kernel's bandwidth."})
    alignment_one_slice: str = field(
        default="cosine",
        metadata={"help": "Target of two prefixes of one slice.", "choices": ["cosine", "kernel"]},
    )
    alignment_similarity: str = field(
        default="cosine", metadata={"help": "The model's own similarities.", "choices": ["cosine", "kernel"]}
    )
    triple_kernel: bool = field(
        default=True, metadata={"help": "Compare slices of one modality by its own teacher, not the cross-modal one."}
    )
    slice_features: str | None = field(
        default=None, metadata={"help": "Folder that `hf-unigd embed-slices` wrote for the training rows."}
    )
    gradient_cache_chunk_size: int | None = field(
        default=None, metadata={"help": "Rows to run at a time, with a gradient cache, whatever the batch size."}
    )
    negatives_across_accumulation: bool = field(
        default=False, metadata={"help": "Contrast the rows of all accumulation steps with each other."}
    )
    loss_gradient_norm_steps: int = field(
        default=0, metadata={"help": "Log the gradient norm of each loss every this many steps; 0 turns it off."}
    )
    eval_block_size: int = field(
        default=64, metadata={"help": "Number of rows that are compared with each other in `eval_loss`."}
    )
    freeze_vision_tower: bool = field(
        default=True, metadata={"help": "Train neither the vision tower nor its projector."}
    )
    vision_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps the features of a frozen vision tower."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest row in tokens, images and target included. Longer rows are errors."}
    )
    short_caption_max_tokens: int = field(
        default=30, metadata={"help": "A `caption` of fewer tokens is contrastive, a longer one a next-token target."}
    )
    long_caption_max_tokens: int = field(default=500, metadata={"help": "Longest caption allowed, in tokens."})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Skip bad rows, counted in the log, instead of stopping at the first."}
    )
    check_rows: bool = field(
        default=True, metadata={"help": "Read every row of a map-style dataset once before training."}
    )
    image_folder: str | None = field(default=None, metadata={"help": "Where relative image paths start."})

    def __post_init__(self):
        # transformers takes the precision of `accelerate launch`, but compares these flags with DeepSpeed's.
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
        if precision in ("bf16", "fp16") and not (self.bf16 or self.fp16):
            setattr(self, precision, True)
        super().__post_init__()
        weights = {f"{name}_weight": getattr(self, f"{name}_weight") for name in LOSSES}
        listing = ", ".join(f"`{name}={value}`" for name, value in weights.items())
        if min(weights.values()) < 0:
            raise ValueError(f"Loss weights must not be negative: {listing}.")
        if not any(weights.values()):
            raise ValueError(f"Every loss weight is 0: {listing}.")
        if self.alignment_positions < 1 or self.alignment_bandwidth <= 0:
            raise ValueError(
                f"`alignment_positions={self.alignment_positions}` and "
                f"`alignment_bandwidth={self.alignment_bandwidth}` must be positive."
            )
        if self.gradient_cache_chunk_size is not None and self.gradient_cache_chunk_size < 1:
            raise ValueError(f"`gradient_cache_chunk_size={self.gradient_cache_chunk_size}` must be positive.")
        if self.alignment_weight and self.dataloader_persistent_workers:
            raise ValueError(
                "`dataloader_persistent_workers=True` keeps the first epoch's positions, which `alignment_weight` "
                "chooses anew in each. Leave it out."
            )
        if self.eval_block_size < 2:
            raise ValueError(
                f"`eval_block_size={self.eval_block_size}` must be at least 2: a row alone has nothing to be compared "
                "with."
            )
        self._refuse_arguments_without_effect()

    def _refuse_arguments_without_effect(self) -> None:
        for name, (accepted, reason) in WITHOUT_EFFECT.items():
            if (value := getattr(self, name)) != accepted:
                raise ValueError(
                    f"`{name}={value!r}` would have no effect: {reason}. Leave it at its default, {accepted!r}."
                )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "`train_sampling_strategy='batch_rebalance'` needs tokenized rows, and rows are processed by the "
                "collator. Use 'group_by_length'."
            )
        for name in ("dispatch_batches", "split_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"`{name}` of `accelerator_config` is not supported: it would cut a batch, whose rows are "
                    "compared with each other, into pieces. Leave it out."
                )
        parallelism = self.parallelism_config
        if parallelism is not None and max(parallelism.tp_size, parallelism.cp_size, parallelism.sp_size) > 1:
            raise ValueError(
                "`parallelism_config` with tensor, context or sequence parallelism is not supported: spans and labels "
                "refer to whole sequences. Use data parallelism, or FSDP2."
            )

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments | None) -> "UniGDTrainingArguments":
        """Our arguments with the values of plain ones, as TRL's trainers convert theirs.

        Args:
            args (`TrainingArguments`, *optional*): Arguments of any kind; ours are returned as they are. The defaults
                by default.

        Raises:
            TypeError: `args` is something else.
            ValueError: `args` sets an argument that would have no effect.
        """
        if args is None:
            return cls()
        if isinstance(args, cls):
            return args
        if not isinstance(args, TrainingArguments):
            raise TypeError(f"`args` must be UniGDTrainingArguments or TrainingArguments, got {type(args).__name__}.")
        values = args.to_dict()
        values |= {"hub_token": args.hub_token, "parallelism_config": args.parallelism_config}  # `to_dict` hides them
        values["remove_unused_columns"] = False  # True is the default of plain arguments
        return cls(**values)

    def __getstate__(self):
        # Trainer pickles the arguments into the folder that it pushes.
        return {**self.__dict__, "hub_token": None}


@dataclass
class UniGDModelConfig(ModelConfig):
    r"""
    TRL's [`~trl.ModelConfig`] (checkpoint, dtype, attention, LoRA, quantisation) plus the embedding head.

    Args:
        head_type (`str`, *optional*, defaults to `"none"`): Head of a new model: `"none"`, `"linear"` or `"mlp"`.
        embedding_dim (`int`, *optional*): Embedding size of a new head.
        matryoshka_dims (`list[int]`, *optional*): Prefix sizes that a new model is trained for.
        soft_prompts (`bool`, *optional*, defaults to `False`): Replace the hand-written prompts by trained tokens
            (VladVA, section 3.3).
        embedding_position (`str`, *optional*, defaults to `"prompt"`): Where a new model embeds a sequence: at the end
            of a prompt (VladVA) or at its `"last_slice"` (Sugar).
        image_pooling (`str`, *optional*, defaults to `"mean"`): Span of an image slice in a new model: the `"mean"` of
            its tokens or the `"last"`.

    Defaults that differ from TRL's are VladVA's: `lora_alpha` 16 and `lora_dropout` 0, LoRA on all linear layers of
    the language model.
    """

    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    head_type: str = field(
        default="none", metadata={"help": "Embedding head of a new model.", "choices": ["none", "linear", "mlp"]}
    )
    embedding_dim: int | None = field(default=None, metadata={"help": "Embedding size of a new head."})
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Prefix sizes for which a new model is trained."}
    )
    soft_prompts: bool = field(default=False, metadata={"help": "Replace the hand-written prompts by trained tokens."})
    embedding_position: str = field(
        default="prompt",
        metadata={"help": "Where a new model embeds a sequence.", "choices": ["prompt", "last_slice"]},
    )
    image_pooling: str = field(
        default="mean",
        metadata={"help": "Tokens of an image that stand for it in a new model.", "choices": ["mean", "last"]},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model_name_or_path is None:
            raise ValueError("`model_name_or_path` is needed: the model to train, a Hub id or a folder.")


@dataclass
class UniGDScriptArguments(ScriptArguments):
    r"""
    TRL's [`~trl.ScriptArguments`] plus what our rows need.

    Args:
        rename_columns (`list[str]`, *optional*): Pairs `old:new`, applied to the rows as they are loaded, for example
            `jpg:image txt:caption`.
    """

    rename_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns to rename, as pairs old:new, for example `jpg:image txt:caption`."}
    )

    def __post_init__(self):
        if self.dataset_name is None:
            raise ValueError("`dataset_name` is needed: a Hub id, a folder, a file, or `icons`.")
        for pair in self.rename_columns or []:
            if len(pair.split(":")) != 2:
                raise ValueError(f"`rename_columns` takes pairs old:new, got {pair!r}.")

    def load_rows(self, split: str) -> Dataset | IterableDataset:
        """Rows of a split, as [`~hf_unigd.data.load_rows`] loads them."""
        return load_rows(
            self.dataset_name,
            self.dataset_config,
            split,
            self.dataset_streaming,
            dict(pair.split(":") for pair in self.rename_columns or []),
        )
