"""studies, prefetch."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.errors import UserError
from orchestrator.options import absolute, data_root_option, emit, output_options
from orchestrator.phases import phases


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

    phases()(f"looking for {name}")
    try:
        dataset = find_dataset(name, data_root, phases())
    except ValueError as error:
        raise UserError(f"{error}; prefetch cannot download it") from None
    if not dataset.files:
        return f"{name}: nothing to download"
    if not dataset.missing(data_root):
        return f"{name}: already under {data_root}"
    from torchvision import datasets as torchvision_datasets

    phases().rest()  # torchvision shows a bar of its own
    click.echo(f"downloading {name} to {data_root}", err=True)
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
