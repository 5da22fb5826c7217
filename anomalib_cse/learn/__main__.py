"""Learn of new good images and of defects: ``python -m anomalib_cse.learn CHECKPOINT --good FOLDER --output NEW``."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from ..cse_gaussian import CseGaussian
from ..deployment import WholeCheckpointIO, compare_good_images


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint of a model that has learnt on, and say what has changed.

    Returns:
        1 if something is wrong, which it says, else 0.
    """
    parser = ArgumentParser(
        prog="python -m anomalib_cse.learn",
        description="Have a fitted CseGaussian learn on, without the images it was fitted to.",
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--good", type=Path, help="folder of new good images")
    parser.add_argument("--defects", type=Path, help="folder of images with defects")
    parser.add_argument("--masks", type=Path, help="folder of the defects' masks, bright where they are")
    parser.add_argument(
        "--forget", type=float, default=0.0, help="part of the earlier good images that counts no more, in [0, 1]"
    )
    parser.add_argument("--threshold-only", action="store_true", help="set thresholds by the good images, no more")
    parser.add_argument("--dry-run", action="store_true", help="say what would change, and write nothing")
    parser.add_argument("--output", type=Path, help="the new checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the file that --output names")
    options = parser.parse_args(arguments)
    if not options.dry_run:
        if options.output is None:
            parser.error("give --output, the file of the new checkpoint, or --dry-run")
        if options.output.exists() and not options.overwrite:
            parser.error(f"{options.output} is there already: give another --output, or --overwrite")
    if options.threshold_only and (options.good is None or options.defects or options.masks or options.forget):
        parser.error("--threshold-only takes --good, and none of --defects, --masks and --forget")
    try:
        lines = run(options)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def run(options: Namespace) -> list[str]:
    """Learn, write the new checkpoint if it is to be, and return what to say."""
    checkpoint = WholeCheckpointIO().load_checkpoint(options.checkpoint)
    model = CseGaussian.load_from_checkpoint(options.checkpoint).eval()
    lines = []
    if options.good and model.post_processor and getattr(model.post_processor, "knows_good_scores", False):
        lines.append(str(compare_good_images(model, options.good)))
    if options.threshold_only:
        lines.append(str(model.recalibrate(options.good)))
    else:
        lines.append(str(model.learn(options.good, options.defects, options.masks, options.forget)))
    if options.dry_run:
        lines.append("Nothing has been written.")
    else:
        checkpoint["state_dict"] = model.state_dict()
        model.on_save_checkpoint(checkpoint)
        WholeCheckpointIO().save_checkpoint(checkpoint, options.output)
        lines.append(f"Written: {options.output}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
