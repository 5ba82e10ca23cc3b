"""Arguments of scripts and commands. TRL's `TrlParser` reads them from YAML files and flags."""

import os
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from trl import ModelConfig

from ..data.checking import CHECK_LEVELS
from ..data.teachers import TeacherArguments
from ..modeling.images_unigd import MAX_PIXELS
from ..settings import AtLeast, NotNegative, Positive, check_least, check_settings


LOSSES = ("contrastive", "alignment", "causal_lm")
CACHE_DTYPES = ("bfloat16", "float16")

# The fields of `TrainingArguments` that would have no effect: the only accepted value, and the reason.
WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "average_tokens_across_devices": (True, "the next-token loss is always normalised over all processes"),
    "batch_eval_metrics": (False, "retrieval is measured over the whole evaluation set, not per batch"),
    "bf16_full_eval": (False, "it would round the weights in place; `bf16=True` evaluates in bfloat16 and keeps them"),
    "enable_jit_checkpoint": (False, "every run already saves a checkpoint when it receives SIGTERM"),
    "eval_accumulation_steps": (None, "embeddings move to the CPU after every block of rows"),
    "eval_do_concat_batches": (True, "predictions are always returned as whole arrays"),
    "fp16_full_eval": (False, "it would round the weights in place; `fp16=True` evaluates in float16 and keeps them"),
    "include_for_metrics": ([], "`compute_metrics` receives embeddings, keys and rankings, not inputs or losses"),
    "label_names": (None, "the collator makes the labels"),
    "length_column_name": ("length", "lengths are measured from the rows themselves"),
    "liger_kernel_config": (None, "`use_liger_kernel` is not supported"),
    "remove_unused_columns": (False, "it would remove every column, which the parser needs"),
    "use_cache": (False, "training never uses the key-value cache"),
    "use_liger_kernel": (False, "Liger patches only the model types that it knows, and a UniGD model is none of them"),
}


# The least values of inherited fields that transformers does not check before it trains.
LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("save_total_limit", "ddp_bucket_cap_mb", "ddp_timeout"), 1),
    **dict.fromkeys(("seed", "data_seed", "dataloader_num_workers", "num_train_epochs", "learning_rate"), 0),
    **dict.fromkeys(("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"), 0),
    **dict.fromkeys(("label_smoothing_factor", "eval_delay", "eval_steps", "save_steps", "logging_steps"), 0),
}

Weight = Annotated[float, AtLeast(0)]


