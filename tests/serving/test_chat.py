"""`/v1/chat/completions`, asked by real clients, against `generate`."""

import openai
import pytest
import torch
from langchain_openai import ChatOpenAI

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from serving_cases import NAME, image_part, in_threads, serving, text_part
from tiny_models import FAMILIES, make_image, make_vlm


CHATS = [
    ["a red cat"],
    [make_image(1), "what is it"],
    [make_image(2, (40, 20)), "two blue dogs on the green grass", make_image(3)],
    ["three people waving"],
    [make_image(4)],
]


def messages_of(sequence):
    parts = [text_part(part) if isinstance(part, str) else image_part(part) for part in sequence]
    return [{"role": "user", "content": parts}]


def make_pair(family="llava", seed=0):
    tiny = make_vlm(family, seed)
    return UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)


@pytest.fixture(scope="module")
def pair():
    return make_pair()


@pytest.fixture(scope="module")
def server(pair):
    with serving(*pair, max_new_tokens=200) as running:
        yield running


def expected(pair, sequence, max_new_tokens=12, **kwargs):
    """The tokens that `generate` gives, and the number of those before."""
    model, processor = pair
    batch = processor.process_sequences([sequence], prompted=False, padding_side="left")
    with torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=max_new_tokens, **(kwargs or {"do_sample": False}))
    return tokens[0, batch["input_ids"].shape[1] :], batch["input_ids"].shape[1]


def text_of(pair, tokens):
    return pair[1].decode(tokens, skip_special_tokens=True)


def ask(client, sequence, **kwargs):
    settings = {"max_tokens": 12, "temperature": 0, **kwargs}
    return client.chat.completions.create(model=NAME, messages=messages_of(sequence), **settings)


