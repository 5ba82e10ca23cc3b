"""Training steps: VladVA's, Sugar's, and one that is compiled."""

import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from datasets import Dataset
from measuring import Clock, Turns
from models import SHAPES, make_image, make_model, make_rows, make_text
from peft import LoraConfig
from transformers import PrinterCallback

from hf_unigd import UniGDTrainer, UniGDTrainingArguments
from hf_unigd.data.teachers import slice_columns
from hf_unigd.trainer.losses import InfoNCELoss


PEAK_FLOPS = {"H100 80GB HBM3": 989.4e12, "H200": 989.4e12}  # dense bfloat16, by a part of the GPU's name


def train_steps(model, processor, rows, repeats, trainer_class=UniGDTrainer, warmup=1, lora=None, **kwargs):
    """Trains for `warmup + repeats` steps on all rows at once. Returns the results and the batch."""
    args = UniGDTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(rows),
        max_steps=warmup + repeats,
        use_cpu=SHAPES["device"] == "cpu",
        bf16=True,
        trust_caption_columns=True,
        check_rows="off",
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **kwargs,
    )
    turns = Turns()
    trainer = trainer_class(
        model, args, train_dataset=rows, processing_class=processor, callbacks=[turns], peft_config=lora
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(len(rows))])
    collator_seconds = time.perf_counter() - start
    trainer.train()
    found = turns.summary(warmup)
    found["rows_per_second"] = len(rows) / found["seconds"]
    # What a worker of a data loader does: it reads and decodes the rows, and collates them on one thread.
    found["collator_rows_per_second"] = len(rows) / collator_seconds
    found["losses"] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return found, batch


