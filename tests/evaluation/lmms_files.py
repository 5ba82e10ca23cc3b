"""Files in the form in which lmms-eval 0.7.3 writes them, which `tests/lmms/check.py` compares with its own."""

import json


def write_lmms_run(folder, tasks, samples=True, model="you/model", date="20261126_120000"):
    """
    Writes what a run of lmms-eval leaves.

    Args:
        folder: Its `--output_path`.
        tasks: By the name of a task, its metrics: by name, the value, which is better, and the entry of each question.
        samples: Whether it ran with `--log_samples`.
    """
    own = folder / model.replace("/", "__")
    own.mkdir(parents=True, exist_ok=True)
    results, configs, directions, numbers = {}, {}, {}, {}
    for task, metrics in tasks.items():
        results[task] = {"alias": task}
        for metric, (value, _, _) in metrics.items():
            more = {f"{metric}_stderr,none": "N/A", f"{metric}_stderr_clt,none": 0.1}
            results[task] |= {f"{metric},none": value, **more, f"{metric}_stderr_clustered,none": "N/A"}
        configs[task] = {
            "task": task,
            "dataset_path": f"lmms-lab-encoder/{task}",
            "test_split": "test",
            "num_fewshot": 0,
            "generation_kwargs": {"max_new_tokens": 16, "until": ["\n\n"]},
        }
        directions[task] = {metric: higher for metric, (_, higher, _) in metrics.items()}
        entries = {metric: each for metric, (_, _, each) in metrics.items()}
        count = max(map(len, entries.values()))
        numbers[task] = {"original": count, "effective": count}
        if samples:
            lines = [
                {
                    "doc_id": place,
                    "target": "cat",
                    "filtered_resps": "a cat",
                    "token_counts": [None],
                    "doc_hash": "74234e98",
                    **{metric: each[place] for metric, each in entries.items()},
                    "input": "What is it?",
                }
                for place in reversed(range(count))  # processes write them in no order
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (own / f"{date}_samples_{task}.jsonl").write_text(text)
    content = {
        "results": results,
        "group_subtasks": {task: [] for task in tasks},
        "configs": configs,
        "versions": dict.fromkeys(tasks, "Yaml"),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": directions,
        "n-samples": numbers,
        "model_name": model,
        "date": date,
    }
    file = own / f"{date}_results.json"
    file.write_text(json.dumps(content, indent=2))
    return file
