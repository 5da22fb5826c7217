"""Checkpoints that are whole or not there."""

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO

LONGEST = 255  # bytes of a name, in most file systems


class WholeCheckpointIO(AnomalibCheckpointIO):
    """Write a checkpoint beside its place and then rename it, so that the one before it is never half overwritten.

    Lightning's own writes to the system's temporary folder and moves the file from there. Between file systems that is
    a copy onto the old checkpoint, which a crash or a full disk leaves torn.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint``, or raise an ``OSError`` and leave one that was there before."""
        if "://" in str(path):  # remote storage, where an upload replaces the old object when it is complete
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        unfinished = Path(f"{path}.unfinished")
        if len(os.fsencode(unfinished.name)) > LONGEST:
            unfinished = path.with_name(f"{blake2b(os.fsencode(path.name), digest_size=16).hexdigest()}.unfinished")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # or a power failure may leave the new name and none of the content
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:  # a failed write reaches torch.save's archive as a RuntimeError
            msg = f"checkpoint {path} cannot be written ({error}); one that was there before is as it was"
            raise OSError(msg) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, to the CPU if no device is given: the one it was written on may not be here.

        Raises:
            ValueError: If the file is not a whole one.
        """
        try:
            return super().load_checkpoint(path, map_location or "cpu", weights_only is not False)
        except (EOFError, RuntimeError) as error:  # what torch.load has for an empty and a truncated archive
            msg = f"{path} is not a whole checkpoint ({str(error) or 'it is empty'}); take another, or train again"
            raise ValueError(msg) from error