@dataclass
class UniGDTrainingArguments(TeacherArguments, TrainingArguments):
    r"""
    Arguments of [`UniGDTrainer`]: [`~transformers.TrainingArguments`] plus those of the joint objective.

    The defaults are VladVA's. Sugar sets `alignment_weight=1` and `contrastive_weight=0`.

    Args:
        > Parameters that control the objective

        contrastive_weight (`float`, *optional*, defaults to 1.0):
            Weight of the symmetric InfoNCE loss over the examples with a positive. `0` disables the loss.
        causal_lm_weight (`float`, *optional*, defaults to 1.0):
            Weight of the next-token loss on long captions and answers. `0` disables the loss. VladVA gives no weights;
            1:1 is our reading of the paper.
        alignment_weight (`float`, *optional*, defaults to 0.0):
            Weight of the structure loss ([`StructureLoss`]): Sugar's α, whose value the paper does not give. `0`
            disables the loss.
        gradient_cache_chunk_size (`int`, *optional*):
            Number of rows per chunk of the gradient cache ([`~hf_unigd.trainer.gradient_cache`]). Every chunk runs
            through the model twice, so that only one chunk's activations are in memory while the batch losses see the
            whole batch.
        negatives_across_accumulation (`bool`, *optional*, defaults to `False`):
            Whether to contrast the rows of all accumulation steps with each other. This uses the gradient cache, with
            the anchors or the candidates of one accumulation step as a chunk unless `gradient_cache_chunk_size` is
            smaller. If `False`, the rows of each accumulation step are contrasted among themselves.
        loss_gradient_norm_steps (`int`, *optional*, defaults to 0):
            Number of optimizer steps between two logs of the gradient norm of each weighted loss over the whole
            accumulated global batch. Each log runs the step once more per loss. `0` disables the norms, and so does
            DeepSpeed.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Whether to freeze the vision tower and its projector.
        freeze_temperature (`bool`, *optional*, defaults to `False`):
            Whether the temperature stays as it is. By default it is trained.
        vision_cache (`str`, *optional*):
            Folder that keeps the features of a frozen vision tower for later epochs and runs, by image and tower. The
            space that they will take is compared with what is free before the first is stored.
        vision_cache_dtype (`str`, *optional*):
            `"bfloat16"` or `"float16"`, to store features in, if not in the type in which they are computed. Features
            are rounded to it from the first epoch on.

        > Parameters that control evaluation

        eval_block_size (`int`, *optional*, defaults to 64):
            Number of rows that are compared with each other in `eval_loss`. Evaluation computes the contrastive and
            the structure loss over consecutive blocks of this many rows, so `eval_loss` does not depend on
            `per_device_eval_batch_size` or the number of processes. The blocks of a streaming dataset hold rows of one
            process, so they do depend on the number of processes. A forward pass never spans two blocks.

        > Parameters that control the structure loss

        alignment_positions (`int`, *optional*, defaults to 4):
            Number of slice ends per sequence at which the loss is computed. They are drawn anew in each epoch.
        alignment_target (`str`, *optional*, defaults to `"kernel"`):
            What similarities are regressed onto: `"kernel"`, or `"mean_slice"` ("w/o GAK").
        alignment_normalization (`str`, *optional*, defaults to `"content"`):
            Normalisation of the kernel: `"cosine"`, or `"content"`, which also removes what the lengths alone explain.
        alignment_bandwidth (`float`, *optional*, defaults to 1.0):
            δ of the kernel's bandwidth.
        alignment_one_slice (`str`, *optional*, defaults to `"cosine"`):
            Target of two prefixes of one slice: `"cosine"` or `"kernel"`.
        alignment_similarity (`str`, *optional*, defaults to `"cosine"`):
            How the model's own similarities are computed: `"cosine"` of the embeddings, or (ours) the `"kernel"` over
            the embeddings of all slices.
        triple_kernel (`bool`, *optional*, defaults to `True`):
            Whether to compare images by the image teacher and texts by the text teacher. If `False`, the cross-modal
            teacher compares all slices ("w/o TK").
        slice_features (`str`, *optional*):
            Folder that `hf-unigd embed-slices` wrote for the training rows. By default, the teachers run during
            training.
        image_teacher, text_teacher, cross_teacher, teacher_pooling, sentence_language:
            As in [`TeacherArguments`].

        > Parameters that control the data

        max_length (`int`, *optional*):
            Maximum number of tokens in a row, including images and target. A longer row is an error; no row is
            truncated.
        short_caption_max_tokens (`int`, *optional*, defaults to 30):
            A `caption` with fewer tokens than this is a contrastive positive; any other is a next-token target. If
            `contrastive_weight` is 0, every `caption` is a target.
        long_caption_max_tokens (`int`, *optional*, defaults to 500):
            Maximum number of tokens in a caption.
        trust_caption_columns (`bool`, *optional*, defaults to `False`):
            Whether a `short_caption` is contrasted and a `long_caption` predicted whatever their lengths. If not, one
            that is not of the length of a short or a long caption is left out, and counted in the log.
        mask_history (`bool`, *optional*, defaults to `False`):
            Whether only the last answer of a chat is learned. By default all are, as in Sugar and LLaVA.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Whether to skip bad rows instead of stopping at the first one. Reasons and number are logged.
        check_rows (`str`, *optional*, defaults to `"text"`):
            How much of every row of a map-style dataset is checked beforehand: `"off"` for nothing; `"text"` for
            columns, lengths, placeholders, reserved tokens and the headers of images; `"full"` to decode the images
            too. The check is divided among processes and `dataloader_num_workers`, and kept for the next run.
        shuffle_buffer_size (`int`, *optional*, defaults to 1000):
            Number of rows of a stream that training draws from at a time; its files are shuffled too. The order is
            another one in each epoch, and depends on `data_seed` or `seed`. With 0, rows come in their own order.
        batch_by_source (`bool`, *optional*, defaults to `False`):
            Whether to fill each global batch from one of several datasets, so that negatives are of the same kind
            (VLM2Vec and other universal embedders). Needs a [`~hf_unigd.data.DatasetMixture`].
        image_folder (`str`, *optional*):
            Folder that image paths start from and must not leave.
        max_image_pixels (`int`, *optional*, defaults to 64 million):
            The largest width times height of an image. A larger one is a bad row, found before it is decoded.

    Defaults that differ from [`~transformers.TrainingArguments`]: `learning_rate` is 1e-4 and the schedule is cosine
    (both papers), `logging_steps` is 10, `dataloader_drop_last` is `True` (an incomplete last batch would have fewer
    negatives), and `remove_unused_columns` is `False`. Arguments that would have no effect are refused
    ([`WITHOUT_EFFECT`]). `label_smoothing_factor` applies to the next-token loss in training; evaluation reports that
    loss without smoothing.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X update steps."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Whether to drop an incomplete last batch, which would have fewer negatives."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Not supported: rows keep all columns."}
    )

    contrastive_weight: Weight = field(default=1.0, metadata={"help": "Weight of the InfoNCE loss. 0 disables it."})
    causal_lm_weight: Weight = field(default=1.0, metadata={"help": "Weight of the next-token loss. 0 disables it."})
    alignment_weight: Weight = field(
        default=0.0, metadata={"help": "Weight of the structure loss (Sugar's alpha). 0 disables it."}
    )
    alignment_positions: Positive = field(
        default=4, metadata={"help": "Number of slice ends per sequence at which the structure loss is computed."}
    )
    alignment_target: str = field(
        default="kernel",
        metadata={"help": "What the structure loss regresses similarities onto.", "choices": ["kernel", "mean_slice"]},
    )
    alignment_normalization: str = field(
        default="content", metadata={"help": "Normalisation of the kernel.", "choices": ["cosine", "content"]}
    )
    alignment_bandwidth: Annotated[float, AtLeast(0, exclusive=True)] = field(
        default=1.0, metadata={"help": "Delta of the kernel's bandwidth."}
    )
    alignment_one_slice: str = field(
        default="cosine",
        metadata={"help": "Target of two prefixes of one slice.", "choices": ["cosine", "kernel"]},
    )
    alignment_similarity: str = field(
        default="cosine",
        metadata={"help": "How the model's own similarities are computed.", "choices": ["cosine", "kernel"]},
    )
    triple_kernel: bool = field(
        default=True,
        metadata={"help": "Whether slices of one modality are compared by its own teacher, not the cross-modal one."},
    )
    slice_features: str | None = field(
        default=None, metadata={"help": "Folder that `hf-unigd embed-slices` wrote for the training rows."}
    )
    gradient_cache_chunk_size: Positive | None = field(
        default=None, metadata={"help": "Number of rows per chunk of the gradient cache. The cache is off by default."}
    )
    negatives_across_accumulation: bool = field(
        default=False, metadata={"help": "Whether to contrast the rows of all accumulation steps with each other."}
    )
    loss_gradient_norm_steps: NotNegative = field(
        default=0, metadata={"help": "Log the gradient norm of each loss every X update steps. 0 disables it."}
    )
    eval_block_size: Annotated[int, AtLeast(2)] = field(
        default=64, metadata={"help": "Number of rows that are compared with each other in `eval_loss`."}
    )
    freeze_vision_tower: bool = field(
        default=True, metadata={"help": "Whether to freeze the vision tower and its projector."}
    )
    freeze_temperature: bool = field(
        default=False, metadata={"help": "Whether the temperature stays as it is. By default it is trained."}
    )
    vision_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps the features of a frozen vision tower for later runs."}
    )
    vision_cache_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type to store these features in, if not the type in which they are computed.",
            "choices": list(CACHE_DTYPES),
        },
    )
    max_length: Positive | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens in a row, including images and target. Longer rows are errors."},
    )
    short_caption_max_tokens: NotNegative = field(
        default=30,
        metadata={"help": "A `caption` with fewer tokens is a positive; any other is a next-token target."},
    )
    long_caption_max_tokens: Positive = field(default=500, metadata={"help": "Maximum number of tokens in a caption."})
    trust_caption_columns: bool = field(
        default=False,
        metadata={"help": "Whether short and long captions are what their columns say, whatever their lengths."},
    )
    mask_history: bool = field(
        default=False, metadata={"help": "Whether only the last answer of a chat is learned, instead of all."}
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={"help": "Whether to skip bad rows and log their reasons instead of stopping at the first one."},
    )
    check_rows: str = field(
        default="text",
        metadata={
            "help": "How much of every row of a map-style dataset is checked beforehand: nothing, all but the pixels, "
            "or all.",
            "choices": list(CHECK_LEVELS),
        },
    )
    batch_by_source: bool = field(
        default=False,
        metadata={"help": "Whether to fill each global batch from one of several `datasets`."},
    )
    shuffle_buffer_size: NotNegative = field(
        default=1000,
        metadata={"help": "Number of rows of a stream that training draws from at a time. 0 keeps their order."},
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder that image paths start from and must not leave."}
    )
    max_image_pixels: Positive = field(
        default=MAX_PIXELS, metadata={"help": "The largest width times height of an image. A larger one is a bad row."}
    )

    def __post_init__(self):
        # transformers takes the precision of `accelerate launch`, but compares only these flags with DeepSpeed's.
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
        if precision in ("bf16", "fp16") and not (self.bf16 or self.fp16):
            setattr(self, precision, True)
        super().__post_init__()
        if self.resume_from_checkpoint in ("true", "True"):  # on a command line
            self.resume_from_checkpoint: Any = True
        if isinstance(self.check_rows, bool):  # YAML reads `off` and `on` as booleans
            self.check_rows = "text" if self.check_rows else "off"
        if self.check_rows not in CHECK_LEVELS:
            raise ValueError(f"`check_rows={self.check_rows}` must be one of {', '.join(CHECK_LEVELS)}.")
        if self.vision_cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(
                f"`vision_cache_dtype={self.vision_cache_dtype}` must be one of {', '.join(CACHE_DTYPES)}."
            )
        if self.vision_cache_dtype is not None and self.vision_cache is None:
            raise ValueError("`vision_cache_dtype` would have no effect without `vision_cache`. Leave it out.")
        check_settings(self)
        check_least(self, LEAST)
        weights = {f"{name}_weight": getattr(self, f"{name}_weight") for name in LOSSES}
        if not any(weights.values()):
            listing = ", ".join(f"`{name}={value}`" for name, value in weights.items())
            raise ValueError(f"Every loss weight is 0: {listing}.")
        if self.freeze_temperature and not self.contrastive_weight:
            raise ValueError(
                "`freeze_temperature` would have no effect: the contrastive loss alone trains the temperature, and "
                "`contrastive_weight` is 0. Leave it out."
            )
        if self.alignment_weight and self.dataloader_persistent_workers:
            raise ValueError(
                "`dataloader_persistent_workers=True` would keep the positions of the first epoch, but the structure "
                "loss draws new ones in each epoch. Leave it out, or set `alignment_weight=0`."
            )
        self._refuse_arguments_without_effect()
        self._check_report_to()

    def _refuse_arguments_without_effect(self) -> None:
        for name, (accepted, reason) in WITHOUT_EFFECT.items():
            if (value := getattr(self, name)) != accepted:
                raise ValueError(
                    f"`{name}={value!r}` would have no effect: {reason}. Leave it at its default, {accepted!r}."
                )
        if self.batch_by_source and self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "`batch_by_source` and `train_sampling_strategy='group_by_length'` both choose the rows of a batch. "
                "Leave one of them out."
            )
        if self.batch_by_source and not self.dataloader_drop_last:
            raise ValueError(
                "`batch_by_source` leaves out what does not fill a batch, so `dataloader_drop_last=False` would have "
                "no effect. Leave it out."
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "`train_sampling_strategy='batch_rebalance'` needs tokenized rows, but the collator tokenizes. Use "
                "'group_by_length'."
            )
        for name in ("dispatch_batches", "split_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"`{name}` of `accelerator_config` is not supported: it would split a batch, whose rows are "
                    "compared with each other. Leave it out."
                )
        parallelism = self.parallelism_config
        if parallelism is not None and max(parallelism.tp_size, parallelism.cp_size, parallelism.sp_size) > 1:
            raise ValueError(
                "`parallelism_config` with tensor, context or sequence parallelism is not supported: spans and labels "
                "refer to whole sequences. Use data parallelism, or FSDP2."
            )

    def _check_report_to(self) -> None:
        try:
            for callback in get_reporting_integration_callbacks(self.report_to):
                callback()  # Trainer would find that its package is missing when the model and the rows are loaded
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(f"`report_to`: {error}") from error

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments | None) -> "UniGDTrainingArguments":
        """
        Converts plain `TrainingArguments`, as TRL's trainers do.

        Args:
            args (`TrainingArguments`, *optional*): The arguments. Those of this class are returned as they are. If
                `None`, the defaults are used.

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
        values |= {"hub_token": args.hub_token, "parallelism_config": args.parallelism_config}  # masked by `to_dict`
        values["remove_unused_columns"] = False  # the default of plain arguments is True
        return cls(**values)

    def __getstate__(self):
        # Trainer pickles the arguments into the output folder, which may be pushed.
        return {**self.__dict__, "hub_token": None}


