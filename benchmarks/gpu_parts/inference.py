"""Embedding and generation."""

import time

from measuring import measure
from models import SHAPES, make_image, make_model, make_text

from hf_unigd.bulk.sequences import embed_sequences


def embed() -> dict:
    def run(sequences, batch_size):
        model, processor = make_model()
        found = measure(
            lambda: embed_sequences(model, processor, sequences, batch_size, show_progress=False), SHAPES["repeats"]
        )
        start = time.perf_counter()
        processor.process_sequences(sequences[:32])
        found["processor_per_second"] = len(sequences[:32]) / (time.perf_counter() - start)
        return found | {"per_second": len(sequences) / found["seconds"], "batch_size": batch_size}

    texts, images = SHAPES["texts"], SHAPES["images"]
    return {
        f"{texts} texts of 5 to 104 words": lambda: run(
            [make_text(5 + place * 37 % 100, place) for place in range(texts)], 64
        ),
        f"{images} images": lambda: run([make_image(place) for place in range(images)], 32),
    }


def generate() -> dict:
    def run():
        model, processor = make_model()
        count = min(16, SHAPES["images"])
        batch = processor.process_sequences([make_image(place) for place in range(count)], padding_side="left")
        batch = batch.to(SHAPES["device"], model.dtype)
        plain = {name: value for name, value in batch.items() if name != "spans"}
        settings = dict.fromkeys(("min_new_tokens", "max_new_tokens"), SHAPES["new_tokens"]) | {"do_sample": False}
        found = {
            "ours": measure(lambda: model.generate(**batch, **settings), SHAPES["repeats"]),
            "backbone": measure(lambda: model.vlm.generate(**plain, **settings), SHAPES["repeats"]),
        }
        for each in found.values():
            each["tokens_per_second"] = count * SHAPES["new_tokens"] / each["seconds"]
        return found | {"ratio": found["ours"]["seconds"] / found["backbone"]["seconds"]}

    return {f"{SHAPES['new_tokens']} tokens of each of {min(16, SHAPES['images'])} images": run}
