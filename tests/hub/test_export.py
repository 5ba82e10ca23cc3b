"""Exports load in transformers and sentence-transformers without our code, and embed and speak as before."""

import json
import subprocess
import sys

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.hub import export_checkpoint, load_checkpoint
from tiny_adapters import SEQUENCES, answers, make_adapter
from tiny_models import make_image, make_vlm


def chat(*parts):
    return [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]


RED, BLUE = make_image(1), make_image(2, (40, 20))
CHATS = [
    [{"role": "user", "content": chat("a red cat")}],
    [{"role": "user", "content": chat(RED)}],
    [{"role": "user", "content": chat("what", RED, "is it", "and", BLUE)}],
    [{"role": "user", "content": chat(RED, BLUE)}],
    [{"role": "user", "content": chat(RED, "two dogs")}],
    [
        {"role": "system", "content": chat("be brief")},
        {"role": "user", "content": chat(BLUE, "what is it")},
        {"role": "assistant", "content": chat("a dog")},
        {"role": "user", "content": chat("and its colour")},
    ],
]

# What a server is: neither hf_unigd nor remote code.
STRANGER = """
import json, sys
import torch
from PIL import Image
sys.modules["hf_unigd"] = None
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("export")
model = AutoModelForImageTextToText.from_pretrained("export")
image = Image.open("a.png")
question = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it"}]}]
batch = processor.apply_chat_template(
    question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
sentences = SentenceTransformer("export")
print(json.dumps({
    "class": type(model).__name__,
    "logits": model(**batch).logits.tolist(),
    "answer": model.generate(**batch, max_new_tokens=8, do_sample=False).tolist(),
    "modules": [type(module).__name__ for module in sentences],
    "embeddings": sentences.encode(["a red cat", image, {"image": image, "text": "two dogs"}]).tolist(),
}))
"""


def test_a_server_loads_the_exported_adapter_without_our_code(tmp_path):
    model, processor = make_adapter(tmp_path)
    main(["export", str(tmp_path / "adapter"), "--to", "llava", "--output", str(tmp_path / "export")])
    RED.save(tmp_path / "a.png")
    result = subprocess.run(
        [sys.executable, "-c", STRANGER],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["class"] == "LlavaForConditionalGeneration"
    assert seen["modules"] == ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    assert not [*(tmp_path / "export").glob("*.py")]

    merged, _ = load_checkpoint(str(tmp_path / "adapter"))
    question = processor.process_sequences([[RED, "what is it"]], prompted=False)
    # Another number of threads sums in another order.
    torch.testing.assert_close(merged(**question).logits, torch.tensor(seen["logits"]), atol=1e-6, rtol=0)
    assert merged.generate(**question, max_new_tokens=8, do_sample=False).tolist() == seen["answer"]
    expected = model.embed(**processor.process_sequences(["a red cat", RED, [RED, "two dogs"]]))
    assert (torch.tensor(seen["embeddings"]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("soft_prompts", [False, True])
@pytest.mark.parametrize(
    ("family", "to", "head_type"),
    [("llava", "llava", "none"), ("llava", "llava", "linear"), ("llava_next", "vlm", "mlp")],
)
def test_chats_embed_the_same(family, to, head_type, soft_prompts, tmp_path):
    tiny = make_vlm(family)
    torch.manual_seed(0)
    head = {} if head_type == "none" else {"embedding_dim": 8}
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type=head_type, **head)
    model.processor = processor = UniGDProcessor(tiny.processor)
    if soft_prompts:
        model.add_soft_prompts(**processor.add_soft_prompts())
        with torch.no_grad():
            model.get_input_embeddings().weight[processor.soft_prompt_ids] += 0.1
    model.save_pretrained(tmp_path / "checkpoint")
    export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "export", to)
    exported = SentenceTransformer(str(tmp_path / "export"))
    expected = model.embed(**processor.process_sequences(CHATS))
    for place, messages in enumerate(CHATS):  # alone, and all together in one padded batch
        assert (torch.tensor(exported.encode([messages])[0]) - expected[place]).abs().max() < 1e-5, place
    assert (torch.tensor(exported.encode(CHATS)) - expected).abs().max() < 1e-5
    assert exported.get_embedding_dimension() == model.config.embedding_dim
    # Generation keeps the backbone's own template.
    plain = AutoProcessor.from_pretrained(tmp_path / "export")
    messages = CHATS[0]
    assert plain.apply_chat_template(messages) == tiny.processor.apply_chat_template(messages)


def test_bfloat16_is_exported_as_it_is(tmp_path):
    tiny = make_vlm("llava", dtype=torch.bfloat16)
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="linear", embedding_dim=8)
    model.processor = UniGDProcessor(tiny.processor)
    model.save_pretrained(tmp_path / "checkpoint")
    export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "export")
    exported = SentenceTransformer(str(tmp_path / "export"))
    assert exported.dtype == torch.bfloat16
    batch = model.processor.process_sequences(SEQUENCES).to(torch.bfloat16)
    encoded = torch.tensor(exported.encode(["a red cat", SEQUENCES[1][0]]))
    assert (encoded - model.embed(**batch)[:2]).abs().max() < 2e-2
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


def test_what_cannot_be_exported_is_named(llava, tmp_path, capsys):
    model, processor = llava
    model.processor = UniGDProcessor(processor.vlm_processor, embedding_position="last_slice")
    model.save_pretrained(tmp_path / "sugar")
    with pytest.raises(SystemExit, match=r"last_slice.*mean of that image's tokens"):
        main(["export", str(tmp_path / "sugar"), "--output", str(tmp_path / "export")])
    tiny = make_vlm("llava_next")
    other = UniGDForConditionalGeneration.from_vlm(tiny.model)
    other.processor = UniGDProcessor(tiny.processor)
    other.save_pretrained(tmp_path / "next")
    with pytest.raises(SystemExit, match=r"'llava_next', not 'llava'.*--to vlm"):
        main(["export", str(tmp_path / "next"), "--output", str(tmp_path / "export")])
    assert not (tmp_path / "export").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit, match="is not empty"):
        main(["export", str(tmp_path / "next"), "--to", "vlm", "--output", str(tmp_path / "full")])


def test_a_template_that_renders_otherwise_is_refused(llava, tmp_path):
    model, processor = llava
    # Said only where no other variable is set: true of our processor, and not of the extended template.
    processor.vlm_processor.chat_template += "{% if sequence is not defined %}.{% endif %}"
    model.processor = processor
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(RuntimeError, match="makes other tokens"):
        export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "export")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("on", ["plain", "ours"])
def test_a_merged_adapter_is_a_normal_checkpoint(on, tied, tmp_path):
    model, processor = make_adapter(tmp_path, on=on, tied=tied)
    main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])
    merged, merged_processor = load_checkpoint(str(tmp_path / "merged"))
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    batch = merged_processor.process_sequences(SEQUENCES, padding_side="left")
    # float32 sums in another order
    assert (merged.embed(**batch) - model.embed(**batch)).abs().max() < 1e-5
    logits = [m(**batch).logits[batch["attention_mask"].bool()] for m in (merged, model)]
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[1].abs().max()
    assert answers(merged, merged_processor) == answers(model, processor)
    assert not [*(tmp_path / "merged").glob("adapter_*.safetensors")]
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with pytest.raises(SystemExit, match="holds no adapter"):
        main(["merge", str(tmp_path / "merged"), "--output", str(tmp_path / "again")])
