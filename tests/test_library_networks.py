"""Networks of torchvision and timm, and a user's own: found, built, given weights, and pruned to the unit."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import usercode
from models import build_model, check_model, layer_units, load_weights, model_content, registry
from models.attention import SeparateAttention, separated
from models.library import known_names, renormalised
from orchestrator.preflight import stirred
from pruners.candidates import n_removed
from pruners.equivalence import LIMIT, equivalence
from pruners.surgery import check_fell, head_weights, prune
from workers.worker import count

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TORCHVISION_VIT = "torchvision/vit_b_16?image_size=32&patch_size=8&hidden_dim=48&num_heads=4&mlp_dim=96&num_layers=2"
TIMM_VIT = "timm/vit_tiny_patch16_224?patch_size=8&embed_dim=48&depth=2&num_heads=4"
SHAPE = (3, 32, 32)
NETWORKS = ["resnet20", "vgg11", TORCHVISION_VIT, TIMM_VIT, "torchvision/resnet18", "torchvision/mobilenet_v3_small"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks: several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dense(name: str) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return stirred(build_model(name, 10, SHAPE)).eval(), torch.randn(2, *SHAPE)


def units_of(module: Any) -> int:
    heads = getattr(module, "prunable_heads", None)
    return heads.count if heads is not None else len(module.weight)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(ratio=st.floats(0.1, 0.8), seed=st.integers(0, 2**32), data=st.data())
def test_exactly_the_named_units_go(name: str, ratio: float, seed: int, data: st.DataObject) -> None:
    """Any layers, any ratio, any units: floor(n * r) of each go, parameters and multiply-adds fall, and the rest
    computes what the dense network does with these units silenced."""
    units = layer_units(name)
    layers = data.draw(st.sets(st.sampled_from(sorted(units)), min_size=1))
    model, probe = dense(name)
    draw = torch.Generator().manual_seed(seed)
    counts = {layer: n_removed(units[layer], ratio) for layer in units if layer in layers}
    removed = {layer: tuple(torch.randperm(units[layer], generator=draw)[:n].tolist()) for layer, n in counts.items()}
    removed = {layer: chosen for layer, chosen in removed.items() if chosen}
    pruned = prune(model, removed, probe[:1])
    left = {layer: units_of(pruned.get_submodule(layer)) for layer in units}
    assert left == {layer: n - len(removed.get(layer, ())) for layer, n in units.items()}
    if removed:
        check_fell(count(model, probe[:1]), count(pruned, probe[:1]))
        found = equivalence(model, pruned, removed, probe)
        assert found.error is not None and found.error <= LIMIT


@pytest.mark.parametrize("name", [TORCHVISION_VIT, TIMM_VIT])
def test_heads_go_whole(name: str) -> None:
    """Without head 1 of four the rows of its queries, keys and values and its columns of the projection are gone, and
    the block says that it has three; so says its importance."""
    block = next(layer for layer, n in layer_units(name).items() if n == 4)
    model, probe = dense(name)
    cut: Any = prune(model, {block: (1,)}, probe[:1]).get_submodule(block)
    whole: Any = model.get_submodule(block)
    kept = [i for i in range(48) if not 12 <= i < 24]
    writes = [("qkv", kept + [48 + i for i in kept] + [96 + i for i in kept])]
    if isinstance(whole, SeparateAttention):
        writes = [(name, kept) for name in "qkv"]
    for layer, rows in writes:
        assert torch.equal(getattr(cut, layer).weight, getattr(whole, layer).weight[rows])
    assert torch.equal(cut.proj.weight, whole.proj.weight[:, kept])
    assert cut.num_heads == cut.prunable_heads.count == 3
    before, after = head_weights(whole), head_weights(cut)
    assert before is not None and after is not None
    assert torch.equal(after, before[[0, 2, 3]])


def test_a_width_takes_all_that_is_as_wide() -> None:
    """Embedding width: norms, tokens, positions and every reader lose the channels, and the sizes said are true."""
    model, probe = dense(TORCHVISION_VIT)
    pruned: Any = prune(model, {"conv_proj": (0, 7)}, probe[:1])
    assert pruned.hidden_dim == 46
    assert pruned.class_token.shape == (1, 1, 46) and pruned.encoder.pos_embedding.shape == (1, 17, 46)
    norms = [m for m in pruned.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 5 and all(m.normalized_shape == (46,) for m in norms)
    attention = pruned.encoder.layers[0].self_attention
    assert (attention.num_heads, attention.q.weight.shape, attention.proj.weight.shape) == (4, (48, 46), (46, 48))


@pytest.mark.parametrize("wrong", ["norm", "head", "position"])
def test_the_check_catches_wrong_surgery_in_a_transformer(wrong: str) -> None:
    """A norm's weight off by 1e-6, two heads swapped in the projection, two channels of the positions swapped."""
    model, probe = dense(TIMM_VIT)
    removed = {"patch_embed.proj": (3, 4), "blocks.0.attn": (1,)}
    pruned: Any = prune(model, removed, probe[:1])
    with torch.no_grad():
        if wrong == "norm":
            pruned.blocks[0].norm1.weight[0] += 1e-6
        elif wrong == "head":
            weight = pruned.blocks[0].attn.proj.weight
            weight[:, :24] = weight[:, :24].roll(12, 1)
        else:
            pruned.pos_embed[..., :2] = pruned.pos_embed[..., :2].flip(-1)
    error = equivalence(model, pruned, removed, probe).error
    assert error is not None and error > LIMIT


