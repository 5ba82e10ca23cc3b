"""MTEB's abstract tasks of images and texts, fed with a few local images."""

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.clustering import AbsTaskClustering
from mteb.abstasks.image.image_text_pair_classification import AbsTaskImageTextPairClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

from tiny_models import make_image


COUNT = 12
CAPTIONS = [f"cat {place} on the grass" for place in range(COUNT)]
IMAGES = [make_image(place) for place in range(COUNT)]


def metadata(task_type, category, modalities, main_score, **more):
    return TaskMetadata(
        name=f"Local{task_type}{category}",
        description="Images made in code.",
        reference=None,
        dataset={"path": "local", "revision": "1"},
        type=task_type,
        category=category,
        modalities=modalities,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
        **more,
    )


class Local:
    """Data that stand in memory instead of on the Hub."""

    def load_data(self, *args, **kwargs):
        self.dataset = DatasetDict({name: self.rows() for name in ("train", "test")})
        self.data_loaded = True


def relevant_documents():
    """By query; every other has two, of which any counts."""
    return [sorted({place, (place + place % 2) % COUNT}) for place in range(COUNT)]


class _Retrieval(AbsTaskRetrieval):
    def load_data(self, *args, **kwargs):
        relevant = {
            f"q{query}": {f"d{place}": 1 for place in places} for query, places in enumerate(relevant_documents())
        }
        split = {
            "queries": items("q", self.metadata.category.split("2")[0]),
            "corpus": items("d", self.metadata.category.split("2")[1]),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def items(prefix, kinds):
    """`"t"`: captions, `"i"`: images, `"it"`: both in one item."""
    columns = {"id": [f"{prefix}{place}" for place in range(COUNT)]}
    features = {"id": Value("string")}
    if "i" in kinds:
        columns["image"], features["image"] = IMAGES, Image()
    if "t" in kinds:
        columns["text"], features["text"] = CAPTIONS, Value("string")
    return Dataset.from_dict(columns, features=Features(features))


def retrieval(category):
    kind = metadata("Any2AnyRetrieval", category, ["image", "text"], "hit_rate_at_1")
    return type(f"Retrieval_{category}", (_Retrieval,), {"metadata": kind})()


class ZeroShot(Local, AbsTaskZeroShotClassification):
    metadata = metadata("ZeroShotClassification", "i2t", ["image", "text"], "accuracy")

    def rows(self):
        features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
        return Dataset.from_dict({"image": IMAGES, "label": [place % 2 for place in range(COUNT)]}, features=features)

    def get_candidate_labels(self):
        return ["a cat", "two dogs"]


class PairClassification(Local, AbsTaskImageTextPairClassification):
    metadata = metadata("Compositionality", "i2t", ["image", "text"], "text_acc")
    images_column_names = ("image",)
    texts_column_names = ("caption", "other_caption")

    def rows(self):
        columns = {"image": IMAGES, "caption": CAPTIONS, "other_caption": CAPTIONS[1:] + CAPTIONS[:1]}
        text = Value("string")
        features = Features({"image": Image(), "caption": text, "other_caption": text})
        return Dataset.from_dict(columns, features=features)


class ImageClassification(Local, AbsTaskClassification):
    metadata = metadata("ImageClassification", "i2c", ["image"], "accuracy")
    input_column_name = "image"
    samples_per_label = 4
    n_experiments = 2

    def rows(self):
        columns = {"image": IMAGES, "label": [place % 2 for place in range(COUNT)]}
        return Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("int64")}))


class ImageClustering(Local, AbsTaskClustering):
    metadata = metadata("ImageClustering", "i2c", ["image"], "v_measure")
    input_column_name = "image"
    label_column_name = "label"
    max_fraction_of_documents_to_embed = None
    rows = ImageClassification.rows


class VisualSTS(Local, AbsTaskSTS):
    metadata = metadata("VisualSTS(eng)", "i2i", ["image"], "cosine_spearman")
    column_names = ("sentence1", "sentence2")

    def rows(self):
        columns = {
            "sentence1": IMAGES,
            "sentence2": IMAGES[1:] + IMAGES[:1],
            "score": [float(p) for p in range(COUNT)],
        }
        features = Features({"sentence1": Image(), "sentence2": Image(), "score": Value("float64")})
        return Dataset.from_dict(columns, features=features)


CATEGORIES = ("t2i", "i2t", "it2i", "t2it", "i2i", "it2it")
OTHER_TASKS = (ZeroShot, PairClassification, ImageClassification, ImageClustering, VisualSTS)
