"""`python -m tests.benchmarks [NAME ...] [--json FILE] [--list]`: all benchmarks, or those named."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

# name -> the module with the function of that name; imported only when it is run: the compute benchmarks
# need torch and numpy, nothing else.
BENCHMARKS = {
    "networks_per_hour": "compute",
    "best_serial_loop": "compute",
    "step": "compute",
    "input_pipeline": "compute",
    "residual": "compute",
    "gpu_fleet": "compute",
    "commit": "store",
    "corr": "store",
    "query": "store",
    "row_bytes": "store",
    "startup": "store",
    "store_curve": "store",
    "orchestration": "orchestration",
    "driver_memory": "orchestration",
    "expansion": "orchestration",
    "resume_plan": "orchestration",
    "orchestration_curve": "orchestration",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--json", default="bench.json", metavar="FILE")
    parser.add_argument("--list", action="store_true", help="Name the benchmarks.")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    if given.list:
        print("\n".join(BENCHMARKS))
        return
    figures: list[dict[str, Any]] = []
    print(HEADER)
    for name in given.names or BENCHMARKS:
        module = import_module(f"tests.benchmarks.{BENCHMARKS[name]}")
        for figure in getattr(module, name)():
            figures.append(figure.to_dict())
            print(line(figures[-1]), flush=True)
    about = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    Path(given.json).write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {given.json}", file=sys.stderr)


HEADER = f"{'':58} {'median':>10} {'95 % interval':>21} {'n':>3} {'at least':>9} {'aim':>8}  "


def line(figure: dict[str, Any]) -> str:
    """A figure as a line of the table."""
    shown = lambda x: "" if x is None else f"{x:.4g}"  # noqa: E731
    interval = f"{shown(figure['low'])} - {shown(figure['high'])}"
    return (
        f"{figure['what'][:58]:58} {shown(figure['median']) + ' ' + figure['unit']:>10} {interval:>21} "
        f"{figure['n']:>3} {shown(figure['least']):>9} {shown(figure['aim']):>8}  {figure['verdict']}"
    )


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    found = {"python": platform.python_version(), "system": platform.platform(), "processor": platform.processor()}
    if "torch" in sys.modules:
        import torch

        found |= {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


if __name__ == "__main__":
    main()
