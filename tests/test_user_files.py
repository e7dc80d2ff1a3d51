"""Files of a user: only regular ones are opened, hidden ones do not count, and every name can be printed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import socket
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile

import usercode
from models import multimodal
from orchestrator.errors import UserError
from orchestrator.imported import read_logs
from storage.errors import QueryError, StoreError
from storage.printable import printable
from storage.sql import quoted, run_query
from storage.store import Store
from storage.userfiles import NotRegular, open_regular
from tests.conversations import items_of, make_data
from workers import folders
from workers.conversations import read_json
from workers.datasets import DATASETS, Dataset, Split, dataset_content, find_dataset
from workers.folders import BadFolder
from workers.multimodal import find_llava, llava_content, load_llava
from workers.networks import load_network

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
LATIN1 = os.fsdecode("été.png".encode("latin-1"))


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own, nothing known of any folder, and an alarm for an open that blocks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders.look.cache_clear()
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    folders.look.cache_clear()


def _hangs(*_: Any) -> None:
    raise AssertionError("a file that is not regular was opened")


def ppm(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P6 4 4 255\n" + bytes([level]) * 48)


def made(root: Path, count: int = 3, classes: tuple[str, ...] = ("a", "b")) -> Path:
    for part in ("train", "test"):
        for label, name in enumerate(classes):
            for number in range(count):
                ppm(root / part / name / f"{number:03}.ppm", 100 * label + number % 100)
    return root


def found(root: Path) -> Dataset:
    folders.look.cache_clear()
    return find_dataset(f"imagefolder:{root}")


def content(root: Path) -> str | None:
    folders.look.cache_clear()
    return dataset_content(f"imagefolder:{root}")


def test_the_content_of_an_ordinary_folder_is_its_paths_and_bytes(tmp_path: Path) -> None:
    """The hash is part of each task's id: by its definition, on two looks."""
    root = made(tmp_path / "data")
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.ppm"))
    lines = [f"{path}\0{hashlib.sha256((root / path).read_bytes()).hexdigest()}\n" for path in paths]
    assert len(lines) == 12
    assert content(root) == content(root) == hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def test_verdicts_of_older_rules_are_not_used(tmp_path: Path) -> None:
    """A cache with the schema of an earlier version is as none."""
    root = made(tmp_path / "data")
    before = content(root)
    (cached,) = (tmp_path / "cache" / "prunesweep" / "folders").iterdir()
    table = pq.read_table(cached).select(["path", "bytes", "changed", "sha256", "width", "height", "damage"])
    wrong = table.set_column(3, "sha256", pa.array(["0" * 64] * len(table)))
    pq.write_table(wrong.set_column(0, "path", table["path"].cast(pa.string())), cached)
    assert content(root) == before


def test_hidden_files_and_folders_do_not_count(tmp_path: Path) -> None:
    """At every depth, damaged or not; the content is that of the visible files."""
    root = made(tmp_path / "data")
    before = content(root)
    for path in (".DS_Store/0.ppm", "train/.cache/0.ppm", "train/a/.ipynb_checkpoints/000-checkpoint.ppm"):
        ppm(root / path, 3)
    (root / "train" / "a" / "._000.ppm").write_bytes(b"Mac OS X")
    (root / "test" / "b" / ".hidden.jpg").symlink_to("/dev/zero")
    ppm(root / "test" / "b" / "deeper" / ".trash" / "1.ppm", 9)
    dataset = found(root)
    assert (dataset.train_size, dataset.test_size, dataset.classes, dataset.damaged) == (6, 6, 2, ())
    assert content(root) == before
    ppm(root / "test" / "b" / "deeper" / "1.ppm", 9)
    assert found(root).test_size == 7 and content(root) != before


