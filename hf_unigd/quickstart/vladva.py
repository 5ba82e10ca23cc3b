"""VladVA on drawn icons: build a small LLaVA, measure it, train it, measure it again, and show what it does."""

import time
from pathlib import Path

from ..bulk.sequences import embed_sequences
from ..data import DatasetMixture, DatasetSource, load_icons
from ..data.icons import HELD_OUT, icon_captions, named_words
from ..evaluation import rank_candidates
from ..evaluation.figures import draw_retrieval
from ..hub.cards import RETRIEVAL_NAME
from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..outputs import writing
from ..trainer import UniGDTrainer
from ..trainer.output_folder import check_output_folder
from .arguments import QuickstartArguments
from .fresh_process import check_in_fresh_process
from .questions import answer_accuracy, answer_questions, question_rows, search_rows, show_answers
from .results import write_card, write_metrics
from .small_llava import IMAGE_SIZE, build_llava, build_processor
from .training import fast_matrix_products, make_trainer


VIEWS = 12
# The paper's prompt, "Summarize the provided image in one word", is longer than most captions here.
PROMPT = "In one word"
QUESTIONS_SHARE, SEARCHES_SHARE = 0.12, 0.06  # of the steps
CAUSAL_LM_WEIGHT = 6.0  # captions are learned more slowly than recall
ASKED = 200  # icons
ICON_NAME = "icon.png"
SHOWN_QUERIES, SHOWN_RESULTS = 8, 5


