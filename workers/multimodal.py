"""Images with text, `llava:PATH`: PATH/train.json, PATH/test.json, PATH/images and PATH/processor.

`processor` holds the tokenizer and image processor of the networks that are to be trained on it, as transformers saves
them: it may be a link to a checkpoint's folder. What is prepared depends on it, so it is part of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.multimodal import hash_of
from storage.printable import printable
from storage.userfiles import mode_of
from workers.conversations import IMAGE, Item, read_items, read_json, read_list
from workers.datasets import DataMissing, Dataset, Split
from workers.folders import Unsupported, picture

if TYPE_CHECKING:
    import torch

FILES = ("train.json", "test.json", "images", "processor")
IGNORED = -100
"""A label that counts for nothing: torch's own."""
NO_CHOICE = -1
"""A choice that is none, where an item has fewer than others."""

MARK = "\ue000"
"""A character for private use, which no text has."""

_INSTALL = "install the extra: pip install 'prunesweep[mllm]'"


def find_llava(path: str) -> Dataset:
    """The data set in a folder. Nothing but JSON is looked at; torch is not imported.

    `classes` is the size of its processor's vocabulary. Raises DataMissing where a part is not there, ValueError.
    """
    folder = Path(path)
    for part in FILES:
        if not mode_of(folder / part):
            raise DataMissing(
                f"llava:{path} has no {part}; there must be {', '.join(FILES)}. `processor` is the folder of the "
                "networks' tokenizer and image processor, or a link to one"
            )
    train, test = (len(read_list(folder / name)) for name in FILES[:2])
    _processor_files(folder / "processor")
    height, width = _image_size(folder / "processor")
    shape, words = (3, height, width), _vocabulary(folder / "processor")
    return Dataset(f"llava:{path}", lambda _: load_llava(folder), train, test, shape, words)


def llava_content(path: str) -> str:
    """The hash (16 hex digits) of the items, the images they name, and the processor's files.

    Raises DataMissing or ValueError.
    """
    find_llava(path)
    folder = Path(path)
    items = [item for name in FILES[:2] for item in read_items(folder / name, folder / "images")]
    processor = [
        file for file in _processor_files(folder / "processor") if file.suffix in (".json", ".model", ".jinja")
    ]
    parts = [*(folder / name for name in FILES[:2]), *processor, *{item.image for item in items}]
    return hash_of(folder, parts)


def _processor_files(folder: Path) -> list[Path]:
    """The files of a processor, without hidden ones. Raises ValueError for a FIFO, socket or device, which
    transformers would open."""
    if not folder.is_dir():
        raise ValueError(f"{printable(folder)} is not a folder of a tokenizer and image processor")
    paths = [path for path in folder.iterdir() if path.exists() and not path.name.startswith(".")]
    files = [path for path in paths if not path.is_dir()]
    if special := [path for path in files if not path.is_file()]:
        raise ValueError(f"{printable(special[0])} is not a regular file; replace or remove it")
    return files


def load_llava(folder: Path) -> tuple[Split, Split]:
    """Train and test set, all of both in memory: [N, T] tokens, [N, 3, H, W] pixels, [N, A] labels.

    T and A are the longest item's, of both sets. Raises ValueError naming the item.
    """
    processor = _processor(folder / "processor")
    parts = [read_items(folder / name, folder / "images") for name in FILES[:2]]
    encoded = [[encoded_item(item, processor) for item in items] for items in parts]
    every = [one for part in encoded for one in part]
    lengths = tuple(max(len(getattr(one, name)) for one in every) for name in ("tokens", "answers", "choices"))
    train, test = (
        _split(ones, [_pixels(item, processor) for item in items], lengths, processor)
        for items, ones in zip(parts, encoded, strict=True)
    )
    return train, test


@dataclass(frozen=True)
class Encoded:
    """An item as token ids. `answers` are the places of answer tokens, of a multiple-choice item its letter's first.

    `choices` are what its letters would be there, in their order.
    """

    tokens: tuple[int, ...]
    answers: tuple[int, ...]
    choices: tuple[int, ...] = ()


