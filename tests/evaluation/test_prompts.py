"""`hf-unigd prompts` on tiny models, compared with plain transformers and numpy."""

import csv
import io
import json
import re
import socket
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import yaml
from datasets import Dataset
from PIL import Image

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.data import RowError
from hf_unigd.evaluation.prompts import (
    PROMPTS_FILE,
    PromptComparison,
    cumulative_variance,
    image_attention,
    load_prompts,
    pair_recalls,
    passes,
    study,
    summarize,
)
from hf_unigd.evaluation.prompts.items import read_captioned_images
from hf_unigd.evaluation.prompts.lists import SOFT_PROMPT, candidates, with_prompt
from hf_unigd.hub import load_checkpoint
from hf_unigd.trainer.arguments import UniGDModelConfig
from hf_unigd.trainer.loading import load_for_training
from tiny_models import FAMILIES, make_image, make_vlm


PROMPTS = {"image": ["What is in the image", "a red cat: $5"], "text": ["In one word", "three people"]}
FIGURES = {"entropy", "cumulative_variance", "top_tokens", "recall", "attention"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for name, seed in (("plain", 0), ("other", 1)):
        tiny = make_vlm(seed=seed)
        tiny.model.lm_head.weight.data *= 30  # otherwise all tokens are about as likely
        tiny.model.save_pretrained(folder / name)
        tiny.processor.save_pretrained(folder / name)
    model = UniGDForConditionalGeneration.from_vlm(make_vlm().model)
    model.processor = UniGDProcessor(make_vlm().processor)
    model.add_soft_prompts(**model.processor.add_soft_prompts())
    with torch.no_grad():
        model.get_input_embeddings().weight[model.processor.soft_prompt_ids] += 0.5
    model.save_pretrained(folder / "soft")
    rows = []
    for place in range(6):
        make_image(place, (24 + place, 20)).save(folder / f"{place}.png")
        rows.append({"image": f"{place}.png", "caption": [f"a cat {place}", f"{'dog ' * (place + 1)}{place}"]})
    rows[5]["image"] = "4.png"  # one image with four captions
    rows[1]["caption"][0] = "a cat 0"  # one caption of two images
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS))
    return folder


def prompts(folder, output, **arguments):
    arguments = {
        "model": folder / "plain",
        "prompts": folder / "prompts.yaml",
        "dataset_name": folder / "rows.jsonl",
        "dataset_test_split": "train",
        "image_folder": folder,
        "attention_images": 2,
        "batch_size": 2,
        "output": output,
        **arguments,
    }
    main(["prompts", *(part for name, value in arguments.items() for part in (f"--{name}", str(value)))])


