"""Forecast of a search's size, cost and duration, printed before it begins.

The duration is extrapolated from a few training steps of the hand-made pattern, timed on images of zeros.
"""

import time
from pathlib import Path

import numpy as np
import torch

from meme.cli.console import console
from meme.config.schema import Config
from meme.data.images import Images, existing
from meme.data.sources import open_layout
from meme.data.survey import SMALLEST
from meme.errors import UserError
from meme.pipeline import pick_device
from meme.scoring.cost import ensemble_cost, sampler_passes
from meme.scoring.metrics import require_images
from meme.support.threads import threads
from meme.training.trainer import PASSES_A_STEP, run_training
from meme_nas.engines.placement import check_engine, check_places, workers_for
from meme_nas.record.effort import Effort
from meme_nas.record.study import Study
from meme_nas.report.words import duration, quantity
from meme_nas.rescoring.confirmation import SAMPLINGS
from meme_nas.rescoring.finalists import FRESH_SEEDS
from meme_nas.rescoring.probabilities import FACTORS
from meme_nas.rescoring.probabilities import SAMPLING_SEEDS as P_SEEDS
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import yardsticks_of
from meme_nas.strategies.rungs import factorised
from search_spaces.domain import size
from search_spaces.space import build_space

START_SECONDS = {"local": 30.0, "ray": 45.0}  # start of the workers, plus the last score to the report; on two cores
LONG = 2 * 3600  # seconds; the forecast of a longer search suggests a smaller network
LEAST_TIMED_STEPS, MOST_TIMED_STEPS = 2, 20
MOST_MACS_ON_A_CPU = 5e10  # some seconds; if one step has more, only a part of its batch is timed
MOST_MACS_ON_A_GPU = 5e12


def describe(settings: SearchSettings) -> None:
    """Print what ``--dry-run`` shows: settings in force, size of the space, cost of one trial, and the forecast.

    Nothing is trained except the timed steps. Raises ``UserError`` if data, engine or placement cannot work.
    """
    config = settings.full_config()
    check_places(settings, config)
    check_engine(settings)
    if config.data and config.data != "digits":
        with open_layout(existing(config.data), follow_links=config.follow_links) as layout:  # raises if it holds no image
            if layout.labels is not None:  # else a file holds many images
                require_images((settings.first_objective,), len(layout.members), Path(config.data).name)
    proxy, cost = settings.as_proxy(config), ensemble_cost(config)
    space = build_space(config, settings.searched)
    for name, value in {**settings.in_force(), "data": config.data, "study": settings.folder, "budget": settings.budget}.items():
        console.print(f"{name:<16} {value}")
    images_trained = proxy.training.steps * proxy.training.batch_size * len(proxy.experts)
    training = PASSES_A_STEP * images_trained * cost.macs
    sampling = proxy.evaluation.samples * proxy.sampling.steps * cost.macs
    console.print(f"space            {len(space.domains)} dimensions, {size(space.domains):.3g} points")
    console.print(f"hand-made        {quantity(cost.params)} parameters, {quantity(cost.macs)} MACs an image and step")
    console.print(
        f"one trial        {len(proxy.experts)} experts x {proxy.training.steps} steps x {proxy.training.batch_size} images, "
        f"then {proxy.evaluation.samples} samples x {proxy.sampling.steps} steps: about {quantity(training + sampling)} MACs"
    )
    for line, words in zip(effort_lines(settings), ("search", ""), strict=False):
        console.print(f"{words:<16} {line}")
    console.print(f"trials at a time {workers_for(settings)} on {pick_device(settings.device)}")
    console.print("\n".join(forecast_lines(settings)))


