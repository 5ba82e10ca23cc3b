"""Writes the model cards of the recipes, from the package's template and the recipes.

python model_cards/render.py
"""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from hf_unigd.hub import make_model_card


ROOT = Path(__file__).parent.parent
NO_SETTINGS = re.compile("datasets|dir|folder|dataloader|logging|save")
UNTRAINED = (
    "The recipe is written from the paper. Our tests run it for two steps on a tiny model. We have not trained it at "
    "this size and do not know whether it reaches the paper's numbers. Comments in the recipe mark the settings that "
    "the paper does not name. "
)
OTHER_BACKBONE = (
    "Our tests run the recipe for two steps on a tiny model of the same family. We have not trained it at this size. "
    "The paper does not have this backbone, and the settings that follow from its size are our choice. "
)
VLADVA_LIMITS = "The recipe does not train text-to-text retrieval, which the paper reports as a weakness."
RECIPES = {
    "vladva-llava-1.5-7b": {
        "recipe": "examples/vladva/llava_1.5_7b.yaml",
        "methods": ["vladva"],
        "summary": "It trains LLaVA-1.5-7B with the contrastive loss on short captions and with next-token prediction "
        "on long captions.",
        "limits": UNTRAINED + "We have trained only the quickstart's LLaVA of 1.7 million parameters on drawn icons "
        "(README.md). " + VLADVA_LIMITS,
        "license": "llama2",
    },
    "vladva-smolvlm-256m": {
        "recipe": "examples/vladva/smolvlm_256m_single_gpu.yaml",
        "methods": ["vladva"],
        "summary": "It trains SmolVLM-256M on one small GPU with the contrastive loss on short captions and with "
        "next-token prediction on long captions.",
        "limits": OTHER_BACKBONE + VLADVA_LIMITS,
        "license": "apache-2.0",
    },
    "vladva-qwen3-vl-2b": {
        "recipe": "examples/vladva/qwen3_vl_2b_8gpu.yaml",
        "methods": ["vladva"],
        "summary": "It trains Qwen3-VL-2B on eight GPUs with the contrastive loss on short captions and with "
        "next-token prediction on long captions.",
        "limits": OTHER_BACKBONE + VLADVA_LIMITS,
        "license": "apache-2.0",
    },
    "sugar-llava-1.5-7b": {
        "recipe": "examples/sugar/llava_1.5_7b.yaml",
        "methods": ["sugar"],
        "summary": "It trains LLaVA-1.5-7B with the structure loss, which regresses similarities of hidden states "
        "onto an alignment kernel between their inputs, and with next-token prediction.",
        "limits": UNTRAINED + "The paper starts from VILA-7B, for which transformers has no class. We have trained "
        "only the quickstart's small LLaVA on stories of drawn icons (docs/sugar.md).",
        "license": "llama2",
    },
}


def render(name: str) -> ModelCard:
    """Returns the card of a recipe."""
    facts = RECIPES[name]
    recipe = yaml.safe_load((ROOT / facts["recipe"]).read_text(encoding="utf-8"))
    datasets = [part["path"].removeprefix("data/") for part in recipe["datasets"]]
    settings = {key: value for key, value in recipe.items() if not NO_SETTINGS.search(key)}
    return make_model_card(
        repo_id=f"your-name/{name}",
        title=name,
        summary=facts["summary"],
        training={"recipe": f"`{facts['recipe']}`", "data": ", ".join(datasets), **settings},
        limits=facts["limits"],
        methods=facts["methods"],
        base_model=recipe["model_name_or_path"],
        base_model_relation="adapter",
        license=facts["license"],
        is_trained=False,
    )


if __name__ == "__main__":
    for name in RECIPES:
        render(name).save(Path(__file__).with_name(f"{name}.md"))
