"""Whether as many good images are rejected as a threshold says. Run by ``make bench-thresholds``.

Nobody has defects to set a threshold by at first. Three ways do without: ``reject_rate`` of the models here, and
anomalib's ``val_split_mode``, ``from_train`` (the highest score of good images kept from training) and ``synthetic``
(the best F1 on those, half of them with synthetic defects). Each is fitted to the training images, and the threshold
counted out on the test images, as they are and under another light, noise and blur, as in ``robustness.py``. The models
stand in a YAML file; see ``configs/compare``.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning.pytorch import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from scipy.stats import binom

from anomalib_cse.deployment.post_processing import MidwayPostProcessor, spread

from common import QUIET, Row, hardware, markdown
from contenders import Contender, chosen, images_of, parser_of
from robustness import MIXED, scores

RATES = 0.01, 0.05, 0.1
WAYS = "reject_rate", "from_train", "synthetic"


def measure(contender: Contender, dataset: Path, way: str, seed: int) -> Iterator[Row]:
    """Fit a model, and give a row for each of its thresholds."""
    validated = {"val_split_mode": "none" if way == "reject_rate" else way, "val_split_ratio": 0.2}
    images = images_of(dataset, contender.train_batch_size, **validated)
    seed_everything(seed, verbose=False)
    own = MidwayPostProcessor(RATES[0]) if way == "reject_rate" else PostProcessor()
    model = contender.build(seed, evaluator=False, visualizer=False, post_processor=own)
    with TemporaryDirectory() as folder:
        limit = 0 if way == "reject_rate" else 1.0
        Engine(
            max_epochs=contender.epochs(model),
            default_root_dir=folder,
            accelerator="cpu",
            limit_val_batches=limit,
            limit_test_batches=0,
            **QUIET,
        ).fit(model, datamodule=images)
    images.setup(TrainerFn.TESTING)
    found, _ = scores(model, images.test_data, MIXED, seed)
    defective = images.test_data.samples["label_index"].to_numpy() == 1
    training = {"set": dataset.name, "images": len(images.train_data), "way": way}
    for rate in RATES if way == "reject_rate" else (None,):
        expected: Row = {"rejects expected %": "", "good ones rejected, expected": ""}
        if rate is not None:
            model.post_processor.reject_rate = rate
            low, high = spread(model.post_processor.good_images).interval(rate)
            fewest, most = (int(binom.ppf(tail, sum(~defective), p)) for tail, p in ((0.05, low), (0.95, high)))
            expected = {"rejects expected %": 100 * rate, "good ones rejected, expected": f"{fewest} to {most}"}
        above = {kind: s > model.post_processor.image_threshold.item() for (kind, _), s in found.items()}
        as_they_are = above.pop("clean")
        yield {
            **training,
            **expected,
            "good ones rejected": f"{sum(as_they_are[~defective])} of {sum(~defective)}",
            "measured %": 100 * as_they_are[~defective].mean(),
            **{f"{kind}, measured %": 100 * labels[~defective].mean() for kind, labels in above.items()},
            "defects found %": 100 * as_they_are[defective].mean(),
        }


def main(arguments: list[str] | None = None) -> None:
    """Measure, write a line for each threshold, and print them as a table."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="CseGaussian", help="name of the list: CseGaussian or Cse")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/thresholds"))
    options = parser.parse_args(arguments)
    [contender] = chosen(parser, options.config, [options.model])
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for category in options.categories:
        for way in options.ways:
            rows += measure(contender, options.root / category, way, options.seed)
            print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(options.output / "results.csv", index=False)
    text = f"{markdown(rows)}\n\n{contender.name}, {contender.note}; seed {options.seed}\n\n{hardware()}\n"
    (options.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
