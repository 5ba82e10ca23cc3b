"""The teachers, and their features of a dataset on disk."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertModel,
    CLIPModel,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
)

from hf_unigd.bulk import write_slice_features
from hf_unigd.data import ExampleDataset, RowError, RowParser, SentenceSplitter, Teachers
from hf_unigd.data.encoders import Encoder
from hf_unigd.data.example import IMAGE, TEXT, Slice
from hf_unigd.data.slice_features import SliceFeatures
from tiny_models import make_image, make_tokenizer
from tiny_teachers import save_teachers


@pytest.fixture(scope="module")
def teacher_args(tmp_path_factory):
    return save_teachers(tmp_path_factory.mktemp("teachers"))


def make_examples(count=10, **kwargs):
    """Every third row has the image and the sentences of the row before it."""
    places = [place - (place % 3 == 2) for place in range(count)]
    rows = Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": f"<image>A red cat {place}. It sleeps.<image>"}] for place in places
            ],
            "images": [[make_image(place), make_image(100)] for place in places],
        }
    )
    return ExampleDataset(rows, RowParser(len, splitter=SentenceSplitter()), **kwargs)


def sentence(text):
    return Slice({"type": "text", "text": text})


def test_features_equal_the_outputs_of_the_encoders(teacher_args):
    teachers = Teachers(teacher_args)
    image, text = make_image(1), "Two blue dogs."
    features = teachers([Slice({"type": "image", "image": image}), sentence(text)])
    assert features.shape == (2, teachers.own_width + teachers.cross_width)

    pixels = AutoImageProcessor.from_pretrained(teacher_args.image_teacher)(image, return_tensors="pt")
    own = Dinov2Model.from_pretrained(teacher_args.image_teacher)(**pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(features[0, : teachers.own_width], F.normalize(own, dim=1)[0])

    ids = AutoTokenizer.from_pretrained(teacher_args.text_teacher)(text, return_tensors="pt")
    own = BertModel.from_pretrained(teacher_args.text_teacher)(**ids).last_hidden_state[:, 0]
    torch.testing.assert_close(features[1, : teachers.own_width], F.normalize(own, dim=1)[0])

    clip = CLIPModel.from_pretrained(teacher_args.cross_teacher)
    pixels = AutoImageProcessor.from_pretrained(teacher_args.cross_teacher)(image, return_tensors="pt")
    ids = AutoTokenizer.from_pretrained(teacher_args.cross_teacher)(text, return_tensors="pt")
    outputs = clip(**pixels, **ids)
    torch.testing.assert_close(features[0, teachers.own_width :], outputs.image_embeds[0])
    torch.testing.assert_close(features[1, teachers.own_width :], outputs.text_embeds[0])


def test_mean_pooling_ignores_padding(teacher_args):
    encoder = Encoder(teacher_args.text_teacher, "mean")
    ids = AutoTokenizer.from_pretrained(teacher_args.text_teacher)("a cat", return_tensors="pt")
    hidden = BertModel.from_pretrained(teacher_args.text_teacher)(**ids).last_hidden_state
    expected = F.normalize(hidden.mean(1), dim=1)
    torch.testing.assert_close(encoder(["a cat"]), expected)
    torch.testing.assert_close(encoder(["a cat", "two blue dogs on the green grass"])[:1], expected)


def test_texts_that_are_too_long_are_truncated_and_counted(teacher_args):
    teachers = Teachers(teacher_args)
    teachers([sentence("a red cat. " * 5), sentence("a cat")])
    assert teachers.truncated == 1  # the limit of CLIP is 16 tokens, that of BERT 64
    assert torch.isfinite(teachers([sentence("a red cat. " * 100)])).all()
    assert teachers.truncated == 3  # the last text is too long for both


def test_a_sentence_transformers_folder_is_encoded_as_the_library_does(teacher_args, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    transformer = modules.Transformer(teacher_args.text_teacher, max_seq_length=32)
    library = SentenceTransformer(
        modules=[transformer, modules.Pooling(transformer.get_embedding_dimension(), "mean")], device="cpu"
    )
    library.save(str(tmp_path))
    encoder = Encoder(str(tmp_path))
    assert encoder.is_sentence_transformer
    expected = torch.from_numpy(library.encode(["a cat", "two dogs"], normalize_embeddings=True))
    torch.testing.assert_close(encoder(["a cat", "two dogs"]), expected)
    encoder(["a cat on the grass. " * 20])
    assert encoder.truncated == 1


def test_written_features_equal_computed_ones_and_are_stored_once(teacher_args, tmp_path):
    examples = make_examples()
    written = write_slice_features(examples, teacher_args, tmp_path / "f", batch_size=3, rows_per_part=4)
    teachers = Teachers(teacher_args)
    distinct = set()
    for place in range(len(examples)):
        slices = examples[place].slices
        assert [part.modality for part in slices] == [IMAGE, TEXT, TEXT, IMAGE]
        torch.testing.assert_close(written.read_row(place, slices).float(), teachers(slices), atol=1e-3, rtol=1e-3)
        distinct |= {part.key for part in slices}
    assert len(written.features) == len(distinct) < 4 * len(examples)
    assert written.features.features["features"].feature.dtype == "float16"


def test_an_interrupted_run_resumes_without_encoding_anything_twice(teacher_args, tmp_path, monkeypatch):
    whole = write_slice_features(make_examples(), teacher_args, tmp_path / "whole", rows_per_part=3)

    calls = []
    encode = Teachers.encode

    def interrupted(self, inputs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(inputs.count)
        return encode(self, inputs)

    monkeypatch.setattr(Teachers, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_slice_features(make_examples(), teacher_args, tmp_path / "part", rows_per_part=3)
    with pytest.raises(ValueError, match="are not finished; run `hf-unigd embed-slices` again"):
        SliceFeatures.load(tmp_path / "part", teacher_args)
    counted = []
    monkeypatch.setattr(Teachers, "encode", lambda self, inputs: counted.append(inputs.count) or encode(self, inputs))
    resumed = write_slice_features(make_examples(), teacher_args, tmp_path / "part", rows_per_part=3)
    assert sum(calls) + sum(counted) == len(whole.features)
    assert resumed.features["key"][:].tolist() == whole.features["key"][:].tolist()
    np.testing.assert_array_equal(resumed.features["features"][:], whole.features["features"][:])


def test_other_teachers_pooling_or_language_make_features_stale(teacher_args, tmp_path):
    write_slice_features(make_examples(4), teacher_args, tmp_path / "f")
    for changed, message in (
        ({"teacher_pooling": "mean"}, "teacher_pooling was 'cls', now 'mean'"),
        ({"sentence_language": "de"}, "sentence_language was 'en', now 'de'"),
        ({"text_teacher": teacher_args.cross_teacher}, "text_teacher was"),
    ):
        other = type(teacher_args)(**{**vars(teacher_args), **changed})
        with pytest.raises(ValueError, match=message):
            SliceFeatures.load(tmp_path / "f", other)
        with pytest.raises(ValueError, match=r"was begun with another model.*`--overwrite true`"):
            write_slice_features(make_examples(4), other, tmp_path / "f")
    write_slice_features(make_examples(4), other, tmp_path / "f", overwrite=True)
    assert len(SliceFeatures.load(tmp_path / "f", other).rows) == 4
    with pytest.raises(ValueError, match="stale"):
        SliceFeatures.load(tmp_path / "f", teacher_args)


def test_a_teacher_retrained_in_its_folder_makes_features_stale(tmp_path):
    args = save_teachers(tmp_path / "t", seed=0)
    write_slice_features(make_examples(4), args, tmp_path / "f")
    save_teachers(tmp_path / "t", seed=1)
    with pytest.raises(ValueError, match="image_teacher_commit was"):
        SliceFeatures.load(tmp_path / "f", args)


def test_changed_and_new_rows_raise_an_error_that_names_them(teacher_args, tmp_path):
    features = write_slice_features(make_examples(4), teacher_args, tmp_path / "f")
    examples = make_examples(6, slice_features=features)
    assert examples[3].slice_features.shape == (4, features.width)
    with pytest.raises(RowError, match=r"Row 4 has no slice features: they end at row 3"):
        examples[4]
    examples.rows = examples.rows.select([3])
    with pytest.raises(RowError, match="Row 0 has changed since its slice features were computed"):
        examples.parse(0)
    with pytest.raises(ValueError, match="`num_rows` was 4, now 6"):
        write_slice_features(make_examples(6), teacher_args, tmp_path / "f")


def test_features_of_another_width_raise(teacher_args, tmp_path):
    examples = make_examples(2)
    write_slice_features(examples, teacher_args, tmp_path)
    description = json.loads((tmp_path / "teachers.json").read_text())
    (tmp_path / "teachers.json").write_text(json.dumps({**description, "own_width": 3}))
    with pytest.raises(ValueError, match=r"slice features of width 28, but `teachers.json` says 15"):
        SliceFeatures.load(tmp_path, teacher_args).read_row(0, examples[0].slices)


def test_a_folder_without_features_raises(teacher_args, tmp_path):
    with pytest.raises(ValueError, match="holds no slice features"):
        SliceFeatures.load(tmp_path, teacher_args)


def test_a_file_that_is_cut_is_named(teacher_args, tmp_path):
    write_slice_features(make_examples(4), teacher_args, tmp_path)
    whole = (tmp_path / "rows.arrow").read_bytes()
    (tmp_path / "rows.arrow").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=f"{tmp_path}: Expected"):
        SliceFeatures.load(tmp_path, teacher_args)


def test_siglip_pads_texts_to_its_limit_whatever_else_is_in_the_batch(tmp_path):
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = make_tokenizer([], bos="<s>")
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(tmp_path)
    text_config = {**config, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    model = SiglipModel(
        SiglipConfig(text_config=text_config, vision_config={**config, "image_size": 16, "patch_size": 8})
    )
    model.save_pretrained(tmp_path)
    encoder = Encoder(str(tmp_path), "cls", "cpu")
    with torch.no_grad():
        inputs = tokenizer(["a cat"], padding="max_length", return_tensors="pt")
        expected = F.normalize(model.eval().get_text_features(**inputs).pooler_output, dim=-1)
        alone, beside = encoder(["a cat"]), encoder(["a cat", "a much longer text of two cats"])[:1]
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(beside, expected)


def test_nothing_is_removed_that_was_not_written_here(teacher_args, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.parquet").write_text("my rows")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files, and no slice features"):
            write_slice_features(make_examples(4), teacher_args, tmp_path / "mine", overwrite=overwrite)
    write_slice_features(make_examples(4), teacher_args, tmp_path / "f")
    (tmp_path / "f" / "notes.txt").write_text("my notes")
    write_slice_features(make_examples(4), teacher_args, tmp_path / "f", overwrite=True)
    assert (tmp_path / "f" / "notes.txt").read_text() == "my notes"
    assert (tmp_path / "mine" / "rows.parquet").read_text() == "my rows"
