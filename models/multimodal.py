"""Vision-language models of transformers by name: `hf/<folder>` or `hf/<hub id>`, the LLaVA family.

`?revision=<tag or commit>` may follow a hub id. What a plan needs (is there such a network, how wide are its layers)
is read from config.json and needs neither transformers nor torch, as long as the config says it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from storage.userfiles import NotRegular, mode_of, open_regular

if TYPE_CHECKING:
    from torch import nn

    from models.vision_language import VisionLanguage

KINDS = ("llava", "vipllava")
"""`model_type` of the configs that can be used: one image, one language model."""

FEED_FORWARD: Mapping[str, str] = {
    "llama": "mlp.gate_proj",
    "mistral": "mlp.gate_proj",
    "qwen2": "mlp.gate_proj",
    "qwen3": "mlp.gate_proj",
    "stablelm": "mlp.gate_proj",
    "phi": "mlp.fc1",
}
"""`model_type` of a language model -> the layer of each block whose units are its feed-forward width."""

KNOWN: Mapping[str, tuple[str, int, int]] = {"llava-hf/llava-1.5-7b-hf": ("llama", 32, 11008)}
"""Hub id -> its language model, blocks and feed-forward width: of the study mllm, which can be planned offline."""

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")
_READ = (".json", ".safetensors", ".model", ".txt", ".jinja")
_INSTALL = "install the extra: pip install 'prunesweep[mllm]'"


@dataclass(frozen=True)
class Reference:
    """What stands behind `hf/`: a folder here, or an id on the hub and which revision of it."""

    name: str
    folder: Path | None
    revision: str | None = None

    @property
    def source(self) -> str:
        """What transformers' `from_pretrained` takes."""
        return str(self.folder or self.name)


def parsed(reference: str) -> Reference:
    """A reference as it stands in a spec, with or without `hf/`. Raises ValueError where it can be none."""
    path, _, query = reference.removeprefix("hf/").partition("?")
    arguments = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := [key for key in arguments if key != "revision"]:
        raise ValueError(f"hf/{path} takes the argument revision alone, not {unknown[0]}")
    folder = Path(path).expanduser()
    if path and stat.S_ISDIR(mode_of(folder)):
        if arguments:
            raise ValueError(f"hf/{path} is a folder here and has no revision: leave `?{query}` out")
        return Reference(path, folder.absolute())
    if not _HUB_ID.fullmatch(path) or path.startswith("."):
        raise ValueError(
            f"hf/{path}: there is no such folder, and it is no hub id; write hf/PATH of a folder with a config.json, "
            "or hf/ORGANISATION/NAME"
        )
    return Reference(path, None, arguments.get("revision"))


def absolute(reference: str) -> str:
    """`hf/` with a folder's absolute path, so that workers elsewhere find it; a hub id as it is. Raises ValueError."""
    folder = parsed(reference).folder
    return f"hf/{folder}" if folder else reference


def check_hf(reference: str) -> None:
    """Raise ValueError for a reference that cannot be used; of a hub id only the form is looked at."""
    found = parsed(reference)
    if found.folder:
        _language_model(found, read_config(found))


def hf_layer_units(reference: str) -> dict[str, int]:
    """Prunable layer -> units: the feed-forward widths of the language model, block by block.

    The names are those of transformers' modules. Raises ValueError.
    """
    found = parsed(reference)
    if found.name in KNOWN and not found.revision:
        kind, blocks, width = KNOWN[found.name]
        return _widths(FEED_FORWARD[kind], blocks, width)
    config = read_config(found)
    layer = FEED_FORWARD[_language_model(found, config)]
    text = config.get("text_config") or {}
    if not {"intermediate_size", "num_hidden_layers"} <= text.keys():
        text = _whole(found, config).text_config.to_dict()  # older configs leave defaults out
    return _widths(layer, int(text["num_hidden_layers"]), int(text["intermediate_size"]))


def _widths(layer: str, blocks: int, width: int) -> dict[str, int]:
    return {f"model.language_model.layers.{block}.{layer}": width for block in range(blocks)}


def hf_content(reference: str) -> str | None:
    """The hash (16 hex digits) of a folder's config, weights and tokenizer files; None of a hub id."""
    folder = parsed(reference).folder
    if not folder:
        return None
    return hash_of(folder, (p for p in folder.iterdir() if p.suffix in _READ and not p.name.startswith(".")))


def hash_of(folder: Path, files: Iterable[Path]) -> str:
    """Return 16 hex digits of sha256 over files of a folder, by their paths in it, UTF-8 or not, and their content.

    Raises OSError, also for a file that is not regular.
    """
    whole = hashlib.sha256()
    for path in sorted(files):
        with open_regular(path) as file:
            held = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(os.fsencode(path.relative_to(folder)) + f"\0{held}\n".encode())
    return whole.hexdigest()[:16]


def build_hf(reference: str, classes: int | None = None, shape: tuple[int, ...] | None = None) -> VisionLanguage:
    """The network that a reference's config describes, with freshly drawn weights (torch's global generator), float32.

    `classes` is the size of the data's vocabulary and `shape` that of its images (channels, height, width), where
    they are known. Raises ValueError where the network does not take them.
    """
    from models.vision_language import VisionLanguage

    found = parsed(reference)
    config = _whole(found, read_config(found))
    _check_data(found, config, classes, shape)
    with _transformers():
        import torch
        from transformers import AutoModelForImageTextToText
    return VisionLanguage.of(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))


