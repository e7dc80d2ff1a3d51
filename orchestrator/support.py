"""Which networks can be pruned: tried, one after the other, each in a process of its own with a time limit."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pruners.candidates import n_removed

if TYPE_CHECKING:
    import torch
    from torch import nn

Shape = tuple[int, int, int]
Layers = tuple[tuple[str, float], ...]

RATIO = 0.25
LARGEST = 100_000_000
"""Parameters of the largest network that is tried."""

SECONDS = 90
"""Of one network."""

SIZES = (64, 128, 224)
"""Image sizes, the first that a network runs on is taken; then its usual one."""

_FAMILIES = """
    beit_base_patch16_224 halonet26t gernet_s cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_atto
    cpubone_nano crossvit_tiny_240 cs3darknet_focus_s cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121 dla46x_c
    dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvim_m1 efficientvit_b0
    efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050
    hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto inception_v3 inception_v4
    lcnetv2_small levit_128s lowformer_b0 mambaout_femto coatnet_nano_rw_224 poolformerv2_s12 gmlp_ti16_224
    mixer_s32_224 mobilenetv3_small_050 mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_gap nest_tiny nextvit_small
    nf_regnet_b0 pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d resnet10t
    resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224
    tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224
    vit_relpos_small_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception
    xcit_nano_12_p16_224
"""

FAMILIES = tuple(_FAMILIES.split())
"""A small classifier of each of timm's families (a source file of it is one)."""

PASSES, PARTLY, FAILS, UNFINISHED, NOT_TRIED = "passes", "partly", "fails", "unfinished", "not tried"


@dataclass(frozen=True)
class Finding:
    """What came of trying a network: its size in millions of parameters, how many prunable layers it has and of what
    kind, whether they can be pruned, and if not all of them why not.
    """

    network: str
    parameters: float | None = None
    layers: int | None = None
    heads: int | None = None
    result: str = NOT_TRIED
    remark: str = ""


def names_of(asked: Sequence[str]) -> list[str]:
    """The networks that `asked` stands for: `all`, or names, several in one separated by commas."""
    names = [name for one in asked for name in one.split(",") if name]
    return [name for one in names for name in (everything() if one == "all" else [one])]


def everything() -> list[str]:
    """Every classifier of torchvision, and a small one of each of timm's families."""
    from models.library import known_names

    return [f"torchvision/{name}" for name in known_names("torchvision")] + [f"timm/{name}" for name in FAMILIES]


COLUMNS = ("network", "parameters (M)", "prunable layers", "of them attention", "filter pruning", "remark")


def columns(finding: Finding) -> dict[str, Any]:
    """A line of the table; parameters in millions."""
    return dict(zip(COLUMNS, asdict(finding).values(), strict=True))