def encoded_item(item: Item, processor: Any) -> Encoded:
    """An item's tokens, with as many for its image as the network will have features of it. Raises ValueError."""
    text, spans = rendered(item, processor)
    tokens, places = _tokenised(text, processor)
    answers = [at for at, (a, b) in enumerate(places) if at and any(a < end and b > begin for begin, end in spans)]
    if not answers:
        raise ValueError(f"{printable(item.image)}: item {item.id}: no token is an answer's: {text!r}")
    if not item.letters:
        return Encoded(tuple(tokens), tuple(answers))
    begin, end = spans[-1]
    letter = text.index(item.letter, begin, end)
    at = next(at for at in answers if places[at][0] <= letter < places[at][1])
    choices = tuple(_alternative(text, letter, other, at, item, processor) for other in item.letters)
    return Encoded(tuple(tokens), (at, *(other for other in answers if other != at)), choices)


def _alternative(text: str, letter: int, other: str, at: int, item: Item, processor: Any) -> int:
    """The token that stands at `at` with another letter in the place of the right one."""
    tokens, places = _tokenised(text[:letter] + other + text[letter + 1 :], processor)
    if not (at < len(tokens) and places[at][0] <= letter < places[at][1]):
        raise ValueError(f"item {item.id}: the tokenizer gives the letter {other} no token where {item.letter} has one")
    return tokens[at]


def rendered(item: Item, processor: Any) -> tuple[str, list[tuple[int, int]]]:
    """An item as the text that the network sees, and where in it the answers are, with what ends them.

    By the processor's chat template; without one as LLaVA-1.5 has it: `USER: <image>\\n... ASSISTANT: ...</s>`.
    Raises ValueError where a template does not add turn to turn.
    """
    whole = _text(item.turns, processor)
    return whole, [_span(item.turns[:turn], whole, processor) for turn in range(2, len(item.turns) + 1, 2)]


def _span(turns: Sequence[tuple[str, str]], whole: str, processor: Any) -> tuple[int, int]:
    """Where the last of `turns`, an answer, is in `whole`, with what ends it.

    Found by a mark in its place: an answer `A` stands in `ASSISTANT` too.
    """
    *before, (role, answer) = turns
    head, _, tail = _text([*before, (role, MARK)], processor).partition(MARK)
    said = f"{head}{answer}{tail}".rstrip()
    if not whole.startswith(said):
        raise ValueError("the chat template of the data set's processor does not write turn after turn as they are")
    return len(head), len(said)


def _text(turns: Sequence[tuple[str, str]], processor: Any) -> str:
    """Turns as text, every token of the image in it."""
    if processor.chat_template:
        said = processor.apply_chat_template(list(_messages(turns)), tokenize=False)
    else:
        end = processor.tokenizer.eos_token or ""
        pieces = [f"USER: {text} ASSISTANT:" if role == "user" else f" {text}{end}" for role, text in turns]
        said = "".join(pieces).replace("USER: ", f"USER: {IMAGE}\n", 1)
    return said.replace(processor.image_token, processor.image_token * image_tokens(processor))


