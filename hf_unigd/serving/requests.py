"""What clients send: OpenAI's requests, and those of retrieval. A field that would have no effect is refused."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


TOKEN_IDS = (
    "arrays of token ids are refused, as they may be another tokenizer's. Send texts; with langchain, set "
    "`check_embedding_ctx_length=False`."
)


class Body(BaseModel):
    """A request. Fields that it does not know are refused."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl

    @model_validator(mode="before")
    @classmethod
    def _with_url(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("image_url"), str):
            return {**value, "image_url": {"url": value["image_url"]}}
        return value


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(value: Any) -> Any:
    """A text, a part, a list of parts, or an object with a list of them as its `content`: all as a list of parts."""
    if isinstance(value, dict) and set(value) == {"content"}:
        value = value["content"]
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
        raise ValueError(TOKEN_IDS)
    return value


Content = Annotated[list[Part], Field(min_length=1), BeforeValidator(_as_parts)]


def _as_contents(value: Any) -> Any:
    """One or several contents, as a list. A list of texts or parts is one of contents, as in OpenAI's API."""
    if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
        raise ValueError(TOKEN_IDS)
    return value if isinstance(value, list) else [value]


Contents = Annotated[list[Content], Field(min_length=1), BeforeValidator(_as_contents)]


class Turn(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: None = None

    @property
    def template_role(self) -> str:
        """The role as chat templates call it."""
        return "system" if self.role == "developer" else self.role


class ModelRequest(Body):
    model: str | None = None
    user: str | None = None


class EmbeddingRequest(ModelRequest):
    input: Contents | None = None
    messages: Annotated[list[Turn], Field(min_length=1)] | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    prompt_name: str | None = None
    instruction: str | None = None

    @model_validator(mode="after")
    def _one_input(self) -> "EmbeddingRequest":
        if (self.input is None) == (self.messages is None):
            raise ValueError("give `input` or `messages`.")
        if self.prompt_name is not None and self.instruction is not None:
            raise ValueError("give `prompt_name` or `instruction`, not both.")
        return self


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


def _check_off(value: Any) -> Any:
    if value:
        raise ValueError("is not supported. Leave it out.")
    return value


Off = Annotated[Any, AfterValidator(_check_off)]


class TextFormat(Body):
    type: Literal["text"]


class Sampling(ModelRequest):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _stops_and_length(self) -> "Sampling":
        if not all(self.stops):
            raise ValueError("`stop` holds an empty text.")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("`max_tokens` and `max_completion_tokens` differ; give one of them.")
        return self

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def generate_kwargs(self) -> tuple[tuple[str, Any], ...]:
        """Items of keyword arguments for `generate`. What is not given is as in the model's generation config."""
        return tuple(self._generate_kwargs())

    def _generate_kwargs(self) -> Iterator[tuple[str, Any]]:
        if self.repetition_penalty is not None:
            yield "repetition_penalty", self.repetition_penalty
        if self.temperature == 0:
            yield "do_sample", False
            return
        names = ("temperature", "top_p", "top_k", "min_p")
        given = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        yield from [("do_sample", True), *given] if given else []


class ChatRequest(Sampling):
    messages: Annotated[list[Turn], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Off = None
    frequency_penalty: Off = None
    logit_bias: Off = None
    logprobs: Off = None
    top_logprobs: Off = None
    tools: Off = None
    tool_choice: Literal["none"] | None = None
    response_format: TextFormat | None = None
    store: Off = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _options_of_streams(self) -> "ChatRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream=true`.")
        return self


class Retrieval(ModelRequest):
    k: Annotated[int, Field(ge=1, le=1000)] = 5
    where: str | None = None
    instruction: str | None = None


class SearchRequest(Retrieval):
    query: Content
    offset: Annotated[int, Field(ge=0)] = 0
    hybrid: bool = False
    include_images: bool = False


class AnswerRequest(Sampling, Retrieval):
    question: Content
    k: Annotated[int, Field(ge=1, le=1000)] = 3
    use_images: bool = False
    include_images: bool = False


class AlignmentRequest(ModelRequest):
    a: Content
    b: Content
    figure: bool = False


class SummaryTokensRequest(ModelRequest):
    input: Content
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    prompt_name: str = "query"
    instruction: str | None = None


class RerankRequest(ModelRequest):
    query: Content
    documents: Contents
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False
    instruction: str | None = None
