"""A page of what a test or a prediction has found, to choose a threshold by."""

from .callback import Report

__all__ = ["Report"]
