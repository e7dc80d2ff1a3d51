"""studies, prefetch, doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.documents import Document
from orchestrator.spec import load_spec
from orchestrator.study import study_names


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(str(ended.value.code)), out, err


def test_studies_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Every study with its counts; a study's text is a spec that loads."""
    code, out, _ = run(capsys, "studies", "-f", "json")
    listed = {line["study"]: line["tasks"] for line in json.loads(out)}
    assert code == 0 and list(listed) == study_names()
    assert listed["digits"] == 90 and listed["lenet5-mini-conv2"] == 3006
    code, out, _ = run(capsys, "studies", "digits")
    assert code == 0 and load_spec(Document("digits", out)).name == "digits"


def test_prefetch_downloads_only_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to do is said; a mirror that does not answer is one message with what to do, exit 2."""
    from torchvision import datasets

    code, _, err = run(capsys, "prefetch", "digits", "--data-root", str(tmp_path))
    assert (code, err) == (0, "digits: nothing to download\n")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    code, _, err = run(capsys, "prefetch", "mnist", "--data-root", str(tmp_path))
    assert code == 2 and "Traceback" not in err
    assert f"cannot download mnist into {tmp_path}" in err and "copy torchvision's MNIST/raw there" in err
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:1/cifar")
    code, _, err = run(capsys, "prefetch", "cifar100", "--data-root", str(tmp_path))
    assert code == 2 and "copy torchvision's cifar-100-python there" in err
    code, _, err = run(capsys, "prefetch", "imagenet", "--data-root", str(tmp_path))
    assert code == 2 and f"no folder {tmp_path}/imagenet" in err and "prefetch cannot download it" in err


def test_prefetch_of_what_is_there(capsys: pytest.CaptureFixture[str], mnist_root: str) -> None:
    """Real files are recognised, and left alone."""
    code, _, err = run(capsys, "prefetch", "mnist", "fmnist", "--data-root", mnist_root)
    assert code == 0 and err.count(f"already under {mnist_root}") == 2


def test_doctor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each line is ok, warn or bad with what to do; a store that cannot be written is exit code 5."""
    code, out, _ = run(capsys, "doctor", "--store", str(tmp_path), "--data-root", str(tmp_path), "-f", "json")
    lines = {line["check"]: line for line in json.loads(out)}
    assert code == 0
    assert lines["store"]["result"] == "ok" and lines["torch"]["result"] == "ok"
    assert lines["data mnist"]["result"] == "warn" and "prunesweep prefetch mnist" in lines["data mnist"]["what"]
    assert lines["compiler"]["result"] == "ok" and "small networks train" in lines["compiler"]["what"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    code, out, _ = run(capsys, "doctor", "--store", str(tmp_path / "file" / "x"), "-f", "json")
    assert code == 5 and {line["check"]: line["result"] for line in json.loads(out)}["store"] == "bad"