def _messages(turns: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for number, (role, text) in enumerate(turns):
        image = [] if number else [{"type": "image"}]
        yield {"role": role, "content": [*image, {"type": "text", "text": text}]}


def image_tokens(processor: Any) -> int:
    """How many tokens an image takes, as LlavaProcessor counts them: its patches, and the class token if kept."""
    height, width = _size_of(processor.image_processor.to_dict())
    patches = (height // processor.patch_size) * (width // processor.patch_size)
    return patches + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")


def _tokenised(text: str, processor: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and from where to where in `text` each is. Templates that begin with their own BOS get no other."""
    tokenizer = processor.tokenizer
    own = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    made = tokenizer(text, add_special_tokens=not own, return_offsets_mapping=True)
    return made["input_ids"], made["offset_mapping"]


def _pixels(item: Item, processor: Any) -> torch.Tensor:
    """An item's image, [3, H, W], float32. Raises ValueError where it is damaged."""
    try:
        image = picture(item.image)
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise many kinds
        kind = "cannot be used" if isinstance(error, Unsupported) else "is damaged"
        raise ValueError(
            f"item {item.id}: the image {printable(item.image)} {kind}: {error}. Allowed: levels of 8 or 16 bits, and "
            "floats from 0 to 1. Convert or replace it"
        ) from error
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    if pixels.shape[1:] != (3, *_size_of(processor.image_processor.to_dict())):
        raise ValueError(
            f"the data set's processor makes {list(pixels.shape)} of {printable(item.image)}: one view is needed"
        )
    return pixels[0].float()


def _split(ones: Sequence[Encoded], pixels: Sequence[torch.Tensor], lengths: tuple[int, ...], processor: Any) -> Split:
    import torch

    width, answers, options = lengths
    pad = processor.tokenizer.pad_token_id or 0
    tokens = torch.tensor([_padded(one.tokens, width, pad) for one in ones])
    labels = torch.tensor([_padded([one.tokens[at] for at in one.answers], answers, IGNORED) for one in ones])
    images = {
        "input_ids": tokens,
        "attention_mask": torch.tensor([_padded([1] * len(one.tokens), width, 0) for one in ones]),
        "pixel_values": torch.stack(list(pixels)),
        "positions": torch.tensor([_padded([at - 1 for at in one.answers], answers, 0) for one in ones]),
    }
    has_choices = any(one.choices for one in ones)
    choices = torch.tensor([_padded(one.choices, options, NO_CHOICE) for one in ones]) if has_choices else None
    return Split(images, labels, choices=choices)


def _padded(values: Sequence[int], length: int, filler: int) -> list[int]:
    return [*values, *[filler] * (length - len(values))]


def _processor(folder: Path) -> Any:
    """transformers' processor of a folder. Raises ValueError."""
    try:
        from transformers import AutoProcessor
    except ImportError as error:
        raise ValueError(f"data sets `llava:PATH` need transformers; {_INSTALL}") from error
    try:
        found: Any = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of another kind for each file that is missing
        raise ValueError(f"{folder} is no processor of transformers: {str(error).splitlines()[0]}") from error
    needed = ("tokenizer", "image_processor", "image_token", "patch_size", "vision_feature_select_strategy")
    if missing := [name for name in needed if getattr(found, name, None) is None]:
        raise ValueError(f"{folder} is no processor of a LLaVA network: it has no {missing[0]}")
    if not found.tokenizer.is_fast:
        raise ValueError(f"{folder} has no tokenizer.json, which says where in a text each token is")
    return found


def _image_size(processor: Path) -> tuple[int, int]:
    """(height, width) of the images a processor makes, out of its JSON files. Raises ValueError."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (processor / name).exists():
            config = read_json(processor / name)
            config = config.get("image_processor", config)
            if "size" in config or "crop_size" in config:
                return _size_of(config)
    raise ValueError(f"{processor} has no preprocessor_config.json that says how large images are")


def _size_of(config: dict[str, Any]) -> tuple[int, int]:
    """What an image processor's config says of the images it makes."""
    size = (config.get("do_center_crop", True) and config.get("crop_size")) or config.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    raise ValueError(f"the data set's image processor makes no images of one size: {size}")


def _vocabulary(processor: Path) -> int:
    """How many tokens a processor's tokenizer knows. Raises ValueError."""
    file = processor / "tokenizer.json"
    if not file.exists():
        raise ValueError(f"{processor} has no tokenizer.json, which says where in a text each token is")
    found = read_json(file)
    own = found["model"]["vocab"]
    ids = own.values() if isinstance(own, dict) else range(len(own))
    return 1 + max([*ids, *(token["id"] for token in found.get("added_tokens", ()))])
