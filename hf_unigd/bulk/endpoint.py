"""Captions by a server that speaks the OpenAI API, such as vLLM's."""

import base64
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

from PIL import Image

from .captioners import QUESTIONS, Captioner, Preparation
from .work import WINDOW


API_KEY = "OPENAI_API_KEY"
_RETRIES = 8  # with waits of 0.5 to 8 seconds


class EndpointCaptioner(Captioner):
    """
    A model behind an OpenAI-compatible endpoint. Requests that fail for a while (connections, timeouts, too many
    requests, errors of the server) are sent again after growing waits.

    Args:
        url: Where the endpoint is, such as `http://localhost:8000/v1`.
        name: Name of the model there.
        kind: `"short"` or `"long"`: the default of `prompt`, one of `QUESTIONS`.
        prompt: What the model is asked about an image.
        max_new_tokens: Maximum number of tokens of a caption.
        temperature: Sampling temperature.
        num_requests: Number of requests at once.

    Raises:
        ImportError: the package `openai` is not installed.
    """

    def __init__(
        self,
        url: str,
        name: str,
        kind: str,
        prompt: str | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        num_requests: int = 32,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError("`--endpoint` needs openai: `pip install 'hf-unigd[endpoint]'`.") from error
        self._openai = openai
        # Servers without keys, such as one's own, ignore it, but the client wants one.
        key = os.environ.get(API_KEY) or "none"
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=_RETRIES)
        self._pool = ThreadPoolExecutor(num_requests)
        self.url = url
        self.prompt = prompt or QUESTIONS[kind]
        self.batch_size = WINDOW * num_requests  # the pool is idle at the end of a batch alone
        self.preparation = _DataUrls()
        self.description = {
            "model": name,
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
        }
        self._settings: dict[str, Any] = {"model": name, "max_tokens": max_new_tokens, "temperature": temperature}

    def __call__(self, inputs: Sequence[str]) -> list[str | ValueError]:
        """
        Raises:
            ConnectionError: the endpoint cannot be reached, or refuses all requests.
        """
        return list(self._pool.map(self._ask, inputs))

    def _ask(self, url: str) -> str | ValueError:
        content: list[Any] = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.prompt},
        ]
        try:
            answer = self._client.chat.completions.create(
                messages=[{"role": "user", "content": content}], **self._settings
            )
        except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
            return ValueError(f"is refused by {self.url}: {error}")
        except self._openai.OpenAIError as error:
            raise ConnectionError(
                f"`--endpoint {self.url}`: {error} Check the address, `--model`, and the environment variable "
                f"{API_KEY}; the same command goes on."
            ) from error
        return answer.choices[0].message.content or "" if answer.choices else ""


class _DataUrls(Preparation):
    """Images inside of requests. They are encoded here, as people see them: upright and without transparency."""

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        return [_data_url(image) for image in images]

    def length(self, image: Image.Image) -> int:
        return 0


def _data_url(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
