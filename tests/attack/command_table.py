"""What a valid call of each command is, from which `commands.py` makes the invalid ones."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.cli import main as cli
from tiny_adapters import make_adapter
from tiny_models import make_image, make_vlm
from tiny_teachers import save_teachers


@dataclass(frozen=True)
class Command:
    """
    Attributes:
        name: Name of the command.
        work: What the command calls first of all that takes long, or sends anything.
        arguments: A valid call, without the output.
        paths: Those of the arguments that name a file or a folder.
        output: The argument that names the output; None where there is none.
        suffix: How an output file ends; empty for a folder.
        writes: Files that it writes to its output, if a valid call would take too long to find out.
        is_quick: Whether a valid call takes seconds and needs no network.
        keeps: Whether an interruption leaves something to go on with.
        unread: Ways to break a path that the command does not come to see.
    """

    name: str
    work: str
    arguments: Mapping[str, str]
    paths: tuple[str, ...] = ()
    output: str | None = None
    suffix: str = ""
    writes: tuple[str, ...] = ()
    is_quick: bool = True
    keeps: bool = False
    unread: tuple[str, ...] = ()

    def call(self, output: Path | str | None = None, **changes: str | Path) -> list[str]:
        """The command line, with some arguments changed."""
        arguments = {**self.arguments, **({self.output: output} if self.output else {}), **changes}
        return [self.name, *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))]


@dataclass
class Workplace:
    """A folder with models, rows and an index of them, and the commands on them."""

    folder: Path
    commands: list[Command] = field(default_factory=list)

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)


_FOLDERS: list[TemporaryDirectory] = []  # removed when the process ends


@cache
def workplace() -> Workplace:
    _FOLDERS.append(TemporaryDirectory())
    here = Workplace(Path(_FOLDERS[-1].name).resolve())
    tiny = make_vlm()
    tiny.model.save_pretrained(here["vlm"])
    tiny.processor.save_pretrained(here["vlm"])
    UniGDForConditionalGeneration.from_vlm(tiny.model).save_pretrained(here["model"])
    UniGDProcessor(tiny.processor).save_pretrained(here["model"])
    (here.folder / "peft").mkdir()
    make_adapter(here.folder / "peft")
    rows = []
    for place in range(4):
        make_image(place).save(here[f"{place}.png"])
        rows.append({"image": here[f"{place}.png"], "short_caption": f"cat {place}", "long_caption": "A cat."})
    (here.folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    bad = [*rows[:2], {**rows[2], "short_caption": " "}, rows[3]]
    (here.folder / "bad.jsonl").write_text("\n".join(map(json.dumps, bad)))
    (here.folder / "prompts.yaml").write_text("image: [In one word]\ntext: [In one word]\n")
    teachers = save_teachers(here.folder / "teachers")
    here.commands += _commands(here, {name: getattr(teachers, name) for name in _TEACHERS})
    captions = [{"anchor": f"dog {place}"} for place in range(4)]
    (here.folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    index = next(one for one in here.commands if one.name == "index")
    cli.main(index.call(here["index"]))
    cli.main(index.call(here["captions_index"], dataset_name=here["captions.jsonl"]))
    return here


_TEACHERS = ("image_teacher", "text_teacher", "cross_teacher")


def _commands(here: Workplace, teachers: dict[str, str]) -> list[Command]:
    rows = {"dataset_name": here["rows.jsonl"]}
    data = {**rows, "dataset_test_split": "train"}
    model = {"model": here["model"]}
    image = {"image": here["0.png"]}
    train = {
        "model_name_or_path": here["vlm"],
        **data,
        "max_steps": "1",
        "per_device_train_batch_size": "4",
        "trust_caption_columns": "true",
        "use_cpu": "true",
        "report_to": "none",
    }
    checkpoint = ("config.json", "model.safetensors", "README.md", "metrics.json")
    return [
        Command(
            "quickstart",
            "hf_unigd.quickstart.vladva.load_icons",
            {"max_steps": "1"},
            output="output",
            writes=(*checkpoint, "retrieval.png"),
            is_quick=False,
        ),
        Command(
            "quickstart",
            "hf_unigd.quickstart.sugar.load_stories",
            {"recipe": "sugar", "max_steps": "1"},
            output="output",
            writes=(*checkpoint, "clip/config.json", "slice_features/teachers.json"),
            is_quick=False,
        ),
        Command(
            "quickstart",
            "hf_unigd.quickstart.scenes.load_scenes",
            {"recipe": "scenes", "max_steps": "1"},
            output="output",
            writes=checkpoint,
            is_quick=False,
        ),
        Command(
            "plan",
            "hf_unigd.cli.plan.plan_model",
            train,
            ("model_name_or_path",),
            # Nothing but the config is read.
            unread=tuple(
                f"model_name_or_path *{name} is cut" for name in ("model.safetensors", "tok*", "proc*", "probe*")
            ),
        ),
        Command(
            "train",
            "hf_unigd.cli.train.load_for_training",
            train,
            ("model_name_or_path", "dataset_name"),
            "output_dir",
            keeps=True,
        ),
        Command(
            "embed-slices",
            "transformers.AutoTokenizer.from_pretrained",
            {**model, **rows, **teachers},
            ("model", "dataset_name", *_TEACHERS),
            "output",
            keeps=True,
            unread=("model *model.safetensors is cut", "model *processor_config.json is cut"),  # only the tokenizer is
        ),
        Command(
            "evaluate",
            "hf_unigd.cli.measuring.load_embedder",
            {**model, **data},
            ("model", "dataset_name"),
            "output",
            ".json",
            keeps=True,
        ),
        Command(
            "compare",
            "hf_unigd.cli.measuring.load_embedder",
            {"base": here["model"], "tuned": here["vlm"], **data},
            ("base", "tuned", "dataset_name"),
            "output",
            keeps=True,
            unread=("tuned *is cut",),  # which is seen when the base is measured, whose results are kept
        ),
        Command(
            "prompts",
            "hf_unigd.trainer.UniGDScriptArguments.load_rows",
            {**model, **data, "prompts": here["prompts.yaml"], "before": here["vlm"]},
            ("model", "dataset_name", "prompts", "before"),
            "output",
            keeps=True,
        ),
        Command(
            "embed",
            "hf_unigd.cli.embed.load_checkpoint",
            {**model, **data},
            ("model", "dataset_name"),
            "output",
            ".parquet",
            keeps=True,
        ),
        Command(
            "caption",
            "hf_unigd.cli.caption.LocalCaptioner",
            {**model, "kind": "long", "replace_captions": "true", "max_new_tokens": "2", **rows},
            ("model", "dataset_name"),
            "output",
            keeps=True,
        ),
        Command(
            "index",
            "hf_unigd.cli.index.load_checkpoint",
            {**model, **data},
            ("model", "dataset_name"),
            "output",
            keeps=True,
        ),
        Command(
            "search",
            "hf_unigd.retrieval.EmbeddingIndex.load",
            {"index": here["index"], **model, **image, "k": "2"},
            ("index", "model", "image"),
            "output",
            ".png",
        ),
        Command(
            "answer",
            "hf_unigd.retrieval.EmbeddingIndex.load",
            {"index": here["index"], **model, **image, "question": "What?", "k": "2", "max_new_tokens": "2"},
            ("index", "model", "image"),
            "output",
            ".png",
        ),
        Command(
            "serve",
            "hf_unigd.cli.serve.load_checkpoint",
            {**model, "index": here["index"], "before": here["vlm"], "port": "0"},
            ("model", "index", "before"),
            is_quick=False,
        ),
        Command(
            "app",
            "hf_unigd.cli.app.load_checkpoint",
            {"space": "ada/space", **model, "index": here["index"]},
            ("model", "index"),
            "output",
        ),
        Command(
            "mine",
            "hf_unigd.cli.mine.load_checkpoint",
            {"index": here["captions_index"], **model, **rows},
            ("index", "model", "dataset_name"),
            "output",
            keeps=True,
        ),
        Command(
            "generate",
            "hf_unigd.cli.generate.load_checkpoint",
            {**model, **image, "max_new_tokens": "2"},
            ("model", "image"),
        ),
        Command(
            "explain",
            "hf_unigd.trainer.UniGDScriptArguments.load_rows",
            {"a": "0", "b": "1", **rows, **teachers},
            ("dataset_name", *_TEACHERS),
            "output",
            ".png",
        ),
        Command(
            "push",
            "hf_unigd.cli.push.push_checkpoint",
            {"folder": here["model"], "repo_id": "ada/model"},
            ("folder",),
            is_quick=False,
            unread=("folder *is cut",),  # it sends files, whatever they hold
        ),
        Command("doctor", "hf_unigd.cli.doctor.examine", model, ("model",)),
        Command(
            "merge", "hf_unigd.cli.merge.merge_adapter", {"adapter": here["peft/adapter"]}, ("adapter",), "output"
        ),
        Command("export", "hf_unigd.cli.export.export_checkpoint", model, ("model",), "output"),
        Command("kernels", "hf_unigd.cli.kernels.export", {"action": "export"}, output="directory"),
    ]
