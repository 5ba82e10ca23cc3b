"""Turns sequences of texts and images into model inputs, with the spans to embed and the tokens to predict.

The processor holds the embedding prompts and saves them; the model only sees spans.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.utils import PROCESSOR_NAME

from .backbone_unigd import load_backbone_processor
from .chat_template_unigd import freeze_dates, holds_video
from .configuration_unigd import check_choice
from .digests_unigd import VERIFY, check_digests, renew_digests_of_files
from .hub_files_unigd import check_json, find_file
from .instructions_unigd import SIDES, check_instructions, with_instruction, without_instruction
from .loading_info_unigd import errors_name
from .pipeline_unigd import UniGDFeatureExtractionPipeline  # saved with the processor, for `pipeline` to load
from .plausible_unigd import MAX_PROCESSOR_SIZE, check_sizes
from .probe_unigd import PROBE_NAME, load_probe, processor_differences
from .prompts_unigd import check_prompts
from .rendering_unigd import SequenceError, SequenceRenderer
from .soft_prompts_unigd import SoftPromptMixin
from .tokenizing_unigd import SequenceTokenizer, check_vlm_processor


logger = logging.getLogger(__name__)


class UniGDProcessor(SoftPromptMixin, ProcessorMixin):
    r"""
    Wraps a backbone's processor (tokenizer, image processor, chat template), and adds prompts and spans.

    A call behaves like a call of the backbone's processor. [`process_sequences`] prepares sequences for embedding and
    training.

    Args:
        vlm_processor (`ProcessorMixin`): The backbone's processor. It needs a chat template.
        prompts (`dict[str, str]`, *optional*): The hand-written embedding prompts by modality: `"image"` for sequences
            with an image, `"text"` for all others. The user's turn ends with the prompt, and the embedding is read at
            the last token before the answer.
        soft_prompts (`dict[str, list[str]]`, *optional*): Reserved tokens by modality, which replace the hand-written
            prompts. [`add_soft_prompts`] creates them.
        embedding_position (`str`, *optional*, defaults to `"prompt"`): Where a sequence is embedded: `"prompt"` at
            the last token of its embedding prompt (VladVA), `"last_slice"` at its last image or sentence, without a
            prompt (Sugar, section 3.2).
        image_pooling (`str`, *optional*, defaults to `"mean"`): The span of an image slice: `"mean"` for all its
            tokens (Sugar, appendix E.1), `"last"` for its last token (table 4b, "w/o AvgPool").
        instructions (`dict[str, str]`, *optional*): What sequences are embedded for, by name: `"query"` and
            `"document"` for the two sides of retrieval, and any others. sentence-transformers calls them prompts.

    Raises:
        ValueError: if the chat template or the padding token is missing, a prompt is for an unknown modality,
            `embedding_position` or `image_pooling` has an unknown value, or a prompt or an instruction is empty or
            holds a reserved token.
    """

    def __init__(
        self,
        vlm_processor,
        prompts=None,
        soft_prompts=None,
        embedding_position="prompt",
        image_pooling="mean",
        instructions=None,
    ):
        if vlm_processor.chat_template is None:
            raise ValueError(
                f"{type(vlm_processor).__name__} has no chat template, which the prompts are placed with. Set "
                "`vlm_processor.chat_template` to the template that the backbone was trained with."
            )
        if vlm_processor.tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token. Set `tokenizer.pad_token`, for example to the EOS token."
            )
        check_choice("embedding_position", embedding_position, ("prompt", "last_slice"))
        check_choice("image_pooling", image_pooling, ("mean", "last"))
        check_vlm_processor(vlm_processor)
        vlm_processor.chat_template = freeze_dates(vlm_processor.chat_template)
        self.vlm_processor = vlm_processor
        self.soft_prompts = soft_prompts
        self.embedding_position = embedding_position
        self.image_pooling = image_pooling
        self._renderer = SequenceRenderer(vlm_processor)
        self._tokenize = SequenceTokenizer(vlm_processor, image_pooling)
        self.prompts = check_prompts(prompts, self.find_reserved)
        self.instructions = check_instructions(instructions, self.find_reserved)

    # What `ProcessorMixin` and its users expect of a processor comes from the backbone's.
    tokenizer = property(lambda self: self.vlm_processor.tokenizer)
    image_processor = property(lambda self: self.vlm_processor.image_processor)
    chat_template = property(lambda self: self.vlm_processor.chat_template)
    image_token = property(lambda self: self.vlm_processor.image_token)
    image_token_id = property(lambda self: self.vlm_processor.image_token_id)
    model_input_names = property(lambda self: [*self.vlm_processor.model_input_names, "spans"])

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Names of the components. `ProcessorMixin` would look for them among the arguments of `__init__`."""
        return ["image_processor", "tokenizer"]

    def __call__(self, images=None, text=None, **kwargs: Unpack[ProcessingKwargs]) -> BatchFeature:
        """Calls the backbone's processor, without prompts and spans. Videos are refused.

        Args:
            images: The images of all texts, in order.
            text (`str` or `list[str]`): Rendered texts, with the backbone's image token where each image stands.
            kwargs: Any other argument of the backbone's processor.

        Returns:
            `BatchFeature` as the backbone's processor returns it.
        """
        if kwargs.get("videos") is not None:
            raise ValueError("`videos` are not supported; pass images and texts.")
        return self.vlm_processor(images=images, text=text, **kwargs)

    def apply_chat_template(self, conversation, *args, **kwargs):
        if holds_video(conversation):
            raise ValueError("The conversation holds a video. Videos are not supported; use images and texts.")
        return self.vlm_processor.apply_chat_template(conversation, *args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.vlm_processor.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.vlm_processor.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, *args, **kwargs):
        return self.vlm_processor.post_process_image_text_to_text(*args, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Number of tokens that each image becomes. It has no public name in transformers, and vLLM calls this one.

        Args:
            image_sizes (`list[tuple[int, int]]`, *optional*): Height and width of each image, in pixels.

        Returns:
            `MultiModalData` with `num_image_tokens` (`list[int]`).
        """
        if hasattr(self.vlm_processor, "_get_num_multimodal_tokens"):
            return self.vlm_processor._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        counts = [self._tokenize.count_image_tokens(tuple(size)) for size in image_sizes or []]
        return MultiModalData(num_image_tokens=counts)

    def __repr__(self):
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings.items())
        return f"{type(self).__name__}({settings}, {self.vlm_processor})"

    def process_sequences(
        self,
        sequences: list,
        targets: list[str | None] | None = None,
        *,
        prompted: bool | list[bool] = True,
        label_history: bool | list[bool] = False,
        prompt_name: str | None = None,
        instruction: str | list[str | None] | None = None,
        sentence_ends: Callable[[str], list[int]] | None = None,
        image_lengths: bool = False,
        max_length: int | None = None,
        padding_side: str | None = None,
    ) -> BatchFeature:
        """
        Prepares a batch of sequences of texts and images. Images and texts keep their order.

        Args:
            sequences (`list`): Each is a text, a `PIL.Image.Image`, a list of both (one user turn), or chat messages
                (`[{"role": ..., "content": ...}]`, with images as `{"type": "image", "image": PIL.Image.Image}`).
            targets (`list[str | None]`, *optional*): For each sequence, the answer that the model learns to give.
            prompted (`bool` or `list[bool]`, *optional*, defaults to `True`): Whether a sequence is embedded. If so,
                it gets a span, and with `embedding_position="prompt"` it ends with its prompt.
            label_history (`bool` or `list[bool]`, *optional*, defaults to `False`): Whether the answers of a
                conversation before its target are labelled as the target is.
            prompt_name (`str`, *optional*): Name of the one of `instructions` that the embedded sequences begin with.
                `"query"` and `"document"` are none if the processor has no such instruction.
            instruction (`str` or `list[str | None]`, *optional*): The instruction itself, or one for each sequence.
            sentence_ends (`Callable[[str], list[int]]`, *optional*): Returns where the sentences of a text end, in
                characters. With it, the spans of all slices are returned too. Each image is a slice, and so is each
                sentence of every turn except the system's.
            image_lengths (`bool`, *optional*, defaults to `False`): Return the number of tokens of each image too.
            max_length (`int`, *optional*): Maximum number of tokens in a row, including image tokens and target.
            padding_side (`str`, *optional*): `"left"` or `"right"`. Defaults to the tokenizer's padding side.

        Returns:
            `BatchFeature` with the backbone's inputs and:

            - `spans` (`torch.LongTensor` of shape `(num_prompted, 3)`): row, start and end (exclusive) of each span.
            - `labels` (`torch.LongTensor` of shape `(batch_size, sequence_length)`), if there is an answer to label:
              -100 at all tokens that are not part of one. If the template does not end an earlier answer with the EOS
              token, as the last one ends, EOS is the label of the token after it.
            - `slice_spans` (`torch.LongTensor` of shape `(num_slices, 3)`), with `sentence_ends`: in order of row and
              position, including the slices of the targets.
            - `image_lengths` (`torch.LongTensor` of shape `(num_images,)`), if they are asked for: the number of image
              tokens of each image, in order.

        Raises:
            SequenceError: if a sequence is empty, contains an empty text, an image placeholder or something that is
                neither text nor image, is longer than `max_length` (nothing is truncated), or has an answer to label
                that the chat template changes.
            TypeError: if `sequences` is not a list.
            ValueError: if there is no sequence, the numbers of sequences, targets and flags differ, the processor has
                no instruction `prompt_name`, or `instruction` is given too.
        """
        if not isinstance(sequences, (list, tuple)):
            raise TypeError(
                f"`sequences` must be a list of sequences, not a {type(sequences).__name__}. Put a single sequence "
                "into a list."
            )
        if not sequences:
            raise ValueError("`sequences` is empty; pass at least one sequence.")
        flags, histories = (
            [value] * len(sequences) if isinstance(value, bool) else value for value in (prompted, label_history)
        )
        targets = [None] * len(sequences) if targets is None else targets
        counts = [len(each) for each in (sequences, targets, flags, histories)]
        if len(set(counts)) > 1:
            raise ValueError(f"The numbers of sequences, targets, `prompted` and `label_history` differ: {counts}.")
        sequences = self._instructed(sequences, flags, prompt_name, instruction)
        prompts = self.embedding_prompts if self.embedding_position == "prompt" else None
        given = zip(sequences, targets, flags, histories, strict=True)
        rows = [
            self._renderer.render(index, sequence, target, prompts if flag else None, sentence_ends, history)
            for index, (sequence, target, flag, history) in enumerate(given)
        ]
        at_last_slice = self.embedding_position == "last_slice"
        tokenized = self._tokenize(rows, with_slices=at_last_slice or sentence_ends is not None)
        batch, lengths, answers = tokenized.batch, tokenized.lengths, tokenized.answers
        for index, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            answer_length = len(answer["input_ids"])
            if max_length is not None and length + answer_length > max_length:
                raise SequenceError(
                    index,
                    f"has {length + answer_length} tokens ({answer_length} of them the target), more than "
                    f"`max_length={max_length}`. Shorten it or raise `max_length`.",
                )

        side = padding_side or self.tokenizer.padding_side
        fill = {"input_ids": self.tokenizer.pad_token_id}
        per_token = [name for name, value in batch.items() if _shape(value) == batch["input_ids"].shape]
        for name in per_token:
            answered = []
            for values, length, answer in zip(batch[name], lengths, answers, strict=True):
                if answer["input_ids"] and name not in answer:
                    raise ValueError(
                        f"{type(self.vlm_processor).__name__} returns a value of `{name}` for each token of a prompt, "
                        "but none for the tokens of a text alone, so no target can follow a prompt."
                    )
                answered.append(torch.cat([values[:length], torch.tensor(answer[name], dtype=values.dtype)]))
            batch[name] = pad_sequence(answered, True, fill.get(name, 0), side)

        width = batch["input_ids"].shape[1]
        spans, slice_spans = [], []
        for index, (length, answer, flag) in enumerate(zip(lengths, answers, flags, strict=True)):
            padding = 0 if side == "right" else width - length - len(answer["input_ids"])
            slices = [(index, padding + start, padding + end) for start, end in tokenized.slices[index]]
            slice_spans += slices
            if flag and at_last_slice:
                spans.append([span for span in slices if span[2] <= padding + length][-1])
            elif flag:
                spans.append((index, padding + length - 1, padding + length))
        batch["spans"] = torch.tensor(spans, dtype=torch.long).reshape(-1, 3)
        if sentence_ends is not None:
            batch["slice_spans"] = torch.tensor(slice_spans, dtype=torch.long).reshape(-1, 3)
        if image_lengths:
            batch["image_lengths"] = torch.tensor(tokenized.image_lengths, dtype=torch.long)
        if any(row.answer or row.history for row in rows):
            batch["labels"] = pad_sequence(tokenized.labels, True, -100, side)
        return batch

    def check_sequence(self, sequence, target=None, *, prompted=True, label_history=False, max_length=None) -> None:
        """
        Checks that [`process_sequences`] takes a sequence. Images are processed only if their sizes do not tell that
        the sequence is well below the limit.

        Args:
            sequence, target, prompted, label_history, max_length: As in [`process_sequences`].

        Raises:
            SequenceError: as [`process_sequences`] does.
        """
        prompts = self.embedding_prompts if prompted and self.embedding_position == "prompt" else None
        rendered = sequence if prompted else without_instruction(sequence)
        row = self._renderer.render(0, rendered, target, prompts, label_history=label_history)
        try:
            sizes = [(image.height, image.width) for image in row.images]
            counts = self._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens if sizes else []
        except Exception:  # an image processor refuses an image in its own way
            counts = None
        if counts is not None:
            # Marks of images, of their rows and of their tiles are not counted.
            length = len(self.tokenizer(row.prompt + row.answer)["input_ids"])
            length += sum(2 * count + 16 for count in counts)
            if max_length is None or length <= max_length:
                return
        flags = {"prompted": prompted, "label_history": label_history}
        self.process_sequences([sequence], [target], **flags, max_length=max_length)

    def _instructed(self, sequences, flags, prompt_name, instruction) -> list:
        """The embedded sequences with their instructions, and the others without."""
        if prompt_name is not None and instruction is not None:
            raise ValueError("Give `prompt_name` or `instruction`, not both.")
        if prompt_name is not None:
            instruction = self.get_instruction(prompt_name)
        texts = instruction if isinstance(instruction, (list, tuple)) else [instruction] * len(sequences)
        if len(texts) != len(sequences):
            raise ValueError(f"{len(sequences)} sequences, but {len(texts)} values of `instruction`.")
        if instruction is not None and not any(flags):
            raise ValueError("An instruction precedes what is embedded, and with `prompted=False` nothing is.")
        return [
            with_instruction(sequence, text) if flag else without_instruction(sequence)
            for sequence, text, flag in zip(sequences, texts, flags, strict=True)
        ]

    def get_instruction(self, prompt_name: str) -> str | None:
        """
        The instruction of a name. `"query"` and `"document"` may have none.

        Raises:
            ValueError: if the processor has no instruction of another name.
        """
        if prompt_name not in (*self.instructions, *SIDES):
            names = ", ".join(repr(name) for name in dict.fromkeys([*SIDES, *self.instructions]))
            raise ValueError(f"There is no instruction {prompt_name!r}. The processor knows {names}.")
        return self.instructions.get(prompt_name)

    def find_reserved(self, text: str) -> str | None:
        """The first reserved token in a text, or `None`: a placeholder of images or videos, a mark of a turn, the end
        of a sequence, a soft prompt. The tokenizer would not read it as text, so no sequence may hold one."""
        return self._renderer.find_reserved(text)

    @property
    def chat_template_keeps_order(self) -> bool:
        """Whether the chat template renders a turn's images and texts in their order."""
        return self._renderer.template.keeps_order

    @property
    def image_placeholder(self) -> str:
        """What the chat template renders for an image."""
        return self._renderer.template.image_placeholder

    @property
    def _settings(self) -> dict:
        return {
            "prompts": self.prompts,
            "soft_prompts": self.soft_prompts,
            "embedding_position": self.embedding_position,
            "image_pooling": self.image_pooling,
            "instructions": self.instructions,
        }

    def to_dict(self):
        return {
            "processor_class": type(self).__name__,
            "vlm_processor_class": type(self.vlm_processor).__name__,
            **self._settings,
        }

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Saves the backbone's processor, the prompts and this code in one folder.

        If the folder has a probe of another processor, the probe is removed with a warning, because loading compares
        the processor with it. If the folder has digests, those of its files are renewed.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            push_to_hub (`bool`, *optional*, defaults to `False`): Also push the folder to the Hub.
            kwargs: Arguments of [`~ProcessorMixin.push_to_hub`]. `repo_id` defaults to the name of the folder.

        Returns:
            `list[str]`: The files of the backbone's processor.
        """
        probe_file = Path(save_directory) / PROBE_NAME
        if probe_file.is_file() and processor_differences(self, load_probe(probe_file)):
            logger.warning(
                "Removed %s, which belongs to another processor. Save the model to get a new probe.", probe_file
            )
            probe_file.unlink()
        files = self.vlm_processor.save_pretrained(save_directory)
        config_file = Path(save_directory) / PROCESSOR_NAME
        config = {**json.loads(config_file.read_text(encoding="utf-8")), **self.to_dict()}
        custom_object_save(self, save_directory, config=config)
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        renew_digests_of_files(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        Loads a processor that [`save_pretrained`] saved.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub id.
            verify (`str`, *optional*, defaults to `"probe"`): How much to check: `"none"`; `"probe"`, that the
                processor still returns the inputs that are saved in the checkpoint's probe; `"digests"`, also the
                SHA-256 of every file of the code and processor.
            kwargs: Arguments of [`~ProcessorMixin.from_pretrained`].

        Raises:
            ValueError: if the checkpoint has a plain processor (use [`from_vlm_pretrained`]) or a damaged one, the
                processor returns other inputs than it did when it was saved, or there are no digests to compare with.
            RuntimeError: if a file differs from its digest.
        """
        verify = kwargs.pop("verify", "probe")
        check_choice("verify", verify, VERIFY)
        if verify == "digests":
            check_digests(pretrained_model_name_or_path, kwargs, with_tensors=False)
        check_json(pretrained_model_name_or_path, (PROCESSOR_NAME,), kwargs)
        config, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        check_sizes(PROCESSOR_NAME, config, MAX_PROCESSOR_SIZE)
        if "vlm_processor_class" not in config:
            raise ValueError(
                f"The processor of {pretrained_model_name_or_path} has no embedding prompts. "
                f"`{cls.__name__}.from_vlm_pretrained(...)` loads it and adds them."
            )
        # Its parts name their classes themselves. Without an (empty) config, AutoTokenizer would load the model's and
        # run its code a second time, and whatever has a class of the first time could then not be pickled.
        kwargs["config"] = PreTrainedConfig()
        vlm_processor = load_backbone_processor(config["vlm_processor_class"], pretrained_model_name_or_path, **kwargs)
        names = ("prompts", "soft_prompts", "embedding_position", "image_pooling", "instructions")
        with errors_name(pretrained_model_name_or_path):
            processor = cls(vlm_processor, **{name: config[name] for name in names if name in config})
            if verify != "none":
                processor._check_probe(pretrained_model_name_or_path, kwargs)
        return processor

    def _check_probe(self, name, kwargs) -> None:
        probe_file = find_file(name, PROBE_NAME, kwargs)
        differences = [] if probe_file is None else processor_differences(self, load_probe(probe_file))
        if differences:
            raise ValueError(
                f"The processor of {name} no longer makes the inputs that it made when it was saved: "
                f"{'; '.join(differences)}. Its prompts, chat template, tokenizer or image processor have changed. "
                "`hf-unigd doctor` tells more, and `verify='none'` loads it without this check."
            )

    @classmethod
    def from_vlm_pretrained(
        cls,
        pretrained_model_name_or_path,
        prompts=None,
        embedding_position="prompt",
        image_pooling="mean",
        instructions=None,
        **kwargs,
    ):
        """
        Loads the processor of a plain vision-language model, and adds embedding prompts to it.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub id.
            prompts, embedding_position, image_pooling, instructions: Arguments of [`UniGDProcessor`].
            kwargs: Arguments of `AutoProcessor.from_pretrained`.
        """
        vlm_processor = AutoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(vlm_processor, prompts, None, embedding_position, image_pooling, instructions)


def _shape(value):
    return value.shape if isinstance(value, torch.Tensor) else None


UniGDProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["SequenceError", "UniGDFeatureExtractionPipeline", "UniGDProcessor"]
