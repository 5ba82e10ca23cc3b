"""From training to use: two steps, a push over the loopback, and five libraries that load it without hf_unigd."""

import json

import evaluate
import pytest
import torch

from hf_unigd.evaluation import METRIC_SCRIPT, rank_candidates
from loopback_hub import TOKENS, run_client, running_hub
from mteb_tasks import CATEGORIES, relevant_documents
from tiny_models import make_image


TRAIN = """
from pathlib import Path
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig
from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, UniGDTrainer, UniGDTrainingArguments
from hf_unigd.cli.main import main
from mteb_tasks import IMAGES, CAPTIONS
from tiny_models import make_image, make_vlm

def mteb_items(kinds):
    return [[*([image] if "i" in kinds else []), *([text] if "t" in kinds else [])]
            for image, text in zip(IMAGES, CAPTIONS)]

rows = Dataset.from_dict({
    "image": [make_image(place) for place in range(8)],
    "short_caption": [f"cat {place}" for place in range(8)],
    "long_caption": [f"A cat on the grass, seen {place} times." for place in range(8)],
})

def train(model, processor, name, peft_config=None):
    args = UniGDTrainingArguments(
        trust_caption_columns=True,
        output_dir=name, hub_model_id=f"ada/{name}", max_steps=2, per_device_train_batch_size=4, learning_rate=3e-3,
        logging_steps=1, report_to=[], use_cpu=True,
    )
    trainer = UniGDTrainer(model, args, train_dataset=rows, processing_class=processor, peft_config=peft_config)
    trainer.train()
    model.eval()
    with torch.no_grad():
        answers[name] = {
            "embeddings": model.embed(**processor.process_sequences(sequences)).tolist(),
            "spoken": speak(model, processor),
        }
        answers[name]["queries"] = {
            kinds: model.embed(**processor.process_sequences(mteb_items(kinds))).tolist() for kinds in ("t", "i", "it")
        }
    logs = Path(name, "runs", "here")
    logs.mkdir(parents=True)
    (logs / "events.out.tfevents.1").write_text(str(logs.resolve()))
    trainer.push_to_hub()
    answers[name]["private"] = outcome(lambda: trainer.push_to_hub(private=True))

torch.manual_seed(0)
tiny = make_vlm()
model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="mlp", embedding_dim=8)
train(model, UniGDProcessor(tiny.processor), "whole")
model.push_to_hub("ada/sharded", max_shard_size="60KB")

model = UniGDForConditionalGeneration.from_pretrained("ada/whole")
processor = UniGDProcessor.from_pretrained("ada/whole")
model.add_soft_prompts(**processor.add_soft_prompts())
train(model, processor, "adapter", LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))

main(["export", "ada/adapter", "--to", "llava", "--output", "llava"])
HfApi().create_repo("ada/llava")
HfApi().upload_folder(repo_id="ada/llava", folder_path="llava")
answers["commits"] = [len(HfApi().list_repo_commits(f"ada/{name}")) for name in ("whole", "adapter")]
"""

# As hf_unigd takes them; the consumers' own forms of the same follow.
INPUTS = """
from PIL import Image
a, b = Image.open("a.png"), Image.open("b.png")
sequences = ["a red cat", [a], ["two blue dogs", b], ["cat", a, "and", b, "on the grass"]]
chat = [{"role": "user", "content": [
    {"type": "text", "text": "cat"}, {"type": "image", "image": a}, {"type": "text", "text": "and"},
    {"type": "image", "image": b}, {"type": "text", "text": "on the grass"},
]}]
def speak(model, processor):
    batch = processor.process_sequences([[a, "what is it"]], prompted=False)
    return model.generate(**batch, max_new_tokens=8, do_sample=False)[0].tolist()
"""

STRANGER = 'sys.modules["hf_unigd"] = None\nimport torch\ntorch.set_grad_enabled(False)\n' + INPUTS

