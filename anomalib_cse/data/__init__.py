"""Datasets under the names that users know, one that needs no download, and a check of files."""

from .datamodules import MVTec
from .demo import SurfaceDemo
from .image_check import ImageCheck, check_batches, check_files, samples_of

__all__ = ["ImageCheck", "MVTec", "SurfaceDemo", "check_batches", "check_files", "samples_of"]
