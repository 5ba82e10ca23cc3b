"""The arms of the study, each a declaration of what is trained on what, and the tables that they stand in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """
    A way to turn the base model into an embedder.

    Attributes:
        title: Its row in tables.
        contrastive: Weight of the contrastive loss.
        next_token: Weight of the next-token loss on long captions.
        lora: Whether LoRA is trained: rank 16, alpha 16, on all linear layers of the language model.
        soft_prompts: Whether the prompts are trained, from those that are written by hand.
        positive: Column of the captions that pictures are contrasted with.
    """

    title: str
    contrastive: float = 1.0
    next_token: float = 0.0
    lora: bool = True
    soft_prompts: bool = True
    positive: str = "short_caption"

    @property
    def is_trained(self) -> bool:
        return self.lora or self.soft_prompts


@dataclass(frozen=True)
class SugarArm:
    """
    A way to add Sugar's head to the base model, with LoRA and the next-token loss, on albums and scenes, also behind
    what an index would hold.

    Attributes:
        title: Its row in tables.
        contrastive: Weight of the contrastive loss on the captions of scenes.
        structure: Weight of the structure loss.
        target: What it regresses similarities onto: `"kernel"`, or `"mean_slice"` (without GAK).
        triple_kernel: Whether slices of one modality have a teacher of their own.
        image_pooling: The tokens of a picture that are pooled: the `"mean"` of all, or the `"last"`.
        halved: Of which rows there are half as many: the `"albums"`, or the `"scenes"`, also those behind entries.
    """

    title: str
    contrastive: float = 0.0
    structure: float = 0.0
    target: str = "kernel"
    triple_kernel: bool = True
    image_pooling: str = "mean"
    halved: str | None = None
    is_trained = True


@dataclass(frozen=True)
class TargetArm:
    """
    What the structure loss regresses the similarities of a model onto, used to retrieve.

    Attributes:
        title: Its row in tables.
    """

    title: str
    is_trained = False


@dataclass(frozen=True)
class ClipArm:
    """
    Two towers of the size of the base model, which are trained from scratch on captioned scenes with CLIP's loss.

    Attributes:
        title: Its row in tables.
        like_tuning, like_pretraining: Whether it takes as many steps as the other arms take from the base model, and
            as this took.
    """

    title: str
    like_tuning: bool = True
    like_pretraining: bool = True
    is_trained = True


@dataclass(frozen=True)
class SentenceArm:
    """
    LoRA on the base model, trained by sentence-transformers on captioned scenes.

    Attributes:
        title: Its row in tables.
    """

    title: str
    is_trained = True


ARMS: dict[str, Arm | SugarArm | TargetArm | ClipArm | SentenceArm] = {
    "as_it_is": Arm("as it is, best prompt", contrastive=0.0, lora=False, soft_prompts=False),
    "soft_prompts": Arm("+ soft prompts", lora=False),
    "lora": Arm("+ LoRA", soft_prompts=False),
    "both": Arm("+ LoRA + soft prompts"),
    "joint": Arm("+ LoRA + soft prompts + next-token", next_token=1.0),
    "long_contrastive": Arm("long captions contrasted", positive="long_caption"),
    "joint_0.1": Arm("contrastive to next-token 1 : 0.1", next_token=0.1),
    "joint_0.5": Arm("contrastive to next-token 1 : 0.5", next_token=0.5),
    "joint_2": Arm("contrastive to next-token 1 : 2", next_token=2.0),
    "sentence_transformers": SentenceArm("LoRA, by sentence-transformers"),
    "clip": ClipArm("two towers, as many steps as the base model and an arm"),
    "clip_short": ClipArm("two towers, as many steps as an arm", like_pretraining=False),
    "sugar_next_token": SugarArm("next-token alone"),
    "sugar_info_nce": SugarArm("+ InfoNCE", contrastive=1.0),
    "sugar": SugarArm("+ structure loss", structure=1.0),
    "sugar_both": SugarArm("+ InfoNCE + structure loss", contrastive=1.0, structure=1.0),
    "sugar_mean_slice": SugarArm("structure loss without GAK", structure=1.0, target="mean_slice"),
    "sugar_one_teacher": SugarArm("structure loss without TK", structure=1.0, triple_kernel=False),
    "sugar_last_token": SugarArm("structure loss without AvgPool", structure=1.0, image_pooling="last"),
    "sugar_half_albums": SugarArm("structure loss, half of the albums", structure=1.0, halved="albums"),
    "sugar_half_scenes": SugarArm("structure loss, half of the scenes", structure=1.0, halved="scenes"),
    "sugar_targets": TargetArm("the targets of the structure loss"),
}


@dataclass(frozen=True)
class Column:
    """
    A column of a table.

    Attributes:
        title: Its heading.
        metrics: Names of metrics, whose mean it is.
        is_share: Whether the metrics are shares, which are printed in per cent.
    """

    title: str
    metrics: tuple[str, ...]
    is_share: bool = True


@dataclass(frozen=True)
class Table:
    """
    A table of the study.

    Attributes:
        title: Its heading.
        question: What it asks.
        rows: Names of arms, with their titles where the table has its own.
        columns: Its columns.
        reference: The arm that every other one is compared with.
    """

    title: str
    question: str
    rows: dict[str, str]
    columns: tuple[Column, ...]
    reference: str


def own_titles(*names: str) -> dict[str, str]:
    return {name: ARMS[name].title for name in names}


RETRIEVAL = (
    Column("text to image R@1", ("text_to_image_recall_at_1",)),
    Column("image to text R@1", ("image_to_text_recall_at_1",)),
)
KINDS = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")
SUGARCREPE = tuple(Column(kind.replace("_", " "), (f"sugarcrepe_{kind}",)) for kind in KINDS)
LANGUAGE = (
    Column("perplexity", ("perplexity",), is_share=False),
    Column("questions", ("pope_accuracy",)),
)
VLADVA = (*RETRIEVAL, *SUGARCREPE, *LANGUAGE)
TABLES = {
    "components": Table(
        "The parts of VladVA (its Table 4)",
        "What do soft prompts, LoRA and the next-token loss on long captions each add?",
        own_titles("as_it_is", "soft_prompts", "lora", "both", "joint"),
        VLADVA,
        reference="both",
    ),
    "long_captions": Table(
        "Long captions in the contrastive loss",
        "Does it collapse to contrast pictures with long captions, as VladVA says, instead of predicting these?",
        {
            "both": "short captions contrasted",
            "long_contrastive": ARMS["long_contrastive"].title,
            "joint": "short captions contrasted, long ones predicted",
        },
        (*VLADVA, Column("contrastive loss at the end", ("final_contrastive_loss",), is_share=False)),
        reference="joint",
    ),
    "structure": Table(
        "The structure loss (Sugar's Table 4b)",
        "Is it the structure loss that helps, beside next-token alone and InfoNCE, and which of its parts?",
        own_titles(
            *("sugar_next_token", "sugar_info_nce", "sugar", "sugar_both"),
            *("sugar_mean_slice", "sugar_one_teacher", "sugar_last_token"),
            *("sugar_half_albums", "sugar_half_scenes", "sugar_targets"),
        ),
        (
            Column("albums, 5c R@5", ("5c_recall_at_5",)),
            Column("albums, 5c+4i R@5", ("5c+4i_recall_at_5",)),
            Column("scenes, text to image R@5", ("text_to_image_recall_at_5",)),
            Column("scenes, pairs of pictures", ("winoground_image_score",)),
            Column("described alone", ("described_alone",)),
            Column("with retrieval", ("described_with_retrieval",)),
            Column("questions", ("pope_accuracy",)),
            Column("perplexity of answers", ("answers_perplexity",), is_share=False),
            Column("perplexity of captions", ("perplexity",), is_share=False),
        ),
        reference="sugar",
    ),
    "towers": Table(
        "Beside two towers, and sentence-transformers",
        "How does a tuned generative model compare with two towers of its size, and with what "
        "sentence-transformers makes of the same model?",
        own_titles("lora", "both", "joint", "sentence_transformers", "clip_short", "clip"),
        (*RETRIEVAL, *SUGARCREPE),
        reference="joint",
    ),
    "mixture": Table(
        "The mixture of the two losses",
        "What does a weight on the next-token loss cost in retrieval, and what does it keep of generation?",
        {"both": "1 : 0", "joint_0.1": "1 : 0.1", "joint_0.5": "1 : 0.5", "joint": "1 : 1", "joint_2": "1 : 2"},
        VLADVA,
        reference="joint",
    ),
}
