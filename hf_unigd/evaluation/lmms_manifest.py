"""How lmms-eval finds our models: the entry point `lmms_eval.models` names this function."""


def manifest():
    """The `ModelManifest` of the model `unigd`. Only lmms-eval calls it, in its own environment."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("unigd", chat_class_path="hf_unigd.evaluation.lmms_model.UniGDLmms")