def forecast_lines(settings: SearchSettings) -> list[str]:
    """Return a sentence on the duration of the search here, and a shorter alternative if it takes very long without a GPU."""
    seconds = START_SECONDS[settings.engine] + search_seconds(settings, workers_for(settings))
    lines = [f"{_stages(settings)} about {duration(seconds)} on this machine"]
    smallest = settings.model_copy(update={"preset": SMALLEST, "image_size": None})
    is_smaller = ensemble_cost(smallest.full_config()).macs < ensemble_cost(settings.full_config()).macs
    if seconds > LONG and pick_device(settings.device).type == "cpu" and settings.preset_name != "digits-meme" and is_smaller:
        shorter = duration(START_SECONDS[smallest.engine] + search_seconds(smallest, workers_for(smallest)))
        lines.append(f"without a GPU, --preset {SMALLEST} ({smallest.full_config().image.size} pixels a side) takes {shorter}")
    return lines


def effort_lines(settings: SearchSettings) -> list[str]:
    """Return the planned effort with the strategy in force, and with the other one if the settings permit it, a line each."""
    lines = [f"{settings.strategy_name}: {_effort_words(planned(settings))}"]
    if unused := settings.budget - ensembles_paid(settings):
        lines[0] += f"; {unused} of the budget of {settings.budget} stay unspent, as no more candidates are left"
    other = "joint" if settings.strategy_name == "factorised" else "factorised"
    try:
        told = {"strategy": other, "sampler": None, "rungs": 1}
        lines.append(f"{other}: {_effort_words(planned(SearchSettings(**settings.model_dump() | told)))}")
    except UserError:  # a dimension that all experts share, which only joint search can vary
        pass
    return lines


def _effort_words(effort: Effort) -> str:
    return (
        f"{effort.charged:.0f} trainings of an expert, {quantity(effort.training)} passes of an image; "
        f"scoring takes up to {quantity(effort.scoring)} more"
    )


def planned(settings: SearchSettings) -> Effort:
    """Return the effort of the search without audit and later stages.

    It assumes that no expert is proposed twice and that no cascades share sampler steps.
    """
    proxy, ensembles = settings.as_proxy(settings.full_config()), ensembles_paid(settings)
    steps = ensembles * len(proxy.experts) * proxy.training.steps + _trunk_steps(settings, proxy)
    trainings = float(ensembles * len(proxy.experts))
    training = PASSES_A_STEP * steps * proxy.training.batch_size
    return Effort(trainings, trainings, training, _scores(settings, ensembles) * sampler_passes(proxy))


def ensembles_paid(settings: SearchSettings) -> int:
    """Return the number of ensemble trainings that the budget pays for, or fewer if the space has fewer candidates."""
    if settings.strategy_name == "joint":
        return settings.budget
    objectives = tuple(name for name in settings.objectives if name != "latency_ms")
    unmeasured = settings.model_copy(update={"objectives": objectives, "max_latency_ms": None})
    search = factorised(unmeasured, Study.in_memory(objectives))
    if not search.exhausted:
        return settings.budget
    return min(settings.budget, settings.training_seeds * (search.most + len(search.yardsticks) - 1))


