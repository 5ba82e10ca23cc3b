"""Interleaved chats with pictures, the sequences of them that are embedded, and an index of them."""

from datasets import Dataset, Features, Image, List, Value

from hf_unigd.retrieval import build_index
from tiny_models import make_image


IMAGES = [make_image(place) for place in range(4)]
KNOWLEDGE = [
    {"images": [], "messages": [("user", "who sees the red cat"), ("assistant", "three people")]},
    {"images": [IMAGES[0]], "messages": [("user", "a car seen from <image> the left")]},
    {"images": [IMAGES[1]], "messages": [("user", "<image>what is it"), ("assistant", "a yellow car")]},
    {"images": IMAGES[2:], "messages": [("user", "one <image> two <image> three"), ("assistant", "dogs")]},
    {"images": [], "messages": [("user", "two blue dogs"), ("assistant", "on the green grass")]},
]


def knowledge(repeat=1, **columns):
    """Interleaved chats, of which one has no answer, with other columns of texts or whole numbers."""
    rows = {
        "images": [entry["images"] for entry in KNOWLEDGE] * repeat,
        "messages": [
            [{"role": role, "content": f"{content} {turn}" if role == "user" and turn else content}
             for role, content in entry["messages"]]
            for turn in range(repeat)
            for entry in KNOWLEDGE
        ],
        **columns,
    }  # fmt: skip
    features = {"images": List(Image()), "messages": List({"role": Value("string"), "content": Value("string")})}
    features |= {name: Value("string" if isinstance(column[0], str) else "int64") for name, column in columns.items()}
    return Dataset.from_dict(rows, Features(features))


def questions():
    """The sequences that are embedded: what users say, with pictures at their places."""
    return [
        "who sees the red cat",
        ["a car seen from", IMAGES[0], "the left"],
        [IMAGES[1], "what is it"],
        ["one", IMAGES[2], "two", IMAGES[3], "three"],
        "two blue dogs",
    ]


def build(llava, folder, rows=None, **kwargs):
    rows = knowledge() if rows is None else rows
    return build_index(*llava, rows, folder, model_name="some/model", show_progress=False, batch_size=2, **kwargs)
