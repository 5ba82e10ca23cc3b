"""Compares training and embedding with their peers: `python benchmarks/training.py [joint] [cached] [sft] [embed]`.

The model is a small LLaVA with random weights, whose vision tower and language model have the proportions of CLIP
ViT-L/14 and SmolLM2-135M. Every peer gets the same backbone, the same rows and, if it takes tensors, the same tensors.
In each repeat the peers take turns. Times are medians, and ratios are medians of the ratio in each repeat. Memory is
the peak of torch's allocator in a step above what it held before. The script writes
benchmarks/results/training-*.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import LlavaConfig, LlavaForConditionalGeneration

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, UniGDTrainer, UniGDTrainingArguments
from hf_unigd.bulk.sequences import embed_sequences
from hf_unigd.hub.export import export_checkpoint
from hf_unigd.quickstart.small_llava import build_processor
from hf_unigd.trainer.losses import InfoNCELoss


RESULTS = Path(__file__).parent / "results"
TEXT = "a red cat sits on the green grass beside two small blue dogs and looks at people who wave from a window"
WORDS = TEXT.split()


def make_text(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[place] for place in torch.randint(0, len(WORDS), (count,), generator=generator).tolist())


def make_image(seed: int, size: int = 168) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def make_rows(count: int, long_captions: bool) -> Dataset:
    """Rows with short captions of 6 to 20 words and long captions of 30 to 90 words."""
    columns = {
        "image": [make_image(place) for place in range(count)],
        "short_caption": [make_text(6 + place * 7 % 15, place) for place in range(count)],
    }
    if long_captions:
        columns["long_caption"] = [make_text(30 + place * 23 % 61, 1000 + place) for place in range(count)]
    return Dataset.from_dict(columns)


def make_processor():
    return build_processor([TEXT, "Summarize the provided image in one word"], 168, 14)


def make_vlm(processor) -> LlavaForConditionalGeneration:
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 168,
            "patch_size": 14,
            "hidden_size": 448,
            "intermediate_size": 1792,
            "num_hidden_layers": 6,
            "num_attention_heads": 7,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 16384,
            "hidden_size": 256,
            "intermediate_size": 683,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1024,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=144,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def make_trainer(batch_size: int, long_captions: bool = True, **kwargs) -> tuple[UniGDTrainer, dict]:
    """Returns a trainer and one batch."""
    processor = UniGDProcessor(make_processor())
    args = UniGDTrainingArguments(
        trust_caption_columns=True,
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        use_cpu=True,
        report_to=[],
        loss_gradient_norm_steps=0,
        gradient_accumulation_steps=1,
        **kwargs,
    )
    model = UniGDForConditionalGeneration.from_vlm(make_vlm(processor))
    trainer = UniGDTrainer(model, args, train_dataset=make_rows(batch_size, long_captions), processing_class=processor)
    trainer.create_optimizer()
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(batch_size)])
    model.train()
    return trainer, batch


def make_step(trainer, batch):
    tokens = trainer._get_num_items_in_batch([batch], "cpu")

    def step():
        loss = trainer.training_step(trainer.model, batch, tokens)
        trainer.model.zero_grad()
        return float(loss)

    return step


def joint() -> dict:
    """The contrastive and the next-token loss on an image, a short and a long caption: our step, and two passes."""
    trainer, batch = make_trainer(16)
    tokens = trainer._get_num_items_in_batch([batch], "cpu")
    peer, _ = make_trainer(16)
    model, processor, loss_function = peer.model, peer.processing_class, InfoNCELoss()
    images = [[make_image(place)] for place in range(16)]
    queries = processor.process_sequences(images, padding_side="right")
    captioned, texts = batch["chunks"]
    captioned = {name: value for name, value in captioned.items() if name != "spans"}

    def two_passes():
        scale = model.embedding_head.logit_scale.exp().squeeze()
        contrastive = loss_function(model.embed(**queries), model.embed(**texts), scale)["loss"]
        contrastive.backward()
        causal_lm = model.vlm(**captioned, num_items_in_batch=tokens).loss
        causal_lm.backward()
        model.zero_grad()
        return float(contrastive + causal_lm)

    return compare("joint", {"ours": make_step(trainer, batch), "two passes": two_passes}, same_loss=1e-4)


def cached() -> dict:
    """The contrastive loss alone on 32 pairs in chunks of 8, with the vision tower frozen or trained: our step, and
    sentence-transformers'."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    found = {}
    for frozen in (True, False):
        trainer, batch = make_trainer(
            32, False, causal_lm_weight=0.0, gradient_cache_chunk_size=8, freeze_vision_tower=frozen
        )
        whole, _ = make_trainer(32, False, causal_lm_weight=0.0)
        collated = whole.data_collator([whole.train_dataset[place] for place in range(32)])
        with tempfile.TemporaryDirectory() as folder:
            processor = make_processor()
            make_vlm(processor).save_pretrained(folder)
            processor.save_pretrained(folder)
            transformer = Transformer(folder)
        peer = SentenceTransformer(
            modules=[transformer, Pooling(256, pooling_mode="lasttoken"), Normalize()], device="cpu"
        ).train()
        if frozen:
            for name, parameter in peer.named_parameters():
                if "vision_tower" in name or "projector" in name:
                    parameter.requires_grad_(False)
        features = []
        for chunk in collated["chunks"]:
            inputs = {name: value for name, value in chunk.items() if name not in ("spans", "labels")}
            if "pixel_values" in inputs:
                inputs["num_images_per_sample"] = torch.ones(32, dtype=torch.long)
            features.append({**inputs, "modality": "message"})
        scale = float(trainer.model.embedding_head.logit_scale.exp())
        loss_function = CachedMultipleNegativesRankingLoss(
            peer, scale, mini_batch_size=8, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        )

        def theirs(loss_function=loss_function, features=features, peer=peer):
            loss = loss_function([dict(each) for each in features], None)
            loss.backward()
            peer.zero_grad()
            return float(loss)

        name = f"cached, {'frozen' if frozen else 'trained'} tower"
        found |= compare(name, {"ours": make_step(trainer, batch), "sentence-transformers": theirs})
    return found


