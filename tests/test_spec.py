"""A spec is checked key by key: a mistake is told with its place, what is allowed and the nearest name."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import expand
from orchestrator.documents import Document
from orchestrator.errors import UserError
from orchestrator.spec import DenseTraining, Grid, Resources, Retraining, SweepSpec, load_spec
from tests import specs

GOOD = """\
# what this is for
name: good
grid:
  model: lenet5_mini
  dataset: digits
  layers: [conv1, conv2]  # two grid points
  ratio: [0.2, 0.4]
  pruner: oracle
  seed: 0
candidates: {mode: all}
dense: {epochs: 1, batch_size: 64, lr: 0.1}
retrain: {epochs: 1, batch_size: 64, lr: {0: 0.1, 2: 0.01}, weight_decay: 1e-4}
"""


def checked(text: str, *overrides: str) -> None:
    """What `plan` does with a spec before it looks at the store."""
    document = Document("good.yaml", text)
    for assignment in overrides:
        document.override(assignment)
    spec = load_spec(document)
    for _ in expand.cells(spec, document):
        pass
    expand.check_data_fits(spec, document)


def message(text: str, *overrides: str) -> str:
    """What a person is told of a bad spec."""
    with pytest.raises(UserError) as error:
        checked(text, *overrides)
    return str(error.value)


def with_line(line: str) -> str:
    """GOOD with this line in place of the one of the same key, or else added to its mapping."""
    key = line.replace("»", "").split(":")[0]
    lines: list[str] = list(GOOD.splitlines())
    at = next((i for i, other in enumerate(lines) if other.startswith(f"{key}:")), None)
    if at is None:
        lines.insert(lines.index("grid:") + 1 if key.startswith(" ") else len(lines), line)
    else:
        lines[at] = line
    return "\n".join(lines) + "\n"


# A line put into GOOD, where » marks the place a person is sent to; the key; what else they are told.
BAD = [
    ("  »model: lenet5_mni", "grid.model", "'lenet5_mni'; allowed: lenet5, ; mean lenet5_mini?"),
    ("  model: [lenet5, »lenet6_mini]", "grid.model.1", "'lenet6_mini'; mean lenet5_mini?"),
    ("  »model: 3", "grid.model", "valid string, not 3"),
    ("  »model: null", "grid.model", "valid string, not None"),
    ("  »model: []", "grid.model", "this list is empty; at least one"),
    ("  »dataset: mnst", "grid.dataset", "'mnst'; allowed: digits, mnist; mean mnist?"),
    ("  »dataset: {digits: 1}", "grid.dataset", "valid string"),
    ("  »pruner: orcale", "grid.pruner", "allowed: oracle, random, l1, ; mean oracle?"),
    ("  »precision: fp23", "grid.precision", "allowed: fp32, bf16, fp16; mean fp32?"),
    ("  »precision: 16", "grid.precision", "valid string, not 16"),
    ("  »propagation: exakt", "grid.propagation", "'exakt'; allowed: exact, released; mean exact?"),
    ("  »granularity: channel", "grid.granularity", "allowed: filter"),
    ("  »modle: lenet5", "grid.modle", "unknown key; allowed: model, dataset, layers; mean model?"),
    ("»grids: {}", "grids", "unknown key; allowed: name, grid, candidates; mean grid?"),
    ("  »layers: conv9", "grid.layers", "'conv9' matches no layer of lenet5_mini; conv1, conv2, conv3, fc1; mean conv"),
    ("  layers: [conv1, conv1, »conv9]", "grid.layers.2", "'conv9' matches no layer"),
    ("  layers: [conv1, »[conv2, 'layer*']]", "grid.layers.1", "'layer*' matches no layer of lenet5_mini"),
    ("  »layers: fc2", "grid.layers", "'fc2' matches no layer"),
    ("  »layers: 3", "grid.layers", "3 names no layers; a name or pattern, a list of them, {pattern: ratio}"),
    ("  »layers: true", "grid.layers", "True names no layers"),
    ("  »layers: null", "grid.layers", "None names no layers"),
    ("  »layers: {}", "grid.layers", "{} names no layers"),
    ("  »layers: {3: 0.2}", "grid.layers", "names no layers"),
    ("  »layers: []", "grid.layers", "this list is empty"),
    ("  layers: [conv1, »3]", "grid.layers.1", "3 names no layers"),
    ("  layers: [conv1, »null]", "grid.layers.1", "None names no layers"),
    ("  layers: [»[]]", "grid.layers.0", "[] names no layers"),
    ("  layers: [»[[conv1]]]", "grid.layers.0", "[['conv1']] names no layers"),
    ("  layers: [»[conv1, 2]]", "grid.layers.0", "['conv1', 2] names no layers"),
    ("  layers: [conv1, »{conv2: many}]", "grid.layers.1", "'many' is not a number"),
    ("  layers: [conv1, »{conv2: true}]", "grid.layers.1", "True is not a number"),
    ("  layers: [conv1, »{conv2: 1.5}]", "grid.layers.1", "1.5 is not a pruning ratio"),
    (
        "  layers: [conv1, »{conv2: 0.01}]",
        "grid.layers.1",
        "ratio 0.01 removes nothing of the 10 units of conv2; use a ratio of at least 0.1",
    ),
    (
        "  layers: [conv1, »{conv1: 0.5, conv2: 0.01, conv3: 0.02}]",
        "grid.layers.1",
        "ratio 0.01 or 0.02 removes nothing of the units of 2 layers of lenet5_mini (conv2 has 10, conv3 has 10); "
        "use a ratio of at least 0.1, or set skip_small_layers: true",
    ),
    ("  layers: [conv1, »{conv2: 0.2, 'conv*': 0.4}]", "grid.layers.1", "conv2; is given two ratios, 0.2 and 0.4"),
    ("  »ratio: 0", "grid.ratio", "0.0 is not a pruning ratio; more than 0 and less than 1"),
    ("  »ratio: 1", "grid.ratio", "1.0 is not a pruning ratio"),
    ("  ratio: [0.2, »-0.5]", "grid.ratio.1", "-0.5 is not a pruning ratio"),
    ("  »ratio: .nan", "grid.ratio", "nan is not a pruning ratio"),
    ("  »ratio: 0.05", "grid.ratio", "ratio 0.05 removes nothing of the 10 units of conv1 of lenet5_mini"),
    ("  ratio: [0.2, 0.2, »0.05]", "grid.ratio.2", "ratio 0.05 removes nothing"),
    ("  »ratio: 0.9999999999", "grid.ratio", "removes everything of the 10 units of conv1"),
    ("  »ratio: true", "grid.ratio", "valid number, not True"),
    ("  »ratio: '0.5'", "grid.ratio", "valid number, not '0.5'"),
    ("  ratio: [0.2, »[0.3]]", "grid.ratio.1", "valid number, not [0.3]"),
    ("  »ratio: []", "grid.ratio", "this list is empty"),
    ("  »seed: -1", "grid.seed", "greater than or equal to 0, not -1"),
    ("  »seed: true", "grid.seed", "valid integer, not True"),
    ("  seed: [0, »1.5]", "grid.seed.1", "valid integer, not 1.5"),
    ("  »seed: 9223372036854775808", "grid.seed", "less than or equal to 9223372036854775807"),
    ("»name: 3", "name", "valid string, not 3"),
    ("»name: 2024-01-31", "name", "valid string"),
    ("»name: a b", "name", "'a b' is no sweep name; letters, digits"),
    ("»name: ../elsewhere", "name", "'../elsewhere' is no sweep name"),
    ("»candidates: all", "candidates", "a mapping of keys to values, not 'all'"),
    ("candidates: {»mode: every}", "candidates.mode", "'every'; allowed: all, sample"),
    ("»candidates: {mode: sample}", "candidates", "mode sample needs a count"),
    ("candidates: {mode: all, »count: 3}", "candidates.count", "leave it out; mode: sample"),
    ("candidates: {mode: sample, »count: 46}", "candidates.count", "46 samples; conv1 0.2 oracle has 45 candidates"),
    ("candidates: {mode: sample, »count: 0}", "candidates.count", "greater than or equal to 1, not 0"),
    ("candidates: {mode: sample, »count: true}", "candidates.count", "valid integer, not True"),
    ("candidates: {mode: sample, count: 3, »seed: -1}", "candidates.seed", "greater than or equal to 0"),
    ("»dense: 3", "dense", "a mapping of keys to values, not 3"),
    ("»dense: []", "dense", "this list is empty"),
    ("»dense: {epochs: 0, batch_size: 64, lr: 0.1}", "dense", "0 epochs need weights"),
    ("dense: {»epochs: -1, batch_size: 64, lr: 0.1}", "dense.epochs", "greater than or equal to 0, not -1"),
    ("»dense: {weights: library, lr: 0.1}", "dense", "lr say how to train: give epochs as well"),
    ("dense: {epochs: 2, batch_size: 64, lr: 0.1, »optimiser: adam}", "dense.optimiser", "mean optimizer?"),
    ("»dense: {epochs: 2, batch_size: 64, lr: {0: 0.1, 1: 0.01}, lr_schedule: cosine}", "dense", "starts from one lr"),
    ("»dense: {epochs: 2, batch_size: 64, lr: 0.1, final_lr: 0.01}", "dense", "is where lr_schedule cosine"),
    ("»dense: {epochs: 2, batch_size: 64, lr: 0.1, lr_schedule: linear, final_lr: 0.1}", "dense", "not below lr 0.1"),
    ("»dense: {epochs: 2, batch_size: 64, lr: 0.1, warmup_epochs: 2}", "dense", "leave nothing of 2 epochs"),
    ("»dense: {epochs: 2, batch_size: 64, lr: 0.1, optimizer: adamw, momentum: 0.9}", "dense", "adamw has betas"),
    ("»dense: {epochs: 2, batch_size: 64, lr: 0.1, betas: [0.9, 0.99]}", "dense", "sgd has a momentum"),
    ("»dense: {epochs: 2, batch_size: 64, lr: 0.1, accumulate: 65}", "dense", "more than batch_size 64"),
    ("dense: {epochs: 2, batch_size: 64, lr: 0.1, »ema: 1}", "dense.ema", "less than 1"),
    ("dense: {»epochs: true, batch_size: 64, lr: 0.1}", "dense.epochs", "valid integer, not True"),
    ("dense: {»epochs: 1.0, batch_size: 64, lr: 0.1}", "dense.epochs", "valid integer, not 1.0"),
    ("dense: {epochs: 1, »batch_size: 0, lr: 0.1}", "dense.batch_size", "greater than or equal to 1, not 0"),
    ("dense: {epochs: 1, batch_size: 64, »lr: -0.1}", "dense.lr", "-0.1 is no learning rate; more than 0"),
    ("dense: {epochs: 1, batch_size: 64, »lr: true}", "dense.lr", "True is not a number"),
    ("dense: {epochs: 1, batch_size: 64, »lr: &same true}", "dense.lr", "True is not a number"),
    ("dense: {epochs: 1, batch_size: 64, »lr: {}}", "dense.lr", "must start at 0"),
    ("dense: {epochs: 1, batch_size: 64, »lr: {1: 0.1}}", "dense.lr", "must start at 0: {0: first rate"),
    ("dense: {epochs: 1, batch_size: 64, »lr: {0: 0.1, 3: -1}}", "dense.lr", "-1.0 is no learning rate"),
    ("dense: {epochs: 1, batch_size: 64, »lr: {0: .inf}}", "dense.lr", "inf is no learning rate"),
    ("dense: {epochs: 1, batch_size: 64, »lr: {-1: 0.1, 0: 1}}", "dense.lr", "-1 is no number of epochs already done"),
    ("dense: {epochs: 1, batch_size: 64, »lr: {false: 0.1}}", "dense.lr", "False is no number of epochs"),
    ("dense: {epochs: 1, batch_size: 64, lr: 0.1, »momentum: false}", "dense.momentum", "valid number, not False"),
    ("dense: {epochs: 1, batch_size: 64, lr: 0.1, »momentum: 1}", "dense.momentum", "less than 1, not 1"),
    ("dense: {epochs: 1, batch_size: 64, lr: 0.1, »weight_decay: true}", "dense.weight_decay", "number, not True"),
    ("dense: {epochs: 1, batch_size: 64, lr: 0.1, »optimizer: sgdm}", "dense.optimizer", "allowed: sgd; mean sgd?"),
    ("»dense: {epochs: 1, batch_size: 64, lr: 0.1, nesterov: true}", "dense", "nesterov needs a momentum"),
    ("dense: {epochs: 1, batch_size: 64, lr: 0.1, »epoch: 3}", "dense.epoch", "unknown key; mean epochs?"),
    ("retrain: {epochs: 1, batch_size: 64, lr: 0.1, »keep: all}", "retrain.keep", "allowed: none, last, best"),
    (
        "retrain: [{epochs: 1, batch_size: 64, lr: 0.1}, {»epochs: 0, batch_size: 64, lr: 0.1}]",
        "retrain.1.epochs",
        "greater than or equal to 1",
    ),
    ("»validation: 1", "validation", "less than 1, not 1"),
    ("»skip_small_layers: [1]", "skip_small_layers", "valid boolean, not [1]"),
    ("»validation: true", "validation", "valid number, not True"),
    ("»loss_subset: 1438", "loss_subset", "1438 of 1437 train samples of digits"),
    ("»resources: null", "resources", "a mapping of keys to values, not None"),
    ("resources: {»workers: 0}", "resources.workers", "greater than or equal to 1, not 0"),
    ("resources: {»workers: true}", "resources.workers", "valid integer, not True"),
    ("resources: {»cpus: .inf}", "resources.cpus", "finite number, not inf"),
    ("resources: {»candidates_per_shard: true}", "resources.candidates_per_shard", "valid integer, not True"),
    ("»3: 4", "3", "Keys should be strings, not 3"),
]


@pytest.mark.parametrize(("line", "key", "told"), BAD, ids=[line.replace("»", "").strip() for line, *_ in BAD])
def test_a_mistake_is_told_with_its_place(line: str, key: str, told: str) -> None:
    """Each message has file:line:column, the key, and what is allowed or meant, and there is but one."""
    text = with_line(line)
    row = next(i for i, found in enumerate(text.splitlines(), 1) if "»" in found)
    column = line.index("»") + 1
    found = message(text.replace("»", ""))
    assert found.startswith(f"good.yaml:{row}:{column}: {key}: ")
    assert len(found.splitlines()) == 1
    for fragment in told.split("; "):
        assert fragment in found


def test_the_spec_the_mistakes_are_put_into_is_good() -> None:
    """The table above shows something only because the spec around each mistake is right."""
    checked(GOOD)


def test_every_mistake_is_told_at_once() -> None:
    """A person with four mistakes gets four lines, each with its place."""
    text = GOOD.replace("lenet5_mini", "lenet").replace("seed: 0", "seed: -1").replace("epochs: 1", "epochs: 0")
    lines = message(text).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["good.yaml:4:3", "grid.model"],
        ["good.yaml:9:3", "grid.seed"],
        ["good.yaml:11:1", "dense"],
        ["good.yaml:12:11", "retrain.epochs"],
    ]


@pytest.mark.parametrize("key", ["model", "dataset", "layers"])
def test_a_missing_axis_is_told(key: str) -> None:
    """A key that must be there is named, at the mapping it belongs in."""
    text = "\n".join(line for line in GOOD.splitlines() if not line.startswith(f"  {key}:"))
    assert message(text) == f"good.yaml:3:1: grid.{key}: this key is missing"


def test_ratio_and_layers_with_ratios() -> None:
    """Every layer has exactly one source of its ratio: grid.ratio, or the entry itself."""
    own = GOOD.replace("[conv1, conv2]", "[{conv1: 0.2}]")
    assert message(own).startswith("good.yaml:7:3: grid.ratio: leave it out")
    neither = GOOD.replace("  ratio: [0.2, 0.4]\n", "")
    assert message(neither).startswith("good.yaml:6:3: grid.layers: needs grid.ratio")
    checked(own.replace("  ratio: [0.2, 0.4]\n", ""))
    checked(GOOD.replace("[conv1, conv2]", "[{conv1: 0.2}, conv2]"))


def test_all_above_a_million_is_refused() -> None:
    """Mode all is for spaces that can be walked; the message says what to do beyond."""
    text = GOOD.replace("[conv1, conv2]", "'conv*'").replace("[0.2, 0.4]", "0.5")
    found = message(text)
    assert found.startswith("good.yaml:10:1: candidates: lenet5_mini digits conv1+conv2+conv3 0.5 oracle")
    assert "1.6e+07 candidates, more than 1,000,000: use {mode: sample, count: N}" in found
    checked(text.replace("{mode: all}", "{mode: sample, count: 3}"))


@pytest.mark.parametrize(
    ("text", "place", "told"),
    [
        ("name: [a\n", "2:1", "not valid YAML"),
        ("name:\n\tx: 3\n", "2:1", "'\\t'"),
        ("name: *x\n", "1:7", "undefined alias"),
        (GOOD + "name: again\n", "13:1", 'duplicate key "name"'),
        (GOOD.replace("epochs: 1,", "epochs: 1, epochs: 2,", 1), "11:20", 'duplicate key "epochs"'),
        (GOOD + "---\na: 1\n", "13:1", "another document"),
        ("", "1:1", "a spec is a mapping"),
        ("just words\n", "1:1", "a spec is a mapping"),
        ("- name: a list\n", "1:1", "a spec is a mapping"),
    ],
)
def test_what_is_no_yaml_mapping_is_told_with_its_place(text: str, place: str, told: str) -> None:
    """Broken YAML, a key given twice and a document of another kind are one message with a place."""
    found = message(text)
    assert found.startswith(f"good.yaml:{place}: ")
    assert told in found


@pytest.mark.parametrize("text", ["name: \0\n", "name: 2024-99-99\n", "name: !!int many\n", "name: !!float x\n"])
def test_what_the_yaml_library_rejects_without_a_place_has_one(text: str) -> None:
    """A character or a scalar that is not allowed stands in a line."""
    assert message(text).startswith("good.yaml:1:7: not valid YAML: ")


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: *a{i - 1}, y{i}: *a{i - 1}}}\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "place", "told"),
    [
        ("#\n" * 500_001, "500001:1", "larger than 1 MB"),
        ("name: " + "é" * 500_000, "1:500004", "larger than 1 MB"),
        ("a:\n" + "[" * 51, "2:50", "more than 50 deep"),
        ("[" * 10**6, "1:51", "more than 50 deep"),
        ("- " * 60, "1:101", "more than 50 deep"),
        ("a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 15 + "*a", "2:19", "more than 50 deep"),
        (LAUGHS, "6:25", "more than 100000"),
        (MERGES, "15:16", "more than 100000"),
        ("a: &a\n  <<: *a\n", "2:7", "contains it"),
        ("a: &a [*a]", "1:8", "contains it"),
        ("a: &a {b: &b {<<: [*a]}}", "1:20", "contains it"),
        ("a: 1\n<<: 3\n", "2:5", "expected a mapping"),
        ("<<: [1, 2]", "1:6", "expected a mapping"),
        ("grid: " + "1" * 5000, "1:7", "4300 digits"),
        ("grid: 0x" + "f" * 5000, "1:7", "128 bits"),
        ("grid: " + str(2**128), "1:7", "128 bits"),
        ("name: !!binary aGk=", "1:7", "tag"),
        ("name: !!python/object:os.system x", "1:7", "tag"),
        ("a: !!omap [b: 1]", "1:4", "tag"),
        ("name: a\n\x1b", "2:1", "special characters"),
        ("name: \udce9", "1:7", "special characters"),
    ],
)
def test_limits_of_a_spec(text: str, place: str, told: str) -> None:
    """Size, depth, nodes and kinds of values are checked before anything is built: each within a second or so."""
    began = time.monotonic()
    found = message(text)
    assert time.monotonic() - began < 15
    assert found.startswith(f"good.yaml:{place}: ")
    assert told in found and len(found) < 300


def test_nodes_without_aliases_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the document and of every --set together."""
    monkeypatch.setattr("orchestrator.documents.MAX_NODES", 100)
    assert "good.yaml:1:199: too large" in message("a: [" + "1," * 100 + "]")
    assert "more than 100 keys and values" in message(GOOD, "grid.seed=[" + "1," * 70 + "]")


