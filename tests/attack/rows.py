"""Awkward rows: each becomes an example that holds everything in it, or a RowError.

Rows are made from the registered formats, so that a later format is attacked too. Their texts and images are numbered:
an example is right if it holds the numbers of its row, each once, and those of each column in order.
"""

import logging
import re
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from attack.outcomes import Outcomes
from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.bulk import write_slice_features
from hf_unigd.data import Example, ExampleDataset, RowError, RowParser, make_examples
from hf_unigd.data import chats as chats_module
from hf_unigd.data import rows as rows_module
from hf_unigd.data.example import iter_parts
from hf_unigd.data.formats import FORMATS, RowFormat
from hf_unigd.retrieval import build_index
from hf_unigd.trainer import UniGDTrainer, UniGDTrainingArguments
from tiny_models import make_vlm
from tiny_teachers import save_teachers


_WORD = re.compile(r"w\d+")
# What stands for any value, or any part of one.
_AWKWARD = st.one_of(
    st.sampled_from(
        [
            *(
                None,
                "",
                " ",
                0,
                -1,
                3.5,
                float("nan"),
                True,
                b"",
                b"\x89PNG\r\n\x1a\n",
                "a.png",
                "../a",
                "\0",
                "\ud800",
            ),
            *([], {}, [None], [[]], [{}], {"bytes": None, "path": None}, {"bytes": b"no image", "path": None}),
            *({"role": "user"}, {"role": None, "content": "x"}, {"type": "image"}, {"type": "text", "text": None}),
            *("<image>", {"from": "human", "value": None}, object()),
        ]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
)


@dataclass
class RowMaker:
    """Makes one row, with `awkward` per cent of its values replaced by others."""

    draw: Any
    awkward: int
    count: int = 0

    def row(self, row_format: RowFormat) -> dict[str, Any]:
        needed = set(self.draw(st.sampled_from(row_format.required)))
        others = [name for name in row_format.columns if name not in needed]
        if self.awkward:
            others += ["negative", "hard_negatives", "caption", "messages", "anchor", "images", "label", "video"]
            others += [*row_format.aliases]
            names = needed | set(self.draw(st.lists(st.sampled_from(others), max_size=3)))
        else:
            names = needed | self._companions(row_format, needed)
        kinds = {
            name: row_format.columns.get(
                row_format.aliases.get(name, name), "label" if name == "label" else "sequence"
            )
            for name in names
        }
        row = {name: self._maybe(getattr(self, kind.replace(" ", "_"))) for name, kind in sorted(kinds.items())}
        if not self.awkward:
            self._match_placeholders(row)
        return {**row, "id": 7}

    def _companions(self, row_format: RowFormat, needed: set[str]) -> set[str]:
        """Columns that go with the needed ones in a good row."""
        names = set()
        if row_format.negatives and needed != {"image", "long_caption"} and self.draw(st.booleans()):
            names |= set(self.draw(st.lists(st.sampled_from(["negative", "negative_1", "negatives"]), max_size=2)))
        if "positive_messages" in row_format.columns and self.draw(st.booleans()):
            names.add("positive_messages")
        if row_format.name in ("chat", "llava"):
            names |= {self.draw(st.sampled_from(["image", "images"]))}
        return names

    def _match_placeholders(self, row: dict[str, Any]) -> None:
        """Gives a chat's first turn as many placeholders as it has images."""
        images = next((row[name] for name in ("images", "image") if name in row), [])
        for name, key in (("messages", "content"), ("conversations", "value")):
            if name in row and self.draw(st.booleans()):
                row[name][0][key] = "<image> " * len(images) + row[name][0][key]

    def _maybe(self, make):
        """The value, or sometimes another one instead."""
        if self.awkward and self.draw(st.integers(0, 99)) < self.awkward:
            return self.draw(_AWKWARD)
        return make()

    def label(self) -> int:
        return 1

    def text(self) -> str:
        self.count += 1
        return f"w{self.count}"

    def texts(self) -> Any:
        return [self._maybe(self.text)] if self.draw(st.booleans()) else self.text()

    def sentences(self) -> list[Any]:
        return [self._maybe(self.text) for _ in range(self.draw(st.integers(1, 3)))]

    def image_infos(self) -> list[Any]:
        return [
            {"image_name": self._maybe(self.image), "matched_text_index": self._maybe(lambda: 0)}
            for _ in range(self.draw(st.integers(0, 2)))
        ]

    def weights(self) -> list[Any]:
        return [self._maybe(lambda: 1.0)]

    def image(self) -> Any:
        self.count += 1
        image = Image.new("RGB", (5, 4), (self.count, 1, 2))
        form = self.draw(st.sampled_from(["image", "bytes", "dict"]))
        if form == "image":
            return image
        buffer = BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue() if form == "bytes" else {"bytes": buffer.getvalue(), "path": None}

    def images(self) -> list[Any]:
        return [self._maybe(self.image) for _ in range(self.draw(st.integers(1, 3)))]

    def image_lists(self) -> list[Any]:
        return [self._maybe(self.images)]

    def sequence(self) -> Any:
        kind = self.draw(st.sampled_from(["text", "image", "both"]))
        return [self._maybe(self.text), self._maybe(self.image)] if kind == "both" else getattr(self, kind)()

    def chat(self) -> list[Any]:
        roles = ["user", "assistant"] * self.draw(st.integers(1, 2))
        return [{"role": self._maybe(lambda role=role: role), "content": self._maybe(self.text)} for role in roles]

    def chats(self) -> list[Any]:
        return [[{"role": "user", "content": self._maybe(self.parts if self.awkward else self.text)}]]

    def parts(self) -> list[Any]:
        return [{"type": "text", "text": self._maybe(self.text)}, {"type": "image", "image": self._maybe(self.image)}]

    def turns(self) -> list[Any]:
        speakers = ["human", "gpt"] * self.draw(st.integers(1, 2))
        return [{"from": self._maybe(lambda name=name: name), "value": self._maybe(self.text)} for name in speakers]


@st.composite
def rows_of(draw, row_format: RowFormat, awkward: int) -> tuple[dict[str, Any], bool]:
    """A row of a format, and whether it is certainly good."""
    maker = RowMaker(draw, awkward)
    return maker.row(row_format), not awkward


def numbers_in(value: Any) -> list[str]:
    """The numbers of the texts and images of a row or of an example, in order."""
    if isinstance(value, str):
        return _WORD.findall(value)
    if isinstance(value, Image.Image):
        return [f"w{value.convert('RGB').getpixel((0, 0))[0]}"]
    if isinstance(value, bytes):
        try:
            return numbers_in(Image.open(BytesIO(value)))
        except Exception:
            return []
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers_in(each)]
    return [number for each in value for number in numbers_in(each)] if isinstance(value, (list, tuple)) else []


