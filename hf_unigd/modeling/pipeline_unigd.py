"""The pipeline behind `pipeline("feature-extraction", model=..., trust_remote_code=True)`.

`UniGDConfig.custom_pipelines` names it, and transformers then uses it instead of its own pipeline, which tokenizes a
text without the prompt that the model was trained to embed.
"""

from transformers import FeatureExtractionPipeline
from transformers.utils import ModelOutput
from transformers.utils.chat_template_utils import Chat


class UniGDFeatureExtractionPipeline(FeatureExtractionPipeline):
    """
    Embeds whatever [`UniGDProcessor.process_sequences`] takes: a text, a PIL image, a list of texts and images, or a
    chat. As in every pipeline, a list is a batch: one sequence of several parts is `[[text, image]]`.

    A model that holds its own processor, as one loaded from an adapter does, uses that one: `pipeline` loads the
    processor of the adapter's base model, whose prompts can differ.

    Args:
        model ([`UniGDModel`] or [`UniGDForConditionalGeneration`]): The model.
        processor ([`UniGDProcessor`]): Its processor.
        kwargs: Arguments of [`~transformers.Pipeline`]. Calls take `return_tensors`: `True` for `torch.FloatTensor`s
            of shape `(1, embedding_dim)`, `False` (default) for nested lists of the same shape; and `prompt_name` or
            `instruction`, as [`UniGDProcessor.process_sequences`] does.

    Example:

        pipe = pipeline("feature-extraction", model="me/my-model", trust_remote_code=True)
        [[text_embedding], [image_embedding]] = pipe(["a red cat", Image.open("cat.png")])
    """

    _load_tokenizer = False
    _load_processor = True

    def __init__(self, model, processor=None, **kwargs):
        super().__init__(model=model, processor=model.processor or processor, **kwargs)

    def _sanitize_parameters(self, return_tensors=None, prompt_name=None, instruction=None):
        instructed = {"prompt_name": prompt_name, "instruction": instruction}
        forward = {name: value for name, value in instructed.items() if value is not None}
        return {}, forward, {} if return_tensors is None else {"return_tensors": return_tensors}

    def preprocess(self, inputs):
        # Processing needs the whole batch, because padding moves the spans. The tuple tells one sequence, which may
        # be a list, from a batch, which is always a list.
        return {"sequence": (inputs.messages if isinstance(inputs, Chat) else inputs,)}

    def _forward(self, model_inputs, prompt_name=None, instruction=None):
        sequence = model_inputs["sequence"]
        sequences = [sequence] if isinstance(sequence, tuple) else sequence
        inputs = self.processor.process_sequences(
            [value for (value,) in sequences], prompt_name=prompt_name, instruction=instruction
        )
        return ModelOutput(embeddings=self.model.embed(**inputs.to(self.device, self.model.dtype)))


__all__ = ["UniGDFeatureExtractionPipeline"]