def _scores(settings: SearchSettings, ensembles: int) -> int:
    """Return the number of scores that the search makes if it trains ``ensembles`` ensembles."""
    if settings.strategy_name == "joint":
        return ensembles
    yardsticks, seeds = len(yardsticks_of(settings)), settings.training_seeds
    candidates = max(1, ensembles // seeds - (yardsticks - 1))
    return seeds * (candidates * settings.cascades_per_candidate + yardsticks)


def _trunk_steps(settings: SearchSettings, proxy: Config) -> int:
    """Return the training steps of all trunks: the iU-Net's, and the Multi-Expert's, from which the single model starts too."""
    return settings.training_seeds * min(2, len(yardsticks_of(settings))) * proxy.training.trunk_steps


def _stages(settings: SearchSettings) -> str:
    """Return the stages that the forecast covers, as subject and verb of its sentence."""
    audit, confirmation = settings.audit_factor > 0, settings.confirm_share > 0
    if audit and confirmation:
        return "the search, its audit and the confirmation of its winner take"
    if audit or confirmation:
        return f"the search and {'its audit' if audit else 'the confirmation of its winner'} take"
    return "the search takes"


def search_seconds(settings: SearchSettings, workers: int) -> float:
    """Return the seconds of all trainings and scores of search, audit, confirmation and last scores, ``workers`` at a time.

    The hand-made pattern is timed in place of every architecture, as these differ little. The result is an upper bound for
    cascades that share sampler steps, and for audited configurations that share experts.
    """
    proxy = settings.as_proxy(settings.full_config())
    with threads(settings.cpus_per_trial):
        image_seconds = _training_seconds_an_image(proxy, pick_device(settings.device))
    trained = _steps_trained(settings, proxy) * proxy.training.batch_size
    return (trained + _images_drawn(settings) * proxy.sampling.steps / PASSES_A_STEP) * image_seconds / workers


def _steps_trained(settings: SearchSettings, proxy: Config) -> int:
    """Return the training steps of one expert that search, audit and confirmation take together."""
    each, trunk, audited = len(proxy.experts) * proxy.training.steps, proxy.training.trunk_steps, _audited(settings)
    steps = ensembles_paid(settings) * each + _trunk_steps(settings, proxy)
    if audited:
        others = settings.audit_seeds - 1  # with the search's seed, experts resume from the bank
        steps += audited * each * (settings.audit_seeds * settings.audit_factor - 1) + others * trunk
    if settings.chooses_p_last:
        longer = settings.trained_to(proxy, settings.p_share).training
        steps += (1 + len(FACTORS)) * len(proxy.experts) * longer.steps
    if settings.confirm_share:
        longer = settings.trained_to(proxy, settings.confirm_share).training
        steps += settings.confirm_seeds * (trunk + 2 * len(proxy.experts) * longer.steps)
    return steps


def _images_drawn(settings: SearchSettings) -> int:
    """Return the number of images drawn for all scores."""
    of_trials, config = _scores(settings, ensembles_paid(settings)), settings.full_config()
    short, long = settings.as_proxy(config).evaluation.samples, config.evaluation.samples
    last = (len(yardsticks_of(settings)) + 1) * len(FRESH_SEEDS)
    last_short = (1 + len(FACTORS) * len(config.experts)) * len(P_SEEDS) if settings.chooses_p_last else 0
    last += 2 * settings.confirm_seeds * SAMPLINGS if settings.confirm_share else 0
    return (of_trials + _audited(settings) * settings.audit_seeds + last_short) * short + last * long


def _audited(settings: SearchSettings) -> int:
    return settings.audited if settings.audit_factor else 0


def _training_seconds_an_image(config: Config, device: torch.device) -> float:
    """Return the seconds of a training step of expert 1, per image.

    The time of one step is subtracted from that of several, because set-up on a busy machine can take longer than the steps of a
    small network.
    """
    images, step_macs = config.training.batch_size, PASSES_A_STEP * ensemble_cost(config).macs
    most = MOST_MACS_ON_A_CPU if device.type == "cpu" else MOST_MACS_ON_A_GPU
    if device.type == "cpu":
        images = min(images, max(1, int(most / step_macs)))
    steps = min(MOST_TIMED_STEPS, max(LEAST_TIMED_STEPS, int(most / (images * step_macs))))
    config = config.with_(training={"batch_size": images, "trunk_steps": 0})
    _timed(config, 1, device)  # the first step allocates
    before, longer, after = (_timed(config, count, device) for count in (1, 1 + steps, 1))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # trials are about to need the memory
    return (longer - min(before, after)) / steps / images


def _timed(config: Config, steps: int, device: torch.device) -> float:
    """Return the seconds of a training of ``steps`` steps, including its set-up."""
    images, classes = config.training.batch_size, config.network.classes
    pixels = np.zeros((images, config.image.channels, config.image.size, config.image.size), dtype=np.uint8)
    labels = np.zeros(images, dtype=np.int64) if classes else None
    data = Images("zeros", pixels, labels, classes=(), content_id="", skipped=())
    begun = time.perf_counter()
    run_training(config.with_(training={"steps": steps}), 1, data, None, device)  # waits for the device at its end
    return time.perf_counter() - begun
