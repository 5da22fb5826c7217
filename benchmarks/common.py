"""What the benchmarks share: a child process for every measurement, datasets of a command line, and a table."""

import argparse
import multiprocessing
import os
import platform
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch


def check_categories(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with ``parser``'s error unless all ``categories`` of ``root`` are datasets in MVTec AD's layout."""
    for category in options.categories:
        if not (options.root / category / "train" / "good").is_dir():
            parser.error(f"{options.root / category} has no train/good: --root and --categories must lead to a dataset")


def call(
    function: Callable[..., dict[str, Any]], *arguments: Any, time_limit: int = 0, memory_limit: float = 0
) -> dict[str, Any]:
    """What ``function`` returns, with this process's peak memory in MB; the process ends with its time or memory."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.alarm(time_limit)  # ends the process even within a long operation, where Python would not get its turn
    if memory_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_limit * 2**30),) * 2)
    before = peak_memory()
    result = function(*arguments)
    return {**result, "peak MB": round(peak_memory()), "of which imports": round(before)}


def in_child(
    function: Callable[..., dict[str, Any]], *arguments: Any, time_limit: int = 0, memory_limit: float = 0
) -> dict[str, Any]:
    """Run ``function`` in a fresh process, so that neither memory nor threads are shared with another measurement.

    What it dies of stands in the result under ``failed``, so that the other measurements go on.

    Args:
        function: What to run.
        *arguments: What with.
        time_limit: Most seconds that it may take; 0 for no limit.
        memory_limit: Most GiB that it may take; 0 for no limit.
    """
    # glibc's heap fragments under large aligned blocks: Patchcore's coreset grew by 18 MB a step, to 23 GB
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**24))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(call, function, *arguments, time_limit=time_limit, memory_limit=memory_limit)
        start = time.monotonic()
        error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool) and time_limit and time.monotonic() - start >= time_limit:
        return {"failed": f"not done after {time_limit} s"}
    traceback.print_exception(error)
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def end_with_parent() -> None:
    """Wait for the parent process to end, by whatever signal, so that no measurement outlives the one who wants it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def peak_memory() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def exported_size(network: Path) -> float:
    """Size of an exported model in MB, that of OpenVINO's weights, which are a file of their own, included."""
    files = [network, network.with_suffix(".bin")] if network.suffix == ".xml" else [network]
    return sum(file.stat().st_size for file in files) / 1e6


def hardware() -> str:
    """Processor, number of threads and version of torch in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads, torch {torch.__version__}, {gpu}"
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
