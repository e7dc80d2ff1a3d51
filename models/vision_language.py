"""A vision-language model of transformers as a network of one argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn


class VisionLanguage(nn.Module):
    """A model and its head, under the names that transformers gives them.

    It takes one mapping: input_ids [B, T] and attention_mask [B, T], int64; pixel_values [B, 3, H, W]; positions
    [B, A], int64, the tokens of which the next one is asked for. It gives logits [B, V, A] for those next tokens: only
    they are computed, since all [B, V, T] would be by far the largest tensor of a training.
    """

    def __init__(self, model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.model, self.lm_head = model, lm_head

    @classmethod
    def of(cls, whole: Any) -> Self:
        """The parts of a `...ForConditionalGeneration`, its norms exact in every precision."""
        _exact_norms(whole)
        return cls(whole.model, whole.lm_head)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if not isinstance(batch, Mapping):
            raise TypeError("a vision-language model takes images and text: give it a `llava:PATH` data set")
        inputs = {name: tensor for name, tensor in batch.items() if name != "positions"}
        hidden = self.model(**inputs, use_cache=False)[0]
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        return self.lm_head(hidden[rows, batch["positions"]]).transpose(1, 2)

    @torch.no_grad()
    def example_input(self) -> dict[str, torch.Tensor]:
        """A black image and one token after it, of which the next is asked for."""
        model: Any = self.model
        side = model.config.vision_config.image_size
        pixels = torch.zeros(1, 3, side, side, device=self.lm_head.get_parameter("weight").device)
        features = model.get_image_features(pixel_values=pixels).pooler_output[0]
        image = model.config.image_token_id
        other = 0 if image else 1
        tokens = torch.tensor([[*[image] * len(features), other]], device=pixels.device)
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "pixel_values": pixels,
            "positions": torch.full_like(tokens[:, :1], len(features)),
        }

    def after_surgery(self) -> None:
        """Make what the config and the feed-forward blocks say of their widths true again."""
        model: Any = self.model
        widest = 0
        for module in model.language_model.modules():
            if width := _width(module):
                module.intermediate_size = width  # type: ignore[assignment]
                widest = max(widest, width)
        model.config.text_config.intermediate_size = widest  # a config has one width for all blocks


def _width(module: nn.Module) -> int | None:
    """The width of a feed-forward block; None for any other module."""
    for name in ("gate_proj", "fc1"):
        layer = dict(module.named_children()).get(name)
        if isinstance(layer, nn.Linear):
            return layer.out_features
    return None


def _exact_norms(whole: nn.Module) -> None:
    """Put torch's RMSNorm in the place of transformers' of the same formula, which computes in float32 whatever its
    input is: compact == masked could not be checked in float64."""
    for module in list(whole.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                own: Any = child
                norm = nn.RMSNorm(len(own.weight), own.variance_epsilon)
                norm.weight = own.weight
                setattr(module, name, norm)
