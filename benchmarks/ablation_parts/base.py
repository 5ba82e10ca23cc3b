"""The generative model that every arm starts from: a LLaVA of five million parameters that has learned to speak."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.trainer_utils import get_last_checkpoint

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, UniGDTrainer, UniGDTrainingArguments
from hf_unigd.outputs import writing
from hf_unigd.quickstart.muon import MuonWithAdamW
from hf_unigd.quickstart.small_llava import build_llava, build_processor
from hf_unigd.quickstart.training import fast_matrix_products

from . import records
from .captions import caption_accuracy, generate_captions
from .corpus import ALL_ANSWERS, QUESTIONS, SHORT_ANSWERS, SIDE, SINGLE_THINGS, pretraining_rows, scenes, texts


FOLDER, FACTS = Path("runs/ablations/base"), "pretraining.json"
PATCH_SIZE, VOCABULARY = 16, 3000
SHAPE = {"hidden_size": 224, "vision_layers": 4, "text_layers": 3}
BATCH_SIZE, WARMUP_STEPS = 128, 30
SHOWN = 6  # unseen pictures whose captions the page shows


@dataclass(frozen=True)
class Stage:
    """
    A stage of pretraining.

    Attributes:
        shares: Shares of the rows.
        steps: Number of steps. Their batches hold rows of all kinds, as those of one kind pull the model to and fro.
    """

    shares: Mapping[tuple[str, str], float]
    steps: int


STAGES = (Stage(SINGLE_THINGS, 250), Stage(SHORT_ANSWERS, 500), Stage(ALL_ANSWERS, 450))


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained model, and a processor whose tokenizer is trained on the texts of the training rows."""
    processor = build_processor(list(texts()), SIDE, PATCH_SIZE, VOCABULARY)
    vlm = build_llava(processor, **SHAPE)
    positions = vlm.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():  # those of the library are a fiftieth of what a patch is
        positions[1:] = sine_positions(SIDE // PATCH_SIZE, positions.shape[1])
    return vlm, processor


def sine_positions(side: int, dim: int, base: float = 100.0) -> torch.Tensor:
    """
    Sines and cosines of the columns and the rows of patches (Beyer, Zhai and Kolesnikov, "Better plain ViT baselines
    for ImageNet-1k", 2022).

    Returns:
        `torch.FloatTensor` of shape `(side * side, dim)`. `dim` is a multiple of 4.
    """
    rates = base ** -torch.linspace(0, 1, dim // 4)
    down, across = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [places.flatten()[:, None] * rates for places in (across, down)]
    return torch.cat([wave(each) for each in angles for wave in (torch.sin, torch.cos)], dim=1)


def pretrain(folder: Path = FOLDER) -> None:
    """
    Trains a base model by next-token prediction alone, from where it was stopped, and writes it with
    `pretraining.json`.

    Args:
        folder: The folder to write. `FOLDER-training` beside it keeps the checkpoints.
    """
    start = time.perf_counter()
    vlm, vlm_processor = build()
    parameters = sum(parameter.numel() for parameter in vlm.parameters())
    print(f"A LLaVA of {parameters / 1e6:.1f} million parameters.", flush=True)
    model, processor = UniGDForConditionalGeneration.from_vlm(vlm), UniGDProcessor(vlm_processor)
    model.verify_saves = False
    was_stopped = False
    for number, stage in enumerate(STAGES):
        checkpoints = folder.with_name(f"{folder.name}-training") / str(number)
        stopped = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        was_stopped = was_stopped or stopped is not None
        trainer = UniGDTrainer(
            model,
            UniGDTrainingArguments(
                output_dir=str(checkpoints),
                max_steps=stage.steps,
                per_device_train_batch_size=BATCH_SIZE,
                warmup_steps=WARMUP_STEPS,
                contrastive_weight=0.0,
                freeze_vision_tower=False,
                check_rows="off",
                save_steps=100,
                save_total_limit=1,
                logging_steps=25,
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=pretraining_rows(stage.shares),
            processing_class=processor,
            optimizers=(MuonWithAdamW(model), None),
        )
        with fast_matrix_products():
            trainer.train(resume_from_checkpoint=stopped)
    record = {
        "parameters": parameters,
        "steps": sum(stage.steps for stage in STAGES),
        "batch_size": BATCH_SIZE,
        # Of a run that was stopped, the minutes before are not known.
        "minutes": None if was_stopped else round((time.perf_counter() - start) / 60, 1),
    }
    with writing(folder) as unfinished:
        vlm.save_pretrained(unfinished)
        vlm_processor.save_pretrained(unfinished)
        (unfinished / FACTS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def make_base(folder: Path = FOLDER) -> None:
    """Pretrains the base model if it does not exist, and records how often its captions of unseen pictures are
    right."""
    if not folder.is_dir():
        pretrain(folder)
    own = records.digest(folder / "model.safetensors")
    file = records.RESULTS / "base.json"
    if records.read(file).get("base") != own:
        model = UniGDForConditionalGeneration.from_vlm_pretrained(str(folder))
        processor = UniGDProcessor.from_vlm_pretrained(str(folder))
        captions = caption_accuracy(model, processor)
        shown = scenes("test").select(range(SHOWN))[:]["image"]
        said = generate_captions(model, processor, shown, QUESTIONS["description"][0])
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        records.write(file, {"base": own, **facts, "captions": captions, "said": said})
        print(json.dumps(captions, indent=1), flush=True)