def table(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


class Oracle:
    """What plain transformers and numpy make of the rows, one at a time."""

    def __init__(self, folder, name="plain"):
        self.vlm = UniGDForConditionalGeneration.from_vlm_pretrained(folder / name).vlm.eval()
        self.processor = make_vlm().processor
        self.images = [Image.open(folder / f"{place}.png").convert("RGB") for place in range(5)]
        self.texts = ["a cat 0", "dog 0", "dog dog 1", "a cat 2", "dog dog dog 2", "a cat 3", "dog dog dog dog 3"]
        self.texts += ["a cat 4", "dog dog dog dog dog 4", "a cat 5", "dog dog dog dog dog dog 5"]
        # The first caption is that of two images, and as an item of each its own.
        self.items = [0, 1, 0, *range(2, 11)]
        owners = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
        self.matches = np.array([[image == owner for owner in owners] for image in range(5)])

    def run(self, modality, prompt):
        embeddings, entropies, mean = [], [], 0
        items = self.images if modality == "image" else self.texts
        for item in items:
            is_image = modality == "image"
            text = f"USER: <image>\n{prompt} ASSISTANT:" if is_image else f"USER: {item}\n{prompt} ASSISTANT:"
            batch = self.processor(text=text, images=item if is_image else None, return_tensors="pt")
            with torch.no_grad():
                outputs = self.vlm(**batch, output_hidden_states=True)
            probabilities = outputs.logits[0, -1].double().softmax(-1).numpy()
            entropies.append(-(probabilities * np.log(probabilities)).sum())
            mean = mean + probabilities / len(items)
            hidden = outputs.hidden_states[-1][0, -1].double().numpy()
            embeddings.append(hidden / np.linalg.norm(hidden))
        return np.stack(embeddings), np.array(entropies), mean

    def recalls(self, images, texts):
        similarities = images @ texts[self.items].T
        found = []
        for scores, matches in ((similarities, self.matches), (similarities.T, self.matches.T)):
            # What is equally similar, such as the same caption of another image, comes before the match.
            order = np.lexsort((matches, -scores.round(9)), axis=1)
            hits = np.take_along_axis(matches, order, axis=1)
            found += [hits[:, :k].any(1).mean() for k in (1, 5, 10)]
        return found


def test_the_command_agrees_with_plain_transformers_and_numpy(folder, tmp_path, capsys):
    prompts(folder, tmp_path / "out")
    oracle = Oracle(folder)
    defaults = UniGDProcessor(make_vlm().processor).prompts
    names = {modality: [defaults[modality], *PROMPTS[modality]] for modality in PROMPTS}
    expected = {modality: {name: oracle.run(modality, name) for name in names[modality]} for modality in names}

    rows = table(tmp_path / "out" / "prompts.csv")
    assert [(row["modality"], row["prompt"]) for row in rows] == [
        (modality, name) for modality in names for name in names[modality]
    ]
    for row in rows:
        embeddings, entropies, _ = expected[row["modality"]][row["prompt"]]
        assert float(row["entropy"]) == pytest.approx(entropies.mean(), rel=1e-4)
        assert float(row["entropy_std"]) == pytest.approx(entropies.std(ddof=1), rel=1e-3)
        variances = np.linalg.svd(embeddings - embeddings.mean(0), compute_uv=False) ** 2
        shares = np.cumsum(variances) / variances.sum()
        assert int(row["components_for_90%"]) == 1 + (shares < 0.9).sum()
        curve = [
            float(each["cumulative_variance"])
            for each in table(tmp_path / "out" / "cumulative_variance.csv")
            if (each["modality"], each["prompt"]) == (row["modality"], row["prompt"])
        ]
        np.testing.assert_allclose(curve, shares, atol=1e-4)

    scores = {}
    for row in table(tmp_path / "out" / "pairs.csv"):
        pair = row["image_prompt"], row["text_prompt"]
        (images, image_entropies, _), (texts, text_entropies, _) = (
            expected[modality][name] for modality, name in zip(names, pair, strict=True)
        )
        found = [float(value) for name, value in row.items() if "_recall_at_" in name]
        np.testing.assert_allclose(found, oracle.recalls(images, texts), atol=1e-5)
        assert float(row["mean_recall"]) == pytest.approx(np.mean(found), abs=1e-5)
        assert float(row["entropy"]) == pytest.approx((image_entropies.mean() + text_entropies.mean()) / 2, rel=1e-4)
        scores[pair] = float(row["mean_recall"]), float(row["entropy"])
    assert len(scores) == 9

    printed = capsys.readouterr().out
    best = yaml.safe_load(printed.split("`hf-unigd train`:")[1])
    assert scores[best["image_prompt"], best["text_prompt"]] == max(scores.values())
    assert f"mean recall {max(scores.values())[0]:.1%}" in printed
    _, processor, _ = load_for_training(UniGDModelConfig(model_name_or_path=str(folder / "plain"), **best))
    assert processor.prompts == {"image": best["image_prompt"], "text": best["text_prompt"]}

    for modality in names:
        mean = expected[modality][best[f"{modality}_prompt"]][2]
        found = [
            float(row["probability"])
            for row in table(tmp_path / "out" / "top_tokens.csv")
            if row["modality"] == modality
        ]
        np.testing.assert_allclose(found, np.sort(mean)[::-1][:10], rtol=1e-4)
    for name in FIGURES:
        assert Image.open(tmp_path / "out" / f"{name}.png").width > 300
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]  # no parts are left


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_5"])  # some layers of Qwen3.5 have no attention
def test_attention_is_that_of_the_eager_backbone_over_the_image_tokens(family):
    tiny = make_vlm(family)
    model = UniGDForConditionalGeneration.from_vlm(tiny.model)
    processor = with_prompt(UniGDProcessor(tiny.processor), "image", "In one word")
    image = make_image(3, (40, 24))
    implementation = model.vlm.get_decoder().config._attn_implementation
    found = image_attention(model, processor, [{"role": "user", "content": [{"type": "image", "image": image}]}])
    assert model.vlm.get_decoder().config._attn_implementation == implementation

    reference = make_vlm(family, attn_implementation="eager")
    batch = processor.process_sequences([[image]])
    batch.pop("spans")
    with torch.no_grad():
        outputs = reference.model(**batch, output_attentions=True)
    attentions = torch.stack(outputs.attentions)[:, 0, :, -1].mean((0, 1))
    ids = batch["input_ids"][0]
    is_image = ids == processor.image_token_id
    assert len(found.weights) == is_image.sum()
    torch.testing.assert_close(found.weights, attentions[is_image], atol=1e-6, rtol=1e-4)
    weights = found.weights.double().numpy() / found.weights.double().sum().item()
    density = np.exp(-(weights * np.log(weights)).sum()) / len(weights)
    assert found.density == pytest.approx(density, rel=1e-4)
    assert found.share == pytest.approx(attentions[is_image].sum().item(), rel=1e-4)
    if found.grid is not None:
        assert found.grid[0] * found.grid[1] == len(found.weights)


