"""`/v1/embeddings` and `/v1/rerank`, asked by real clients, against the model itself."""

import base64
from io import BytesIO

import numpy as np
import openai
import pytest
import torch
from langchain_openai import OpenAIEmbeddings
from sentence_transformers import SentenceTransformer

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, load_checkpoint
from hf_unigd.modeling import SequenceError
from serving_cases import NAME, data_url, image_part, in_threads, serving, text_part
from tiny_adapters import make_adapter
from tiny_models import make_image, make_vlm


TEXTS = ["a red cat", "two blue dogs on the green grass", "who?", "three people waving from its windows"]
SEQUENCES = [
    ["a red cat"],
    [make_image(1)],
    [make_image(2, (30, 18)), "two blue dogs"],
    ["one", make_image(3), "two", make_image(4), "three"],
]


def as_parts(sequence):
    return [text_part(part) if isinstance(part, str) else image_part(part) for part in sequence]


@pytest.fixture(scope="module")
def pair():
    tiny = make_vlm()
    torch.manual_seed(0)
    settings = {"head_type": "mlp", "embedding_dim": 16, "matryoshka_dims": [8]}
    instructions = {"query": "Find the picture.", "sorting": "Sort the pictures."}
    return (
        UniGDForConditionalGeneration.from_vlm(tiny.model, **settings),
        UniGDProcessor(tiny.processor, instructions=instructions),
    )


@pytest.fixture(scope="module")
def server(pair):
    with serving(*pair, max_images=3, max_image_pixels=2000) as running:
        yield running


def expected(pair, sequences, truncate_dim=None, **kwargs):
    """Each sequence embedded alone."""
    model, processor = pair
    rows = [processor.process_sequences([sequence], **kwargs) for sequence in sequences]
    with torch.no_grad():
        return torch.cat([model.embed(**row, truncate_dim=truncate_dim) for row in rows]).numpy()


def vectors_of(answer):
    assert [each.index for each in answer.data] == list(range(len(answer.data)))
    return np.array([each.embedding for each in answer.data])


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_openais_client_gets_the_vectors_of_the_model(server, pair, encoding):
    answer = server.client().embeddings.create(model=NAME, input=TEXTS, **encoding)
    vectors = vectors_of(answer) if encoding != {"encoding_format": "base64"} else np.stack(
        [np.frombuffer(base64.b64decode(each.embedding), "<f4") for each in answer.data]
    )  # fmt: skip
    np.testing.assert_allclose(vectors, expected(pair, TEXTS), atol=1e-5)
    lengths = [pair[1].process_sequences([text])["input_ids"].shape[1] for text in TEXTS]
    assert (answer.model, answer.usage.prompt_tokens) == (NAME, sum(lengths))


def test_a_single_text_is_one_input(server, pair):
    answer = server.client().embeddings.create(model=NAME, input=TEXTS[0])
    np.testing.assert_allclose(vectors_of(answer), expected(pair, TEXTS[:1]), atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda parts: parts, lambda parts: {"content": parts}])
def test_content_parts_are_embedded_in_their_order(server, pair, wrap):
    inputs = [wrap(as_parts(sequence)) for sequence in SEQUENCES if len(sequence) < 5]
    answer = server.client().embeddings.create(model=NAME, input=inputs)
    np.testing.assert_allclose(vectors_of(answer), expected(pair, SEQUENCES[:3]), atol=1e-5)


def test_messages_are_embedded_as_a_chat(server, pair):
    for sequence in SEQUENCES:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": as_parts(sequence)}]
        answer = server.client().embeddings.create(model=NAME, input=openai.omit, extra_body={"messages": messages})
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": sequence}]
        np.testing.assert_allclose(vectors_of(answer), expected(pair, [chat]), atol=1e-5)


