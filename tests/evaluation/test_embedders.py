"""Whatever embeds does so as its own library says."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel

from evaluation_cases import make_clip, make_siglip
from hf_unigd.cli.main import main
from hf_unigd.evaluation.embedders import (
    CannotMeasureError,
    Instructed,
    ModelEmbedder,
    SentenceEmbedder,
    load_embedder,
)
from tiny_adapters import make_adapter
from tiny_models import make_image, make_vlm
from tiny_models.building import make_tokenizer


TEXTS = ["a red cat", "two blue dogs on the green grass", "a"]
IMAGES = [make_image(place) for place in range(3)]


@pytest.mark.parametrize("make", [make_clip, make_siglip])
@torch.no_grad()
def test_clip_and_siglip_embed_as_transformers_does(tmp_path, make):
    model, processor = make(tmp_path)
    embedder = load_embedder(str(tmp_path), batch_size=2)
    assert isinstance(embedder, SentenceEmbedder)
    # Texts and images in turn, which a dual encoder cannot take in one call.
    given = [part for pair in zip(TEXTS, IMAGES, strict=True) for part in ([pair[0]], [pair[1]])]
    found = embedder.embed(given)
    length = {"padding": "max_length", "max_length": 64} if make is make_siglip else {}
    for place, (text, image) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        tokens = processor.tokenizer(text, return_tensors="pt", **length)
        tokens.pop("token_type_ids", None)
        expected = model.get_text_features(**tokens).pooler_output
        torch.testing.assert_close(found[2 * place], torch.nn.functional.normalize(expected)[0], atol=1e-5, rtol=1e-4)
        pixels = processor.image_processor(image, return_tensors="pt")
        expected = model.get_image_features(**pixels).pooler_output
        torch.testing.assert_close(
            found[2 * place + 1], torch.nn.functional.normalize(expected)[0], atol=1e-5, rtol=1e-4
        )


def test_a_dual_encoder_refuses_what_holds_several_parts(tmp_path):
    make_clip(tmp_path)
    embedder = load_embedder(str(tmp_path))
    with pytest.raises(ValueError, match="embeds a text or an image, and not 3 parts"):
        embedder.embed([["a cat", IMAGES[0], "a dog"]])


@torch.no_grad()
def test_a_plain_vision_language_model_is_read_at_its_prompts(tmp_path):
    tiny = make_vlm()
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    prompts = {"image": "Describe the image in one word:", "text": "Describe the text in one word:"}
    embedder = load_embedder(str(tmp_path), image_prompt=prompts["image"], text_prompt=prompts["text"])
    assert isinstance(embedder, ModelEmbedder) and embedder.description["prompts"] == prompts
    # The last token of the rendered prompt, without our model and processor.
    for sequence, text in ((IMAGES[0], prompts["image"]), ("a red cat", f"a red cat\n{prompts['text']}")):
        is_image = sequence is IMAGES[0]
        content = [*([{"type": "image"}] if is_image else []), {"type": "text", "text": text}]
        rendered = tiny.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        images = {"images": [sequence]} if is_image else {}
        inputs = tiny.processor(text=[rendered], return_tensors="pt", **images)
        expected = tiny.model.base_model(**inputs).last_hidden_state[0, -1]
        found = embedder.embed([[sequence]])[0]
        torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=0), atol=1e-5, rtol=1e-4)


def test_a_checkpoint_and_an_adapter_embed_as_they_do_elsewhere(tmp_path, llava):
    model, processor = llava
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    embedder = load_embedder(str(tmp_path / "model"))
    with torch.no_grad():
        expected = model.embed(**processor.process_sequences(["a red cat"]))
    torch.testing.assert_close(embedder.embed(["a red cat"]), expected)
    (tmp_path / "peft").mkdir()
    adapted, _ = make_adapter(tmp_path / "peft")
    found = load_embedder(str(tmp_path / "peft" / "adapter")).embed(["a red cat"])
    with torch.no_grad():
        expected = adapted.embed(**adapted.processor.process_sequences(["a red cat"]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_instructions_come_before_what_is_embedded(llava):
    model, processor = llava
    processor.instructions = {"query": "Find the picture."}
    embedder = ModelEmbedder(model, processor, "llava")
    found = embedder.embed(Instructed([["a red cat"]], embedder.instruction("query")))
    with torch.no_grad():
        expected = model.embed(**processor.process_sequences(["a red cat"], prompt_name="query"))
    torch.testing.assert_close(found, expected)
    assert embedder.instruction("document") is None


def test_what_cannot_embed_is_refused_by_name(tmp_path, llava):
    with pytest.raises(ValueError, match="is neither a folder nor a Hub id"):
        load_embedder(str(tmp_path / "nothing"))
    model, processor = llava
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has its own way to embed\. Leave out `image_prompt`"):
        load_embedder(str(tmp_path), image_prompt="Describe it.")


def test_a_model_of_texts_is_left_out_where_there_are_images(tmp_path, caplog):
    tokenizer = make_tokenizer([], bos="<s>")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    SentenceTransformer(str(tmp_path / "bert")).save(str(tmp_path / "texts"))
    embedder = load_embedder(str(tmp_path / "texts"))
    assert embedder.embed([["a red cat"], ["a dog"]]).shape == (2, 16)
    for sequence, reason in (([make_image()], "not image in one input"), ([make_image(), "a"], "not image and text")):
        with pytest.raises(CannotMeasureError, match=f"texts embeds text, and {reason}"):
            embedder.embed([sequence])
    with pytest.raises(SystemExit, match="cannot be measured on any of these benchmarks"):
        main(["evaluate", str(tmp_path / "texts"), "--benchmarks", "scenes_winoground"])
    assert "Scenes (Winoground) is left out" in caplog.text