def test_a_model_that_returns_no_attention_is_refused_with_the_remedy(monkeypatch):
    tiny = make_vlm()
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    forward = type(model).forward

    def without_attention(self, **kwargs):
        outputs = forward(self, **kwargs)
        outputs.attentions = None
        return outputs

    monkeypatch.setattr(type(model), "forward", without_attention)
    with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration returns no attention.*--attention_images 0"):
        image_attention(model, processor, [{"role": "user", "content": [{"type": "image", "image": make_image()}]}])


def test_before_and_after_are_compared_at_the_best_pair(folder, tmp_path):
    prompts(folder, tmp_path / "out", before=folder / "other")
    tokens = table(tmp_path / "out" / "top_tokens.csv")
    assert [row["model"] for row in tokens] == ["before"] * 20 + ["after"] * 20
    chosen = {row["modality"]: row["prompt"] for row in tokens}
    for name, folder_of in (("before", "other"), ("after", "plain")):
        mean = Oracle(folder, folder_of).run("image", chosen["image"])[2]
        found = [float(row["probability"]) for row in tokens if (row["model"], row["modality"]) == (name, "image")]
        np.testing.assert_allclose(found, np.sort(mean)[::-1][:10], rtol=1e-4)
    attention = table(tmp_path / "out" / "attention.csv")
    assert [row["model"] for row in attention] == ["before"] * 2 + ["after"] * 2
    assert len({row["share_of_attention"] for row in attention}) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


def test_a_soft_prompt_is_compared_with_the_prompt_that_it_started_from(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(PromptComparison, "best", lambda self, hand_written=False: (int(hand_written),) * 2)
    prompts(folder, tmp_path / "out", model=folder / "soft", before=folder / "plain", attention_images=0)
    tokens = table(tmp_path / "out" / "top_tokens.csv")
    mean = Oracle(folder).run("image", "Summarize the provided image in one word")[2]
    found = [float(row["probability"]) for row in tokens if (row["model"], row["modality"]) == ("before", "image")]
    np.testing.assert_allclose(found, np.sort(mean)[::-1][:10], rtol=1e-4)


def test_an_interrupted_run_goes_on_and_refuses_another_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "BLOCK", 2)
    prompts(folder, tmp_path / "whole", attention_images=0)
    summarize, done = passes.summarize, []

    def stop_after_three(*args, **kwargs):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return summarize(*args, **kwargs)

    monkeypatch.setattr(passes, "summarize", stop_after_three)
    with pytest.raises(SystemExit):
        prompts(folder, tmp_path / "parts", attention_images=0)
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(passes, "summarize", summarize)
    for changes, reason in (({"model": folder / "other"}, "`model` was"), ({"max_rows": 3}, "`rows` was")):
        with pytest.raises(SystemExit, match=f"was begun with another model, other rows or settings: .*{reason}"):
            prompts(folder, tmp_path / "parts", attention_images=0, **changes)
    monkeypatch.setattr(passes, "summarize", lambda *args, **kwargs: done.append(1) or summarize(*args, **kwargs))
    prompts(folder, tmp_path / "parts", attention_images=0)
    assert len(done) == 3 + 3 - 3 + 6  # 3 blocks of images and 6 of captions, of which 3 were there
    tables = ("prompts", "pairs", "cumulative_variance", "top_tokens")
    written = {*(f"{name}.png" for name in FIGURES - {"attention"}), *(f"{name}.csv" for name in tables)}
    assert {file.name for file in (tmp_path / "parts").iterdir()} == written
    for name in tables:
        assert (tmp_path / "parts" / f"{name}.csv").read_text() == (tmp_path / "whole" / f"{name}.csv").read_text()


