"""The name that ``python -m anomalib_cse.preflight`` had, which still works."""

import runpy
import sys

if __name__ == "__main__":
    sys.stderr.write("this command is python -m anomalib_cse.preflight now\n")
    runpy.run_module("anomalib_cse.preflight", run_name="__main__", alter_sys=True)