def test_a_spec_within_its_limits_is_read() -> None:
    """50 levels, aliases and merge keys of mappings, a mark of byte order."""
    text = "a: &a " + "[" * 24 + "]" * 24 + "\nb: " + "[" * 25 + "*a" + "]" * 25 + "\nc: &c {x: 1}\nd: {<<: *c}\n"
    found = Document("d", "\ufeff" + text).plain()
    assert found["d"] == {"x": 1} and set(found) == set("abcd")


@pytest.mark.parametrize("length", [215, 216, 300])
def test_the_length_of_a_sweeps_name(length: int) -> None:
    """A name that would be too long for a file is refused where it is read."""
    text = GOOD.replace("name: good", f"name: {'n' * length}")
    if length <= 215:
        checked(text)
    else:
        assert "215 characters at most" in message(text)


def test_many_mistakes_are_a_short_message() -> None:
    """Neither their number nor the length of a value makes it long; many equal points are read in time."""
    text = GOOD + "".join(f"k{i}: 1\n" for i in range(500))
    assert message(text).count("\n") == 50 and "and 450 more mistakes" in message(text)
    assert len(message(GOOD.replace("name: good", f"name: {'ä' * 10**5}"))) < 5000
    began = time.monotonic()
    message(GOOD.replace("seed: 0", "seed: [" + "0," * 5_000 + "x]"))
    assert time.monotonic() - began < 15


