"""Arguments of scripts and commands, parsed by TRL's `TrlParser` from YAML and flags."""

import os
from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments

from ..data import load_rows
from ..data.teachers import TeacherArguments


LOSS_WEIGHTS = ("contrastive_weight", "alignment_weight", "causal_lm_weight")


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
        loss_gradient_norm_steps (`int`, *optional*, defaults to 100):
            Log the norm of each weighted loss's gradient over the whole accumulated global batch every so many steps,
            at the cost of running that step once more for each loss. 0 never does.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Train neither the vision tower nor its projector.

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
    `remove_unused_columns` `False`.
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
        default=100, metadata={"help": "Log the gradient norm of each loss every so many steps; 0 never does."}
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
        weights = {name: getattr(self, name) for name in LOSS_WEIGHTS}
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
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns=True` would remove every column: rows are parsed by the collator."
            )

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
