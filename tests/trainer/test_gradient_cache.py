"""Memory and precision of the gradient cache. test_parity.py tests its gradients."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from hf_unigd.modeling.modeling_unigd import next_token_loss
from tiny_models import make_image
from trainer_cases import make_rows, make_trainer


def peak_of_allocations(function, folder):
    """Returns the peak number of bytes that `function` allocates on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        held = torch.zeros(1)
        function()
    recording.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    del held
    return max(totals) - totals[0]


def step_peak(folder, batch_size, chunk_size):
    captions = ["A cat on the green grass, seen from the left, with three people waving." for _ in range(batch_size)]
    rows = make_rows(batch_size, image=[make_image(place % 50) for place in range(batch_size)], long_caption=captions)
    settings = {"gradient_cache_chunk_size": chunk_size, "per_device_train_batch_size": batch_size}
    trainer = make_trainer(folder, rows, check_rows="off", gradient_accumulation_steps=1, **settings)
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(batch_size)])
    trainer.create_optimizer()
    model = trainer.model

    def step():
        trainer.training_step(model, batch, torch.tensor(100))

    step()  # allocates the gradients, which stay
    return peak_of_allocations(step, folder)


def test_memory_does_not_grow_with_the_batch_size(tmp_path):
    small, large = step_peak(tmp_path, 32, 32), step_peak(tmp_path, 512, 32)
    whole = step_peak(tmp_path, 96, None)
    assert large <= 1.25 * small, (small, large)
    assert whole > 2 * small, (small, whole)


def test_bfloat16_autocast_gives_the_gradients_of_the_uncached_step_and_ends_with_it(tmp_path):
    gradients = []
    for chunk_size in (None, 4):
        AcceleratorState._reset_state()  # it would keep the precision of an earlier trainer
        trainer = make_trainer(tmp_path, max_steps=1, bf16=True, gradient_cache_chunk_size=chunk_size)
        batch = trainer.data_collator([trainer.train_dataset[place] for place in range(4)])
        model = trainer.accelerator.prepare_model(trainer.model)
        trainer.training_step(model, batch, torch.tensor(60))
        assert trainer.accelerator.mixed_precision == "bf16"
        assert not torch.is_autocast_enabled("cpu")  # it does not leak out of the step
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        )
    for name, expected in gradients[0].items():
        assert torch.nn.functional.cosine_similarity(gradients[1][name].flatten(), expected.flatten(), dim=0) > 0.99, (
            name
        )


def test_the_logits_of_a_large_vocabulary_are_computed_in_slices(monkeypatch):
    hidden = torch.randn(3, 12, 8, dtype=torch.double, requires_grad=True)
    targets = torch.randint(0, 50, (3, 12))
    targets[:, :4] = -100
    head = torch.nn.Linear(8, 50).double()
    expected = next_token_loss(hidden, targets, head, head.out_features)
    expected_gradients = torch.autograd.grad(expected, [hidden, head.weight])
    sizes = []
    head.register_forward_hook(lambda _module, _args, output: sizes.append(output.numel()))
    monkeypatch.setattr("hf_unigd.modeling.modeling_unigd.MAX_LOGITS", 5 * 50)
    loss = next_token_loss(hidden, targets, head, head.out_features)
    gradients = torch.autograd.grad(loss, [hidden, head.weight])
    assert (
        max(sizes) == 5 * 50 and len(sizes) == 2 * 5
    )  # 24 positions in the forward pass, and again in the backward pass
    torch.testing.assert_close(loss, expected)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_cache_chunk_size=0"):
        make_trainer(tmp_path, gradient_cache_chunk_size=0)