@pytest.mark.parametrize("sequence", CHATS, ids=len)
def test_openais_client_gets_what_generate_gives(server, pair, sequence):
    answer = ask(server.client(), sequence)
    tokens, length = expected(pair, sequence)
    (choice,) = answer.choices
    assert choice.message.content == text_of(pair, tokens)
    ended = tokens[-1].item() == pair[0].generation_config.eos_token_id
    assert choice.finish_reason == ("stop" if ended else "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, len(tokens))
    assert answer.usage.total_tokens == length + len(tokens)


def test_a_stream_is_the_same_text_in_pieces(server, pair):
    chunks = list(ask(server.client(), CHATS[1], stream=True, stream_options={"include_usage": True}))
    tokens, length = expected(pair, CHATS[1])
    *pieces, usage = chunks
    text = [chunk.choices[0].delta.content or "" for chunk in pieces]
    assert "".join(text) == text_of(pair, tokens)
    assert sum(map(bool, text)) > 3
    assert [chunk.choices[0].finish_reason for chunk in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.prompt_tokens, usage.usage.completion_tokens) == ([], length, len(tokens))
    assert len({chunk.id for chunk in chunks}) == 1


def test_langchain_chats_and_streams(server, pair):
    client = ChatOpenAI(model=NAME, base_url=f"{server.address}/v1", api_key="none", temperature=0, max_tokens=12)
    text = text_of(pair, expected(pair, CHATS[1])[0])
    messages = messages_of(CHATS[1])
    assert client.invoke(messages).content == text
    assert "".join(chunk.content for chunk in client.stream(messages)) == text


def test_a_conversation_is_rendered_with_all_its_turns(server, pair):
    said = [("developer", "Be brief."), ("user", "a red cat"), ("assistant", "who?"), ("user", "two blue dogs")]
    messages = [{"role": role, "content": text} for role, text in said]
    answer = server.client().chat.completions.create(model=NAME, messages=messages, max_tokens=12, temperature=0)
    chat = [{"role": "system" if role == "developer" else role, "content": text} for role, text in said]
    tokens, length = expected(pair, chat)
    assert answer.choices[0].message.content == text_of(pair, tokens)
    assert answer.usage.prompt_tokens == length


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_beside_others(family):
    """Small batches take turns with each other and with embeddings, step by step."""
    pair = make_pair(family)
    wanted = [text_of(pair, expected(pair, sequence, 30)[0]) for sequence in CHATS]
    with serving(*pair, batch_size=2) as running:
        client = running.client()
        chats = [lambda chat=chat: ask(client, chat, max_tokens=30) for chat in CHATS]
        embeddings = [lambda chat=chat: client.embeddings.create(model=NAME, input=[messages_of(chat)[0]["content"]])
                      for chat in CHATS]  # fmt: skip
        answers = in_threads([*chats, *embeddings, *chats, *embeddings])
    assert not [answer for answer in answers if isinstance(answer, Exception)]
    texts = [answer.choices[0].message.content for answer in answers if hasattr(answer, "choices")]
    assert texts == wanted * 2
    vectors = [answer.data[0].embedding for answer in answers if hasattr(answer, "data")]
    with torch.no_grad():
        alone = torch.cat([pair[0].embed(**pair[1].process_sequences([chat])) for chat in CHATS])
    torch.testing.assert_close(torch.tensor(vectors), alone.repeat(2, 1), atol=1e-5, rtol=0)


def test_a_seed_gives_the_tokens_of_generate_whatever_else_is_sampled(server, pair):
    settings = {"temperature": 0.8, "top_p": 0.9}

    def with_seed(seed):
        torch.manual_seed(seed)
        return text_of(pair, expected(pair, CHATS[1], 40, do_sample=True, **settings)[0])

    wanted = [with_seed(seed) for seed in (1, 2, 3)]
    assert len(set(wanted)) == 3
    client = server.client()
    seeded = [lambda seed=seed: ask(client, CHATS[1], max_tokens=40, seed=seed, **settings) for seed in (1, 2, 3)]
    others = [lambda: ask(client, CHATS[0], max_tokens=40, **settings)] * 3
    answers = in_threads([*seeded, *others])
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[:3] == wanted
    assert len(set(texts[3:])) == 3


def test_it_stops_before_a_text_to_stop_at(server, pair):
    whole = text_of(pair, expected(pair, CHATS[0], 40)[0])
    stop = whole[7:10]
    until = whole[: whole.index(stop)]
    answer = ask(server.client(), CHATS[0], max_tokens=40, stop=["not there", stop])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (until, "stop")
    assert answer.usage.completion_tokens < 40
    chunks = list(ask(server.client(), CHATS[0], max_tokens=40, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == until


def test_it_stops_where_the_model_ends(pair):
    """The first token that is generated is made the end."""
    model, processor = pair
    tokens, _ = expected(pair, CHATS[0])
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [ends, tokens[4].item()]
    try:
        with serving(model, processor) as running:
            answer = ask(running.client(), CHATS[0])
    finally:
        model.generation_config.eos_token_id = ends
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == tokens.tolist().index(tokens[4].item()) + 1


def test_it_stops_where_the_generation_config_says(pair, monkeypatch):
    monkeypatch.setattr(pair[0].generation_config, "max_time", 1e-9)
    with serving(*pair) as running:
        answer = ask(running.client(timeout=60), CHATS[0])
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (1, "length")


def test_the_longest_answer_is_as_long_as_the_server_allows(server):
    client = server.client()
    answer = client.chat.completions.create(model=NAME, messages=messages_of(CHATS[0]), temperature=0)
    assert answer.usage.completion_tokens == 200 or answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match=r"`max_tokens=201` is more than this server's 200"):
        ask(client, CHATS[0], max_tokens=201)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_room_is_refused_and_its_neighbour_answered(server, pair, stream):
    long = ["cat " * 900]
    client = server.client()
    short, refused = in_threads(
        [lambda: ask(client, CHATS[0]), lambda: ask(client, long, max_tokens=190, stream=stream)]
    )
    assert isinstance(refused, openai.BadRequestError) and refused.code == "context_length_exceeded"
    assert "more than the model's context of 1024" in str(refused)
    assert short.choices[0].message.content == text_of(pair, expected(pair, CHATS[0])[0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "`messages`: .* at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must end with the user's turn"),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"`messages\[0\].role`"),
        ({"messages": [{"role": "user", "content": ""}]}, "`messages` holds an empty text"),
        ({"messages": [{"role": "user", "content": "<s>"}]}, "`messages` holds the reserved token"),
        ({"n": 2}, "`n`"),
        ({"tools": [{"type": "function"}]}, "`tools`: is not supported"),
        ({"logprobs": True}, "`logprobs`: is not supported"),
        ({"presence_penalty": 0.5}, "`presence_penalty`: is not supported"),
        ({"response_format": {"type": "json_object"}}, "`response_format"),
        ({"temperature": -1}, "`temperature`"),
        ({"max_tokens": 0}, "`max_tokens`"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"stop": ["a", ""]}, "`stop` holds an empty text"),
        ({"stream_options": {"include_usage": True}}, "needs `stream=true`"),
        ({"best_of": 3}, "`best_of` is not known here"),
    ],
)
def test_what_cannot_be_answered_is_refused(server, body, message):
    body = {"model": NAME, "messages": [{"role": "user", "content": "a"}], **body}
    with pytest.raises(openai.BadRequestError, match=message):
        server.client().post("/chat/completions", body=body, cast_to=object)


def test_what_changes_nothing_is_accepted(server, pair):
    neutral = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logprobs": False, "tools": [], "user": "ada"}
    answer = ask(server.client(), CHATS[0], **neutral, tool_choice="none", response_format={"type": "text"})
    assert answer.choices[0].message.content == text_of(pair, expected(pair, CHATS[0])[0])