def numbers_of(example: Example) -> list[str]:
    sequences = [example.anchor, example.positive or [], *example.negatives]
    parts = [part[part["type"]] for sequence in sequences for _, part in iter_parts(sequence)]
    return numbers_in([*parts, example.target or ""])


def check_row(row: dict[str, Any], is_good: bool, outcomes: Outcomes) -> None:
    try:
        # An article of MMC4 has nothing to predict or to contrast.
        example = RowParser(len, trust_caption_columns=True, requires_match="text_list" not in row)(row, 7)
    except RowError as error:
        if is_good:
            outcomes.wrong.append(f"refused, and is good: {error}; {row}"[:300])
        elif not str(error).startswith("Row 7 ") or error.row != 7:
            outcomes.wrong.append(f"does not name its row: {error}")
        else:
            outcomes.refused += 1
        return
    except Exception as error:
        outcomes.wrong.append(f"{type(error).__name__}: {error}; {row}"[:300])
        return
    if sorted(numbers_of(example)) == sorted(numbers_in(row)):
        outcomes.right += 1
    else:
        outcomes.wrong.append(f"holds {numbers_of(example)} of {numbers_in(row)}; {row}"[:300])


def parse_all(outcomes: Outcomes, count: int) -> None:
    """Parses `count` awkward rows and a tenth as many good ones of each format."""
    for row_format in FORMATS:
        for awkward, share in ((0, 10), (8, 1), (40, 1)):

            @generated(max(count // share, 20))
            @given(rows_of(row_format, awkward))
            def parse(case):
                check_row(*case, outcomes)

            parse()


class Doors:
    """Every place that rows go into: with `skip`, they use the good rows and no others; without, they name the first
    bad row, or use all."""

    def __init__(self, folder: Path):
        self.folder = folder
        tiny = make_vlm("llava")
        self.model = UniGDForConditionalGeneration.from_vlm(tiny.model)
        self.processor = UniGDProcessor(tiny.processor)
        self.teachers = save_teachers(folder / "teachers")
        self.count = 0

    def __call__(self, rows: list[dict[str, Any]], outcomes: Outcomes) -> None:
        stored = Dataset.from_dict({"place": range(len(rows))})
        columns = sorted({name for row in rows for name in row})
        shown = stored.with_transform(
            lambda batch: {name: [rows[place].get(name) for place in batch["place"]] for name in columns}
        )
        for name in ("training", "streaming", "index", "evaluate", "embed_slices"):
            learned = name not in ("index",)
            parser = RowParser(
                len, trust_caption_columns=True, requires_match=learned, find_reserved=self.processor.find_reserved
            )
            if name == "embed_slices":
                parser.find_reserved, parser.splitter = None, self.teachers.splitter
            good, bad = [], []
            for place, row in enumerate(rows):
                try:
                    parser(row, place)
                    good.append(place)
                except RowError:
                    bad.append(place)
                except Exception as error:
                    outcomes.wrong.append(f"{name}: {type(error).__name__}: {error}")
                    return
            for skip in (True, False):
                self.count += 1
                try:
                    used = getattr(self, name)(
                        rows if name == "streaming" else shown, skip, self.folder / f"{self.count}"
                    )
                    right = (skip or not bad) and used == good
                    refused = False
                except RowError as error:
                    right, refused, used = False, not skip and error.row == bad[0], str(error)
                except ValueError as error:
                    right, used = False, str(error)
                    refused = not good
                except Exception as error:
                    right, refused, used = False, False, f"{type(error).__name__}: {error}"
                outcomes.right += right
                outcomes.refused += refused
                if not right and not refused:
                    outcomes.wrong.append(f"{name}, skip={skip}: good {good}, bad {bad}, got {used}"[:300])

    def _trainer(self, folder, rows, skip):
        args = UniGDTrainingArguments(
            output_dir=str(folder),
            skip_bad_rows=skip,
            trust_caption_columns=True,
            max_steps=2,
            per_device_train_batch_size=2,
            eval_block_size=4,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return UniGDTrainer(self.model, args, train_dataset=rows, processing_class=self.processor)

    def training(self, rows, skip, folder):
        trainer = self._trainer(folder, rows, skip)
        trainer.train()
        return [trainer.train_dataset[place].row for place in range(len(trainer.train_dataset))]

    def streaming(self, rows, skip, folder):
        stream = IterableDataset.from_generator(lambda: iter(rows))
        examples = make_examples(
            stream, RowParser(len, trust_caption_columns=True, find_reserved=self.processor.find_reserved), skip
        )
        trainer = self._trainer(folder, examples, skip)
        trainer.train()
        return [example.row for example in examples]

    def index(self, rows, skip, folder):
        index = build_index(
            self.model, self.processor, rows, folder, skip_bad_rows=skip, batch_size=4, show_progress=False
        )
        return sorted(row for batch in index.table.batches(["row"]) for row in batch["row"].to_pylist())

    def evaluate(self, rows, skip, folder):
        trainer = self._trainer(folder, None, skip)
        metrics = trainer.evaluate(rows)
        assert metrics["eval_loss"] == metrics["eval_loss"]
        return [example.row for example in trainer.get_test_dataloader(rows).dataset]

    def embed_slices(self, rows, skip, folder):
        examples = ExampleDataset(
            rows, RowParser(len, trust_caption_columns=True, splitter=self.teachers.splitter), skip_bad_rows=skip
        )
        features = write_slice_features(examples, self.teachers, folder)
        return [place for place, slices in enumerate(features.rows["slices"]) if slices]


def enter_all(outcomes: Outcomes, batches: int) -> None:
    """Puts batches of good and awkward rows of all formats through every door."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        doors = Doors(Path(folder))
        good, awkward = (st.sampled_from(FORMATS).flatmap(lambda each, n=n: rows_of(each, n)) for n in (0, 20))

        @generated(batches)
        @given(st.lists(good, min_size=3, max_size=5), st.lists(awkward, min_size=1, max_size=4), st.randoms())
        def enter(good, awkward, random):
            rows = [row for row, _ in [*good, *awkward]]
            random.shuffle(rows)
            doors(rows, outcomes)

        enter()
    logging.disable(logging.NOTSET)


def generated(count: int) -> settings:
    """Makes the same cases each time, and goes on after a wrong one."""
    return settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def run(bounded: bool) -> Outcomes:
    outcomes = Outcomes("rows")
    parse_all(outcomes, 100 if bounded else 3_000)
    if not (bounded and outcomes.wrong):
        enter_all(outcomes, 1 if bounded else 25)
    return outcomes


def _lenient_format_of(row: dict[str, Any], requires_match: bool = True) -> RowFormat:
    found = next((each for each in FORMATS if each.fits(row, requires_match)), None)
    if found is None:
        raise ValueError("has no usable columns")
    return found


PLANTED = {
    "negatives are dropped": lambda: mock.patch.object(RowParser, "_negatives", lambda self, row: []),
    "columns are dropped": lambda: mock.patch.object(rows_module, "format_of", _lenient_format_of),
    "turns are not checked": lambda: mock.patch.object(
        chats_module, "_checked_turns", lambda turns, name: list(turns)
    ),
    "good rows are refused": lambda: mock.patch.object(rows_module, "_caption", _refuse),
    "skipping stops": lambda: mock.patch.object(ExampleDataset, "__getitem__", ExampleDataset.parse),
}


def _refuse(value: Any, name: str) -> str:
    raise ValueError(f"has a `{name}`")
