"""Vision-language networks and their data: read, pruned, retrained and measured as any other network."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")
pytest.importorskip("peft")

from models import build_model, layer_units, load_weights
from models.multimodal import FEED_FORWARD, build_hf, check_hf, hf_content, hf_layer_units, merged, parsed, with_lora
from orchestrator.preflight import misfit, preflight
from pruners.equivalence import LIMIT, equivalence
from pruners.surgery import prune
from storage.records import Cell, Dense, Recipe, Row, Shard, Task
from storage.store import Store
from tests.conversations import SIDE, items_of, make_data, make_network, make_processor
from workers import load_network
from workers.augment import Draws, mixed
from workers.checkpoints import Checkpoint
from workers.conversations import Item, item_of, letter_of
from workers.datasets import Data, DataMissing, Split, find_dataset
from workers.dense import load_dense
from workers.importances import of_dense
from workers.measures import measured
from workers.multimodal import find_llava, llava_content, load_llava, rendered
from workers.pulse import Stopped
from workers.serial import Serial, optimizer_of
from workers.training import train
from workers.weights import portable
from workers.worker import Worker

SHAPE = (3, SIDE, SIDE)
GATE = "model.language_model.layers.{}.mlp.gate_proj"
TRAINING: dict[str, Any] = {"optimizer": "adamw", "lr_schedule": "cosine"}
DENSE_RECIPE = Recipe(2, 4, ((0, 0.003),), seed=0, **TRAINING)
FULL = Recipe(1, 4, ((0, 0.003),), weight_decay=0.01, **TRAINING)
LORA = Recipe(1, 4, ((0, 0.01),), lora_rank=2, **TRAINING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network's config in `net` and data in `data`."""
    root = tmp_path_factory.mktemp("multimodal")
    make_network(root / "net")
    make_data(root / "data")
    return root


@pytest.fixture(scope="module")
def data(folder: Path) -> tuple[Split, Split]:
    """Train and test set."""
    return load_llava(folder / "data")


@pytest.fixture
def network(folder: Path) -> torch.nn.Module:
    """The network with weights of its own draw."""
    torch.manual_seed(0)
    return build_model(f"hf/{folder / 'net'}", 101, SHAPE).eval()


@pytest.fixture(scope="module")
def swept(folder: Path) -> tuple[Store, dict[str, Row]]:
    """A store after a whole small sweep, and its rows: two retrainings, full and by low-rank additions."""
    store = Store(str(folder / "store"))
    dense = Dense(f"hf/{folder / 'net'}", f"llava:{folder / 'data'}", DENSE_RECIPE)
    layers = tuple((GATE.format(block), 0.5) for block in (0, 1))
    cells = {name: Cell(dense, layers, "l1", recipe) for name, recipe in (("full", FULL), ("lora", LORA))}
    worker = Worker(store, str(folder))
    assert list(worker.run_shard(Shard("dense", dense=dense))) == []
    rows = {}
    for name, cell in cells.items():
        (row,) = worker.run_shard(Shard(name, (Task(cell, 0, 0),), keep="last"))
        assert row.status == "done", row.error
        rows[name] = row
    return store, rows


def one(split: Split, at: int) -> Split:
    return split.at(torch.tensor([at]))


@torch.no_grad()
def by_hand(network: torch.nn.Module, split: Split) -> tuple[float, float]:
    """Mean loss of the answer tokens and share of right letters, item by item, from all of a network's logits."""
    losses, right = [], []
    for at in range(len(split)):
        item = one(split, at)
        width = int(item.images["attention_mask"].sum())
        inputs = {
            name: item.images[name][:, :width] if name != "pixel_values" else item.images[name]
            for name in ("input_ids", "attention_mask", "pixel_values")
        }
        whole: Any = network
        logits = whole.lm_head(whole.model(**inputs)[0])[0]
        answers = sorted(
            int(p) for p, label in zip(item.images["positions"][0], item.labels[0], strict=True) if label >= 0
        )
        tokens = item.images["input_ids"][0]
        losses += [F.cross_entropy(logits[at], tokens[at + 1]).item() for at in answers]
        letters = {39: "A", 40: "B", 41: "C"}
        if len(answers) == 2:  # a letter and what ends it
            best = max(letters, key=lambda token: logits[answers[0], token].item())
            right.append(best == int(tokens[answers[0] + 1]))
    return sum(losses) / len(losses), sum(right) / len(right)


