"""Our retrieval and MTEB's on the same images and captions."""

import mteb
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import SentenceTransformerEncoderWrapper

from evaluation_cases import evaluated, karpathy_rows
from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.evaluation.embedders import ModelEmbedder
from hf_unigd.evaluation.mteb_tasks import run_tasks
from mteb_tasks import CAPTIONS, COUNT, IMAGES, PairClassification, ZeroShot
from tiny_models import make_vlm


class Duplicated(AbsTaskRetrieval):
    """Text-to-image retrieval with captions that several images have, as MTEB keeps it: by ids."""

    metadata = TaskMetadata(
        name="DuplicatedCaptions",
        description="Images made in code.",
        reference=None,
        dataset={"path": "local", "revision": "1"},
        type="Any2AnyRetrieval",
        category="t2i",
        modalities=["image", "text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="hit_rate_at_1",
    )
    rows = karpathy_rows(same=7)  # equal images would be ranked by chance

    def load_data(self, *args, **kwargs):
        queries = [
            {"id": f"q{key}", "text": text}
            for row in self.rows
            for text, key in zip(row["caption"], row["caption_id"], strict=True)
        ]
        corpus = [{"id": row["image_id"], "image": row["image"]} for row in self.rows]
        relevant = {f"q{key}": {row["image_id"]: 1} for row in self.rows for key in row["caption_id"]}
        split = {
            "queries": Dataset.from_list(queries),
            "corpus": Dataset.from_list(corpus),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def test_recall_on_duplicated_captions_is_mtebs(tmp_path):
    tiny = make_vlm()
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    model.processor = processor
    model.save_pretrained(tmp_path)
    wrapped = SentenceTransformerEncoderWrapper(str(tmp_path), trust_remote_code=True, device="cpu")
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update={"modalities": ["image", "text"]})
    scores = mteb.evaluate(wrapped, [Duplicated()], cache=None, show_progress_bar=False)[0].scores["test"][0]
    found = evaluated(Duplicated.rows, ModelEmbedder(model, processor, "llava")).metrics
    for k in (1, 5, 10):
        assert found[f"positive_to_anchor_recall_at_{k}"] == pytest.approx(scores[f"hit_rate_at_{k}"], abs=1e-5)


def test_mtebs_tasks_run_on_whatever_embeds_and_write_its_json(tmp_path, monkeypatch):
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    tasks = {"zero": ZeroShot(), "pairs": PairClassification()}
    monkeypatch.setattr(mteb, "get_tasks", lambda names: [tasks[name] for name in names])
    tiny = make_vlm()
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    embedder = ModelEmbedder(model, processor, "you/model")
    found = run_tasks(embedder, ["zero", "pairs"])
    images = embedder.embed([[image] for image in IMAGES])
    labels = embedder.embed([["a cat"], ["two dogs"]])
    right = [(vector @ labels.T).argmax().item() == place % 2 for place, vector in enumerate(images)]
    assert found[ZeroShot.metadata.name]["accuracy"] == pytest.approx(sum(right) / len(right))
    texts = embedder.embed([[text] for text in CAPTIONS])
    matched = [
        (vector @ texts[place] > vector @ texts[(place + 1) % COUNT]).item() for place, vector in enumerate(images)
    ]
    assert found[PairClassification.metadata.name]["text_acc"] == pytest.approx(sum(matched) / COUNT)
    assert "top5_accuracy" not in found[ZeroShot.metadata.name]  # of two classes
    written = [file.name for file in (tmp_path / "cache").rglob("*.json")]
    assert f"{ZeroShot.metadata.name}.json" in written


class SevenClasses(ZeroShot):
    metadata = ZeroShot.metadata.model_copy(update={"name": "SevenClasses"})
    labels = tuple(f"{number} red cats" for number in range(7))

    def rows(self):
        names = [str(number) for number in range(7)]
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"image": IMAGES, "label": [place % 7 for place in range(COUNT)]}, features=features)

    def get_candidate_labels(self):
        return list(self.labels)


def test_zero_shot_tasks_measure_the_first_five_classes_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mteb, "get_tasks", lambda names: [SevenClasses()])
    tiny = make_vlm()
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    embedder = ModelEmbedder(model, processor, "you/model")
    found = run_tasks(embedder, ["SevenClasses"])["SevenClasses"]
    similarities = (
        embedder.embed([[image] for image in IMAGES]) @ embedder.embed([[text] for text in SevenClasses.labels]).T
    )
    ranks = [(own > own[place % 7]).sum().item() for place, own in enumerate(similarities)]
    assert found["accuracy"] == pytest.approx(sum(rank == 0 for rank in ranks) / COUNT)
    assert found["top5_accuracy"] == pytest.approx(sum(rank < 5 for rank in ranks) / COUNT)
    assert found["accuracy"] < found["top5_accuracy"] < 1
    (file,) = (tmp_path / "cache").rglob("SevenClasses.json")
    assert "top5_accuracy" in file.read_text()