def sft() -> dict:
    """The next-token loss alone: our step, and that of TRL's SFTTrainer on the same tensors."""
    from trl import SFTConfig, SFTTrainer

    trainer, batch = make_trainer(16, contrastive_weight=0.0)
    (chunk,) = batch["chunks"]
    chunk = {name: value for name, value in chunk.items() if name != "spans"}
    tokens = trainer._get_num_items_in_batch([batch], "cpu")
    processor = make_processor()
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    peer = SFTTrainer(
        make_vlm(processor),
        SFTConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, report_to=[], max_length=None, bf16=False,
                  gradient_checkpointing=False, per_device_train_batch_size=16),
        train_dataset=Dataset.from_dict({"messages": [messages] * 4, "images": [[make_image(0)]] * 4}),
        processing_class=processor,
    )  # fmt: skip
    peer.current_gradient_accumulation_steps = 1
    for name, parameter in peer.model.named_parameters():
        if "vision_tower" in name or "projector" in name:
            parameter.requires_grad_(False)

    def theirs():
        loss = peer.training_step(peer.model, dict(chunk), tokens)
        peer.model.zero_grad()
        return float(loss)

    return compare("sft", {"ours": make_step(trainer, batch), "SFTTrainer": theirs}, same_loss=1e-5)


def embed() -> dict:
    """Embeds 192 rows (texts, images, images with texts) with `embed_sequences`, and with `SentenceTransformer.encode`
    of the same model, exported.

    Texts have 5 to 104 words, or 4 to 400 words with as many up to 40 words as above, like captions, queries and
    passages.
    """
    from sentence_transformers import SentenceTransformer

    processor = UniGDProcessor(make_processor())
    model = UniGDForConditionalGeneration.from_vlm(make_vlm(processor), head_type="none").eval()
    lengths = {
        "5 to 104 words": [5 + place * 37 % 100 for place in range(192)],
        "4 to 400 words": [round(4 * 100 ** (place * 37 % 192 / 191)) for place in range(192)],
    }
    model.processor = processor
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/ours")
        export_checkpoint(f"{folder}/ours", f"{folder}/plain")
        peer = SentenceTransformer(f"{folder}/plain", device="cpu").eval()

    def as_input(sequence):
        if isinstance(sequence, str):
            return sequence
        image, *text = sequence
        return {"image": image, "text": text[0]} if text else image

    found = {}
    for name, counts in lengths.items():
        sequences = [
            (make_text(count, place), [make_image(place)], [make_image(place), make_text(count, place)])[place % 3]
            for place, count in enumerate(counts)
        ]
        inputs = [as_input(sequence) for sequence in sequences]

        def ours(sequences=sequences):
            return embed_sequences(model, processor, sequences, 32, show_progress=False)

        def theirs(inputs=inputs):
            return peer.encode(inputs, batch_size=32, convert_to_tensor=True, show_progress_bar=False)

        assert (ours() - theirs()).abs().max() < 1e-5
        found |= compare(f"embed, {name}", {"ours": ours, "sentence-transformers": theirs})
    return found


def compare(name: str, peers: dict, same_loss: float | None = None) -> dict:
    """Times the peers in turns. Prints and returns the results."""
    results = {peer: step() for peer, step in peers.items()}  # warm-up
    if same_loss is not None:
        ours, theirs = results.values()
        assert abs(ours - theirs) <= same_loss * abs(theirs), results
    times: dict[str, list[float]] = {peer: [] for peer in peers}
    for _ in range(REPEATS):
        for peer, step in peers.items():
            start = time.perf_counter()
            step()
            times[peer].append(time.perf_counter() - start)
    ours, theirs = times.values()
    found = {
        "seconds": {peer: statistics.median(each) for peer, each in times.items()},
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "peak_bytes": {peer: peak(step) for peer, step in peers.items()},
        "repeats": REPEATS,
    }
    if same_loss is not None:
        found["losses"] = results
    seconds = ", ".join(f"{peer} {value:.2f} s" for peer, value in found["seconds"].items())
    memory = ", ".join(f"{peer} {value / 1e6:.0f} MB" for peer, value in found["peak_bytes"].items())
    print(f"{name}: {seconds}; ratio {found['ratio']:.2f}; {memory}", flush=True)
    return {name: found}


def peak(step) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        held = torch.zeros(1)
        step()
    with tempfile.TemporaryDirectory() as folder:
        recording.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    del held
    return max(totals) - totals[0]


def versions() -> dict:
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "peft", "trl", "sentence-transformers")
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": cpu[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


BENCHMARKS = {"joint": joint, "cached": cached, "sft": sft, "embed": embed}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    REPEATS = arguments.repeats
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    for benchmark in arguments.names:
        command = f"python benchmarks/training.py {benchmark} --repeats {REPEATS} --threads {arguments.threads}"
        result = {"command": command, **versions(), "results": BENCHMARKS[benchmark]()}
        (RESULTS / f"training-{benchmark}.json").write_text(json.dumps(result, indent=1) + "\n")
