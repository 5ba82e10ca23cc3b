"""`hf-unigd embed-slices` and training with what it wrote."""

import json

import pytest

from hf_unigd.cli.main import main
from tiny_models import make_vlm
from tiny_teachers import save_teachers


def test_features_are_written_once_and_train(tmp_path, capsys):
    tiny = make_vlm("llava")
    tiny.model.save_pretrained(tmp_path / "vlm")
    tiny.processor.save_pretrained(tmp_path / "vlm")
    teachers = save_teachers(tmp_path / "teachers")
    rows = tmp_path / "rows.jsonl"
    chats = [
        [{"role": "user", "content": f"Cat {n}. A dog."}, {"role": "assistant", "content": "Yes."}] for n in range(6)
    ]
    rows.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    flags = [
        *("--dataset_name", str(rows), "--image_teacher", teachers.image_teacher),
        *("--text_teacher", teachers.text_teacher, "--cross_teacher", teachers.cross_teacher),
    ]
    features = str(tmp_path / "features")
    main(["embed-slices", "--model", str(tmp_path / "vlm"), "--output", features, *flags])
    assert "8 distinct slices of 6 rows" in capsys.readouterr().out
    main(["embed-slices", "--model", str(tmp_path / "vlm"), "--output", features, *flags])
    assert "8 distinct slices of 6 rows" in capsys.readouterr().out

    train = [
        *("train", "--model_name_or_path", str(tmp_path / "vlm"), "--output_dir", str(tmp_path / "run"), *flags),
        *("--slice_features", features, "--alignment_weight", "1", "--contrastive_weight", "0", "--max_steps", "2"),
        *("--per_device_train_batch_size", "2", "--embedding_position", "last_slice", "--head_type", "mlp"),
        *("--embedding_dim", "8", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"),
    ]
    main(train)
    assert (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(SystemExit, match="teacher_pooling was 'cls', now 'mean'"):
        main([*train, "--teacher_pooling", "mean"])