@dataclass
class UniGDModelConfig(ModelConfig):
    r"""
    TRL's [`~trl.ModelConfig`] (checkpoint, dtype, attention, LoRA, quantisation) plus the arguments of the embedding
    head.

    Args:
        head_type (`str`, *optional*, defaults to `"none"`):
            Embedding head of a new model: `"none"`, `"linear"` or `"mlp"`.
        embedding_dim (`int`, *optional*):
            Embedding size of a new head.
        matryoshka_dims (`list[int]`, *optional*):
            Prefix sizes that a new model is trained for, besides the full size.
        soft_prompts (`bool`, *optional*, defaults to `False`):
            Whether to replace the hand-written prompts by trained tokens (VladVA, section 3.3).
        soft_prompts_only (`bool`, *optional*, defaults to `False`):
            Whether to train nothing but the soft prompts and the head, without LoRA (VladVA, table 4, row 2), and save
            them as an adapter.
        image_prompt, text_prompt (`str`, *optional*):
            The hand-written embedding prompts of sequences with an image, and of all others. Soft prompts start from
            them. They default to those of the checkpoint, or VladVA's.
        initial_temperature (`float`, *optional*):
            The temperature of the contrastive loss at the start. It defaults to that of the checkpoint, or to CLIP's
            0.07.
        embedding_position (`str`, *optional*, defaults to `"prompt"`):
            Where a new model embeds a sequence: at the end of a `"prompt"` (VladVA) or at its `"last_slice"` (Sugar).
        image_pooling (`str`, *optional*, defaults to `"mean"`):
            Tokens of an image slice that a new model pools: the `"mean"` of all of them, or the `"last"` one.
        instruction, document_instruction (`str`, *optional*):
            What anchors, and positives and negatives, are embedded for: the processor's instructions `"query"` and
            `"document"`, which it is saved with. They precede what is embedded, in rows without instructions of their
            own.

    Defaults that differ from TRL's are VladVA's: `lora_alpha` is 16, `lora_dropout` is 0, and LoRA adapts all linear
    layers of the language model.
    """

    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    head_type: str = field(
        default="none", metadata={"help": "Embedding head of a new model.", "choices": ["none", "linear", "mlp"]}
    )
    embedding_dim: Positive | None = field(default=None, metadata={"help": "Embedding size of a new head."})
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Prefix sizes that a new model is trained for, besides the full size."}
    )
    soft_prompts: bool = field(
        default=False, metadata={"help": "Whether to replace the hand-written prompts by trained tokens."}
    )
    soft_prompts_only: bool = field(
        default=False,
        metadata={"help": "Whether to train nothing but the soft prompts and the head, without LoRA, as an adapter."},
    )
    image_prompt: str | None = field(
        default=None, metadata={"help": "Embedding prompt of sequences with an image. Soft prompts start from it."}
    )
    text_prompt: str | None = field(
        default=None, metadata={"help": "Embedding prompt of all other sequences. Soft prompts start from it."}
    )
    initial_temperature: Annotated[float, AtLeast(0, exclusive=True)] | None = field(
        default=None,
        metadata={"help": "Temperature at the start: by default the checkpoint's, or 0.07 for a new model."},
    )
    embedding_position: str = field(
        default="prompt",
        metadata={"help": "Where a new model embeds a sequence.", "choices": ["prompt", "last_slice"]},
    )
    image_pooling: str = field(
        default="mean",
        metadata={"help": "Tokens of an image that a new model pools.", "choices": ["mean", "last"]},
    )
    instruction: str | None = field(
        default=None,
        metadata={"help": "Instruction of anchors, saved with the model for queries. Rows may have their own."},
    )
    document_instruction: str | None = field(
        default=None,
        metadata={"help": "Instruction of positives and negatives, saved with the model for documents."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_settings(self)
        check_least(self, {"lora_r": 1, "lora_alpha": 1, "lora_dropout": 0})
        if self.soft_prompts_only:
            lora = [each for each in fields(self) if each.name.startswith(("lora_", "use_rslora", "use_dora"))]
            if given := [each.name for each in lora if getattr(self, each.name) != each.default]:
                raise ValueError(
                    f"`soft_prompts_only` trains without LoRA, so {', '.join(f'`{name}`' for name in given)} would "
                    "have no effect. Leave one of them out."
                )
            self.soft_prompts = True
        if self.model_name_or_path is None:
            raise ValueError("`model_name_or_path` is required: the Hub id or the folder of the model to train.")