TRANSFORMERS = """
from transformers import (
    AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline
)
for name in ("whole", "adapter"):
    processor = AutoProcessor.from_pretrained(f"ada/{name}", trust_remote_code=True)
    batch = processor.process_sequences(sequences, padding_side="left")
    embedder = AutoModel.from_pretrained(f"ada/{name}", trust_remote_code=True)
    speaker, multimodal = [
        auto_class.from_pretrained(f"ada/{name}", trust_remote_code=True)
        for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    ]
    pipe = pipeline("feature-extraction", model=f"ada/{name}", trust_remote_code=True, device="cpu")
    embeddings = [model.embed(**batch).tolist() for model in (embedder, speaker)]
    answers[name] = {
        "embeddings": [*embeddings, [embedding for [embedding] in pipe(sequences, batch_size=2)]],
        "spoken": [speak(model, processor) for model in (speaker, multimodal)],
    }
sharded = AutoModel.from_pretrained("ada/sharded", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("ada/sharded", trust_remote_code=True)
answers["whole"]["embeddings"].append(sharded.embed(**processor.process_sequences(sequences)).tolist())
"""

SENTENCE_TRANSFORMERS = """
from sentence_transformers import SentenceTransformer
for name in ("whole", "adapter"):
    model = SentenceTransformer(f"ada/{name}", trust_remote_code=True)
    images, mixed = [a, "a.png"], {"text": "two blue dogs", "image": b}
    vectors = [model.encode(["a red cat", image, mixed, chat]) for image in images]
    if name == "whole":  # other processes get the model pickled, here after it has run on images
        vectors.append(model.encode(["a red cat", a, mixed, chat], device=["cpu", "cpu"], batch_size=1, chunk_size=2))
    narrow = SentenceTransformer(f"ada/{name}", trust_remote_code=True, truncate_dim=4)
    answers[name] = {
        "embeddings": [each.tolist() for each in vectors],
        "similarity": model.similarity(vectors[0], vectors[0]).tolist(),
        "truncated": narrow.encode(["a red cat", a]).tolist(),
    }
"""

PEFT = """
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained("ada/adapter", trust_remote_code=True)
batch = processor.process_sequences(sequences, padding_side="left")
base = AutoModelForImageTextToText.from_pretrained("ada/whole", trust_remote_code=True)
base.resize_token_embeddings(len(processor.tokenizer))
models = [AutoPeftModel.from_pretrained("ada/adapter", trust_remote_code=True),
          PeftModel.from_pretrained(base, "ada/adapter")]
answers["adapter"] = {
    "embeddings": [model.embed(**batch).tolist() for model in models],
    "spoken": [speak(model, processor) for model in models],
}
"""

PLAIN_LLAVA = """
from sentence_transformers import SentenceTransformer
from transformers import AutoProcessor, LlavaForConditionalGeneration
processor = AutoProcessor.from_pretrained("ada/llava")
model, loading = LlavaForConditionalGeneration.from_pretrained("ada/llava", output_loading_info=True)
question = [{"role": "user", "content": [{"type": "image", "image": a}, {"type": "text", "text": "what is it"}]}]
batch = processor.apply_chat_template(
    question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answers["loading"] = [sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])]
sentences = SentenceTransformer("ada/llava")
# sentence-transformers' own module takes chats and other inputs in batches of their own.
vectors = [*sentences.encode(["a red cat", a, {"text": "two blue dogs", "image": b}]), *sentences.encode([chat])]
answers["adapter"] = {
    "embeddings": [[vector.tolist() for vector in vectors]],
    "spoken": [model.generate(**batch, max_new_tokens=8, do_sample=False)[0].tolist()],
}
"""

MTEB = """
import mteb
from mteb_tasks import CATEGORIES, OTHER_TASKS, retrieval
from mteb.models import SentenceTransformerEncoderWrapper
# What `mteb.get_model` does, which needs torchvision for images.
model = SentenceTransformerEncoderWrapper("ada/whole", trust_remote_code=True)
model.mteb_model_meta = mteb.get_model_meta("ada/whole", fetch_from_hf=True)
answers["modalities"] = model.mteb_model_meta.modalities
tasks = [retrieval(category) for category in CATEGORIES] + [task() for task in OTHER_TASKS]
results = mteb.evaluate(model, tasks, cache=None, show_progress_bar=False)
answers["scores"] = {result.task_name: result.scores["test"][0] for result in results}
"""