def special(folder: Path, suffix: str = ".png") -> list[Path]:
    """A FIFO, a socket, links to one and to devices, a link to itself and to nothing, and a folder."""
    names = ("fifo", "socket", "link", "zero", "null", "self", "broken", "folder")
    paths = [folder / f"{name}{suffix}" for name in names]
    fifo, bound, link, zero, null, itself, broken, inner = paths
    os.mkfifo(fifo)
    here = Path.cwd()
    os.chdir(folder)  # the name of a socket is at most 107 bytes long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(bound.name)
    os.chdir(here)
    for one, target in ((link, fifo.name), (zero, "/dev/zero"), (null, "/dev/null"), (itself, itself.name)):
        one.symlink_to(target)
    broken.symlink_to("nowhere.png")
    inner.mkdir()
    return paths


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others with the name of an image are damaged, by name; a link to a regular file counts."""
    root = made(tmp_path / "data", 400)
    linked = root / "train" / "b" / "399.ppm"
    linked.rename(tmp_path / "elsewhere.ppm")
    linked.symlink_to(tmp_path / "elsewhere.ppm")
    before = found(root)
    assert before.train_size == 800 and before.damaged == ()
    unusable = special(root / "train" / "a")
    ppm(unusable[-1] / "0.ppm", 1)
    seen: list[Path] = []
    inspect = folders._inspect
    monkeypatch.setattr(folders, "_inspect", lambda path: (seen.append(path), inspect(path))[1])
    dataset = found(root)
    assert set(dataset.damaged) == set(map(str, unusable)) and dataset.train_size == 800 and seen == []
    train, _ = dataset.load(tmp_path)
    assert isinstance(train, Split) and len(train) == 800
    more = root / "train" / "a" / "more"
    more.mkdir()
    special(more)
    with pytest.raises(BadFolder, match=r"16 of the 816 .*broken\.png.* and 11 more \(the first: it is a folder, FIFO"):
        found(root)


def test_a_file_that_turns_into_a_fifo_is_not_opened(tmp_path: Path) -> None:
    """The worker opens files as the plan does."""
    root = made(tmp_path / "data")
    dataset = found(root)
    one = root / "train" / "a" / "000.ppm"
    one.unlink()
    os.mkfifo(one)
    with pytest.raises(ValueError, match=r"a/000\.ppm could be read before and cannot now: .*is a FIFO"):
        dataset.load(tmp_path)
    for path, kind in ((one, "a FIFO"), (Path("/dev/zero"), "a character device"), (tmp_path, "a folder")):
        with pytest.raises(NotRegular, match=f"{path} is {kind}; only a regular file"):
            open_regular(path)


@pytest.mark.parametrize("target", [".", "..", "../..", "/", "other"])
def test_loops_of_folder_links_end(target: str, tmp_path: Path) -> None:
    """The link is named. Links to other folders count."""
    root = made(tmp_path / "data")
    (tmp_path / "far").mkdir()
    ppm(tmp_path / "far" / "0.ppm", 7)
    (root / "train" / "a" / "far").symlink_to(tmp_path / "far")
    assert found(root).train_size == 7
    link = root / "train" / "a" / "link"
    if target == "other":
        (tmp_path / "far" / "back").symlink_to(root / "train" / "a")
        link = root / "train" / "a" / "far" / "back"
    else:
        link.symlink_to(target)
    with pytest.raises(BadFolder, match=rf"{link} is a link to a folder that holds it, .*Remove the link"):
        found(root)


def test_a_link_to_itself_in_the_place_of_a_folder_does_not_count(tmp_path: Path) -> None:
    """Neither as a class nor below one."""
    root = made(tmp_path / "data")
    for path in (root / "train" / "loop", root / "train" / "a" / "loop"):
        path.symlink_to(path.name)
    assert (found(root).classes, found(root).train_size) == (2, 6)


def bomb(side: int) -> bytes:
    """A small PNG of many black pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9460, 14_000])
