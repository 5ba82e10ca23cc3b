"""The embedding head, and the pooling of hidden states that it is applied to."""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_unigd import UniGDConfig


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 or better, whatever the data type of its weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.linear(input.to(weight.dtype), weight, bias)


class UniGDHead(nn.Module):
    """Turns pooled hidden states `(n, hidden_size)` into embeddings `(n, embedding_dim)`, and owns the temperature.

    The head is kept in float32 whatever the backbone's data type is. It computes in float32 or better even if it is
    cast by autocast, by hand, or by FSDP or DeepSpeed in bfloat16. The temperature is a part of the head so that a
    PEFT adapter which saves the head (`modules_to_save`) holds everything that embedding needs.
    """

    def __init__(self, config: UniGDConfig):
        super().__init__()
        hidden_size = config.get_text_config().hidden_size
        if config.head_type == "none":
            self.projection: nn.Module = nn.Identity()
        elif config.head_type == "linear":
            self.projection = Float32Linear(hidden_size, config.embedding_dim)
        else:
            inner_size = config.head_hidden_dim or hidden_size
            self.projection = nn.Sequential(
                Float32Linear(hidden_size, inner_size), nn.GELU(), Float32Linear(inner_size, config.embedding_dim)
            )
        # The shape is (1,) because FSDP cannot shard scalars.
        self.logit_scale = nn.Parameter(torch.tensor([float(config.logit_scale_init_value)]))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            return F.normalize(self.projection(at_least_float32(pooled)), dim=-1)

    @property
    def inverse_temperature(self) -> torch.Tensor:
        """The factor by which similarities are multiplied, a float32 tensor of shape `()`."""
        return at_least_float32(self.logit_scale).exp().squeeze()


def last_token_spans(attention_mask: torch.Tensor) -> torch.Tensor:
    """Spans `(batch_size, 3)` of the last attended token of each row, with padding on either side.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 for tokens, 0 for padding.
    """
    length = attention_mask.shape[1]
    last = length - 1 - attention_mask.flip(1).to(torch.int32).argmax(1)
    rows = torch.arange(attention_mask.shape[0], device=attention_mask.device)
    return torch.stack([rows, last, last + 1], dim=1)


def pool_spans(hidden_states: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """Mean hidden state of each span, summed in float32 or better.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`).
        spans (`torch.LongTensor` of shape `(num_spans, 3)`): row, start and end (exclusive) of each span.

    Returns:
        `torch.FloatTensor` of shape `(num_spans, hidden_size)`.
    """
    if len(spans) == 0:  # `segment_reduce` refuses this; of a slice, the gradient is zero instead of missing
        return at_least_float32(hidden_states.flatten(0, 1)[:0])
    rows, starts, ends = spans.to(hidden_states.device).unbind(1)
    lengths = ends - starts
    # The flat index of every pooled token: the start of its span, plus its place inside the span.
    segment = torch.repeat_interleave(lengths)
    place = torch.arange(segment.shape[0], device=segment.device) - (lengths.cumsum(0) - lengths)[segment]
    tokens = hidden_states.flatten(0, 1)[(rows * hidden_states.shape[1] + starts)[segment] + place]
    return torch.segment_reduce(at_least_float32(tokens), "mean", lengths=lengths)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or in its own data type if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
