"""Datamodules under the names that users know."""

from anomalib.data import MVTecAD


class MVTec(MVTecAD):
    """MVTec AD under the name it had in anomalib 1."""
