"""Long runs: ``make stress``, or a part of it, ``CSE_STRESS=0.1 make stress``. Figures are printed with ``-s``."""

import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openvino
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem, MVTecAD
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from anomalib_cse import Cse
from anomalib_cse.cse.loss import CseLoss
from anomalib_cse.cse.torch_model import Decoder, Embedder, cosine_distances
from anomalib_cse.features import pool

from tiny import COMMON, MODELS, QUIET

SHARE = float(os.environ.get("CSE_STRESS", "1"))


def memory():
    """This process's resident memory in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def check_flat(what, seen, begun):
    """The last quarter of what was seen of the memory takes no more than the first."""
    quarter = max(1, len(seen) // 4)
    settled, end = max(seen[:quarter]), max(seen[-quarter:])
    print(f"{what}: {settled:.0f} MB, then {end:.0f} MB, {time.perf_counter() - begun:.0f} s")  # noqa: T201
    assert end < settled + 20


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ten_thousand_random_steps_have_finite_numbers(precision):
    """Features of every magnitude, some of them all zero, through loss, optimiser and score."""
    torch.manual_seed(0)
    steps, seen = round(10_000 * SHARE), []
    embedder, decoder, criterion = Embedder(24, 8), Decoder([8, 16], 8).requires_grad_(requires_grad=False), CseLoss()
    optimizer = torch.optim.Adam(embedder.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(1)
    begun = time.perf_counter()
    for step in range(steps):
        scale = 10 ** (8 * torch.rand((), generator=generator) - 4) * (step % 17 > 0)
        features = [scale * torch.randn(8, c, s, s, generator=generator) for c, s in ((8, 6), (16, 3))]
        corrupted = torch.rand(4, generator=generator) < 0.5
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            embeddings = embedder(features)
            first, second = pool(embeddings, 2).chunk(2)
            clean = [f[:4] for f in features]
            loss = criterion(first, second, corrupted, clean, decoder(embeddings[:4], [f.shape[-2:] for f in clean]))
            score = cosine_distances(second, F.normalize(first.mean(dim=0), dim=0)[None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for value in (embeddings, loss, score):
            assert value.isfinite().all(), step
        seen.append(loss.item())
    assert all(value.isfinite().all() for value in embedder.state_dict().values())
    print(f"{precision}: {steps} steps, loss {min(seen):.3f} to {max(seen):.3f}, {time.perf_counter() - begun:.0f} s")  # noqa: T201


class Memory(Callback):
    def __init__(self):
        self.after_batches, self.after_epochs = [], []

    def on_train_batch_end(self, *arguments):
        self.after_batches.append(memory())

    def on_train_epoch_end(self, *arguments):
        self.after_epochs.append(memory())


@pytest.mark.parametrize("budget", [0, 2**30])
def test_two_hundred_epochs_take_flat_memory(budget, mvtec_root, tmp_path):
    epochs, seen, begun = max(8, round(200 * SHARE)), Memory(), time.perf_counter()
    engine = Engine(max_epochs=epochs, default_root_dir=tmp_path, callbacks=[seen], **QUIET)
    engine.fit(Cse(**COMMON, memory_budget=budget), datamodule=MVTecAD(root=mvtec_root, category="tiny", num_workers=0))
    check_flat(f"{epochs} epochs", seen.after_epochs, begun)


class Noise(Dataset):
    """So many images of noise, none of which is on the disk."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(index))
        return ImageItem(image=image, image_path=f"{index}.raw")


@pytest.mark.parametrize(
    ("name", "options"), [("Cse", {"holdout_ratio": 0}), ("CseGaussian", {"memory_budget": 2**24})]
)
def test_thirty_thousand_images_take_flat_memory(name, options, tmp_path):
    count, seen, begun = round(30_000 * SHARE), Memory(), time.perf_counter()
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, callbacks=[seen], **QUIET)
    engine.fit(
        MODELS[name](**COMMON, **options, visualizer=False),
        train_dataloaders=DataLoader(Noise(count), batch_size=8, collate_fn=ImageBatch.collate),
    )
    check_flat(f"{name}, {count} images", seen.after_batches, begun)


@pytest.mark.parametrize(
    ("name", "compression", "streams"),
    [("Cse", None, 2), ("Cse", CompressionType.INT8, 1), ("CseGaussian", None, 2)],
)
def test_fifty_thousand_images_through_one_compiled_model(name, compression, streams, mvtec_root, tmp_path):
    """Four threads with a request each share it; scores are those of the first pass, bit by bit, and memory is flat.

    8-bit weights in one stream, as in more OpenVINO 2026.4 gives all images one score.
    """
    model = MODELS[name](**COMMON, post_processor=False)  # or these images, pure noise, would all have a score of 1
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    engine.fit(model, datamodule=MVTecAD(root=mvtec_root, category="tiny", num_workers=0))
    exported = engine.export(model, ExportType.OPENVINO, export_root=tmp_path, compression_type=compression)
    compiled = openvino.compile_model(exported, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": streams})
    images = torch.rand(100, 1, 3, 72, 96, generator=torch.Generator().manual_seed(0)).numpy()
    total, threads, seen = round(50_000 * SHARE), 4, []

    def score(request, image):
        return request.infer({0: image})["pred_score"].item()

    expected = [score(compiled.create_infer_request(), image) for image in images]
    assert len(set(expected)) > 50

    def work(thread):
        request = compiled.create_infer_request()
        for number in range(total // threads):
            at = (number + 25 * thread) % len(images)
            assert score(request, images[at]) == expected[at]
            if thread == 0 and number % 250 == 0:
                seen.append(memory())

    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool_of_threads:
        list(pool_of_threads.map(work, range(threads)))
    check_flat(f"{name}, {compression}, {streams} streams: {total} images", seen, begun)