def test_a_photo_is_turned_upright(server, pair):
    image = make_image(5, (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    file = BytesIO()
    image.save(file, "PNG", exif=exif)
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    answer = server.client().embeddings.create(model=NAME, input=[{"type": "image_url", "image_url": {"url": url}}])
    upright = image.rotate(-90, expand=True)
    np.testing.assert_allclose(vectors_of(answer), expected(pair, [[upright]]), atol=1e-5)


@pytest.mark.parametrize("dimensions", [8, 16])
def test_dimensions_are_prefixes_that_were_trained(server, pair, dimensions):
    answer = server.client().embeddings.create(model=NAME, input=TEXTS, dimensions=dimensions)
    np.testing.assert_allclose(vectors_of(answer), expected(pair, TEXTS, dimensions), atol=1e-5)


def test_instructions_are_given_by_name_or_as_texts(server, pair):
    for given, same in [
        ({"prompt_name": "query"}, {"prompt_name": "query"}),
        ({"prompt_name": "sorting"}, {"prompt_name": "sorting"}),
        ({"instruction": "Say what it is."}, {"instruction": "Say what it is."}),
    ]:
        answer = server.client().embeddings.create(model=NAME, input=TEXTS, extra_body=given)
        np.testing.assert_allclose(vectors_of(answer), expected(pair, TEXTS, **same), atol=1e-5)


def test_langchain_embeds(server, pair):
    client = OpenAIEmbeddings(
        model=NAME, base_url=f"{server.address}/v1", api_key="none", check_embedding_ctx_length=False
    )
    np.testing.assert_allclose(client.embed_documents(TEXTS), expected(pair, TEXTS), atol=1e-5)
    np.testing.assert_allclose([client.embed_query(TEXTS[1])], expected(pair, TEXTS[1:2]), atol=1e-5)


def test_langchains_token_ids_are_refused_with_the_remedy(server):
    client = OpenAIEmbeddings(
        model=NAME, base_url=f"{server.address}/v1", api_key="none", tiktoken_enabled=True, max_retries=0
    )
    for ids in ([1, 2], [[1, 2]]):
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            client.client.create(model=NAME, input=ids)


def test_sentence_transformers_gives_the_same(server, pair, tmp_path, modules_cache):
    model, processor = pair
    model.processor = processor
    model.save_pretrained(tmp_path / "model")
    beside = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")
    inputs = [*TEXTS, make_image(1), {"image": make_image(2), "text": "two blue dogs"}]
    parts = [*TEXTS, [image_part(make_image(1))], [image_part(make_image(2)), text_part("two blue dogs")]]
    answer = server.client().embeddings.create(model=NAME, input=parts)
    np.testing.assert_allclose(vectors_of(answer), beside.encode(inputs), atol=1e-5)


def test_an_adapter_is_served(tmp_path):
    model, processor = make_adapter(tmp_path)
    loaded = load_checkpoint(str(tmp_path / "adapter"))
    with serving(*loaded) as running:
        answer = running.client().embeddings.create(model=NAME, input=TEXTS)
    np.testing.assert_allclose(vectors_of(answer), expected((model, processor), TEXTS), atol=1e-5)


def test_rerank_sorts_by_cosine_similarity(server, pair):
    documents = [*TEXTS[1:], {"content": as_parts(SEQUENCES[2])}]
    body = {"model": NAME, "query": TEXTS[0], "documents": documents, "top_n": 3, "return_documents": True}
    answer = server.client().post("/rerank", body=body, cast_to=object)
    query = expected(pair, TEXTS[:1], prompt_name="query")[0]
    scores = expected(pair, [*TEXTS[1:], SEQUENCES[2]]) @ query
    assert [each["index"] for each in answer["results"]] == np.argsort(-scores)[:3].tolist()
    for each in answer["results"]:
        assert each["relevance_score"] == pytest.approx(scores[each["index"]], abs=1e-5)
        content = documents[each["index"]]
        assert each["document"] == (content if isinstance(content, dict) else {"content": [text_part(content)]})


LARGE = {"type": "image_url", "image_url": {"url": data_url(make_image(0, (60, 40)))}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": []}, "`input`: .* at least 1 item"),
        ({"input": ["a", ""]}, r"`input\[1\]` holds an empty text"),
        ({"input": "an <image>"}, "`input` holds the reserved token '<image>'"),
        ({"input": "a", "dimensions": 5}, r"`dimensions=5` was not trained. Choose one of \[8, 16\]"),
        ({"input": "a", "encoding_format": "int8"}, "`encoding_format`"),
        ({"input": "a", "truncate": True}, "`truncate` is not known here"),
        ({"input": "a", "messages": [{"role": "user", "content": "b"}]}, "give `input` or `messages`"),
        ({}, "give `input` or `messages`"),
        ({"input": "a", "prompt_name": "painting"}, "There is no instruction 'painting'"),
        ({"input": [{"type": "video_url", "video_url": "a"}]}, "video_url"),
        ({"input": [{"type": "image_url", "image_url": "http://localhost/a.png"}]}, "this server fetches none"),
        ({"input": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}, "send a data URL"),
        ({"input": [{"type": "image_url", "image_url": "/etc/passwd"}]}, "send a data URL"),
        ({"input": [{"type": "image_url", "image_url": "data:image/png,abc"}]}, "not of the form data:image"),
        ({"input": [{"type": "image_url", "image_url": "data:image/png;base64,a"}]}, "base64 is broken"),
        ({"input": [{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}]}, "has a corrupt image"),
        ({"input": [LARGE]}, "has an image of 60 x 40 pixels, more than 2000"),
        ({"input": [image_part(make_image(0, (40, 40)))] * 2}, "has images of 3200 pixels, more than the 2000"),
        ({"input": [image_part(make_image())] * 4}, r"has 4 images, more than the 3 .*`--max_images`"),
        ({"input": "red cat " * 600}, r"tokens .*more than `max_length=1024`"),
    ],
)
def test_what_cannot_be_embedded_is_refused_in_openais_form(server, body, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        server.client().post("/embeddings", body={"model": NAME, **body}, cast_to=object)
    assert set(refused.value.body) == {"message", "type", "param", "code"}
    assert refused.value.body["type"] == "invalid_request_error"


def test_another_model_is_not_there(server):
    with pytest.raises(openai.NotFoundError, match="There is no model 'other' here; it is 'tiny'") as refused:
        server.client().embeddings.create(model="other", input="a")
    assert refused.value.code == "model_not_found"


def test_a_bad_image_is_not_its_neighbours_fault(server, pair, monkeypatch):
    """What only the image processor can see fails alone, in the batch that it was in."""
    process = pair[1].process_sequences

    def refuse_who(sequences, **kwargs):
        if ["who?"] in sequences:
            raise SequenceError(sequences.index(["who?"]), "cannot be read.")
        return process(sequences, **kwargs)

    monkeypatch.setattr(pair[1], "process_sequences", refuse_who)
    with serving(*pair, batch_window_ms=200) as running:
        client = running.client()
        answers = in_threads([lambda text=text: client.embeddings.create(model=NAME, input=text) for text in TEXTS])
    assert isinstance(answers[2], openai.BadRequestError) and "An input cannot be read." in str(answers[2])
    good = [place for place in range(4) if place != 2]
    vectors = np.concatenate([vectors_of(answers[place]) for place in good])
    monkeypatch.undo()
    np.testing.assert_allclose(vectors, expected(pair, [TEXTS[place] for place in good]), atol=1e-5)