AXES: list[tuple[str, Any]] = [
    ("model", "lenet5_mini"),
    ("dataset", "synthetic"),
    ("layers", "conv1"),
    ("ratio", 0.2),
    ("pruner", "oracle"),
    ("pruner_seed", 3),
    ("granularity", "filter"),
    ("propagation", "released"),
    ("precision", "bf16"),
    ("seed", 3),
]


@pytest.mark.parametrize(("axis", "value"), AXES)
def test_every_axis_takes_a_scalar_or_a_list(axis: str, value: Any) -> None:
    """A scalar is the list of that one value: the same tasks, with the same ids."""
    candidates = {"mode": "sample", "count": 3}
    listed = specs.ids(specs.document({axis: [value]}, candidates=candidates))
    assert len(listed) == 3
    assert specs.ids(specs.document({axis: value}, candidates=candidates)) == listed


def test_layers_with_ratios_and_recipes_take_a_scalar_or_a_list() -> None:
    """So do {pattern: ratio}, dense, retrain, and a learning rate that never changes."""
    grid = {"layers": {"conv1": 0.2}, "ratio": None}
    one = specs.document(grid)
    several = specs.document(grid | {"layers": [grid["layers"]]}, dense=[specs.TRAINING], retrain=[specs.TRAINING])
    several.override("retrain.0.lr={0: 0.1}")
    assert specs.ids(one) == specs.ids(several)


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("name=other", ("name",), "other"),
        ("grid.ratio=0.5", ("grid", "ratio"), 0.5),
        ("grid.ratio=[0.5, 0.6]", ("grid", "ratio"), [0.5, 0.6]),
        ("grid.ratio.1=0.6", ("grid", "ratio", 1), 0.6),
        ("grid.layers.0={conv3: 0.3}", ("grid", "layers", 0), {"conv3": 0.3}),
        ("retrain.lr.2=1e-5", ("retrain", "lr", 2), 1e-5),
        ("retrain.lr.5=0.5", ("retrain", "lr", 5), 0.5),
        ("resources.candidates_per_shard=3", ("resources", "candidates_per_shard"), 3),
        ("dense.nesterov=true", ("dense", "nesterov"), True),
        ("name=a=b", ("name",), "a=b"),
        ("loss_subset=", ("loss_subset",), None),
    ],
)
def test_set_changes_one_place(assignment: str, path: tuple[str | int, ...], value: object) -> None:
    """--set takes any YAML value, list indices, and keys whose mapping is not there yet."""
    document = Document("good.yaml", GOOD)
    before = document.plain()
    document.override(assignment)
    after = found = document.plain()
    for key in path:
        found = found[key]
    assert found == value
    assert type(found) is type(value)
    assert {k: v for k, v in after.items() if k != path[0]} == {k: v for k, v in before.items() if k != path[0]}


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("grid.ratio", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("grid.ratio=[0.2", "the value is not valid YAML"),
        ("name=2024-99-99", "the value is not valid YAML"),
        ("name.x=3", "name has no keys"),
        ("grid.layers.2=conv3", "grid.layers is a list; use its index"),
        ("grid.layers.first=conv3", "grid.layers is a list; use its index"),
        ("grid.layers.9.x=conv3", "there is no 9"),
        ("grid.model.x.y=3", "there is no x"),
        ("grid.²=3", "grid.²: unknown key"),
        ("grid..ratio=3", "unknown key"),
        ("grid.ratio=2", "grid.ratio: 2.0 is not a pruning ratio"),
        ("grid.ratio.1=0.05", "grid.ratio.1: ratio 0.05 removes nothing"),
        ("grid.modle=3", "grid.modle: unknown key; allowed: model"),
        ("resource.workers=3", "resource: unknown key; allowed: name"),
        ("candidates.mode=sample", "needs a count"),
        ("candidates.count=3", "candidates.count: leave it out"),
        ("0=3", "Keys should be strings"),
        ("grid=3", "grid: this is a mapping of keys to values, not 3"),
    ],
)
def test_a_mistake_in_set_is_told_as_one(assignment: str, told: str) -> None:
    """A bad override is named as it was typed, not as a place in a file that is right."""
    found = message(GOOD, assignment)
    # A mapping of the file that an override broke stands in the file.
    assert found.startswith(f"--set {assignment}: " if assignment != "candidates.mode=sample" else "good.yaml:10:1: ")
    assert told in found