def test_a_decompression_bomb_is_named_and_not_decoded(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just above the limit at which PIL warns, and above the one at which it raises."""
    root = made(tmp_path / "data", 100)
    one = root / "test" / "b" / "bomb.png"
    one.write_bytes(bomb(side))
    monkeypatch.setattr(ImageFile.ImageFile, "load", _unless_large(ImageFile.ImageFile.load))
    assert found(root).damaged == (str(one),)
    make_data(tmp_path / "talk")
    (tmp_path / "talk" / "images" / "B.png").write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match=r"item item1: the image .*B\.png is damaged: .*pixels"):
        load_llava(tmp_path / "talk")


def _unless_large(load: Any) -> Any:
    def checked(image: Any) -> Any:
        if image.width * image.height > folders.MOST_PIXELS:
            pytest.exit("a decompression bomb was decoded", 1)
        return load(image)

    return checked


def test_a_file_of_too_many_bytes_is_named_and_not_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte takes no time."""
    root = made(tmp_path / "data", 100)
    one = root / "train" / "a" / "huge.tif"
    with one.open("wb") as file:
        file.truncate(2**40)
    assert found(root).damaged == (str(one),)
    with pytest.raises(OSError, match="the maximum is 1073741824"):
        folders.picture(one)


def test_class_names_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    """train/ composed and test/ decomposed are one class, with one label."""
    root = made(tmp_path / "data", classes=("cafz", COMPOSED, "zoo"))
    (root / "test" / COMPOSED).rename(root / "test" / DECOMPOSED)
    assert COMPOSED != DECOMPOSED and len(list((root / "test").iterdir())) == 3
    dataset = found(root)
    assert (dataset.classes, dataset.train_size, dataset.test_size) == (3, 9, 9)
    train, test = dataset.load(tmp_path)
    assert isinstance(train, Split) and isinstance(test, Split)
    # By the level of its images, each class has the same number in both parts.
    labels = [
        {round(image.mean().item(), 4): label for image, label in zip(part.images, part.labels.tolist(), strict=True)}
        for part in (train, test)
    ]
    assert labels[0] == labels[1] and set(labels[0].values()) == {0, 1, 2}
    ppm(root / "train" / DECOMPOSED / "0.ppm", 3)
    with pytest.raises(
        BadFolder, match=r"train has two folders for one class: 'cafe\\u0301' and 'caf\\xe9' differ only"
    ):
        found(root)


def test_names_that_are_not_utf8_are_shown_escaped(tmp_path: Path) -> None:
    """Of images, classes and the folder itself: hashed, cached, loaded and printed."""
    root = made(tmp_path / LATIN1, 100, classes=("a", f"b{LATIN1}"))
    ppm(root / "train" / "a" / LATIN1, 77)
    first = content(root)
    assert found(root).train_size == 201 and content(root) == first != content(made(tmp_path / "plain", 100))
    train, _ = found(root).load(tmp_path)
    assert isinstance(train, Split) and len(train) == 201
    one = root / "test" / "a" / LATIN1
    one.write_bytes(b"no image")
    (name,) = found(root).damaged
    assert name == f"{tmp_path}/\\xe9t\\xe9.png/test/a/\\xe9t\\xe9.png" and name.encode()
    (root / "train" / LATIN1).mkdir()
    with pytest.raises(BadFolder, match=r"train/ has classes that test/ has not: \\xe9t\\xe9\.png"):
        found(root)
    assert printable("a\nb\x1b[0m\udce9é\ud800") == "a\\nb\\x1b[0m\\xe9é\\ud800"


def test_images_with_text_are_regular_files_with_any_name(tmp_path: Path) -> None:
    """A FIFO as an image, a list or a processor's file is named; hidden files do not count; a name may be bytes."""
    data = tmp_path / "data"
    make_data(data)
    first = llava_content(str(data))
    (data / "processor" / "._tokenizer.json").write_bytes(b"Mac OS X")
    (data / "processor" / ".cache.json").symlink_to("/dev/zero")
    assert llava_content(str(data)) == first
    items = items_of(3)
    items[1]["image"] = LATIN1
    (data / "images" / LATIN1).write_bytes((data / "images" / "A.png").read_bytes())
    (data / "train.json").write_text(json.dumps(items))
    assert len(load_llava(data)[0]) == 3 and llava_content(str(data)) != first
    (data / "images" / LATIN1).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"item item1: the image .*/\\xe9t\\xe9\.png is damaged"):
        load_llava(data)
    (data / "images" / LATIN1).unlink()
    os.mkfifo(data / "images" / LATIN1)
    with pytest.raises(ValueError, match=r"item item1: the image is not a regular file: .*\\xe9t\\xe9\.png"):
        llava_content(str(data))
    os.mkfifo(data / "processor" / "chat_template.jinja")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not a regular file"):
        find_llava(str(data))
    (data / "test.json").unlink()
    (data / "test.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"test\.json cannot be read: .* is a character device"):
        find_llava(str(data))


def test_a_fifo_in_the_place_of_a_built_in_data_set_is_missing(tmp_path: Path) -> None:
    """torchvision would wait for it."""
    name = DATASETS["cifar10"].files[1]
    (tmp_path / name).parent.mkdir()
    os.mkfifo(tmp_path / name)
    assert name in DATASETS["cifar10"].missing(tmp_path)


def test_a_small_picture_of_16_bits_marks_the_content(tmp_path: Path) -> None:
    """Results on clipped levels, from before levels were scaled, are not taken for those of today."""
    root = made(tmp_path / "data")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(root / "train" / "a" / "deep.png")
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.p[pn][mg]"))
    lines = [f"{path}\0{hashlib.sha256((root / path).read_bytes()).hexdigest()}" for path in paths]
    marked = "".join(f"{line}{' scaled' if 'deep.png' in line else ''}\n" for line in lines)
    assert content(root) == hashlib.sha256(marked.encode()).hexdigest()[:16]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_postscript_named_as_an_image_starts_no_program(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIL finds the format in the content, and would start Ghostscript for EPS."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.exit("a program was started", 1))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "/bin/true")
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match="one of the formats JPEG"):
        folders.picture(file)


def test_code_and_kept_networks_are_regular_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO in a package of the user, or in place of a kept network, is named and blocks nothing."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    os.mkfifo(package / "pipe.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"mine:build: its code cannot be read: .*pipe\.py is a FIFO"):
        usercode.fingerprint("mine:build")
    with pytest.raises(ValueError, match="is a FIFO"):
        load_network(package / "pipe.py")


