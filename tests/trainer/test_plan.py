"""The estimates of `hf-unigd plan`: counts against real models, operations against torch's counter, and memory against
what autograd and an optimizer keep."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_unigd.cli.main import main
from hf_unigd.cli.plan import plan_recipe
from hf_unigd.trainer.plan import CARDS, ModelShapes
from hf_unigd.trainer.plan.estimate import Workload, estimate, kept_bytes, optimizer_bytes
from hf_unigd.trainer.plan.shapes import Stack
from tiny_models import make_vlm
from trainer_cases import LORA, make_args, make_trainer


TEXT = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 320}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
# 64 x 64 for queries and the output, 64 x 32 for keys and values, and three products of the MLP, in each of 3 layers.
MATRICES = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
STACK = Stack(64, 3, 160, (64, 32), MATRICES, True, 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with nothing but a config, by family."""
    folders = {family: tmp_path_factory.mktemp(family) for family in ("llava", "qwen3_vl", "smolvlm")}
    for family, folder in folders.items():
        make_vlm(family).model.config.save_pretrained(folder)
    return folders


def plan(folder, **arguments):
    arguments = {"dataset_name": "d", "model_name_or_path": folder, "image_tokens": 10, **arguments}
    return plan_recipe([word for name, value in arguments.items() for word in (f"--{name}", *str(value).split())])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm"])
@pytest.mark.parametrize("adapted", [False, True])
def test_parameters_are_those_of_the_trainer(folders, tmp_path, family, adapted):
    trainer = make_trainer(tmp_path, family=family, peft_config=LORA if adapted else None)
    parameters = list(trainer.model.parameters())
    arguments = {"use_peft": True, "lora_r": 4, "lora_alpha": 4} if adapted else {}
    shapes = plan(folders[family], dtype="float32", **arguments).shapes
    assert shapes.parameters == sum(each.numel() for each in parameters)
    assert shapes.trained == sum(each.numel() for each in parameters if each.requires_grad)
    assert shapes.weight_bytes == sum(each.numel() * each.element_size() for each in parameters)
    assert shapes.trains_text != adapted and not shapes.trains_vision


def test_parameters_of_a_lora_and_of_a_head_by_hand(folders):
    text = make_vlm("llava").model.config.text_config
    width, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    keys = text.num_key_value_heads * width // text.num_attention_heads
    lora = {"use_peft": True, "lora_r": 8, "lora_target_modules": "q_proj v_proj down_proj"}
    sides = (width + width) + (width + keys) + (inner + width)
    shapes = plan(folders["llava"], **lora, head_type="linear", embedding_dim=16).shapes
    temperature = 1
    assert shapes.trained - 8 * layers * sides - temperature in (16 * width, 16 * width + 16)  # without or with a bias
    prompts = plan(folders["llava"], **lora, soft_prompts=True).shapes
    assert prompts.trained == 8 * layers * sides + temperature + 24 * width


def test_weights_in_4_bits_take_about_half_a_byte(folders):
    whole = plan(folders["llava"], dtype="bfloat16", use_peft=True).shapes
    quantised = plan(folders["llava"], dtype="bfloat16", use_peft=True, load_in_4bit=True).shapes
    nested = plan(
        folders["llava"], dtype="bfloat16", use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True
    ).shapes
    model = make_vlm("llava").model
    linear = sum(each.weight.numel() for each in model.modules() if isinstance(each, torch.nn.Linear))
    linear -= model.lm_head.weight.numel()
    assert whole.weight_bytes - quantised.weight_bytes == pytest.approx(linear * (2 - 0.5625))
    assert nested.weight_bytes < quantised.weight_bytes


