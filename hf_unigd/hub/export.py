"""A checkpoint as a plain model of its backbone's family, which needs no remote code.

Soft prompts become ordinary tokens, an adapter is merged, and the embedding prompt moves from our processor into a
second chat template, `embedding`. sentence-transformers' own modules hold the rest: last-token pooling, the head as
dense layers, normalisation.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.probe_unigd import probe_sequences
from .loading import load_checkpoint
from .merging import new_folder


TARGETS = {"llava": "llava", "vlm": None}  # model type that the backbone must have
TEMPLATE_NAME = "embedding"
_TEMPLATE = Path(__file__).with_name("embedding_template.jinja")


def export_checkpoint(name: str, output: str | Path, to: str = "llava", **kwargs) -> str:
    """
    Writes a checkpoint as a plain model of its backbone's family, with sentence-transformers' modules beside it.

    Args:
        name: Hub id or folder of a checkpoint or adapter.
        output: Folder to write, new or empty.
        to: `"llava"`, or `"vlm"` for whatever family the backbone is of.
        kwargs: For `from_pretrained` of the model: `dtype`, ...

    Returns:
        Name of the class that loads it.

    Raises:
        ValueError: the backbone is of another family, or the checkpoint embeds in a way that needs our code.
        FileExistsError: `output` holds files.
        RuntimeError: the written templates do not make the tokens that the checkpoint was trained with.
    """
    model, processor = load_checkpoint(name, **kwargs)
    check_exportable(model, processor, to)
    folder = new_folder(output)
    model.vlm.save_pretrained(folder)
    vlm_processor = processor.vlm_processor
    chat_template = vlm_processor.chat_template
    # sentence-transformers and vLLM read this one; generation keeps the backbone's.
    vlm_processor.chat_template = {"default": chat_template, TEMPLATE_NAME: embedding_template(processor)}
    vlm_processor.save_pretrained(folder)
    _check_tokens(processor)
    vlm_processor.chat_template = chat_template
    _save_sentence_transformer(model, folder)
    return type(model.vlm).__name__


def check_exportable(model: UniGDForConditionalGeneration, processor: UniGDProcessor, to: str) -> None:
    """
    Raises:
        ValueError: a plain model of the family `to` cannot embed as this one does.
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
            f"embedded at the {processor.image_pooling} of that image's tokens, one that ends with a text at its last "
            "token, before the template's answer mark. sentence-transformers and vLLM pool every sequence in one way, "
            "over all of its tokens or at the last. Serve this checkpoint with its own code: "
            "`SentenceTransformer(DIR, trust_remote_code=True)`."
        )


def embedding_template(processor: UniGDProcessor) -> str:
    """The chat template that renders a sequence with its embedding prompt, as [`UniGDProcessor.process_sequences`]."""
    placeholder = processor.image_placeholder
    prompts = {
        modality: "".join(processor.soft_prompts[modality]) if processor.soft_prompts else prompt
        for modality, prompt in processor.prompts.items()
    }
    constants = {
        "IMAGE_PLACEHOLDER": placeholder,
        "IMAGES_TOUCH": placeholder.strip() == placeholder,
        "IMAGE_PROMPT": prompts["image"],
        "TEXT_PROMPT": prompts["text"],
    }
    assignments = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in constants.items())
    return assignments + _TEMPLATE.read_text(encoding="utf-8") + processor.chat_template


def _check_tokens(processor: UniGDProcessor) -> None:
    for sequence in probe_sequences():
        parts = [sequence] if isinstance(sequence, str) else sequence
        content = [
            {"type": "image", "image": part} if isinstance(part, Image.Image) else {"type": "text", "text": part}
            for part in parts
        ]
        exported = processor.vlm_processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=TEMPLATE_NAME,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        if not torch.equal(exported["input_ids"], processor.process_sequences([sequence])["input_ids"]):
            raise RuntimeError(
                "The backbone's chat template, extended with the embedding prompt, makes other tokens than the "
                "checkpoint's processor. The export would embed otherwise; use the checkpoint itself."
            )


def _save_sentence_transformer(model: UniGDForConditionalGeneration, folder: Path) -> None:
    hidden_size = model.config.get_text_config().hidden_size
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
    _write_json(folder / "sentence_bert_config.json", transformer)
    library = "sentence_transformers"
    modules = [("", f"{library}.base.modules.transformer.Transformer")]

    modules.append(("1_Pooling", f"{library}.sentence_transformer.modules.pooling.Pooling"))
    pooling = {"embedding_dimension": hidden_size, "pooling_mode": "lasttoken", "include_prompt": True}
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    layers = [module for module in model.embedding_head.projection.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        activation = "linear.Identity" if layer is layers[-1] else "activation.GELU"
        path = f"{len(modules)}_Dense"
        modules.append((path, f"{library}.base.modules.dense.Dense"))
        dense = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": True,
            "activation_function": f"torch.nn.modules.{activation}",
            "module_input_name": "sentence_embedding",
            "module_output_name": "sentence_embedding",
        }
        _write_json(folder / path / "config.json", dense)
        tensors = {"linear.weight": layer.weight.detach(), "linear.bias": layer.bias.detach()}
        save_file(tensors, folder / path / "model.safetensors", metadata={"format": "pt"})
    modules.append((f"{len(modules)}_Normalize", f"{library}.base.modules.normalize.Normalize"))
    (folder / modules[-1][0]).mkdir()
    entries = [{"idx": idx, "name": str(idx), "path": path, "type": kind} for idx, (path, kind) in enumerate(modules)]
    _write_json(folder / "modules.json", entries)
    settings: dict[str, object] = {"similarity_fn_name": "cosine", "prompts": {}, "default_prompt_name": None}
    _write_json(folder / "config_sentence_transformers.json", settings)


def _write_json(file: Path, content) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
