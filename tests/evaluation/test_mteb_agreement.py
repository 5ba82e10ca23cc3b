"""Our retrieval and MTEB's on the same images and captions."""

import mteb
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import SentenceTransformerEncoderWrapper

from evaluation_cases import evaluated, karpathy_rows
from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.evaluation.embedders import ModelEmbedder
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