def page(found: Sequence[Finding]) -> str:
    """docs/support.md: what the table is, how often each result came, and the table."""
    from importlib.metadata import version

    from tabulate import tabulate

    counts = {
        result: sum(one.result == result for one in found) for result in (PASSES, PARTLY, FAILS, UNFINISHED, NOT_TRIED)
    }
    said = ", ".join(f"{n} {result}" for result, n in counts.items())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "torch-pruning"))
    rows = [[_cell(value) for value in columns(one).values()] for one in found]
    table = tabulate(rows, list(columns(found[0])), tablefmt="github", disable_numparse=True)
    return _PAGE.format(ratio=RATIO, largest=LARGEST // 10**6, counts=said, libraries=libraries) + table + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|")


_PAGE = """# What can be pruned

Written by `prunesweep doctor --models all -f markdown -o docs/support.md`: every classifier of torchvision, and a small
one of each of timm's families, up to {largest} million parameters.

Each network is built with random weights for ten classes, on small images where it takes them. Of every prunable layer
a fraction of {ratio} of the units is removed, all layers at once: output channels, widths, and whole heads of attention
blocks, and sets of channels where some can only go together. It *passes* where its saved weights load again, parameters
and multiply-adds fall, the pruned network computes what the network with these units silenced does (float64, relative
difference at most 1e-9), it can be trained by one step, and it computes the same once it is kept and loaded again.
Where that fails each layer is tried alone: *partly* are those of which some layers can be pruned, and the remark says
how many, and the first that cannot and why. *unfinished* are those that were still being tried, on one busy processor,
when their time was up.
Whether a network's own layers can be pruned together in another choice, `prunesweep plan SPEC --preflight` tells.

{counts} ({libraries}).

"""


def findings(names: Sequence[str], seconds: float = SECONDS) -> Iterator[Finding]:
    """The finding of each network, as they come: each from a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "timm"])
    for name in names:
        yield _tried_apart(context, name, seconds)


def _tried_apart(context: Any, name: str, seconds: float) -> Finding:
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_tell, args=(name, theirs))
    child.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return Finding(name, result=UNFINISHED, remark=f"not through within {seconds:.0f} s")
        return Finding(**json.loads(ours.recv_bytes()))
    except EOFError:
        child.join()
        return Finding(name, result=FAILS, remark=f"its process ended with {child.exitcode}")
    finally:
        child.kill()
        child.join()


def _tell(name: str, to: Any) -> None:
    to.send_bytes(json.dumps(asdict(tried(name))).encode())


def tried(name: str) -> Finding:
    """Build a network, prune all its prunable layers at once, and one by one where that fails."""
    import torch

    from models.registry import layer_units
    from orchestrator.preflight import check_forward
    from workers.rehearsal import check_saved

    torch.set_num_threads(1)
    try:
        millions = _parameters(name) / 1e6
        if millions * 1e6 > LARGEST:
            return Finding(name, round(millions, 1), remark=f"larger than {LARGEST // 10**6} million parameters")
        model, probe = _running(name)
        shape = tuple(probe.shape[1:])
        units = layer_units(name, CLASSES, shape)
    except ValueError as error:
        return Finding(name, result=FAILS, remark=_short(error))
    heads = sum(_is_attention(name) for name in units)
    about = {"parameters": round(millions, 1), "layers": len(units), "heads": heads}
    if not units:
        return Finding(name, **about, result=FAILS, remark="none of its layers can lose units")
    try:
        check_forward(model, probe, CLASSES)
        check_saved(model, name, CLASSES, shape, probe)
    except ValueError as error:
        return Finding(name, **about, result=FAILS, remark=_short(error))
    layers = tuple((layer, RATIO) for layer, n in units.items() if n_removed(n, RATIO))
    result, remark = _pruning(name, layers, model, probe)
    return Finding(name, **about, result=result, remark=remark)


def _parameters(name: str) -> int:
    import torch

    from models.registry import build_model

    problem = ValueError(f"{name} cannot be built")
    for device in ("meta", "cpu"):  # some look at their weights as they are built
        for shape in _shapes(name):
            try:
                with torch.device(device):
                    return sum(p.numel() for p in build_model(name, 1000, shape).parameters())
            except ValueError as error:
                problem = error
    raise problem


def _shapes(name: str) -> list[Shape]:
    """(channels, height, width) that a network may be for, its usual one last."""
    from models.library import is_library, usual_shape
    from models.registry import MODELS, USUAL_SHAPES

    if name in MODELS:
        return [MODELS[name].input or (3, 32, 32)]
    if not is_library(name):
        return list(USUAL_SHAPES)
    channels, height, width = usual_shape(name)
    return [*((channels, n, n) for n in SIZES if n < height), (channels, height, width)]


def _is_attention(layer: str) -> bool:
    return layer.rpartition(".")[2] in ("attn", "self_attention", "attention", "token_mixer")


def _pruning(name: str, layers: Layers, model: nn.Module, probe: torch.Tensor) -> tuple[str, str]:
    """(result, remark) of pruning every layer by RATIO: together, else each alone."""
    from orchestrator.preflight import graph_of, prune_together

    graph = graph_of(model, probe)
    try:
        sizes = prune_together(model, layers, probe, graph, name)
        return PASSES, f"without a check of its outputs: {sizes.reason}" if sizes.reason else ""
    except ValueError as error:
        together = _short(error)
    problems = {}
    for layer in layers:
        try:
            prune_together(model, (layer,), probe, graph)
        except ValueError as error:
            problems[layer[0]] = _short(error).removeprefix(f"{layer[0]}: ")
    rest = tuple(layer for layer in layers if layer[0] not in problems)
    if not problems:
        return PARTLY, f"each layer alone, but not all together: {together}"
    remark = f"{len(rest)} of {len(layers)} layers; {next(iter(problems))}: {next(iter(problems.values()))}"
    if not rest:
        return FAILS, remark
    try:
        prune_together(model, rest, probe, graph, name)
    except ValueError as error:
        remark = f"{remark}; the others not all together: {_short(error)}"
    return PARTLY, remark


CLASSES = 10


def _running(name: str) -> tuple[Any, Any]:
    """The network and two samples, on the smallest images that it runs on. Raises ValueError."""
    import torch

    from orchestrator.preflight import SAMPLES, built

    problem = ValueError("there is no image size to try")
    for shape in _shapes(name):
        try:
            torch.manual_seed(0)
            model = built(name, CLASSES, shape)
            probe = torch.randn(SAMPLES, *shape)
            with torch.no_grad():
                if model(probe).isfinite().all():
                    return model, probe
            problem = ValueError("its output on random inputs is not finite")
        except Exception as error:  # for other images
            problem = ValueError(f"{type(error).__name__}: {error}")
    raise problem


def _short(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
