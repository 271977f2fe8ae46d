"""The command that generates: what it tells while it loads; its whole is in test_main.py."""

from pathlib import Path

from engine import generate_command


def test_loading_is_told_tensor_by_tensor(monkeypatch):
    told = []

    class Loaded:
        def __init__(self, directory, config, progress):
            progress(3, 7, "a tensor")

    monkeypatch.setattr("engine.model_runner.ModelRunner", Loaded)

    generate_command._model_runner(Path(), None, lambda *args: told.append(args))

    assert told == [("loading weights", 3, 7)]
