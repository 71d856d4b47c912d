"""End of a search: export of configs and weights, the report, and the results printed on the console."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch

from meme.cli.console import console, remarks
from meme.config.schema import Config
from meme.data.images import Images
from meme.diffusion.ensemble import Ensemble
from meme.errors import shell_command
from meme.pipeline import pick_device
from meme.scoring.features import FeatureSpace
from meme.support.files import written_whole
from meme_nas.record.effort import effort_of
from meme_nas.record.folder import LOCK, trial_folder
from meme_nas.record.ranking import front, winner
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.claims import audit_words, confirmed_words, dominant_words, judged_words, unconfirmed_words
from meme_nas.report.costs import costs_of
from meme_nas.report.page import write_report
from meme_nas.report.portraits import portrait, portrait_macs
from meme_nas.report.spread import dominant
from meme_nas.report.summary import Portrait, Summary
from meme_nas.report.words import costs_text, effort_text, metric_name
from meme_nas.rescoring.audit import agreements, signals_of
from meme_nas.rescoring.chosen import Chosen
from meme_nas.rescoring.confirmation import Confirmation
from meme_nas.rescoring.finalists import FRESH_SEEDS, Finalists
from meme_nas.results import export_configs
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import Strategy
from meme_nas.worker.bank import Banked, ExpertBank
from meme_nas.worker.objective import STATES, Basis, restore_ensemble
from meme_nas.worker.shared_sampling import StateCache

MOST_LIVE_MACS = 1e11  # MACs of a portrait during a search; a larger one would take a core from the trials for too long


def so_far(settings: SearchSettings, search: Strategy, facts: dict[str, str]) -> Summary:
    """Return the summary of a search as recorded, without scores of later stages."""
    trials = list(search.study.trials)  # a copy: the search may still append to its list
    return Summary(
        title=f"MEME search: {settings.preset_name}",
        folder=settings.folder,
        trials=trials,
        winner=winner(trials, settings.objectives),
        importance=search.study.importance(),
        dominant=dominant(trials, settings.first_objective),
        facts=facts,
        objectives=settings.objectives,
    )


def report_before_audit(settings: SearchSettings, search: Strategy, basis: Basis, portraits: "Portraits") -> None:
    """Write the report of the search alone, to be read while the audit runs."""
    summary = so_far(settings, search, facts_of(settings, basis.images, basis.space))
    path = settings.folder / "report.html"
    write_report(replace(summary, portraits=portraits.of(summary.trials, summary.winner)), path)
    remarks.print(f"the report before the audit: {path}")


def conclude(
    settings: SearchSettings,
    search: Strategy,
    chosen: Chosen,
    finalists: Finalists,
    confirmation: Confirmation | None,
    basis: Basis,
    portraits: "Portraits",
) -> Summary:
    """Export configs and weights, copy the winner's samples, write the report."""
    folder, trials, best, audited = settings.folder, search.study.trials, chosen.best, chosen.audited
    confirmed = confirmation.result() if confirmation else None
    export_configs(folder, trials, settings, best, confirmed)
    bank = ExpertBank(settings.bank_folder, basis.data, basis.held_out, search=folder / LOCK)
    for trial in finalists.chosen:
        restore_ensemble(trial_folder(folder, trial.number), bank, pick_device(settings.device))
    facts = facts_of(settings, basis.images, basis.space)
    effort = effort_of(search.every_trial, settings.training_seeds)
    facts["the search took"] = effort_text(effort)
    if chosen.probabilities:
        facts["p of the winner"] = chosen.probabilities.said()
    summary = replace(
        so_far(settings, search, facts),
        winner=best,
        finalists=finalists.results(),
        audited=audited,
        agreements=agreements(audited, signals_of(audited, search)) if audited else [],
        regret=chosen.regret,
        judged=chosen.judged,
        portraits=portraits.of(trials, best),
        effort=effort,
        confirmed=confirmed,
    )
    if summary.recommended:
        with written_whole(folder / "samples.png") as partial:
            shutil.copyfile(summary.folder_of(summary.recommended) / "samples.png", partial)
    write_report(summary, folder / "report.html")
    StateCache(folder / STATES).remove()  # only used while cascades are scored
    return summary


class Portraits:
    """Portraits of the winner and the hand-made pattern, each made once. Experts that the bank lacks are trained again."""

    def __init__(self, settings: SearchSettings, basis: Basis):
        self.device, self._data, self._seed = pick_device(settings.device), basis.data, {"seed": settings.seed}
        self.bank = ExpertBank(settings.bank_folder, basis.data, basis.held_out, search=settings.folder / LOCK)
        self._made: dict[str, Portrait] = {}  # by architecture

    def of(self, trials: Sequence[TrialRecord], best: TrialRecord | None) -> list[Portrait]:
        """Return the portraits of ``best`` and of the hand-made pattern among ``trials``, as far as they can be made."""
        chosen = _portrayed(trials, best)
        for trial in chosen:
            config = trial.config.with_(training=self._seed)
            key = trial.architecture_id
            if key not in self._made and (ensemble := self.ensemble(config)):
                self._made[key] = portrait(trial, ensemble, self._data, FRESH_SEEDS[0], self.device)
        made = {trial.architecture_id: trial for trial in chosen}
        self._made = {key: replace(self._made[key], trial=trial) for key, trial in made.items() if key in self._made}
        return list(self._made.values())

    def ensemble(self, config: Config) -> Ensemble | None:
        """Return the ensemble of ``config`` with trained experts; None if it shall have no portrait."""
        numbers = range(1, len(config.experts) + 1)
        return self.with_experts(config, [self.bank.obtain(config, number, self.device) for number in numbers])

    def with_experts(self, config: Config, banked: Sequence[Banked]) -> Ensemble:
        return Ensemble(config, [self.bank.load(config, n, each, self.device) for n, each in enumerate(banked, start=1)])


