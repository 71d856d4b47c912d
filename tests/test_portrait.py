"""Portraits: the film is the sampler's own way, cut at the hand-overs; spectra are one an expert."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from meme.config.presets import preset
from meme.data.images import open_images
from meme.pipeline import draw, train
from meme.support.grids import grid
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.portraits import IMAGES, portrait


@pytest.fixture(scope="module")
def portrayed():
    config = preset("digits-meme").with_(training={"steps": 2, "batch_size": 4})
    images = open_images("digits", size=8, channels=1)
    ensemble = train(config, images)
    trial = TrialRecord(0, "complete", "candidate", config, {}, "", None)
    return ensemble, portrait(trial, ensemble, images, seed=7)


def test_the_film_ends_with_the_images_that_are_drawn(portrayed):
    ensemble, found = portrayed
    drawn = torch.cat(list(draw(ensemble, IMAGES, 7)))
    last = np.array(Image.open(io.BytesIO(found.film[-1].png)))
    assert np.array_equal(last, grid(drawn, columns=1).numpy()[..., 0])


def test_experts_follow_each_other_from_noise_to_data(portrayed):
    _, found = portrayed
    assert [frame.expert for frame in found.film] == [0, 4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1]
    levels = [frame.timestep for frame in found.film]
    assert levels == sorted(levels, reverse=True) and levels[-1] == 0
    assert len({frame.png for frame in found.film}) == len(found.film)


def test_spectra_are_one_an_expert_and_begin_at_zero(portrayed):
    _, found = portrayed
    assert [(spectrum.expert, spectrum.timestep) for spectrum in found.spectra] == [(1, 125), (2, 375), (3, 625), (4, 875)]
    for spectrum in found.spectra:
        assert spectrum.frequencies == (0.0, 0.25, 0.5, 0.75, 1.0) and spectrum.relative_log_amplitude[0] == 0