def test_comments_survive() -> None:
    """The spec that a store keeps is the one the person wrote, with the overrides in it."""
    document = Document("good.yaml", GOOD)
    document.override("grid.ratio.1=0.6")
    document.override("resources.workers=2")
    text = document.text()
    assert "# what this is for" in text
    assert "# two grid points" in text
    assert Document("again.yaml", text).plain() == document.plain()
    changed = set(text.splitlines()) - set(GOOD.splitlines())
    assert {re.sub(r"\s", "", line) for line in changed} == {"ratio:[0.2,0.6]", "resources:", "workers:2"}


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "1E-4", "1.e-4", "0.0001", ".0001", "1e-04"])
def test_small_numbers_are_numbers(written: str) -> None:
    """1e-4 is a float here, not the text that YAML 1.1 makes of it, however it is written."""
    document = Document("good.yaml", GOOD.replace("weight_decay: 1e-4", f"weight_decay: {written}"))
    assert document.plain()["retrain"]["weight_decay"] == 1e-4
    assert load_spec(document).retrain[0].weight_decay == 1e-4
    assert specs.ids(document) == specs.ids(Document("good.yaml", GOOD))


def test_json_is_yaml() -> None:
    """A spec written by a program as JSON is the same spec."""
    plain = Document("good.yaml", GOOD).plain() | {"retrain": {"epochs": 1, "batch_size": 64, "lr": 0.1}}
    assert Document("good.json", json.dumps(plain)).plain() == plain


def test_every_key_is_documented() -> None:
    """docs/spec.md names each key of a spec, and no other in its first column."""
    page = Path("docs/spec.md").read_text(encoding="utf-8").partition("## Networks")[0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for cell in rows for name in re.findall(r"`(\w+)`", cell)}
    models = (SweepSpec, Grid, DenseTraining, Retraining, Resources)
    keys = {key for model in models for key in model.model_fields}
    assert named == keys - {"grid"}
