"""Exporting a checkpoint as a plain model of its backbone's family, which needs no remote code.

Soft prompts become ordinary tokens, an adapter is merged, and the embedding prompt moves from our processor into a
second chat template, `embedding`. sentence-transformers' own modules hold the rest: last-token pooling, the head as
dense layers, and normalisation.
"""

import json
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.probe_unigd import probe_sequences
from ..modeling.sentence_files_unigd import save_sentence_files
from ..outputs import new_folder
from .loading import load_checkpoint


TARGETS = {"llava": "llava", "vlm": None}  # the model type that the backbone must have
TEMPLATE_NAME = "embedding"
_TEMPLATE = Path(__file__).with_name("embedding_template.jinja")


def export_checkpoint(name: str, output: str | Path, to: str = "llava", **kwargs) -> str:
    """
    Writes a checkpoint as a plain model of its backbone's family, with sentence-transformers' modules beside it.

    Args:
        name: Hub id or folder of a checkpoint or adapter.
        output: Folder to write, new or empty.
        to: `"llava"`, or `"vlm"` for the backbone's family, whichever it is.
        kwargs: Arguments of the model's `from_pretrained`: `dtype`, ...

    Returns:
        The name of the class that loads the export.

    Raises:
        ValueError: the backbone is of another family, or the checkpoint embeds in a way that needs our code.
        FileExistsError: `output` holds files.
        RuntimeError: the exported chat template does not give the tokens that the checkpoint was trained with.
    """
    with new_folder(output) as folder:
        model, processor = load_checkpoint(name, **kwargs)
        check_exportable(model, processor, to)
        _write(model, processor, folder)
    return type(model.vlm).__name__


def _write(model: UniGDForConditionalGeneration, processor: UniGDProcessor, folder: Path) -> None:
    model.vlm.save_pretrained(folder)
    vlm_processor = processor.vlm_processor
    chat_template = vlm_processor.chat_template
    # sentence-transformers and vLLM read the second template; generation keeps the backbone's own.
    vlm_processor.chat_template = {"default": chat_template, TEMPLATE_NAME: embedding_template(processor)}
    vlm_processor.save_pretrained(folder)
    _check_tokens(processor)
    vlm_processor.chat_template = chat_template
    save_sentence_files(folder, _sentence_modules(model), processor.instructions)
    for path, layer in _dense_layers(model).items():
        tensors = {"linear.weight": layer.weight.detach(), "linear.bias": layer.bias.detach()}
        save_file(tensors, folder / path / "model.safetensors", metadata={"format": "pt"})


def check_exportable(model: UniGDForConditionalGeneration, processor: UniGDProcessor, to: str) -> None:
    """
    Raises:
        ValueError: a plain model of the family `to` cannot embed like this one.
    """
    family = model.config.vlm_config.model_type
    if TARGETS[to] not in (None, family):
        raise ValueError(
            f"The backbone is of the family {family!r}, not {to!r}. `--to vlm` writes a plain "
            f"{type(model.vlm).__name__}."
        )
    if processor.embedding_position == "last_slice":
        raise ValueError(
            "`embedding_position='last_slice'` (Sugar) cannot be exported: a sequence that ends with an image is "
            f"embedded at the {processor.image_pooling} of that image's tokens, and one that ends with a text at its "
            "last token, before the template's answer mark. sentence-transformers and vLLM pool all sequences in the "
            "same way, over all tokens or at the last. Serve this checkpoint with its own code: "
            "`SentenceTransformer(DIR, trust_remote_code=True)`."
        )


def embedding_template(processor: UniGDProcessor) -> str:
    """A chat template that adds the embedding prompt to a sequence, as [`UniGDProcessor.process_sequences`] does.
    sentence-transformers makes an instruction the system's turn, from which it is moved to its place."""
    prompts = processor.embedding_prompts
    constants = {
        "KEEPS_ORDER": processor.chat_template_keeps_order,
        "IMAGE_PLACEHOLDER": processor.image_placeholder,
        "IMAGE_PROMPT": prompts["image"],
        "TEXT_PROMPT": prompts["text"],
        "INSTRUCTIONS": sorted(processor.instructions.values()),
    }
    assignments = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in constants.items())
    return assignments + _TEMPLATE.read_text(encoding="utf-8") + processor.chat_template


def _check_tokens(processor: UniGDProcessor) -> None:
    for sequence, instruction in product(probe_sequences(), [None, *processor.instructions.values()]):
        parts = [sequence] if isinstance(sequence, str) else sequence
        content = [
            {"type": "image", "image": part} if isinstance(part, Image.Image) else {"type": "text", "text": part}
            for part in parts
        ]
        turns = [{"role": "user", "content": content}]
        if instruction is not None:
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": instruction}]})
        exported = processor.vlm_processor.apply_chat_template(
            turns,
            chat_template=TEMPLATE_NAME,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        expected = processor.process_sequences([sequence], instruction=instruction)
        if not torch.equal(exported["input_ids"], expected["input_ids"]):
            raise RuntimeError(
                "The backbone's chat template, extended with the embedding prompt, makes other tokens than the "
                "checkpoint's processor. The export would give other embeddings; use the checkpoint itself."
            )


def _sentence_modules(model: UniGDForConditionalGeneration) -> list[tuple[str, str, dict]]:
    """The modules by which sentence-transformers embeds like `model`: their folders, classes and settings."""
    library = "sentence_transformers"
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            **dict.fromkeys(("text", "image", "image+text"), forward),
            "message": {**forward, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": {"chat_template": TEMPLATE_NAME}},
    }
    hidden_size = model.config.get_text_config().hidden_size
    pooling = {"embedding_dimension": hidden_size, "pooling_mode": "lasttoken", "include_prompt": True}
    modules = [
        ("", f"{library}.base.modules.transformer.Transformer", transformer),
        ("1_Pooling", f"{library}.sentence_transformer.modules.pooling.Pooling", pooling),
    ]
    layers = _dense_layers(model)
    for path, layer in layers.items():
        activation = "linear.Identity" if path == list(layers)[-1] else "activation.GELU"
        dense = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": True,
            "activation_function": f"torch.nn.modules.{activation}",
            "module_input_name": "sentence_embedding",
            "module_output_name": "sentence_embedding",
        }
        modules.append((path, f"{library}.base.modules.dense.Dense", dense))
    return [*modules, (f"{len(modules)}_Normalize", f"{library}.base.modules.normalize.Normalize", {})]


def _dense_layers(model: UniGDForConditionalGeneration) -> dict[str, nn.Linear]:
    """The head's linear layers, by the folder of the sentence-transformers module that each becomes."""
    layers = [module for module in model.embedding_head.projection.modules() if isinstance(module, nn.Linear)]
    return {f"{place}_Dense": layer for place, layer in enumerate(layers, start=2)}