def test_separate_attention_computes_what_torchvisions_does() -> None:
    """The network whose attention is replaced gives what the library's gives, to rounding; weights are the same."""
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = stirred(VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=10)).double().eval()
        x = torch.randn(4, *SHAPE, dtype=torch.float64)
        expected = model(x).detach()
        got = separated(model)(x)
    assert any(isinstance(m, SeparateAttention) for m in model.modules())
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_a_librarys_state_dict_is_loaded(tmp_path: Path) -> None:
    """A file with torchvision's names, .pt or .safetensors: the network computes what the library's does."""
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        library = stirred(VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10)).eval()
        torch.save({"model": library.state_dict()}, tmp_path / "vit.pt")
        save_file(library.state_dict(), tmp_path / "vit.safetensors")
        for file in ("vit.pt", "vit.safetensors"):
            model, probe = dense(TORCHVISION_VIT)
            load_weights(model, TORCHVISION_VIT, str(tmp_path / file))
            assert torch.allclose(model(probe), library(probe), atol=1e-5)


def test_weights_of_the_library_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`library`, and a name of the library's: from its cache as it would be filled; a classifier for another number
    of classes keeps its fresh weights."""
    from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    given = mobilenet_v3_small()
    torch.save(given.state_dict(), folder / MobileNet_V3_Small_Weights.DEFAULT.url.rpartition("/")[2])
    name = "torchvision/mobilenet_v3_small"
    for weights, classes in (("library", 1000), ("IMAGENET1K_V1", 10)):
        model = build_model(name, classes, SHAPE)
        fresh = model.get_parameter("classifier.3.weight").clone()
        load_weights(model, name, weights)
        assert torch.equal(model.get_parameter("features.0.0.weight"), given.get_parameter("features.0.0.weight"))
        expected = given.get_parameter("classifier.3.weight") if classes == 1000 else fresh
        assert torch.equal(model.get_parameter("classifier.3.weight"), expected)
    with pytest.raises(ValueError, match=r"has no weights 'IMAGENET1K_V9'; torchvision has IMAGENET1K_V1"):
        load_weights(build_model(name, 10, SHAPE), name, "IMAGENET1K_V9")


def test_weights_of_densenets_have_older_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's files call `norm1` `norm.1`: they are loaded as its own loader does."""
    from torchvision.models import DenseNet121_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    name = "torchvision/densenet121"
    model = build_model(name, 1000, SHAPE)
    given = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", n): t for n, t in given.items()}
    older = {n: t for n, t in older.items() if not n.endswith("num_batches_tracked")}
    # torchvision checks a file it downloads, not one that is there.
    torch.save(older, folder / DenseNet121_Weights.DEFAULT.url.rpartition("/")[2])
    load_weights(model, name, "library")
    layer = model.get_submodule("features.denseblock1.denselayer1")
    assert not layer.get_parameter("norm1.weight").any() and not layer.get_parameter("conv2.weight").any()


