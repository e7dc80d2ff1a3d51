"""studies, prefetch, doctor."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from orchestrator.errors import UserError
from orchestrator.options import absolute, data_root_option, emit, output_options, store_option, write_file

OK, WARN, BAD = "ok", "warn", "bad"
Check = tuple[str, str, str]


@click.command()
@click.argument("name", required=False)
@output_options
def studies(name: str | None, form: str, output: Path | None) -> None:
    """List the studies that ship with prunesweep; with NAME, print its spec.

    \b
    prunesweep studies
    prunesweep studies digits > mine.yaml
    """
    import pyarrow as pa

    from orchestrator.expand import candidate_count, cells
    from orchestrator.spec import load_spec
    from orchestrator.study import open_document, study_names

    if name:
        if name not in study_names():
            raise UserError(f"no study {name}; there are: {', '.join(study_names())}")
        click.echo(open_document(name).text(), nl=False)
        return
    lines = []
    for study in study_names():
        document = open_document(study)
        spec = load_spec(document)
        counts = [candidate_count(cell, spec.candidates.count) for cell in cells(spec, document)]
        lines.append(
            {
                "study": study,
                "model": "+".join(spec.grid.model),
                "dataset": "+".join(spec.grid.dataset),
                "cells": len(counts),
                "candidates": sum(counts),
                "seeds": len(spec.grid.seed),
                "tasks": sum(counts) * len(spec.grid.seed),
            }
        )
    emit(pa.Table.from_pylist(lines), form, output)


@click.command()
@click.argument("datasets", nargs=-1, required=True)
@data_root_option
def prefetch(datasets: tuple[str, ...], data_root: str) -> None:
    """Download DATASETS into the data root, so that no worker ever has to.

    \b
    prunesweep prefetch mnist fmnist --data-root /shared/data
    """
    from workers.datasets import check_dataset

    for name in datasets:
        try:
            check_dataset(name)
        except ValueError as error:
            raise UserError(str(error)) from None
    for name in datasets:
        click.echo(_fetch(name, absolute(data_root)), err=True)


def _fetch(name: str, data_root: str) -> str:
    from workers.datasets import find_dataset

    try:
        dataset = find_dataset(name, data_root)
    except ValueError as error:
        raise UserError(f"{error}; prefetch cannot download it") from None
    if not dataset.files:
        return f"{name}: nothing to download"
    if not dataset.missing(data_root):
        return f"{name}: already under {data_root}"
    from torchvision import datasets as torchvision_datasets

    try:
        for train in (True, False):
            getattr(torchvision_datasets, str(dataset.source))(data_root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot download {name} into {data_root}: {reason}. Is this machine online? "
            f"Otherwise copy torchvision's {dataset.folder} there"
        ) from error
    return f"{name}: downloaded to {data_root}"


@click.command()
@click.option("--models", multiple=True, metavar="NAME", help="Instead, try whether these networks can be pruned.")
@store_option
@data_root_option
@output_options
@click.pass_context
def doctor(
    ctx: click.Context, models: tuple[str, ...], store: str, data_root: str, form: str, output: Path | None
) -> None:
    """Check this machine, the store and the data; each line says what to do. Exits 5 if the store is bad, 1 if
    the installation is.

    With --models, prune the networks named on the CPU, a quarter of every layer, and say what came of it: `all` are
    those of docs/support.md. Exits 2 if one cannot be pruned at all.

    \b
    prunesweep doctor --store /shared/results --data-root /shared/data
    prunesweep doctor --models torchvision/resnet18,timm/vit_tiny_patch16_224
    prunesweep doctor --models all -f markdown -o docs/support.md
    """
    import pyarrow as pa

    if models:
        return _support(ctx, models, form, output)
    lines = [*_machine(), *_libraries(), *_store(store), *_data(absolute(data_root))]
    emit(
        pa.Table.from_pylist([dict(zip(("check", "result", "what"), line, strict=True)) for line in lines]),
        form,
        output,
    )
    bad = [check for check, result, _ in lines if result == BAD]
    if bad:
        sys.stdout.flush()
        ctx.exit(5 if bad == ["store"] else 1)
    return None


def _support(ctx: click.Context, asked: tuple[str, ...], form: str, output: Path | None) -> None:
    """The table of which networks can be pruned; in markdown with what it says of itself."""
    import pyarrow as pa

    from models.registry import check_model
    from orchestrator.support import FAILS, columns, findings, names_of, page

    names = names_of(asked)
    for name in names:
        try:
            check_model(name)
        except ValueError as error:
            raise UserError(str(error)) from None
    found = []
    for i, finding in enumerate(findings(names), 1):
        click.echo(f"{i}/{len(names)} {finding.network}: {finding.result}", err=True)
        found.append(finding)
    if form == "markdown" and output is not None:
        write_file(output, lambda: output.write_text(page(found)))
    else:
        emit(pa.Table.from_pylist([columns(one) for one in found]), form, output)
    if len(asked) and "all" not in asked and any(one.result == FAILS for one in found):
        ctx.exit(2)


def _machine() -> Iterator[Check]:
    yield "python", OK, f"{platform.python_version()} at {sys.executable}"
    import psutil

    yield "processors", OK, f"{psutil.cpu_count()}"
    free = psutil.virtual_memory().available / 2**30
    result = OK if free > 2 else WARN
    yield "memory", result, f"{free:.1f} GiB free; a worker with MNIST in memory takes about 1.5 GiB"


def _libraries() -> Iterator[Check]:
    for name in ("torch", "torchvision", "ray", "torch-pruning", "accelerate", "duckdb", "pyarrow"):
        try:
            yield name, OK, version(name)
        except PackageNotFoundError:
            yield name, BAD, "not installed; run `make install`"
    try:
        import torch
        import torchvision  # noqa: F401  a build that does not match torch fails here
    except Exception as error:
        yield "torch works", BAD, f"{error}; install torch and torchvision from the same index"
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    yield "GPUs", OK, names or "none; workers run on the processors, one thread each"
    yield _compiled()


def _compiled() -> Check:
    import torch

    from workers.compiled import NoCompiler, compiler, library

    try:
        library(torch.float32)
    except NoCompiler as error:
        return "compiler", WARN, f"{error}; with one, small networks train several times faster on a processor"
    return "compiler", OK, f"{compiler()[1]}: small networks train on a processor by code it has built"


def _store(location: str) -> Iterator[Check]:
    from storage.errors import StoreError
    from storage.store import Store

    try:
        store = Store(location)
        store.check_writable()
    except StoreError as error:
        yield "store", BAD, f"{error}; choose another with --store or PRUNESWEEP_STORE"
        return
    yield "store", OK, f"{location} is writable; sweeps: {', '.join(store.sweeps()) or 'none yet'}"
    if store.is_local:
        folder = Path(store.root)
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free / 2**30
        yield "disk", OK if free > 1 else WARN, f"{free:.1f} GiB free where the store is"


def _data(data_root: str) -> Iterator[Check]:
    from workers.datasets import DATASETS

    for name, dataset in DATASETS.items():
        if dataset.files:
            missing = dataset.missing(data_root)
            what = f"not under {data_root}; `prunesweep prefetch {name}`" if missing else f"under {data_root}"
            yield f"data {name}", WARN if missing else OK, what
