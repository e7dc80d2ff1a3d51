"""Levels of images: the same picture with 8, 12 or 16 bits, or as floats, has the same pixels, or is refused."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conversations import make_data
from workers import folders
from workers.datasets import Samples, Split, find_dataset
from workers.folders import BadFolder, picture
from workers.multimodal import load_llava

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
DEEP = GREY.astype(np.uint16) * 257
COLOURS = np.stack([GREY, GREY.T, GREY[::-1]], -1)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own, and nothing known of any folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders.look.cache_clear()
    yield
    folders.look.cache_clear()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(picture(path))


def png(samples: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16-bit samples, [H, W] or [H, W, channels]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(data: bytes, bits: int, kind: int = 1, white: int = 1, order: str = "<", side: int = 16) -> bytes:
    """An uncompressed TIFF of one channel; `kind` is SampleFormat, `white` PhotometricInterpretation."""
    tags = {256: side, 257: side, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: side, 279: len(data), 339: kind}
    entries = [
        struct.pack(f"{order}HHI", tag, 4 if tag in (273, 279) else 3, 1)
        + (struct.pack(f"{order}I", value) if tag in (273, 279) else struct.pack(f"{order}HH", value, 0))
        for tag, value in tags.items()
    ]
    start = struct.pack(f"{order}HI", 42, 8 + len(data))
    directory = struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)
    return (b"II" if order == "<" else b"MM") + start + data + directory


def packed12(levels: np.ndarray) -> bytes:
    """12-bit levels, two in three bytes."""
    one, other = levels.ravel()[::2].astype(int), levels.ravel()[1::2].astype(int)
    return np.stack([one >> 4, (one & 15) << 4 | other >> 8, other & 255], -1).astype(np.uint8).tobytes()


WIDE: dict[str, tuple[str, bytes]] = {
    "png16": ("x.png", png(DEEP, 0)),
    "png16-alpha": ("x.png", png(np.stack([DEEP, DEEP.T], -1), 4)),
    "tiff16": ("x.tif", tiff(DEEP.astype("<u2").tobytes(), 16)),
    "tiff16-big-endian": ("x.tiff", tiff(DEEP.astype(">u2").tobytes(), 16, order=">")),
    "tiff16-white-is-zero": ("x.tif", tiff((65535 - DEEP).astype("<u2").tobytes(), 16, white=0)),
    "tiff12": ("x.tif", tiff(packed12(np.rint(GREY * (4095 / 255))), 12)),
    "tiff-float": ("x.tif", tiff((GREY / np.float32(255)).astype("<f4").tobytes(), 32, kind=3)),
    "tiff-float-white-is-zero": ("x.tif", tiff((1 - GREY / np.float32(255)).astype("<f4").tobytes(), 32, 3, white=0)),
    "pgm16": ("x.pgm", b"P5 16 16 65535\n" + DEEP.astype(">u2").tobytes()),
    "pgm10": ("x.pgm", b"P5 16 16 1020\n" + (GREY.astype(np.uint16) * 4).astype(">u2").tobytes()),
    "pgm-text": ("x.pgm", b"P2 16 16 65535\n" + " ".join(map(str, DEEP.ravel())).encode()),
    "tiff8-white-is-zero": ("x.tif", tiff((255 - GREY).tobytes(), 8, white=0)),
}


@pytest.mark.parametrize("kind", WIDE)
def test_grey_levels_of_any_depth_are_those_of_8_bits(kind: str, tmp_path: Path) -> None:
    """Black, white and all levels between, in three equal channels."""
    name, content = WIDE[kind]
    (tmp_path / name).write_bytes(content)
    assert np.array_equal(pixels(tmp_path / name), np.stack([GREY] * 3, -1))


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.png", png(COLOURS.astype(np.uint16) * 257, 2)),
        ("x.png", png(np.concatenate([COLOURS, GREY[..., None]], -1).astype(np.uint16) * 257, 6)),
        ("x.ppm", b"P6 16 16 65535\n" + (COLOURS.astype(np.uint16) * 257).astype(">u2").tobytes()),
        ("x.ppm", b"P6 16 16 255\n" + COLOURS.tobytes()),
    ],
    ids=["rgb16", "rgba16", "ppm16", "ppm8"],
)
def test_colours_of_16_bits_are_those_of_8_bits(name: str, content: bytes, tmp_path: Path) -> None:
    """Channel by channel, without alpha."""
    (tmp_path / name).write_bytes(content)
    assert np.array_equal(pixels(tmp_path / name), COLOURS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_of_8_bits_are_as_pil_has_them(mode: str, tmp_path: Path) -> None:
    """As torchvision's loader converts them."""
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    Image.fromarray(COLOURS).convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
        assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    """And PIL's warning about alpha is not shown."""
    palette = Image.fromarray(GREY % 4, "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
    palette.save(tmp_path / "x.png", transparency=b"\x00\x80\xff\xff")
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], dtype=np.uint8)
    assert np.array_equal(pixels(tmp_path / "x.png"), colours[GREY % 4])


def made(root: Path, save: Callable[[np.ndarray, Path], object], low: int = 60, high: int = 180) -> Path:
    """A folder of two classes, `save`d from 8-bit grey pictures."""
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(3):
                save(draw.integers(low, high, (16, 16)).astype(np.uint8), root / part / name / f"{number}")
    return root


