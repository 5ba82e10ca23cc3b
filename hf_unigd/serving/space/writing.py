"""The folder of a Space: what the Hub builds and runs, and what its readers see."""

import shutil
import sys
from pathlib import Path

import yaml
from huggingface_hub import SpaceCardData
from huggingface_hub.constants import REPOCARD_NAME

from ...hub.pushing import check_checkpoint, pushed_files
from ...outputs import new_folder
from ...version import __version__
from .requirements import pinned_requirements


_PACKAGE = Path(__file__).parents[2]
_PORT = 7860
_README = """\
# {title}

One vision-language model that finds pictures and texts, and answers from them. Its page is here; programs ask it by
OpenAI's API, at the address that *Embed this Space* names:

```bash
curl https://{host}/v1/embeddings -H 'Content-Type: application/json' -d '{{"input": ["a red cat"]}}'
```

The folder was written by `hf-unigd app`. `serve.yaml` holds the arguments of `hf-unigd serve`, to be changed there;
`hf_unigd/` is [hf-unigd](https://github.com/hf-unigd/hf-unigd) {version}, under the Apache licence 2.0.
"""


def write_space(folder: str | Path, space: str, model: str, index: str | None = None, name: str | None = None) -> None:
    """
    Writes a folder that the Hub runs as a Docker Space: the server with its page, the code of this hf-unigd, and the
    versions of this environment.

    Args:
        folder: A new or empty folder.
        space: The Space, as owner/name.
        model: A Hub id, which the Space downloads, or the folder of a checkpoint, of which the Space gets what a push
            would upload.
        index: An index of the model: a folder, which is copied, or an address that LanceDB opens.
        name: What the model is called there. By default its Hub id or, for a folder, the name of the Space.

    Raises:
        FileExistsError: `folder` holds files.
        ValueError: the model's folder holds no checkpoint, or an adapter whose base model is not on the Hub.
        ImportError: the page, the server or the index needs a package that is not installed here, so that its version
            is not known.
    """
    requirements = pinned_requirements("app", *(["retrieval"] if index is not None else []))
    is_copied = Path(model).is_dir()
    if is_copied:
        check_checkpoint(model)
    title = name or (space.partition("/")[2] if is_copied else model)
    serve = {"model": "model" if is_copied else model, "name": title, "host": "0.0.0.0", "port": _PORT, "page": True}
    with new_folder(folder) as unfinished:
        shutil.copytree(_PACKAGE, unfinished / "hf_unigd", ignore=shutil.ignore_patterns("__pycache__"))
        if is_copied:
            for file in pushed_files(model):
                (unfinished / "model" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(model) / file, unfinished / "model" / file)
        if index is not None:
            serve["index"] = "index" if Path(index).is_dir() else index
            if Path(index).is_dir():
                shutil.copytree(index, unfinished / "index")
        dockerfile = (Path(__file__).parent / "Dockerfile").read_text(encoding="utf-8")
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        texts = {
            "Dockerfile": dockerfile.replace("PYTHON_VERSION", python),
            "requirements.txt": "".join(f"{line}\n" for line in requirements),
            "serve.yaml": yaml.safe_dump(serve, sort_keys=False),
            REPOCARD_NAME: _card(space, title, [] if is_copied else [model]),
        }
        for file, text in texts.items():
            (unfinished / file).write_text(text, encoding="utf-8")


def _card(space: str, title: str, models: list[str]) -> str:
    metadata = SpaceCardData(
        title=title,
        emoji="🔎",
        colorFrom="blue",
        colorTo="indigo",
        sdk="docker",
        app_port=_PORT,
        short_description="Finds pictures and texts, and answers from them",
        models=models or None,
    )
    host = f"{space.replace('/', '-').lower()}.hf.space"
    return f"---\n{metadata.to_yaml()}\n---\n\n{_README.format(title=title, host=host, version=__version__)}"
