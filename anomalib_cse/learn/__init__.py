"""The command by which a fitted model learns on: ``python -m anomalib_cse.learn``."""
