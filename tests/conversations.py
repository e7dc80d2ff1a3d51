"""A small vision-language network, its processor, and data to train it on, made where a test wants them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIDE, PATCH = 16, 8
WORDS = ["[UNK]", "<pad>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:"]
COLORS = {"A": (220, 30, 30), "B": (30, 220, 30), "C": (30, 30, 220)}
QUESTION = "<image>\nWhich color?\nA. red\nB. green\nC. blue"


def make_network(folder: Path, **text: Any) -> Path:
    """A folder with the config of a network of two blocks, and nothing else."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=16,
    )
    usual: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
    }
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=LlamaConfig(**usual | text).to_dict(),
        image_token_index=WORDS.index("<image>"),
    )
    config.save_pretrained(folder)
    return folder


def make_processor(folder: Path, template: str | None = None) -> Path:
    """A folder with a tokenizer of single characters and some words, and an image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = {word: at for at, word in enumerate([*WORDS, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "USER:", "ASSISTANT:"]})
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    processor = LlavaProcessor(
        images,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return folder


def items_of(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Multiple-choice items in turn with one that is free text; their images are named by their color."""
    made = []
    for at in range(first, first + count):
        letter = "ABC"[at % 3]
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": letter}]
        if at % 4 == 3:
            turns = [{"from": "human", "value": "<image>\nSay it."}, {"from": "gpt", "value": f"so {letter} now"}]
        made.append({"id": f"item{at}", "image": f"{letter}.png", "conversations": turns})
    return made


def make_data(folder: Path, train: int = 12, test: int = 8) -> Path:
    """A data set of LLaVA's format, with the processor of `make_processor`."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    for letter, color in COLORS.items():
        Image.new("RGB", (20, 24), color).save(folder / "images" / f"{letter}.png")
    (folder / "train.json").write_text(json.dumps(items_of(train)))
    (folder / "test.json").write_text(json.dumps(items_of(test, train)))
    make_processor(folder / "processor")
    return folder
