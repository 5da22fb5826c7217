"""What a report says of a run: which model, which files, which images, and where the threshold comes from."""

import inspect
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from ..checks import plain
from .origin import Origin, folders, listed, threshold_source
from .page import Record, name, plural

PACKAGES = ("torch", "timm", "lightning", "anomalib", "anomalib_cse")


def facts_of(
    model: LightningModule,
    records: Sequence[Record],
    seconds: float,
    loaded: str | Path | None,
    saved: str | Path | None,
) -> tuple[dict[str, str], str]:
    """Return what there is to say of a run, by its name, and a warning about the threshold or ``""``.

    Args:
        model: The model.
        records: Of all images.
        seconds: What it took.
        loaded: The checkpoint that the run was given; ``None`` if the model was in memory.
        saved: The one that the trainer's last fit has saved, if it has.
    """
    own, origin = getattr(model, "post_processor", None), getattr(model, "origin", Origin())
    given: Mapping[str, Any] = getattr(model, "hparams", {})
    source, warning = threshold_source(own, origin, (record.path for record in records))
    expectation = getattr(own, "expectation", "")
    suspicious = ", ".join(f"{name(path, 0)} ({score:.3g})" for path, score in getattr(own, "suspicious", ()))
    images = [record.path for record in records if record.path]
    facts = {
        "Model": f"{type(model).__name__}, {in_pixels(getattr(model, 'image_size', None))}, {seed_in_words(given)}",
        "Backbone": getattr(getattr(model, "backbone", None), "architecture", "unknown"),
        "Checkpoint": checkpoint_in_words(loaded, saved),
        "Training images": listed(origin.training) or "not known: the checkpoint does not name them",
        "These images": listed(folders(images)) if images else "not known: they came without paths",
        "Threshold": source,
        "Rejects, at the model's own threshold": expectation,
        "Reject rate asked for": "" if given.get("reject_rate") is None else f"{100 * given['reject_rate']:.3g} %",
        "Training images unlike the others": suspicious,
        "Date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}",
        "Time": f"{seconds:.1f} s, {len(records) / seconds:.1f} images a second, reading and drawing included",
        "Processor": f"{processor(model.device)}, {plural(torch.get_num_threads(), 'thread')}",
        "Versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
    }
    return {what: said for what, said in facts.items() if said}, warning


def checkpoint_in_words(loaded: str | Path | None, saved: str | Path | None) -> str:
    """Return which file a model was loaded from, or saved to."""
    file = loaded or saved
    if not file:
        return "none was given: the model was in memory"
    return f"{file}{'' if loaded else ', saved by the fit before this'}, SHA-256 {sha256(Path(file))}"


def in_pixels(size: Sequence[int] | None) -> str:
    """Return a height and width in words."""
    return "images as they are" if size is None else f"images of {size[0]}x{size[1]} pixels"


def seed_in_words(given: Mapping[str, Any]) -> str:
    """Return the seed in words."""
    seed = given.get("seed")
    return "no seed given" if seed is None else f"seed {seed}"


def sha256(file: Path) -> str:
    """Return a file's digest."""
    if not file.is_file():
        return "not known, as the file is gone"
    with file.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest()


def processor(device: torch.device) -> str:
    """Return the name of what the model ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def next_command(model: LightningModule, checkpoint: Path) -> str:
    """Return the command that predicts with a model's checkpoint, with the arguments that shape it."""
    usual = inspect.signature(type(model).__init__).parameters
    shaping = ("backbone", "layers", "image_size", "center_crop_size", *getattr(model, "shaping", ()))
    changed = {
        what: plain(model.hparams[what])
        for what in shaping
        if what in model.hparams and plain(model.hparams[what]) != plain(usual[what].default)
    }
    options = [f"--model.{what}={written(value)}" for what, value in changed.items()]
    command = ["anomalib", "predict", "--model", type(model).__name__, *options, "--data", "FOLDER"]
    return shlex.join([*command, "--ckpt_path", str(checkpoint)])


def written(value: object) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