def utilization(batch: dict, seconds: float, chunk_size: int | None, checkpointing: bool) -> dict:
    """The floating-point operations of a step, as the docstring of this file counts them."""
    image_size, patch_size, vision, text = SHAPES["large"]

    def weights(width, layers, heads, key_value_heads, inner, matrices):
        return layers * (2 * width * width * (1 + key_value_heads / heads) + matrices * width * inner)

    width, layers = text[:2]
    patches = (image_size // patch_size) ** 2 + 1
    lengths = torch.cat([chunk["attention_mask"].sum(1) for chunk in batch["chunks"]]).double()
    labelled = sum(int(chunk["labels"].ne(-100).sum()) for chunk in batch["chunks"])
    images = sum(len(chunk.get("pixel_values", ())) for chunk in batch["chunks"])
    decoder = float((2 * weights(*text, 3) * lengths + 2 * lengths**2 * width * layers).sum())
    logits = 2 * SHAPES["vocab_size"] * width * labelled
    tower = 2 * weights(*vision, 2) * patches + 4 * patches**2 * vision[0] * vision[1]
    tower += 2 * patches * (vision[0] * width + width * width)  # the projector
    needed = 2 * (decoder + logits) + images * tower
    done = needed + decoder * (checkpointing + (chunk_size is not None))
    name = torch.cuda.get_device_name() if SHAPES["device"] == "cuda" else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    return {
        "tokens": int(lengths.sum()),
        "tokens_per_second": float(lengths.sum()) / seconds,
        "model_flops": needed,
        "mfu": peak and needed / seconds / peak,
        "hfu": peak and done / seconds / peak,
    }


class TwoPasses(UniGDTrainer):
    """Trains with one pass per loss on inputs of its own, as without this library."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inner = self.accelerator.unwrap_model(model).train()
        captioned, texts = self._prepare_inputs(inputs)["chunks"]
        ends = captioned.pop("spans")[:, 2].unique()
        queries = {name: captioned[name][:, : int(ends)] for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            embeddings = [
                inner.embed(**each) for each in (queries | {"pixel_values": captioned["pixel_values"]}, texts)
            ]
            scale = inner.embedding_head.inverse_temperature
            contrastive = InfoNCELoss()(*embeddings, scale)["loss"]
        self.accelerator.backward(contrastive)
        with self.accelerator.autocast():
            causal_lm = inner.vlm(**captioned, num_items_in_batch=num_items_in_batch, use_cache=False).loss
        self.accelerator.backward(causal_lm)
        return (contrastive + causal_lm).detach()


def vladva(rows: int, chunk_size: int | None, checkpointing: bool, trainer_class=UniGDTrainer) -> dict:
    model, processor = make_model()
    model.add_soft_prompts(**processor.add_soft_prompts())
    found, batch = train_steps(
        model,
        processor,
        make_rows(rows),
        2 if rows == SHAPES["rows"] else SHAPES["repeats"],
        trainer_class,
        lora=LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM"),
        gradient_cache_chunk_size=chunk_size,
        gradient_checkpointing=checkpointing,
        learning_rate=1e-4,
    )
    if trainer_class is UniGDTrainer:
        found |= utilization(batch, found["seconds"], chunk_size, checkpointing)
    return found


def train() -> dict:
    rows, few, chunk = SHAPES["rows"], SHAPES["rows_without_cache"], SHAPES["chunk_size"]
    parts = {
        f"{rows} rows, chunks of {chunk}, checkpointing": lambda: vladva(rows, chunk, True),
        f"{chunk} rows, checkpointing": lambda: vladva(chunk, None, True),
        f"{chunk} rows, checkpointing, two passes": lambda: vladva(chunk, None, True, TwoPasses),
        f"{few} rows, checkpointing": lambda: vladva(few, None, True),
    }
    for size in SHAPES["chunk_sizes_without_checkpointing"]:
        parts[f"{few} rows, chunks of {size}"] = lambda size=size: vladva(few, size, False)
    return parts


class RandomTeachers:
    """Random unit vectors, as wide as the frozen encoders' of each slice."""

    truncated = 0

    def modality_columns(self, triple_kernel: bool) -> dict:
        return slice_columns(SHAPES["teacher_width"], SHAPES["teacher_width"], triple_kernel)

    def __call__(self, slices: list) -> torch.Tensor:
        vectors = torch.randn(len(slices), 2, SHAPES["teacher_width"], device=SHAPES["device"])
        return F.normalize(vectors, dim=-1).flatten(1)


def sugar() -> dict:
    def run():
        model, processor = make_model(position="last_slice", head_type="mlp", embedding_dim=SHAPES["embedding_dim"])
        images = SHAPES["images_per_story"]
        stories = [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": " ".join(
                            f"{make_text(12, images * place + n)}. <image>" for n in range(images)
                        ).capitalize(),
                    },
                    {"role": "assistant", "content": f"The {make_text(30, place)}. The {make_text(20, 500 + place)}."},
                ],
                "images": [make_image(images * place + n) for n in range(images)],
            }
            for place in range(SHAPES["stories"])
        ]
        clock, shares = Clock(), []

        class Trainer(UniGDTrainer):
            teachers = RandomTeachers()

            def batch_losses(self, *args):
                clock.start()
                losses = super().batch_losses(*args)
                shares.append(clock.stop())
                return losses

        found, batch = train_steps(
            model,
            processor,
            Dataset.from_list(stories),
            2,
            trainer_class=Trainer,
            lora=LoraConfig(r=128, lora_alpha=256, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            gradient_checkpointing=True,
            alignment_weight=1.0,
            contrastive_weight=0.0,
        )
        structure = batch["structure"]
        found["structure_loss_seconds"] = statistics.median(shares[1:])  # with two synchronisations of the GPU
        found["structure_loss_share"] = found["structure_loss_seconds"] / found["seconds"]
        found |= {"slices": len(structure["modalities"]), "positions": len(structure["starts"])}
        return found | utilization(batch, found["seconds"], None, True)

    return {f"{SHAPES['stories']} rows of {SHAPES['images_per_story']} images, checkpointing": run}


def compile_() -> dict:
    def run(**kwargs):
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        model, processor = make_model("small", torch.float32)
        found, _ = train_steps(model, processor, make_rows(SHAPES["rows_without_cache"]), 5, warmup=3, **kwargs)
        found["first_step_seconds"] = found["all_seconds"][0]
        found["graphs"] = counters["stats"]["unique_graphs"]
        found["graph_breaks"] = {reason.split("\n")[0][:200]: n for reason, n in counters["graph_break"].items()}
        return found

    return {"eager": run, "torch_compile": lambda: run(torch_compile=True)}