def test_a_sweep_of_a_vision_language_network(swept: tuple[Store, dict[str, Row]], data: tuple[Split, Split]) -> None:
    """Dense, pruned, retrained fully and by low-rank additions: the rows of any other network, and true ones."""
    store, rows = swept
    for row in rows.values():
        assert row.equivalence_error is not None and row.equivalence_error <= LIMIT
        assert row.params is not None and row.dense_params is not None
        assert row.dense_params - row.params == 2 * 24 * 3 * 32  # half of gate, up and down in two blocks
        assert row.macs is not None and row.dense_macs is not None and row.macs < row.dense_macs
        assert row.removed is not None and [len(r.units) for r in row.removed] == [24, 24]
        assert row.diverged is False and row.epoch_train_loss is not None and len(row.epoch_train_loss) == 1
        assert row.pruned_train_loss_n == 12
        assert all(value is not None for value in (row.score_l1, row.score_fpgm, row.best_test_accuracy))
        assert row.score_taylor is None  # gradients of all parameters are for whoever prunes by them
    assert rows["full"].pruned_test_loss == rows["lora"].pruned_test_loss
    assert rows["full"].last_test_loss != rows["lora"].last_test_loss
    file = store.dense(rows["full"].dense_id)
    assert file is not None
    dense = load_dense(rows["full"].task().cell.dense, file.content)
    loss, accuracy = by_hand(dense, data[1])
    assert rows["full"].dense_test_loss == pytest.approx(loss, rel=1e-5)
    assert rows["full"].dense_test_accuracy == pytest.approx(accuracy)


@pytest.mark.parametrize("which", ["full", "lora"])
def test_the_kept_network_is_the_measured_one(
    which: str, swept: tuple[Store, dict[str, Row]], data: tuple[Split, Split]
) -> None:
    """Loaded from its file, low-rank additions merged, it has the loss and accuracy of its row's last epoch."""
    store, rows = swept
    row = rows[which]
    assert row.kept_network is not None
    kept: Any = load_network(Path(store.root) / row.kept_network)
    loss, accuracy = by_hand(kept, data[1])
    assert row.last_test_loss == pytest.approx(loss, rel=1e-5)
    assert row.last_test_accuracy == pytest.approx(accuracy)
    assert not any("lora" in name for name in kept.state_dict())
    assert kept.model.config.text_config.intermediate_size == 24
    assert [block.mlp.intermediate_size for block in kept.model.language_model.layers] == [24, 24]


def test_only_low_rank_additions_are_trained(folder: Path, swept: tuple[Store, dict[str, Row]]) -> None:
    """Between the pruned network and the one kept, linear layers differ by rank 2, nothing else."""
    store, rows = swept
    row = rows["lora"]
    file = store.dense(row.dense_id)
    assert file is not None and row.kept_network is not None and row.removed is not None
    dense = load_dense(row.task().cell.dense, file.content)
    kept = load_network(Path(store.root) / row.kept_network).state_dict()
    example = one(load_llava(folder / "data")[0], 0).images
    before = prune(dense, {r.layer: r.units for r in row.removed}, example).state_dict()
    changed = {name for name in before if not torch.equal(before[name], kept[name])}
    assert changed and all("language_model.layers" in name and "_proj" in name for name in changed)
    assert {int(torch.linalg.matrix_rank(kept[n] - before[n], rtol=1e-3)) for n in changed} == {2}