def load_hf(network: nn.Module, reference: str) -> None:
    """Put the reference's own weights, from its safetensors files, into a network that `build_hf` made of it.

    Raises ValueError naming what is missing or does not fit. Nothing is ever unpickled.
    """
    from models.vision_language import VisionLanguage

    found = parsed(reference)
    if found.folder:
        _check_files(found.folder)
    with _transformers():
        import torch
        from transformers import AutoModelForImageTextToText
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            found.source,
            revision=found.revision or "main",
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # of another kind for each way to be missing or damaged
        raise ValueError(f"the weights of hf/{found.name} cannot be loaded: {_first_line(error)}") from error
    given, said = loaded
    if apart := sorted(said["missing_keys"]):
        raise ValueError(f"the weights of hf/{found.name} lack {', '.join(apart[:4])}: they are of another network")
    network.load_state_dict(VisionLanguage.of(given).state_dict())


def check_fits(reference: str, classes: int, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the network that a reference describes takes the data, as `build_hf`; builds nothing."""
    found = parsed(reference)
    _check_data(found, _whole(found, read_config(found)), classes, shape)


def read_config(found: Reference) -> dict[str, Any]:
    """A reference's config.json. Raises ValueError."""
    path = found.folder / "config.json" if found.folder else _from_hub(found)
    try:
        with open_regular(path) as file:
            config = json.loads(file.read())
    except FileNotFoundError:
        raise ValueError(f"hf/{found.name}: the folder has no config.json") from None
    except NotRegular as error:
        raise ValueError(f"hf/{found.name}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"hf/{found.name}: config.json is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"hf/{found.name}: config.json is no config of transformers")
    return config


def with_lora(network: nn.Module, rank: int) -> nn.Module:
    """`network` itself, low-rank additions of this rank (alpha twice that) in the linear layers of its language model.

    Only they need gradients from here on. A is drawn from torch's global generator and B is zero, so it still
    computes what it did. Raises ValueError for a network without a language model, or with masks.
    """
    from torch.nn import Linear

    targets = [n for n, m in network.named_modules() if isinstance(m, Linear) and ".language_model." in f".{n}"]
    if not targets:
        raise ValueError("lora_rank is for networks with a language model (hf/...); leave it out for this one")
    if any(name.endswith("weight_orig") for name, _ in network.named_parameters()):
        raise ValueError("lora_rank is for granularity filter: merged additions would fill what masks have emptied")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"lora_rank needs peft; {_INSTALL}") from error
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), network)


def merged(network: nn.Module) -> nn.Module:
    """A copy of `network` with its low-rank additions added to its weights; itself where it has none."""
    if not any(".lora_A." in name for name, _ in network.named_parameters()):
        return network
    import copy

    from peft.tuners.lora import LoraLayer

    whole: Any = copy.deepcopy(network)
    for name, module in list(whole.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge(safe_merge=False)
            parent, _, own = name.rpartition(".")
            setattr(whole.get_submodule(parent), own, layer.get_base_layer())
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    return whole


def _language_model(found: Reference, config: Mapping[str, Any]) -> str:
    """The kind of a config's language model. Raises ValueError where it or the whole is none we know."""
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"hf/{found.name} is a network of type {kind}; those that can be pruned: {', '.join(KINDS)}")
    text = (config.get("text_config") or {}).get("model_type", "llama")
    if text not in FEED_FORWARD:
        known = ", ".join(FEED_FORWARD)
        raise ValueError(f"hf/{found.name} has a language model of type {text}; those that can be pruned: {known}")
    return text


def _check_data(found: Reference, config: Any, classes: int | None, shape: tuple[int, ...] | None) -> None:
    words, side = config.text_config.vocab_size, config.vision_config.image_size
    if classes is not None and classes > words:
        raise ValueError(
            f"hf/{found.name} knows {words} tokens and the data's processor {classes}: give the data this network's own"
        )
    if shape is not None and tuple(shape) != (3, side, side):
        height, width = shape[-2:]
        raise ValueError(
            f"hf/{found.name} takes images of 3x{side}x{side}, the data's are {shape[0]}x{height}x{width}: "
            "give it a `llava:PATH` data set with this network's own processor"
        )


def _check_files(folder: Path) -> None:
    """Raise ValueError unless a folder has safetensors weights, all of them."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            with open_regular(index) as file:
                named = sorted(set(json.loads(file.read())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{index} is no index of weights: {error!r}") from error
        if missing := [name for name in named if not (folder / name).is_file()]:
            raise ValueError(f"{index} names {missing[0]}, which is not beside it: fetch the whole folder")
    elif not (folder / "model.safetensors").is_file():
        if shards := sorted(folder.glob("model-*-of-*.safetensors")):
            raise ValueError(f"{shards[0]} is one file of several, and {index.name}, which says of which, is missing")
        raise ValueError(
            f"{folder} has no safetensors weights. Leave `weights` out to start from fresh ones; files of another kind "
            "are not loaded: convert them with transformers' save_pretrained"
        )


def _whole(found: Reference, config: Mapping[str, Any]) -> Any:
    """transformers' own config, with its defaults. Raises ValueError."""
    _language_model(found, config)
    with _transformers():
        from transformers import AutoConfig
    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # of another kind for each key
        raise ValueError(f"hf/{found.name}: config.json cannot be used: {_first_line(error)}") from error


def _from_hub(found: Reference) -> Path:
    with _transformers():
        from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(found.name, "config.json", revision=found.revision))
    except Exception as error:  # no such id, no network, not allowed: each library's own
        raise ValueError(
            f"hf/{found.name}: no folder of that name is here, and the hub gives no config.json of it "
            f"({_first_line(error)}); download it where there is a network and name the folder"
        ) from error


@contextmanager
def _transformers() -> Iterator[None]:
    """Imports that are an extra's. Raises ValueError where it is not installed."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"networks of hf/ need transformers ({_first_line(error)}); {_INSTALL}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
