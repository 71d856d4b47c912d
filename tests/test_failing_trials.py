"""Real trials that run out of memory, or whose loss is no number: they fail with a reason, and the search goes on."""

import sys

import pytest
from toys import Limited

from meme_nas.engines.local import LocalEngine
from meme_nas.record.study import Study, read_trials
from meme_nas.settings import SearchSettings
from meme_nas.strategies.joint import Joint
from meme_nas.worker.objective import Objective


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to a limit of its memory")
def test_trials_without_memory_or_with_nan_fail_and_the_next_one_is_scored(tmp_path):
    small = {"proxy_steps": 2, "samples": 16, "features": "random", "trunk_share": 0.0}
    settings = SearchSettings(strategy="joint", budget=4, study=tmp_path, **small)
    whole = settings.as_proxy(settings.full_config())
    trials = [
        ("hand-made", whole),
        ("multi-expert", whole.with_(training={"batch_size": 2**23})),  # 2 GiB of images
        ("single-model", whole.with_(training={"learning_rate": 1e30, "warmup_steps": 0, "gradient_clip": 0.0, "steps": 5})),
    ]
    study, engine = Study(tmp_path, settings.in_force(), settings.objectives), LocalEngine(1)
    try:
        engine.run(
            Joint(settings, study, yardsticks=trials), Limited(Objective(tmp_path, tmp_path / "bank", "cpu"), 1024), lambda: None
        )
    finally:
        engine.close()
        study.close()
    found = read_trials(tmp_path)
    assert [trial.state for trial in found] == ["complete", "failed", "failed", "complete"]
    assert "alloc" in found[1].reason or found[1].reason.startswith("MemoryError")
    assert found[2].reason.startswith("TrainingDiverged: expert 1: loss is")