class LivePortraits(Portraits):
    """Portraits of the best trial so far and the hand-made pattern, made while the search runs.

    They are made on the CPU from experts in the bank, and only if they take at most ``MOST_LIVE_MACS``.
    """

    def __init__(self, settings: SearchSettings, basis: Basis):
        super().__init__(settings, basis)
        self.device = torch.device("cpu")

    def ensemble(self, config: Config) -> Ensemble | None:
        """Return the ensemble with the bank's experts; None if one was evicted or the portrait would take long."""
        if config.first_stage or portrait_macs(config) > MOST_LIVE_MACS:
            return None
        found = [each for number in range(1, len(config.experts) + 1) if (each := self.bank.find(config, number))]
        return self.with_experts(config, found) if len(found) == len(config.experts) else None


def _portrayed(trials: Sequence[TrialRecord], best: TrialRecord | None) -> list[TrialRecord]:
    hand_made = [trial for trial in trials if trial.kind == "hand-made" and trial.state == "complete" and trial is not best]
    return [*([best] if best else []), *hand_made]


def facts_of(settings: SearchSettings, images: Images, space: FeatureSpace) -> dict[str, str]:
    """Return the facts, by name, that a reader needs beside the scores to judge and repeat them: see ``Summary.facts``."""
    full = settings.full_config()
    config = settings.as_proxy(full)
    used = ("meme-nas", "torch", "numpy", "optuna", "ray", "diffusers", "clean-fid", "ptflops")
    versions = ", ".join(f"{name} {found}" for name in used if (found := _installed(name)))
    return {
        "command": shell_command(["python", *sys.argv]),
        "data": f"{images.name}: {len(images)} images, {config.image.channels} x {config.image.size} x {config.image.size}",
        "feature space": space.name,
        "minimised": ", ".join(settings.objectives),
        "scored on": f"{config.evaluation.samples} samples, {config.sampling.sampler} {config.sampling.steps} steps",
        "winner and yardsticks on": f"{full.evaluation.samples} samples",
        "trunk": f"{config.training.trunk_steps} steps, from which every expert starts",
        "proxy training": f"{config.training.steps} steps of {config.training.batch_size} an expert",
        "full training": f"{full.training.steps} steps an expert",
        "versions": f"Python {platform.python_version()}, {versions}",
        "hardware": f"{os.cpu_count()} cores, {_gpu()}",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def say_results(settings: SearchSettings, summary: Summary) -> None:
    """Print the last scores, the verdict, the effort and the next command."""
    folder, best, metric = settings.folder, summary.winner, metric_name(summary)
    if best is None:
        console.print(f"no trial was scored; the reasons are in {folder / 'trials.csv'}")
        return
    for finalist in summary.finalists:
        name = f"winner (trial {finalist.trial.number})" if finalist.trial is best else finalist.trial.kind
        costs = costs_text(finalist.trial, costs_of(settings.objectives))
        console.print(f"  {name:<20} {metric} {finalist.mean:.3f} +- {finalist.deviation:.3f}  {costs}")
    console.print(
        f"  ({metric} over {best.scored.features}, {len(FRESH_SEEDS)} fresh sampling seeds, proxy training; for these weights: "
        "of the architectures it says nothing)"
    )
    for sentence in _judgements(summary, best):
        console.print(sentence)
    if summary.effort:
        console.print(f"The search took {effort_text(summary.effort)}.")
    console.print(
        f"{len(front(summary.trials, settings.objectives))} trials on the Pareto front. Look at {folder / 'report.html'}"
    )
    if not settings.retrain:
        console.print(
            f"train the winner in full: {shell_command(['python', '-m', 'meme', 'train', str(folder / 'winner.yaml')])}"
        )


def _judgements(summary: Summary, best: TrialRecord) -> list[str]:
    """Return the sentences on audit and confirmation."""
    said = audit_words(summary) if summary.audited else []
    if summary.dominant:
        said.append(dominant_words(summary.dominant, summary.metric))
    if summary.confirmed:
        return [*said, confirmed_words(summary.confirmed, summary.metric)]
    return [*said, judged_words(summary.judged, summary.metric) if summary.judged else unconfirmed_words(best)]


def _installed(name: str) -> str | None:
    """Return the version of a package; None if it is not installed. Ray is optional, and this project can run in place."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