def save8(levels: np.ndarray, path: Path) -> None:
    Image.fromarray(levels).save(path.with_suffix(".png"))


def save16(levels: np.ndarray, path: Path) -> None:
    Image.fromarray(levels.astype(np.uint16) * 257).save(path.with_suffix(".png"))


def save_float(levels: np.ndarray, path: Path) -> None:
    Image.fromarray(levels.astype(np.float32) / 255).save(path.with_suffix(".tif"))


def images_of(root: Path) -> list[torch.Tensor]:
    """The samples of train and test, as a network sees them."""
    parts: tuple[Samples, ...] = find_dataset(f"imagefolder:{root}").load(root)
    return [torch.cat([batch.images for batch in part.in_order(4)]) for part in parts]


@pytest.mark.parametrize("size", [16, 70], ids=["in-memory", "streamed"])
def test_a_folder_has_the_same_samples_at_any_depth(size: int, tmp_path: Path) -> None:
    """8 bits, 16 bits, floats and a mixture: bit for bit."""

    def at_size(save: Callable[[np.ndarray, Path], object]) -> Callable[[np.ndarray, Path], object]:
        return lambda levels, path: save(np.resize(levels, (size, size)), path)

    def mixed(levels: np.ndarray, path: Path) -> None:
        (save8, save16, save_float)[int(path.name) % 3](levels, path)

    saves = {"8": save8, "16": save16, "float": save_float, "mixed": mixed}
    first, *others = (images_of(made(tmp_path / name, at_size(save))) for name, save in saves.items())
    assert first[0].std() > 0.1
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda x: x.astype(np.float32), r"floats from 0 to 255"),
        (lambda x: x.astype(np.float32) / 127.5 - 1, r"floats from -1 to 1"),
        (lambda x: np.where(x == 7, np.nan, x / 255).astype(np.float32), r"floats from nan"),
        (lambda x: x.astype(np.int32) * 257, r"signed integers"),
        (lambda x: x.astype(np.int32), r"signed integers"),
    ],
    ids=["float-255", "float-negative", "nan", "int32", "int32-low"],
)
def test_levels_without_a_known_scale_are_refused_by_name(
    spoil: Callable[[np.ndarray], np.ndarray], said: str, tmp_path: Path
) -> None:
    """A single file of 601 is not left out as damage is: the error has its name, what is allowed, and what to do."""
    root = made(tmp_path / "data", save8)
    for number in range(600):
        (root / "train" / "a" / f"more{number}.png").hardlink_to(root / "train" / "a" / "0.png")
    odd = root / "train" / "b" / "odd.tif"
    Image.fromarray(spoil(GREY)).save(odd)
    with pytest.raises(
        BadFolder, match=rf"train/b/odd\.tif: its levels are {said}.*8 or 16 bits, and floats"
    ) as raised:
        find_dataset(f"imagefolder:{root}")
    assert "Convert it" in str(raised.value)
    folders.look.cache_clear()  # the verdict is cached, and is the same
    with pytest.raises(BadFolder, match=said):
        find_dataset(f"imagefolder:{root}")


@pytest.mark.parametrize(
    "content, said",
    [
        (tiff(GREY.astype("<u4").tobytes(), 32), "integers of PIL's mode I"),
        (tiff(GREY.astype("<i2").tobytes(), 16, kind=2), "signed integers"),
        (tiff(GREY.tobytes(), 8, kind=2), "signed integers"),
    ],
    ids=["uint32", "int16", "int8"],
)
def test_integers_of_other_kinds_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    """TIFF says what its numbers are."""
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(folders.Unsupported, match=said):
        picture(tmp_path / "x.tif")


def test_8_or_12_bit_levels_in_16_bit_files_are_refused(tmp_path: Path) -> None:
    """All would be nearly black. One dark picture among others is kept."""
    for name, factor in (("8", 1), ("12", 16)):

        def save(levels: np.ndarray, path: Path, factor: int = factor) -> None:
            Image.fromarray(levels.astype(np.uint16) * factor).save(path.with_suffix(".png"))

        root = made(tmp_path / name, save)
        with pytest.raises(BadFolder, match=r"\.png: \d+ is the highest level of all 12 images with 16 bits.*65535"):
            find_dataset(f"imagefolder:{root}")
    root = made(tmp_path / "16", save16)
    save16(np.zeros((16, 16), np.uint8), root / "train" / "a" / "0")
    train, _ = find_dataset(f"imagefolder:{root}").load(root)
    assert isinstance(train, Split) and train.pad is not None
    assert torch.allclose(train.images[0].amax((1, 2)), torch.tensor(train.pad))


def test_images_with_text_have_the_same_scale(tmp_path: Path) -> None:
    """A 16-bit copy gives the same pixels; floats from 0 to 255 are refused by item and file."""
    make_data(tmp_path / "data")
    image = tmp_path / "data" / "images" / "B.png"
    Image.fromarray(GREY).save(image)
    expected = load_llava(tmp_path / "data")[0].images["pixel_values"]
    Image.fromarray(DEEP).save(image)
    assert torch.equal(load_llava(tmp_path / "data")[0].images["pixel_values"], expected)
    Image.fromarray(GREY.astype(np.float32)).save(image, "TIFF")
    with pytest.raises(ValueError, match=r"item item1: the image .*B\.png cannot be used: its levels are floats"):
        load_llava(tmp_path / "data")
