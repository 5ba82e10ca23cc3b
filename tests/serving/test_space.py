"""`hf-unigd app`: the folder of a Space, started as the Hub would start it, and its upload."""

import re
import sys
from importlib.metadata import version
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from huggingface_hub import RepoCard
from packaging.requirements import Requirement

import hf_unigd
from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.retrieval import build_index
from hf_unigd.serving.space.requirements import pinned_requirements
from index_cases import knowledge
from serving_cases import started_process
from tiny_models import make_vlm


HOST = "ada-icons.hf.space"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an index of it, and the Space of both."""
    folder = tmp_path_factory.mktemp("space")
    tiny = make_vlm()
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    model.processor = processor
    model.save_pretrained(folder / "model")
    (folder / "model" / "training_args.bin").write_text("secret")
    build_index(model, processor, knowledge(), folder / "index", model_name="m", show_progress=False)
    arguments = ["ada/icons", "--model", folder / "model", "--index", folder / "index", "--output", folder / "space"]
    main(["app", *map(str, arguments)])
    return folder


def texts_in(space):
    return {file: (space / file).read_text() for file in ("Dockerfile", "README.md", "requirements.txt", "serve.yaml")}


def test_the_folder_runs_as_the_hub_runs_it(folder, tmp_path):
    """Only the image's own steps are left out: its packages are those of this environment."""
    (command,) = re.findall("^CMD (.+)$", texts_in(folder / "space")["Dockerfile"], re.MULTILINE)
    serve = yaml.safe_load((folder / "space" / "serve.yaml").read_text())
    (folder / "space" / "serve.yaml").write_text(yaml.safe_dump({**serve, "port": 0}))  # 7860 may be in use here
    # What the Hub sets, with a domain of the owner's.
    space = {"SYSTEM": "spaces", "SPACE_ID": "ada/icons", "SPACE_HOST": f"icons.example,{HOST}"}
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": "", "HOME": str(tmp_path)}
    try:
        with started_process(["sh", "-c", command], cwd=folder / "space", env={**space, **path}) as (
            _,
            address,
            lines,
        ):
            proxied = {"Host": HOST, "X-Forwarded-Proto": "https", "X-Forwarded-For": "8.8.8.8"}
            page = httpx.get(address, headers=proxied)
            assert page.status_code == 200 and "icons · hf-unigd" in page.text
            assert f"https://{HOST}" in httpx.get(f"{address}/config", headers=proxied).text
            http = httpx.Client(headers=proxied)
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", http_client=http, max_retries=0)
            assert len(client.embeddings.create(model="icons", input="a red cat").data[0].embedding) == 32
            found = client.post("/search", body={"query": "two blue dogs", "k": 2}, cast_to=object)
            assert found["data"][0]["id"] == "rows/4"
            for host, status in {"icons.example": 200, "evil.example": 403, "evil-icons.hf.space": 403}.items():
                assert httpx.get(address, headers={**proxied, "Host": host}).status_code == status
        assert "Traceback" not in "".join(lines)
    finally:
        (folder / "space" / "serve.yaml").write_text(yaml.safe_dump(serve))


def test_it_holds_what_the_space_needs_and_nothing_else(folder):
    space = folder / "space"
    assert {path.name for path in space.iterdir()} == {*texts_in(space), "hf_unigd", "model", "index"}
    assert not (space / "model" / "training_args.bin").exists()
    assert (space / "model" / "model.safetensors").read_bytes() == (
        folder / "model" / "model.safetensors"
    ).read_bytes()
    package = Path(hf_unigd.__file__).parent
    code = {
        file.relative_to(package) for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    }
    assert {
        file.relative_to(space / "hf_unigd")
        for file in (space / "hf_unigd").rglob("*")
        if file.suffix != ".pyc" and file.is_file()
    } == code


def test_the_card_says_what_the_hub_asks_for(folder):
    card = RepoCard.load(folder / "space" / "README.md").data.to_dict()
    assert (card["sdk"], card["app_port"], card["title"]) == ("docker", 7860, "icons")
    assert len(card["short_description"]) <= 60
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card["colorFrom"], card["colorTo"]} <= colors
    assert f"https://{HOST}/v1/embeddings" in (folder / "space" / "README.md").read_text()
    texts = texts_in(folder / "space")
    assert "EXPOSE 7860" in texts["Dockerfile"]
    assert f"FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim" in texts["Dockerfile"]
    assert yaml.safe_load(texts["serve.yaml"])["port"] == 7860


def test_every_package_is_pinned_as_it_is_here(folder):
    pinned = {one.name: one for one in map(Requirement, texts_in(folder / "space")["requirements.txt"].splitlines())}
    assert {"torch", "transformers", "gradio", "fastapi", "uvicorn", "lancedb"} <= pinned.keys()
    assert not {"pytest", "hf-unigd", "sentence-transformers", "bitsandbytes"} & pinned.keys()
    for name, one in pinned.items():
        assert one.specifier.contains(version(name).partition("+")[0]) and str(one.specifier).startswith("==")
    assert "lancedb" not in {Requirement(line).name for line in pinned_requirements("app")}


def test_what_is_not_installed_is_named(monkeypatch):
    from hf_unigd.serving.space import requirements

    def missing(name):
        if name == "gradio":
            raise requirements.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(requirements, "version", missing)
    with pytest.raises(ImportError, match=r"needs gradio.*pip install 'hf-unigd\[app,retrieval\]'"):
        pinned_requirements("app", "retrieval")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "icons"], "`--space icons` lacks its owner"),
        (["--space", "a/b/c"], "`--space`: Repo id must be"),
        (["--space", "ada/icons", "--private", "true"], "`--private` and `--token` are for `--push true`"),
    ],
)
def test_arguments_that_make_no_space_are_refused(arguments, message):
    with pytest.raises(SystemExit) as end:
        main(["app", "--model", "nothing", *arguments])
    assert message in str(end.value)


def test_it_says_how_to_upload(folder, tmp_path, capsys):
    main(["app", "ada/icons", str(folder / "model"), "--output", str(tmp_path / "space"), "--name", "drawn"])
    assert f"hf upload ada/icons {tmp_path}/space --repo-type space" in capsys.readouterr().out
    serve = yaml.safe_load((tmp_path / "space" / "serve.yaml").read_text())
    assert serve["model"] == "model" and serve["name"] == "drawn" and "index" not in serve