CONSUMERS = {
    "transformers": TRANSFORMERS,
    "sentence-transformers": SENTENCE_TRANSFORMERS,
    "PEFT": PEFT,
    "plain LLaVA": PLAIN_LLAVA,
}


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    """A hub that was trained for and pushed to, a client of it, and what the models said before they were saved."""
    folder = tmp_path_factory.mktemp("trained")
    make_image(1).save(folder / "a.png")
    make_image(2, (40, 20)).save(folder / "b.png")
    with running_hub(ada=TOKENS["ada"]) as hub:
        expected, _ = run_client(hub, folder, INPUTS + TRAIN)

        def stranger(code):
            return run_client(hub, folder, STRANGER + code, HF_HOME=str(folder / "cache of a stranger"))[0]

        yield hub, stranger, expected


def test_the_trainer_pushes_all_in_one_commit(way):
    hub, _, expected = way
    assert expected["commits"] == [2, 2]  # created, then filled
    everywhere = {"README.md", "curves.png", "chat_template.jinja", "modules.json", "probe.safetensors"}
    whole, adapter = (set(hub.files(f"ada/{name}")) for name in ("whole", "adapter"))
    assert {*everywhere, "model.safetensors", "generation_config.json"} <= whole
    assert {*everywhere, "adapter_model.safetensors", "adapter_config.json"} <= adapter
    assert {"model-00001-of-00005.safetensors", "model.safetensors.index.json"} <= set(hub.files("ada/sharded"))
    base = json.loads(hub.files("ada/adapter")["adapter_config.json"])
    commit = hub.repositories["ada/whole"].refs["main"][-1][0]
    assert (base["base_model_name_or_path"], base["revision"]) == ("ada/whole", commit)
    assert "training_args.bin" not in whole | adapter
    assert not [path for path in whole | adapter if path.startswith(("checkpoint-", "runs/"))]
    assert all("public" in expected[name]["private"] for name in ("whole", "adapter"))


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_consumer_without_our_code_embeds_and_speaks_the_same(way, consumer):
    _, stranger, expected = way
    answers = stranger(CONSUMERS[consumer])
    compared = 0
    for name in answers.keys() & {"whole", "adapter"}:
        for embeddings in answers[name]["embeddings"]:
            assert distance(embeddings, expected[name]["embeddings"]) < 1e-5, (name, compared)
            compared += 1
        for spoken in answers[name].get("spoken", []):
            assert spoken == expected[name]["spoken"], name
    assert compared == {"transformers": 7, "sentence-transformers": 5, "PEFT": 2, "plain LLaVA": 1}[consumer]
    if consumer == "sentence-transformers":
        for name in ("whole", "adapter"):
            vectors = torch.tensor(expected[name]["embeddings"])
            assert distance(answers[name]["similarity"], vectors @ vectors.T) < 1e-5
            assert distance(unit(torch.tensor(answers[name]["truncated"])), unit(vectors[:2, :4])) < 1e-5
    if consumer == "plain LLaVA":
        assert answers["loading"] == [[], []]


def test_mteb_measures_the_recall_that_we_do(way):
    _, stranger, expected = way
    answers = stranger(MTEB)
    assert set(answers["modalities"]) == {"image", "text"}
    items = {kinds: torch.tensor(vectors) for kinds, vectors in expected["whole"]["queries"].items()}
    documents, metric = relevant_documents(), evaluate.load(METRIC_SCRIPT)
    for category in CATEGORIES:
        queries, corpus = category.split("2")
        ranking = rank_candidates(items[queries], items[corpus], 10).tolist()
        ours = metric.compute(predictions=ranking, references=documents, ks=(1, 5, 10))
        theirs = answers["scores"][f"LocalAny2AnyRetrieval{category}"]
        for k in (1, 5, 10):
            # MTEB's older name for it is cv_recall_at_k: any relevant document among the first k.
            assert ours[f"recall_at_{k}"] == pytest.approx(theirs[f"hit_rate_at_{k}"], abs=1e-4), (category, k)
    assert len(answers["scores"]) == len(CATEGORIES) + 5
    assert all(isinstance(score["main_score"], float) for score in answers["scores"].values())


def distance(found, expected):
    return (torch.as_tensor(found) - torch.as_tensor(expected)).abs().max()


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=-1)
