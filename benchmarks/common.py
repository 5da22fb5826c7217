"""What the benchmarks share: a child process for every measurement, and a table."""

import multiprocessing
import platform
import resource
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch


def call(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What ``function`` returns, with this process's peak memory in MB."""
    before = peak_memory()
    result = function(*arguments)
    return {**result, "peak MB": round(peak_memory()), "of which imports": round(before)}


def in_child(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run ``function`` in a fresh process, so that neither memory nor threads are shared with another measurement.

    What the process dies of stands in the result, so that the other measurements go on.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(call, function, *arguments).result()
        except (RuntimeError, BrokenProcessPool) as error:
            return {"failed": f"{type(error).__name__}: {str(error)[:80]}"}


def peak_memory() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def hardware() -> str:
    """Processor, number of threads and version of torch in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return (
        f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads, torch {torch.__version__}, no GPU"
    )


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table; columns in the order of their first appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[shown(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *cells])


def shown(value: Any) -> str:
    """A number with three digits, anything else as it is."""
    return f"{float(f'{value:.3g}'):g}" if isinstance(value, float) else str(value)