@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_that_torch_counts(frozen):
    """A decoder of a plain Llama, forward and backward. torch counts attention without its mask: twice of what is
    needed."""
    model = LlamaForCausalLM(LlamaConfig(**TEXT, **HEADS, attn_implementation="sdpa")).train()
    if frozen:
        model.requires_grad_(False)
    inputs = torch.randn(2, 50, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    attention = [n for op, n in counted.items() if "attention" in str(op)]
    products = sum(n for op, n in counted.items() if "attention" not in str(op))
    work = Workload(2, None, 0, 0, 0, 50, None, 0)
    found = estimate(shapes_of(model, frozen), work, make_args("o", causal_lm_weight=1), CARDS["A10"], 1.0)
    wanted = (2 if frozen else 3) * 2 * MATRICES * 100
    assert products == pytest.approx(wanted, rel=1e-6)
    attended = found.flops - wanted
    assert attended == (2 if frozen else 3) * 4 * 0.5 * 50**2 * 64 * 3 * 2
    if attention:  # forward, and 2.5 times of it backward, which computes the scores again
        assert sum(attention) == pytest.approx(3.5 * 2 * attended / (2 if frozen else 3), rel=0.01)


def shapes_of(model, frozen):
    numbers = sum(each.numel() for each in model.parameters())
    return ModelShapes(
        name="m",
        parameters=numbers,
        trained=0 if frozen else numbers,
        weight_bytes=4 * numbers,
        sharded_weight_bytes=4 * numbers,
        trained_bytes=0 if frozen else 4 * numbers,
        text=STACK,
        vision=STACK,
        vocabulary=320,
        trains_text=not frozen,
        trains_vision=False,
        image_size=None,
        patch_size=14,
        image_tokens=None,
        merged=None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_trained", [False, True])
def test_kept_activations_are_about_those_that_autograd_keeps(dtype, is_trained):
    """Of layers with wide hidden states, where lengths and masks count little. Each storage counts once."""
    sizes = {**TEXT, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)).to(dtype).train()
    model.requires_grad_(is_trained)
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    storages: dict = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    inputs = torch.randn(2, 64, 256, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(inputs_embeds=inputs, use_cache=False)
    measured = sum(size for size, _ in storages.values()) / 128 / 4
    stack = Stack(256, 4, 640, (256, 256), 0, True, 0)
    assert kept_bytes(stack, dtype.itemsize, is_trained) == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_keeps_what_is_estimated(dtype):
    parameter = torch.nn.Parameter(torch.zeros(1000, 10, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    kept = sum(each.numel() * each.element_size() for each in optimizer.state[parameter].values() if each.dim())
    assert optimizer_bytes("adamw_torch_fused", 10_000, 10_000 * dtype.itemsize) == kept
    assert optimizer_bytes("paged_adamw_8bit", 10_000, 10_000 * dtype.itemsize) == 20_000
    with pytest.raises(ValueError, match="`optim=rmsprop`: its memory is not known"):
        optimizer_bytes("rmsprop", 1, 4)


def test_sharding_divides_what_it_says(folders):
    one, ddp, zero, full = (
        plan(folders["llava"], devices=devices, sharding=sharding).found.memory
        for devices, sharding in ((1, "none"), (4, "none"), (4, "zero2"), (4, "full"))
    )
    assert ddp == {**one, "gradients": 2 * one["gradients"]}
    assert zero == {**one, "gradients": one["gradients"] / 4, "optimizer": one["optimizer"] / 4}
    shapes = plan(folders["llava"]).shapes
    frozen = shapes.weight_bytes - shapes.sharded_weight_bytes
    assert full == {**zero, "weights": frozen + shapes.sharded_weight_bytes / 4} and frozen > 0


def test_a_recipe_takes_its_steps_and_days(folders):
    arguments = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    found = plan(folders["llava"], **arguments, devices=4, rows=1000, utilization=0.5)
    assert found.batch == 64 and found.steps == math.ceil(1000 / 64 * 3)
    assert found.seconds == 2 * found.found.flops / (0.5 * CARDS["H100-80GB"].flops_float32)
    across = plan(folders["llava"], **arguments, devices=4, negatives_across_accumulation=True)
    assert across.batch == 64 and across.work.chunk == 8 and across.steps is None
    assert across.found.flops > 2 * found.found.flops  # every chunk runs twice forward
    halved = plan(folders["llava"], **arguments, gradient_cache_chunk_size=4)
    whole = plan(folders["llava"], **arguments)
    assert halved.found.memory["activations"] < whole.found.memory["activations"] / 2
    checkpointed = plan(folders["llava"], **arguments, gradient_checkpointing=True)
    assert checkpointed.found.memory["activations"] < whole.found.memory["activations"]
    assert checkpointed.found.flops > whole.found.flops


def test_a_recipe_that_learns_no_text_has_none_in_its_estimate(folders):
    silent = plan(folders["llava"], causal_lm_weight=0, long_tokens=120)
    assert silent.work.sequences == plan(folders["llava"], causal_lm_weight=1, long_tokens=0).work.sequences
    assert silent.found.flops < plan(folders["llava"], causal_lm_weight=1, long_tokens=120).found.flops


def test_it_prints_what_it_takes_and_assumes(folders, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {folders['llava']}\ndataset_name: d\nmax_steps: 100\nbf16: true\n")
    main(["plan", "--config", str(recipe), "--card", "RTX-4090", "--image_tokens", "576"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("An estimate, not a measurement") and "1 x RTX-4090" in lines[0]
    assert "of 24 GB a device, fits: weights" in lines[3]
    assert "100 steps: " in lines[4]
    assert "27% of the card's 165.2 TFLOP/s" in lines[5] and "576 tokens" in lines[6]


def refused(*words):
    with pytest.raises(SystemExit) as end:
        main(["plan", "--dataset_name", "d", *map(str, words)])
    return str(end.value)


def test_what_cannot_be_estimated_is_refused(folders, tmp_path):
    model = ("--model_name_or_path", folders["llava"])
    assert "`--sharding` would have no effect on one device" in refused(*model, "--sharding", "full")
    assert "is a share, so at most 1" in refused(*model, "--utilization", "27")
    assert "Give `--image_tokens`" in refused("--model_name_or_path", folders["smolvlm"])
    assert str(tmp_path / "nothing") in refused("--model_name_or_path", tmp_path / "nothing")


def test_the_cpu_of_this_machine_is_measured(folders):
    card = plan(folders["llava"], card="cpu").card
    assert 1e8 < card.flops_float32 < 1e14 and card.memory > 1e8