def test_layers_are_known_from_the_config(folder: Path, tmp_path: Path) -> None:
    """Their names and units are those of the network that is built, also where the config leaves defaults out."""
    reference = f"hf/{folder / 'net'}"
    assert layer_units(reference) == {GATE.format(0): 48, GATE.format(1): 48}
    config = json.loads((folder / "net" / "config.json").read_text())
    del config["text_config"]["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert set(hf_layer_units(str(tmp_path)).values()) == {11008}  # Llama's own default


def test_what_a_plan_needs_imports_no_torch(folder: Path) -> None:
    """Layers, sizes and contents of a network and its data come from their files alone."""
    asked = (
        "import sys; from models import layer_units, model_content; "
        "from workers.datasets import dataset_content, find_dataset; net, data = sys.argv[1:]; "
        "print(len(layer_units(net)), model_content(net), find_dataset(data).train_size, dataset_content(data)); "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    names = (f"hf/{folder / 'net'}", f"llava:{folder / 'data'}")
    done = subprocess.run([sys.executable, "-c", asked, *names], capture_output=True, text=True, check=True)
    contents = hf_content(names[0]), llava_content(str(folder / "data"))
    assert done.stdout.splitlines() == [f"2 {contents[0]} 12 {contents[1]}", "[]"]


@pytest.mark.parametrize("kind", list(FEED_FORWARD))
def test_every_kind_of_language_model_is_cut_exactly(kind: str, tmp_path: Path, data: tuple[Split, Split]) -> None:
    """For each of the table: the layers are there, and compact == masked."""
    make_network(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rest = ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size", "num_hidden_layers")
    config["text_config"] = {name: config["text_config"][name] for name in (*rest, "vocab_size")} | {
        "model_type": kind,
        "max_position_embeddings": 64,
        "pad_token_id": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = build_hf(str(tmp_path), 101, SHAPE).eval()
    units = hf_layer_units(str(tmp_path))
    assert {name: network.get_submodule(name).out_features for name in units} == units
    removed = dict.fromkeys(units, (0, 7, 30))
    probe = data[0].at(torch.arange(4)).images
    compact = prune(network, removed, one(data[0], 0).images)
    found = equivalence(network, compact, removed, probe)
    assert found.error is not None and found.error <= LIMIT, found


def test_loss_and_accuracy_do_not_depend_on_padding_or_batch(
    network: torch.nn.Module, data: tuple[Split, Split]
) -> None:
    """Measured in batches they are those of items alone, without padding; the loss is torch's own of all of them."""
    for split in data:
        loss, accuracy = by_hand(network, split)
        for batch in (1, 5):
            (found,) = measured(lambda images: network(images).unsqueeze(0).double(), split, batch)
            assert (found.loss, found.accuracy) == (pytest.approx(loss, rel=1e-5), pytest.approx(accuracy))
            assert found.n == len(split)
        with torch.no_grad():
            assert F.cross_entropy(network(split.images), split.labels).item() == pytest.approx(loss, rel=1e-5)


def test_measures_of_text_by_hand() -> None:
    """Two networks on three samples: token-weighted loss, its standard error, letters among the choices only."""
    labels = torch.tensor([[0, -100], [1, 2], [2, -100]])
    choices = torch.tensor([[0, 1, -1], [-1, -1, -1], [2, 0, 1]])
    logits = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    logits[0, 0, :, 0] = torch.tensor([1.0, 0.0, 5.0, 9.0])  # right among its letters, though not the highest
    logits[0, 2, :, 0] = torch.tensor([3.0, 0.0, 2.0, 0.0])  # wrong
    found = measured(lambda images: logits[:, images], Split(torch.arange(3), labels, choices=choices), 2)
    assert found[0].accuracy == 0.5
    for member, measure in zip(logits.double(), found, strict=True):
        each = F.cross_entropy(member, labels, reduction="none").sum(1)
        tokens = torch.tensor([1.0, 2.0, 1.0])
        mean = (each.sum() / tokens.sum()).item()
        assert measure.loss == pytest.approx(mean, rel=1e-6)
        apart = ((each - mean * tokens).square().sum() * 3 / 2).sqrt().item() / 4
        assert measure.loss_se == pytest.approx(apart, rel=1e-5)
    without = measured(lambda images: logits[:, images], Split(torch.arange(3), labels), 2)
    expected = [
        [bool((m.argmax(0) == row)[row >= 0].all()) for m, row in zip(net, labels, strict=True)] for net in logits
    ]
    assert [m.accuracy for m in without] == [pytest.approx(sum(right) / 3) for right in expected]


def test_text_of_one_token_is_measured_as_classes() -> None:
    """With one label per sample, loss, standard error and accuracy are those of images with classes."""
    logits = torch.randn(1, 50, 7, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(50) % 7
    (classes,) = measured(lambda images: logits[:, images], Split(torch.arange(50), labels), 16)
    (text,) = measured(lambda images: logits[:, images].unsqueeze(3), Split(torch.arange(50), labels[:, None]), 16)
    assert vars(text) == pytest.approx(vars(classes), rel=1e-6)


def test_tokens_are_those_of_the_processor(folder: Path, data: tuple[Split, Split]) -> None:
    """Tokens and pixels are what LlavaProcessor makes of the same text and image; answers end with what ends them."""
    from PIL import Image
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(str(folder / "data" / "processor"))
    texts = [
        "USER: <image>\nWhich color?\nA. red\nB. green\nC. blue ASSISTANT: A</s>",
        "USER: <image>\nSay it. ASSISTANT: so A now</s>",
    ]
    for at, text in zip((0, 3), texts, strict=True):
        item = one(data[0], at)
        image = Image.open(folder / "data" / "images" / "A.png")
        expected = processor(text=text, images=image, return_tensors="pt")
        width = expected["input_ids"].shape[1]
        assert torch.equal(item.images["input_ids"][:, :width], expected["input_ids"])
        assert item.images["attention_mask"].sum() == width
        assert torch.equal(item.images["pixel_values"], expected["pixel_values"])
        answer = item.labels[item.labels >= 0]
        words = ["A", "</s>"] if at == 0 else [*"soAnow", "</s>"]
        assert processor.tokenizer.convert_ids_to_tokens(answer.tolist()) == words


def test_a_chat_template_says_how_turns_are_written(folder: Path, tmp_path: Path) -> None:
    """Its text is what is tokenised; every answer is labelled, the last one's letter first."""
    shutil.copytree(folder / "data", tmp_path / "data")
    template = (  # its role ends with a space that a prompt to go on does not have, as some models' do
        "{% for m in messages %}{{ 'USER:' if m['role'] == 'user' else 'ASSISTANT:' }} "
        "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }} {% endfor %}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    make_processor(tmp_path / "data" / "processor", template)
    (item,) = items_of(1)
    talk = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
    item["conversations"] = [
        *talk,
        {"from": "human", "value": "Which?\n(A) red\n(B) blue"},
        {"from": "gpt", "value": "B"},
    ]
    (tmp_path / "data" / "train.json").write_text(json.dumps([item]))
    train, _ = load_llava(tmp_path / "data")
    ends, letter, y = 3, 40, 95
    assert sorted(train.labels[0][train.labels[0] >= 0].tolist()) == sorted([y, ends, letter, ends])
    assert train.labels[0, 0] == letter and train.choices is not None and train.choices[0, :2].tolist() == [39, 40]
    tokens, positions = train.images["input_ids"][0], train.images["positions"][0]
    labelled = train.labels[0] >= 0
    assert torch.equal(tokens[positions[labelled] + 1], train.labels[0][labelled])


def test_an_answer_is_found_where_it_stands(folder: Path) -> None:
    """Not in a word before it that has the same letter, and not in what ends it."""
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(str(folder / "data" / "processor"))
    for answer in ("A", "s", "S", "USER: A"):
        text, spans = rendered(Item("x", Path("x"), (("user", "A or s?"), ("assistant", answer))), processor)
        assert [text[begin:end] for begin, end in spans] == [f"{answer}</s>"]
    template = "{% for m in messages %}{{ loop.length }}{{ m['content'][-1]['text'] }}{% endfor %}"
    processor.chat_template = template  # says at its beginning how many turns there are: none can be added
    talk = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(ValueError, match="does not write turn after turn"):
        rendered(Item("x", Path("x"), talk), processor)


def test_given_weights_are_loaded_from_safetensors_alone(folder: Path, tmp_path: Path) -> None:
    """A checkpoint of transformers gives its outputs; shards count; a missing shard and pickles are refused."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(3)
    whole: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(str(folder / "net"))).eval()
    data = load_llava(folder / "data")[0].at(torch.arange(4))
    inputs = {name: tensor for name, tensor in data.images.items() if name != "positions"}
    with torch.no_grad():
        logits = whole(**inputs).logits
    rows = torch.arange(4)[:, None]
    expected = logits[rows, data.images["positions"]].transpose(1, 2)
    for name, size in (("whole", "1GB"), ("shards", "60KB")):
        whole.save_pretrained(tmp_path / name, max_shard_size=size)
        reference = f"hf/{tmp_path / name}"
        network = build_model(reference, 101, SHAPE).eval()
        load_weights(network, reference, "library")
        with torch.no_grad():
            assert torch.allclose(network(data.images), expected, atol=1e-5)
    reference = f"hf/{tmp_path / 'shards'}"
    network = build_model(reference, 101, SHAPE)
    own = {name: tensor.contiguous() for name, tensor in whole.state_dict().items()}
    save_file(own, tmp_path / "own.safetensors")
    load_weights(network, reference, str(tmp_path / "own.safetensors"))
    with torch.no_grad():
        assert torch.allclose(network.eval()(data.images), expected, atol=1e-5)
    for other in (str(tmp_path / "whole"), "IMAGENET1K_V1"):
        with pytest.raises(ValueError, match=r"\.safetensors"):
            load_weights(network, reference, other)
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    kept = shards[0].read_bytes()
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"names {shards[0].name}, which is not beside it"):
        load_weights(network, reference, "library")
    shards[0].write_bytes(kept)
    (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=f"{shards[0].name} is one file of several"):
        load_weights(network, reference, "library")
    torch.save(whole.state_dict(), folder / "net" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors weights"):
        load_weights(network, f"hf/{folder / 'net'}", "library")
    (folder / "net" / "pytorch_model.bin").unlink()


def test_weights_of_another_network_are_refused(folder: Path, tmp_path: Path) -> None:
    """Widths that differ from the config's, and tensors that are missing, are errors, not fresh weights."""
    from safetensors.torch import load_file, save_file

    reference = f"hf/{tmp_path}"
    make_network(tmp_path)
    network: Any = build_model(reference, 101, SHAPE)
    whole = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    load_weights(network, reference, "library")
    missing = load_file(tmp_path / "model.safetensors")
    del missing["lm_head.weight"]
    save_file(missing, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack lm_head\.weight"):
        load_weights(network, reference, "library")
    save_file(whole | {"lm_head.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_weights(network, reference, "library")


def test_tied_weights_stay_tied(folder: Path, tmp_path: Path) -> None:
    """A network whose head is its embedding trains, is stored and comes back with one of them."""
    make_network(tmp_path / "net", tie_word_embeddings=True)
    store = Store(str(tmp_path / "store"))
    dense = Dense(f"hf/{tmp_path / 'net'}", f"llava:{folder / 'data'}", Recipe(1, 8, ((0, 0.001),), seed=0, **TRAINING))
    assert list(Worker(store, str(folder)).run_shard(Shard("dense", dense=dense))) == []
    file = store.dense(dense.dense_id)
    assert file is not None
    found: Any = load_dense(dense, file.content)
    assert found.lm_head.weight is found.model.language_model.embed_tokens.weight


@pytest.mark.parametrize("recipe", [FULL, LORA], ids=["full", "lora"])
def test_a_stopped_training_goes_on(recipe: Recipe, data: tuple[Split, Split], tmp_path: Path) -> None:
    """Stopped after a minibatch and gone on with, a network with tied weights ends with the very same ones."""
    from accelerate import Accelerator

    make_network(tmp_path / "net", tie_word_embeddings=True)
    store = Store(str(tmp_path / "store"))

    def trained(stop: Callable[[], bool]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        backend = Serial(build_hf(str(tmp_path / "net")), recipe, Accelerator(cpu=True), "contiguous_format")
        checkpoint = Checkpoint(store.scratch, "here", {}, 1e9, stop)
        whole = Data(data[0], data[0].at(torch.arange(0)), data[1], 101)
        train(backend, whole, recipe, dataset="talk", seed=0, stream="retrain", checkpoint=checkpoint)
        return portable(backend.networks[0])

    expected = trained(lambda: False)
    asked = iter([False, True, True])
    with pytest.raises(Stopped):
        trained(lambda: next(asked))
    minibatches: list[None] = []
    found = trained(lambda: bool(minibatches.append(None)))
    assert len(minibatches) == 2  # of three
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_low_rank_additions_change_nothing_at_first(network: torch.nn.Module, data: tuple[Split, Split]) -> None:
    """They begin at zero, are all that the optimizer gets, and merging is what they compute."""
    images = data[0].at(torch.arange(4)).images
    with torch.no_grad():
        before = network(images)
        plain = copy.deepcopy(network)
        assert merged(plain) is plain
        made = with_lora(network, 3)
        assert torch.equal(made(images), before)
    groups = optimizer_of(list(made.parameters()), LORA).param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for name, p in made.named_parameters() if ".lora_" in name}
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        added = made(images)
        whole = merged(made)
        assert not torch.allclose(added, before, atol=1e-4)
        assert torch.allclose(whole(images), added, atol=1e-5)
    assert whole.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in whole.parameters())


def test_low_rank_additions_need_a_language_model_without_masks(network: torch.nn.Module) -> None:
    """Other networks and masked ones are refused, with what to do."""
    from torch.nn.utils import prune as masks

    with pytest.raises(ValueError, match=r"lora_rank is for networks with a language model"):
        with_lora(build_model("lenet5_mini", 10, (1, 32, 32)), 2)
    masks.random_unstructured(network.get_submodule(GATE.format(0)), "weight", 0.5)
    with pytest.raises(ValueError, match="granularity filter"):
        with_lora(network, 2)


def test_content_is_what_the_files_hold(folder: Path, tmp_path: Path) -> None:
    """A copy elsewhere is the same; an edited config, item, image or processor is not; other files do not count."""
    for name in ("net", "data"):
        shutil.copytree(folder / name, tmp_path / name)
    net, data = str(tmp_path / "net"), str(tmp_path / "data")
    assert (hf_content(net), llava_content(data)) == (
        hf_content(str(folder / "net")),
        llava_content(str(folder / "data")),
    )
    (tmp_path / "net" / "README.md").write_text("nothing")
    assert hf_content(net) == hf_content(str(folder / "net"))
    first = hf_content(net)
    (tmp_path / "net" / "config.json").write_text((tmp_path / "net" / "config.json").read_text() + " ")
    assert hf_content(net) != first
    seen = {llava_content(data)}
    for part in ("train.json", "processor/tokenizer_config.json"):
        (tmp_path / "data" / part).write_text((tmp_path / "data" / part).read_text() + " ")
        seen.add(llava_content(data))
    shutil.copy(tmp_path / "data" / "images" / "A.png", tmp_path / "data" / "images" / "B.png")
    assert len(seen | {llava_content(data)}) == 4


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda item: item.pop("conversations"), "has no list `conversations`"),
        (lambda item: item["conversations"].pop(), "has no answer to its last question"),
        (lambda item: item["conversations"][1].update(value=" "), "turn 2, of gpt, has no text"),
        (lambda item: item["conversations"][1].update({"from": "human"}), "turn 2 is not from gpt"),
        (lambda item: item.pop("image"), "names no image"),
        (lambda item: item.update(image="none.png"), r"there is no image .*none\.png"),
        (lambda item: item["conversations"][0].update(value="<image> <image>"), "more than once"),
        (lambda item: item.update(choices=["A", "B"]), r"the answer 'C' is none of its letters A, B"),
        (lambda item: item.update(choices="ABC"), "`choices` is a list"),
    ],
)
def test_a_bad_item_is_named(spoil: Callable[[dict[str, Any]], Any], said: str, folder: Path, tmp_path: Path) -> None:
    """The error has the file, the item's id and what is wrong with it."""
    shutil.copytree(folder / "data", tmp_path / "data")
    items = items_of(3)
    spoil(items[2])
    (tmp_path / "data" / "train.json").write_text(json.dumps(items))
    with pytest.raises(ValueError, match=rf"train\.json: item item2.*{said}"):
        load_llava(tmp_path / "data")


def test_a_damaged_image_is_named(folder: Path, tmp_path: Path) -> None:
    """An image that cannot be decoded is an error with item and file."""
    shutil.copytree(folder / "data", tmp_path / "data")
    (tmp_path / "data" / "images" / "B.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"item item1: the image .*B\.png is damaged"):
        load_llava(tmp_path / "data")


def test_letters_come_from_choices_or_from_the_question(tmp_path: Path) -> None:
    """Options by name have the letters from A; lines `A. ...` count where the answer is one of their letters."""
    (tmp_path / "x.png").touch()

    def letters(question: str, answer: str, **more: Any) -> tuple[str, ...]:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return item_of({"image": "x.png", "conversations": turns, **more}, "here", 0, tmp_path).letters

    assert letters("Which?", "B", choices=["cat", "dog", "cow"]) == ("A", "B", "C")
    assert letters("Which?", "D", choices=["A", "D"]) == ("A", "D")
    assert letters("Which?\nA. cat\nB) dog\n(C) cow", "(C)") == ("A", "B", "C")
    assert letters("Which?\nA. cat\nB. dog", "dog") == ()
    assert letters("Which?\nA. cat", "A") == ()
    assert [letter_of(text) for text in ("A", " B. ", "(C)", "D:", "a", "AB", "A dog")] == [
        "A",
        "B",
        "C",
        "D",
        *[None] * 3,
    ]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("hf/nowhere", "no such folder, and it is no hub id"),
        ("hf/./nowhere/at/all", "no such folder, and it is no hub id"),
        ("hf/some/model?size=3", "takes the argument revision alone"),
    ],
)
def test_a_bad_reference_is_refused(reference: str, said: str) -> None:
    """What is neither a folder nor a hub id, and unknown arguments."""
    with pytest.raises(ValueError, match=said):
        check_hf(reference)


def test_a_hub_id_that_cannot_be_had_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hub is out of reach the message tells what else can be done. No weights are fetched to check a name."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert parsed("hf/some/model?revision=v1").revision == "v1"
    check_hf("hf/some/model")
    assert hf_content("hf/some/model") is None
    with pytest.raises(ValueError, match=r"hf/some/model: no folder of that name is here.*name the folder"):
        layer_units("hf/some/model")


def test_networks_of_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    """Other types of networks and of language models, no config, and a config that is no JSON."""
    config = json.loads((folder / "net" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"the folder has no config\.json"):
        check_hf(str(tmp_path))
    file = tmp_path / "config.json"
    for text, said in (
        ("{", "is no JSON"),
        (json.dumps(config | {"model_type": "bert"}), "a network of type bert"),
        (json.dumps(config | {"text_config": {"model_type": "gpt2"}}), "a language model of type gpt2"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            check_hf(str(tmp_path))


def test_data_that_is_not_for_the_network_is_refused(folder: Path) -> None:
    """Images of another size, more tokens than it knows, and data without text."""
    reference = str(folder / "net")
    with pytest.raises(ValueError, match=r"takes images of 3x16x16, the data's are 1x32x32"):
        build_hf(reference, 10, (1, 32, 32))
    with pytest.raises(ValueError, match="knows 128 tokens and the data's processor 500"):
        build_hf(reference, 500, SHAPE)
    with pytest.raises(TypeError, match=r"give it a `llava:PATH` data set"):
        build_hf(reference)(torch.zeros(1, *SHAPE))


def test_what_does_not_go_together_is_known_before_a_run(folder: Path, tmp_path: Path) -> None:
    """Networks with text and data without, the other way round, and a processor of other images than the network's."""
    net, data = f"hf/{folder / 'net'}", f"llava:{folder / 'data'}"
    assert misfit(net, data, None) is None and misfit("lenet5_mini", "synthetic", None) is None
    assert "takes images with text" in (misfit(net, "synthetic", None) or "")
    assert "takes images alone" in (misfit("lenet5_mini", data, None) or "")
    make_network(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["image_size"] = 24
    (tmp_path / "config.json").write_text(json.dumps(config))
    cell = Cell(Dense(f"hf/{tmp_path}", data, DENSE_RECIPE), ((GATE.format(0), 0.5),), "l1", FULL)
    (problem,) = preflight([cell], None)
    assert problem.startswith(f"hf/{tmp_path} takes images of 3x24x24, the data's are 3x16x16")


def test_a_data_set_without_all_its_parts_is_refused(folder: Path, tmp_path: Path) -> None:
    """The part that is not there is named; what is there is known without reading images."""
    found = find_dataset(f"llava:{folder / 'data'}")
    assert (found.train_size, found.test_size, found.shape, found.classes) == (12, 8, SHAPE, 101)
    for part in ("train.json", "test.json", "images", "processor"):
        with pytest.raises(DataMissing, match=f"has no {part}"):
            find_llava(str(tmp_path))
        if part in ("images", "processor"):
            (tmp_path / part).mkdir()
        else:
            (tmp_path / part).write_text("[]")
    with pytest.raises(ValueError, match="is no list of items"):
        find_llava(str(tmp_path))


def test_images_with_text_are_not_mixed(data: tuple[Split, Split]) -> None:
    """Mixup of tokens means nothing: it is refused with what to do."""
    with pytest.raises(ValueError, match="leave them out"):
        mixed(data[0], Recipe(1, 4, ((0, 0.01),), mixup=0.2), 101, Draws("talk", 0, "retrain/0"), 0)


def test_no_moving_average_of_low_rank_additions(network: torch.nn.Module) -> None:
    """The two together are refused before anything is trained."""
    from accelerate import Accelerator

    recipe = Recipe(1, 4, ((0, 0.01),), lora_rank=2, ema=0.9)
    with pytest.raises(ValueError, match="leave one of them out"):
        Serial(network, recipe, Accelerator(cpu=True), "contiguous_format")
    assert math.isclose(recipe.lr_at(0), 0.01)


def test_scores_that_need_gradients(swept: tuple[Store, dict[str, Row]], folder: Path) -> None:
    """A study that prunes by such a criterion has the scores of all."""
    cell = replace(swept[1]["full"].task().cell, pruner="taylor", calibration=2)
    found = of_dense(cell, Worker(swept[0], str(folder)))
    assert all(one.units is not None for name in ("taylor", "hessian") for one in found[name].values())