def test_weights_for_transformed_inputs_are_not_given_others() -> None:
    """torchvision's GoogLeNet and Inception transform their inputs where they have its weights."""
    name = "torchvision/googlenet"
    with pytest.raises(ValueError, match=r"name it torchvision/googlenet\?transform_input=True"):
        load_weights(build_model(name, 10, SHAPE), name, "library")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"conv1.weight": torch.zeros(16, 1, 3, 3)}, r"conv1.weight is \[16, 1, 3, 3\] in it and \[16, 3, 3, 3\] here"),
        ({"extra": torch.zeros(1)}, "the network has no tensor called extra"),
        ({}, "there is no tensor called conv1.weight, bn1.weight"),
        ({"fc.weight": torch.zeros(100, 64)}, r"fc.weight is \[100, 64\] in it and \[10, 64\] here"),
    ],
)
def test_weights_that_do_not_fit_are_refused(content: dict[str, torch.Tensor], said: str, tmp_path: Path) -> None:
    """The message names the file, the tensors and both shapes; nothing is loaded."""
    model = build_model("resnet20", 10, SHAPE)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    save_file({**({"conv1.weight": before["conv1.weight"]} if content else {}), **content}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=said) as error:
        load_weights(model, "resnet20", str(tmp_path / "w.safetensors"))
    assert str(tmp_path / "w.safetensors") in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_files_are_read_safely(tmp_path: Path) -> None:
    """A pickle that would run code is not loaded; a missing file, a torn one and another kind are named."""

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"conv1.weight": Runs()}, tmp_path / "evil.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"123")
    model = build_model("resnet20", 10, SHAPE)
    for file, said in (
        ("evil.pt", "damaged or holds more than tensors"),
        ("torn.safetensors", "damaged"),
        ("none.pt", "cannot be read"),
        ("weights/of.txt", r"weights are a \.safetensors file or"),
    ):
        with pytest.raises(ValueError, match=said):
            load_weights(model, "resnet20", str(tmp_path / file))
    assert not (tmp_path / "ran").exists()


def test_channels_and_sizes_are_the_datas() -> None:
    """timm takes any number of channels; torchvision three, and says so."""
    assert build_model(TIMM_VIT, 5, (1, 16, 16)).eval()(torch.zeros(2, 1, 16, 16)).shape == (2, 5)
    with pytest.raises(ValueError, match="torchvision's networks take 3 channels, not 1"):
        build_model("torchvision/resnet18", 10, (1, 28, 28))
    with pytest.raises(ValueError, match=r"cannot be built for 10 classes and inputs of 3x32x32: .*depht"):
        build_model("timm/vit_tiny_patch16_224?depht=2", 10, SHAPE)


def test_layers_are_known_without_torch_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept in the user's cache: a second plan imports no torch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = dict(registry._found_layers.__wrapped__(TIMM_VIT).units)
    code = f"import sys; from models import layer_units; print(layer_units({TIMM_VIT!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{found} False\n"


def test_names_are_checked_against_the_libraries_source() -> None:
    """What is read there is what the libraries register; a misspelt name is told the nearest."""
    import timm
    from torchvision import models

    assert set(known_names("torchvision")) == set(models.list_models(module=models))
    assert set(known_names("timm")) == set(timm.list_models(include_tags=False))
    check_model("timm/resnet50.a1_in1k")
    for name, said in (
        ("torchvision/resnet19", "did you mean torchvision/resnet18"),
        ("timm/convnext_atom", "timm/convnext_atto"),
        ("torchvision/resnet18?wide", r"\?key=value"),
        ("nowhere.such:build", "there is no Python module nowhere"),
    ):
        with pytest.raises(ValueError, match=said):
            check_model(name)


# -- a user's own ------------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn
from . import sizes

class Net(nn.Module):
    def __init__(self, classes, shape):
        super().__init__()
        self.first = nn.Conv2d(shape[0], sizes.WIDTH, 3, padding=1)
        self.attn = Attention(sizes.WIDTH, 2)
        self.fc = nn.Linear(sizes.WIDTH, classes)

    def forward(self, x):
        x = self.first(x).relu().flatten(2).transpose(1, 2)
        return self.fc((x + self.attn(x)).mean(1))

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(len(x), x.shape[1], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))

def build(classes, shape):
    return Net(classes, shape)

def for_mnist(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.ReLU(), nn.Linear(6, classes))

def number(classes):
    return classes