def run_vladva(args: QuickstartArguments) -> dict[str, dict[str, float]]:
    """
    Trains a small LLaVA on icons with the VladVA objective, and writes to `args.output` the checkpoint with its card,
    `metrics.json` and `retrieval.png`.

    Returns:
        The metrics of each stage: `before`, `after` and `chance`.

    Raises:
        ImportError: the icon font is not installed.
        RuntimeError: the checkpoint gives another similarity in a fresh process.
    """
    start = time.perf_counter()
    output = args.folder
    check_output_folder(output, RETRIEVAL_NAME)
    train = load_icons("train", views=VIEWS, size=IMAGE_SIZE, seed=args.seed)
    test = load_icons("test", size=IMAGE_SIZE)
    chats = question_rows(train, args.seed)
    model, processor = build(train, chats, args.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"A LLaVA of {parameters / 1e6:.1f} million parameters.")
    print(f"{len(train)} images of {len(train) // VIEWS} icons to train on, {len(test)} other icons to test on.")

    trainer = make_trainer(
        args,
        model,
        processor,
        DatasetMixture(
            [
                DatasetSource(train, "icons", 1 - QUESTIONS_SHARE - SEARCHES_SHARE),
                DatasetSource(chats, "questions", QUESTIONS_SHARE),
                DatasetSource(search_rows(train, args.seed), "searches", SEARCHES_SHARE),
            ]
        ),
        test,
        batch_by_source=True,  # prompts with entries are long, and captions would be padded to them
        per_device_eval_batch_size=250,
        causal_lm_weight=CAUSAL_LM_WEIGHT,
        logging_steps=25,
    )
    before = measure(trainer)
    with fast_matrix_products():
        trainer.train()
    after = measure(trainer)
    chance = {
        f"{direction}_recall_at_{k}": k / HELD_OUT
        for direction in ("anchor_to_positive", "positive_to_anchor")
        for k in (1, 5, 10)
    }
    captions = generate_captions(model, processor, test)
    accuracy = caption_accuracy(captions, test.with_format(None)["icon"])
    known, asked = train.select(range(len(train) // VIEWS)), test.select(spread(test, ASKED))
    questions = answer_questions(model, processor, known, asked)
    answered = answer_accuracy(questions)
    metrics = {"before": before, "after": after | accuracy | answered, "chance": chance}
    minutes = (time.perf_counter() - start) / 60

    trainer.save_model()
    plot_retrieval(model, processor, test, output / RETRIEVAL_NAME)
    with writing(output / ICON_NAME) as file:
        test[0]["image"].save(file, "PNG")
    write_card(
        args,
        after,
        minutes,
        summary="a small LLaVA built in code, trained from scratch on drawn icons by `hf-unigd quickstart`.",
        dataset="Material Design icons, held out",
        objective=f"InfoNCE + next-token, 1 : {CAUSAL_LM_WEIGHT:g} (VladVA)",
        methods=["vladva"],
    )
    show_metrics(metrics)
    show_captions(captions, test, accuracy)
    show_answers(questions, answered)
    similarity = check_in_fresh_process(model, processor, test[0]["image"], test[0]["short_caption"], output)
    print(f"\nReloaded in a fresh process without hf-unigd: the same similarity, {similarity:.4f}.")

    minutes = (time.perf_counter() - start) / 60
    write_metrics(args, metrics, minutes)
    print(
        f"\n{minutes:.1f} minutes. {output} holds the checkpoint, its card (README.md), {RETRIEVAL_NAME} and "
        "metrics.json."
    )
    print("\nNext, index the icons and search them:")
    print(f"  hf-unigd index --model {output} --dataset_name icons --output icons_index")
    print('  hf-unigd search icons_index --query "arrow left" --output hits.png')
    print(f'  hf-unigd answer icons_index --image {output / ICON_NAME} --question "What is it?"')
    print("and look at it in a browser, after `pip install 'hf-unigd[app]'`:")
    print(f"  hf-unigd serve --model {output} --index icons_index")
    return metrics


def build(train, chats, seed: int) -> tuple[UniGDForConditionalGeneration, UniGDProcessor]:
    """An untrained model, and a processor whose tokenizer is trained on texts of the training rows."""
    texts = icon_captions(train.select(range(len(train) // VIEWS)))
    texts += [f"USER: {PROMPT} ASSISTANT:"] * 100
    texts += [
        part["text"]
        for messages in chats[:500]["messages"]
        for turn in messages
        if turn["role"] == "user"
        for part in turn["content"]
        if part["type"] == "text"
    ]
    processor = UniGDProcessor(build_processor(texts), prompts={"image": PROMPT, "text": PROMPT})
    return UniGDForConditionalGeneration.from_vlm(build_llava(processor.vlm_processor, seed=seed)), processor


def measure(trainer: UniGDTrainer) -> dict[str, float]:
    """Recall and perplexity on the test icons."""
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    return {name: value for name, value in metrics.items() if "recall" in name or name == "perplexity"}


def show_metrics(metrics: dict[str, dict[str, float]]) -> None:
    """Prints a table of the metrics by stage."""
    print(f"\n{'on icons not trained on':<28}{'before':>10}{'after':>10}{'chance':>10}")
    for direction, title in (("anchor_to_positive", "image to text"), ("positive_to_anchor", "text to image")):
        for k in (1, 5, 10):
            row = [metrics[stage][f"{direction}_recall_at_{k}"] for stage in ("before", "after", "chance")]
            print(f"{f'{title}, R@{k}':<28}" + "".join(f"{value:>10.1%}" for value in row))
    before, after = metrics["before"]["perplexity"], metrics["after"]["perplexity"]
    print(f"{'perplexity of captions':<28}{before:>10.1f}{after:>10.1f}")


def spread(test, count: int) -> list[int]:
    """Indices of `count` rows at equal distances: the icons are sorted by name, and neighbours share words."""
    return list(range(0, len(test), len(test) // count))[:count]


def generate_captions(model, processor, test, batch_size: int = 250) -> list[str]:
    """The caption that the model generates for each image."""
    captions: list[str] = []
    for start in range(0, len(test), batch_size):
        images = [[row["image"]] for row in test.select(range(start, min(start + batch_size, len(test))))]
        batch = processor.process_sequences(images, padding_side="left")
        generated = model.generate(**batch.to(model.device), max_new_tokens=60, do_sample=False)
        captions += processor.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [caption.strip() for caption in captions]


def caption_accuracy(captions: list[str], icons: list[str]) -> dict[str, float]:
    """Shares of captions that name first what the name of the icon says first, and exactly the words of the name."""
    said, names = [named_words(caption) for caption in captions], [icon.split("_") for icon in icons]
    pairs = list(zip(said, names, strict=True))
    return {
        "captions_with_the_first_word": sum(a[:1] == b[:1] for a, b in pairs) / len(pairs),
        "captions_with_all_words": sum(sorted(a) == sorted(b) for a, b in pairs) / len(pairs),
    }


def show_captions(captions: list[str], test, accuracy: dict[str, float], count: int = 3) -> None:
    """Prints captions that the model generated, each below the true one, and how many of all are right."""
    print("\nGenerated captions:")
    for place in spread(test, count):
        print(f"  {test[place]['long_caption']}\n    -> {captions[place]}")
    print(
        f"Of all {len(captions)}, {accuracy['captions_with_the_first_word']:.1%} begin with the first word of the "
        f"icon's name, and {accuracy['captions_with_all_words']:.1%} have exactly its words."
    )


def plot_retrieval(model, processor, test, file: Path) -> None:
    """Plots text queries and their nearest images among all test images."""
    images = embed_sequences(model, processor, [[test[place]["image"]] for place in range(len(test))], batch_size=250)
    places = spread(test, SHOWN_QUERIES)
    queries = [test[place]["short_caption"] for place in places]
    ranking = rank_candidates(embed_sequences(model, processor, queries, show_progress=False), images, len(test))
    rows = []
    for place, query, hits in zip(places, queries, ranking.tolist(), strict=True):
        results = [(test[hit]["image"], test[hit]["short_caption"], hit == place) for hit in hits[:SHOWN_RESULTS]]
        rows.append((f"{query}\n(found at rank {hits.index(place) + 1})", results))
    draw_retrieval(
        rows,
        file,
        f"Texts and the {SHOWN_RESULTS} nearest of {len(test)} icons that the model was never shown. "
        "The right one has a green frame.",
    )