@pytest.mark.parametrize("content", ["[" * 10**5, '{"weight_map": {"a": ["x"]}}', "9" * 5000, ""])
def test_json_of_any_depth_and_size_is_a_message(content: str, tmp_path: Path) -> None:
    """Deeper than Python follows, with numbers longer than it reads."""
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is no"):
        multimodal._check_files(tmp_path)
    if "weight" not in content:
        with pytest.raises(ValueError, match=r"index\.json is no JSON"):
            read_json(file)


def test_logs_are_regular_files(tmp_path: Path) -> None:
    """Neither a FIFO nor a device without an end is read."""
    os.mkfifo(tmp_path / "a.log")
    for path, said in ((tmp_path / "a.log", "is a FIFO"), (Path("/dev/zero"), "is a character device")):
        with pytest.raises(UserError, match=said):
            read_logs([path])


def test_text_that_is_not_utf8_is_refused_by_sql(tmp_path: Path) -> None:
    """In a query, a value and a name, as arguments of a shell can have it."""
    store = Store(tmp_path)
    store.commit("rows/a.parquet", b"")
    for sql, values in (("select '\udcff'", {}), ("select $a", {"a": "\udcff"})):
        with pytest.raises(QueryError, match="not text in UTF-8"):
            run_query(store, sql, parameters=values)
    with pytest.raises(QueryError, match="not text in UTF-8"):
        quoted("\udcff")
    with pytest.raises(StoreError, match="UTF-8"):
        Store(tmp_path / "\udcff")


@pytest.mark.parametrize("name", ["imagefolder:", "llava:"])
def test_a_name_that_no_file_can_have_is_a_folder_that_is_missing(name: str, tmp_path: Path) -> None:
    """The system refuses to look at a name of more than 255 bytes."""
    with pytest.raises(ValueError, match=r"(cannot be read|has no)"):
        find_dataset(f"{name}{'x' * 5000}", str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        multimodal.parsed("x" * 5000)
