"""Networks by name. Imports no other room; torch only to build one."""

from models.registry import (
    MODELS,
    build_model,
    check_model,
    input_shape,
    layer_units,
    load_weights,
    model_content,
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
    "weight_layers",
]
