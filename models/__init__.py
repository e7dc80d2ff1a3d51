"""Networks by name. Of the other rooms it imports pruners alone; torch only to build a network."""

from models.registry import (
    MODELS,
    build_model,
    check_model,
    input_shape,
    layer_units,
    load_weights,
    model_content,
    prunable_layers,
    weight_layers,
)

__all__ = [
    "MODELS",
    "build_model",
    "check_model",
    "input_shape",
    "layer_units",
    "load_weights",
    "model_content",
    "prunable_layers",
    "weight_layers",
]