def broken(classes):
    raise KeyError("lost")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's package in the working directory, of another name in each test."""
    package = tmp_path / f"own_{tmp_path.name.replace('-', '_')}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "net.py").write_text(OWN)
    (package / "sizes.py").write_text("WIDTH = 8\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package


def test_a_users_own_network_is_pruned(own: Path) -> None:
    """build(classes, shape) and build(classes); its layers are found, its attention has heads, and pruning holds."""
    name = f"{own.name}.net:build"
    check_model(name)
    assert layer_units(name) == {"first": 8, "attn": 2}
    assert layer_units(f"{own.name}.net:for_mnist") == {"1": 6}
    model, probe = dense(name)
    removed = {"first": (0, 5), "attn": (1,)}
    pruned = prune(model, removed, probe[:1])
    found = equivalence(model, pruned, removed, probe)
    assert found.error is not None and found.error <= LIMIT
    check_fell(count(model, probe[:1]), count(pruned, probe[:1]))


def test_a_users_code_is_known_by_content(own: Path) -> None:
    """The fingerprint is of all files of the package, of nothing else, and needs no import."""
    name = f"{own.name}.net:build"
    before = model_content(name)
    assert before == usercode.fingerprint(name) and before is not None and len(before) == 16
    assert f"{own.name}.net" not in sys.modules
    (own / "notes.txt").write_text("not code")
    assert model_content(name) == before
    (own / "sizes.py").write_text("WIDTH = 9\n")
    assert model_content(name) != before
    assert model_content("resnet20") is None and model_content("torchvision/resnet18") is None


def test_a_users_mistakes_are_told(own: Path) -> None:
    """No such module or attribute, something that is no network, code that fails: the name and what to do."""
    for attribute, said in (
        ("buidl", r"net has no buidl; it has .*build"),
        ("number", r"made a int: it must return a torch.nn.Module"),
        ("broken", r"failed when called with .*KeyError: 'lost'"),
        ("OWN", "has no OWN"),
    ):
        with pytest.raises(ValueError, match=said):
            build_model(f"{own.name}.net:{attribute}", 10, SHAPE)
    with pytest.raises(ValueError, match="No module named"):
        usercode.load(f"{own.name}.nets:build")
    assert not usercode.is_code("imagefolder:data") and not usercode.is_code("llava:x.json")
    assert usercode.is_code("net:build") and not usercode.is_code("resnet20")


def test_another_normalisation_goes_into_the_first_convolution() -> None:
    """On our images it gives what the given weights give on images normalised as they want them."""
    draw = torch.Generator().manual_seed(0)
    raw = torch.rand(2, 3, 8, 8, generator=draw, dtype=torch.float64)
    weight = torch.randn(5, 3, 4, 4, generator=draw, dtype=torch.float64)
    bias = torch.randn(5, generator=draw, dtype=torch.float64)
    theirs, ours = ((0.5, 0.4, 0.3), (0.5, 0.6, 0.7)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def normalised(statistics: Any) -> torch.Tensor:
        mean, std = (torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1) for values in statistics)
        return (raw - mean) / std

    expected = torch.nn.functional.conv2d(normalised(theirs), weight, bias, stride=4)
    found = torch.nn.functional.conv2d(normalised(ours), *renormalised(weight, bias, theirs, ours), stride=4)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_weights_for_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT's weights for mean 0.5 are changed at one place; those of a network whose first convolution pads are
    refused."""
    from models import library

    name = "timm/vit_tiny_patch16_224?patch_size=8&embed_dim=48&depth=1&num_heads=3"
    model = build_model(name, 10, (3, 32, 32))
    given = {n: t.clone() for n, t in build_model(name, 10, (3, 32, 32)).state_dict().items()}
    made: Any = build_model(name, 10, (3, 32, 32))
    other: Any = build_model("timm/resnet18", 10, (3, 32, 32))
    held = [other, made]
    monkeypatch.setattr(library, "_build_timm", lambda *_, **__: held.pop())
    made.load_state_dict(given)
    assert made.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    load_weights(model, name, "library")
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, given[n])}
    assert changed == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    other.pretrained_cfg["mean"] = (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"are for images of mean \(0.5, 0.5, 0.5\)"):
        load_weights(copy.deepcopy(other), "timm/resnet18", "library")
