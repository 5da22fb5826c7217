"""What runs do not say any more, what they do, and that nothing of it stays for other models."""

import logging
import warnings

import pytest
from anomalib.engine import Engine
from anomalib.models import Padim

from anomalib_cse import CseGaussian
from anomalib_cse.deployment.quiet import EXPORTERS, VERBOSE, quiet_exporters

from tiny import COMMON, MODELS, QUIET, data_of


def said_by(model, root, folder, **options):
    """The warnings of a fit and a test."""
    engine = Engine(default_root_dir=folder, **{**QUIET, "max_epochs": 1, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.train(model, datamodule=data_of(root))
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", MODELS)
def test_a_run_warns_of_nothing_that_a_user_cannot_change(name, mvtec_root, dtd, tmp_path, monkeypatch):
    model = MODELS[name](**COMMON, dtd_dir=str(dtd))
    assert not said_by(model, mvtec_root, tmp_path)
    assert any("eval mode" in message for message in said_by(Padim("test_efficientnet", ["blocks.1", "blocks.2"],
        pre_trained=False, n_features=8), mvtec_root, tmp_path))  # fmt: skip
    monkeypatch.setenv(VERBOSE, "1")
    said = said_by(MODELS[name](**COMMON, dtd_dir=str(dtd)), mvtec_root, tmp_path)
    assert any("eval mode" in message for message in said)


def test_a_run_that_breaks_off_leaves_warnings_as_they_were(mvtec_root, dtd, tmp_path):
    before = list(warnings.filters)
    model = CseGaussian(**COMMON, dtd_dir=str(dtd))
    with pytest.raises(ValueError, match="max_steps"):
        Engine(default_root_dir=tmp_path, max_steps=0, **QUIET).fit(model, datamodule=data_of(mvtec_root))
    assert list(warnings.filters) == before


def test_exporters_log_warnings_alone_unless_asked(caplog, monkeypatch):
    def log():
        for name in EXPORTERS:
            logging.getLogger(f"{name}.passes").info("removed")
            logging.getLogger(f"{name}.passes").warning("odd")

    with caplog.at_level(logging.INFO), quiet_exporters() as verbose:
        log()
    assert [record.message for record in caplog.records] == ["odd"] * len(EXPORTERS)
    assert not verbose
    monkeypatch.setenv(VERBOSE, "1")
    with caplog.at_level(logging.INFO), quiet_exporters() as verbose:
        log()
    assert [record.message for record in caplog.records].count("removed") == len(EXPORTERS)
    assert verbose


def test_models_are_made_without_a_word_unless_asked(caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        CseGaussian(**COMMON)
        assert "Initializing" not in caplog.text
        monkeypatch.setenv(VERBOSE, "1")
        CseGaussian(**COMMON)
        assert "Initializing CseGaussian model" in caplog.text


def test_progress_shows_without_a_terminal(mvtec_root, dtd, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("anomalib_cse.cse.lightning_model.rank_zero_info", said.append)
    for shown in (True, False):
        model = MODELS["Cse"](**COMMON, dtd_dir=str(dtd))
        engine = Engine(default_root_dir=tmp_path, max_epochs=4, **{**QUIET, "enable_progress_bar": shown})
        engine.fit(model, datamodule=data_of(mvtec_root))
    assert [line.split(",")[0] for line in said] == ["1 of 4 epochs", "2 of 4 epochs", "3 of 4 epochs"]