def prompts_on_rank(rank, port, folder, output):
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "ACCELERATE_USE_CPU": "true"}.items():
            patch.setenv(name, str(value))
        patch.setattr(passes, "BLOCK", 2)
        summarize, done = passes.summarize, []
        patch.setattr(passes, "summarize", lambda *args, **kwargs: done.append(1) or summarize(*args, **kwargs))
        with redirect_stdout(io.StringIO()) as printed:
            prompts(folder, output, before=folder / "other")
        torch.save((len(done), printed.getvalue()), folder / f"rank_{rank}.pt")
        torch.distributed.destroy_process_group()


def numbered(cell):
    """A cell of a table, as a number if it is one."""
    try:
        return float(cell)
    except ValueError:
        return cell


def test_two_processes_share_the_work_and_write_what_one_does(folder, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(prompts_on_rank, (port, folder, tmp_path / "two"), nprocs=2)
    monkeypatch.setattr(passes, "BLOCK", 2)
    prompts(folder, tmp_path / "one", before=folder / "other")
    (first, printed), (second, nothing) = (torch.load(folder / f"rank_{rank}.pt") for rank in (0, 1))
    assert first + second == 2 * (3 + 6) and abs(first - second) <= 2  # blocks of images and captions, of two models
    assert "The best hand-written prompts" in printed and "hand-written" not in nothing
    files = {file.name for file in (tmp_path / "one").iterdir()}
    assert {file.name for file in (tmp_path / "two").iterdir()} == files
    for name in sorted(each for each in files if each.endswith(".csv")):
        one, two = (
            [list(map(numbered, row.values())) for row in table(tmp_path / run / name)] for run in ("one", "two")
        )
        # Six digits are written, of which the last is that of a sum in another order.
        near = [[cell if isinstance(cell, str) else pytest.approx(cell, rel=2e-5) for cell in row] for row in one]
        assert two == near, name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one", "two"]  # no parts are left


def test_soft_prompts_are_compared_as_they_are_and_not_recommended(folder, tmp_path, capsys):
    prompts(folder, tmp_path / "out", model=folder / "soft")
    model, processor = load_checkpoint(str(folder / "soft"))
    first = table(tmp_path / "out" / "prompts.csv")[0]
    assert first["prompt"] == SOFT_PROMPT
    entropies = []
    for place in range(5):
        batch = processor.process_sequences([[Image.open(folder / f"{place}.png").convert("RGB")]])
        logits = model(**batch).logits[0, -1].double()
        entropies.append(torch.distributions.Categorical(logits=logits).entropy().item())
    assert float(first["entropy"]) == pytest.approx(np.mean(entropies), rel=1e-4)
    pairs = table(tmp_path / "out" / "pairs.csv")
    assert {SOFT_PROMPT} < {row["text_prompt"] for row in pairs}
    best = yaml.safe_load(capsys.readouterr().out.split("`hf-unigd train`:")[1])
    assert best["image_prompt"] in PROMPTS["image"] and best["text_prompt"] in PROMPTS["text"]


def test_rows_are_read_at_equal_distances_and_streams_from_their_beginning():
    rows = [{"image": make_image(place), "short_caption": f"a cat {place}"} for place in range(10)]
    rows[4]["long_caption"] = "A cat on the grass."
    processor = UniGDProcessor(make_vlm().processor)
    items = read_captioned_images(rows, processor, 5)
    numbers = [0, 2, 4, 6, 8]
    assert all(items.read(modality, range(5))[1] == numbers for modality in ("image", "text"))
    captions = [sequence[0]["content"][0]["text"] for sequence in items.read("text", range(5))[0]]
    assert captions == [f"a cat {place}" for place in numbers]
    assert items.read("image", [1])[0][0][0]["content"][0]["image"].tobytes() == make_image(2).tobytes()
    assert torch.equal(items.matches, torch.eye(5, dtype=torch.bool))
    stream = Dataset.from_list(rows).to_iterable_dataset()
    items = read_captioned_images(stream, processor, 5)
    assert items.read("image", range(5))[1] == [0, 1, 2, 3, 4]
    assert items.read("image", [3])[0][0][0]["content"][0]["image"].tobytes() == make_image(3).tobytes()


def test_the_instructions_of_a_model_precede_what_is_compared():
    tiny = make_vlm()
    tiny.model.lm_head.weight.data *= 30
    model = UniGDForConditionalGeneration.from_vlm(tiny.model)
    instructions = {"query": "Find a caption.", "document": "Find an image."}
    processor = with_prompt(UniGDProcessor(tiny.processor, instructions=instructions), "text", "In one word")
    for name in instructions:
        sequence = [{"role": "user", "content": [{"type": "text", "text": "a red cat"}]}]
        found = summarize(model, [processor], [sequence], [0], name)
        text = f"USER: {instructions[name]} a red cat\nIn one word ASSISTANT:"
        with torch.no_grad():
            logits = tiny.model(**tiny.processor(text=text, return_tensors="pt")).logits[0, -1].double()
        entropy = torch.distributions.Categorical(logits=logits).entropy().item()
        assert found.entropies.item() == pytest.approx(entropy, rel=1e-4)


# Hand-computed numbers.


def test_recall_of_pairs_counts_ties_against_the_match():
    eye = torch.eye(3)
    images = torch.stack([eye, torch.ones(3, 3) / 3**0.5])
    texts = torch.stack([eye[[0, 1, 2, 0]], eye[[1, 0, 2, 1]]])
    matches = torch.tensor([[True, False, False, True], [False, True, False, False], [False, False, True, False]])
    found = pair_recalls(images, texts, matches, show_progress=False).recalls
    assert found[0, 0].tolist() == [[1, 1, 1], [1, 1, 1]]
    # Only the third image and the third text match; the others are second or third.
    assert found[0, 1, :, 0].tolist() == pytest.approx([1 / 3, 1 / 4])
    assert found[1, 0].tolist() == [[0, 1, 1], [0, 1, 1]]  # all alike: nothing is first


def test_cumulative_variance_of_known_embeddings():
    line = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    assert cumulative_variance(line).tolist() == pytest.approx([1, 1, 1])
    cross = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    assert cumulative_variance(cross).tolist() == pytest.approx([0.9, 1])
    assert cumulative_variance(torch.ones(4, 2)).tolist() == [1, 1]
    wide = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    values = np.linalg.svd(wide.double().numpy() - wide.double().numpy().mean(0), compute_uv=False) ** 2
    np.testing.assert_allclose(cumulative_variance(wide).numpy(), np.cumsum(values) / values.sum(), atol=1e-12)


# Prompts and rows that cannot be compared.


def test_the_file_that_we_ship_has_fifty_of_each():
    found = load_prompts()
    assert {modality: len(prompts) for modality, prompts in found.items()} == {"image": 50, "text": 50}
    assert candidates(UniGDProcessor(make_vlm().processor), found)["image"].keys() == set(found["image"])
    assert "Summarize the provided image in one word" in found["image"] and PROMPTS_FILE.is_file()


def test_the_file_in_the_documentation_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text()
    example = next(block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if block.startswith("image:"))
    (tmp_path / "prompts.yaml").write_text(example)
    assert load_prompts(tmp_path / "prompts.yaml")["image"][0] == "What is in the image?"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("image: [a]", r"keys `image` and `text`.*got \['image'\]"),
        ("just a text", r"got str"),
        ("image: []\ntext: [a]", r"`image` must be a list of prompts that is not empty"),
        ("image: [a]\ntext: [b, c: d]", r"prompt 1 of `text` must be a text, got {'c': 'd'}.*quotation marks"),
        ("image: [a, b, a]\ntext: [a]", r"`image` has the prompt 'a' twice"),
        ("image: [a?, b]", r"prompts\.yaml is not valid YAML: while parsing.*on a line of its own"),
        ("image: [a <image>]\ntext: [a]", r"holds the reserved token '<image>'"),
    ],
)
def test_bad_files_are_refused_by_name(folder, tmp_path, content, reason):
    file = tmp_path / "prompts.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit, match=f"hf-unigd prompts: .*{reason}"):
        prompts(folder, tmp_path / "out", prompts=file)


def test_rows_without_an_image_and_models_without_a_prompt_are_refused(folder, tmp_path):
    rows = [{"anchor": "a cat", "positive": "a dog"}, {"anchor": "a car", "positive": "a bus"}]
    with pytest.raises(RowError, match="Row 0 is no image with a short caption"):
        study.compare_prompts(str(folder / "plain"), rows, tmp_path / "out", show_progress=False)
    one = [{"image": make_image(), "caption": f"a cat {place}"} for place in range(3)]
    with pytest.raises(ValueError, match="1 different images and 3 different captions"):
        study.compare_prompts(str(folder / "plain"), one, tmp_path / "out", show_progress=False)
    tiny = make_vlm()
    model = UniGDForConditionalGeneration.from_vlm(tiny.model)
    model.processor = UniGDProcessor(tiny.processor, embedding_position="last_slice")
    model.save_pretrained(tmp_path / "sugar")
    with pytest.raises(
        ValueError, match=re.escape("`embedding_position='last_slice'`, where no prompt has an effect")
    ):
        study.compare_prompts(str(tmp_path / "sugar"), one, tmp_path / "out", show_progress=False)
