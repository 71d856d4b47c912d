"""Settings of a search: every option of ``run_search.py``, validated in one place."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from meme.config.presets import preset
from meme.config.schema import Config, Settings
from meme.errors import UserError
from meme.support.files import expanded
from meme.support.precision import Precision
from search_spaces.space import PAPER

Objective = Literal["fid", "kid", "macs", "params", "latency_ms"]
QUALITIES = ("fid", "kid")
LEAST_LAG = 2  # so that one worker and two make the same proposals
TRUNK_SHARE = 0.25  # docs/proxy.md says why
PROXY_SHARE = 44  # steps of a full training for one step of a proxy training
LEAST_AUDITED, MOST_AUDITED = 4, 8  # fewer cannot test a ranking; more need --audit-size
AUDIT_SHARE = 6  # budget for one audited configuration, so that small searches do not spend most of their time on the audit
SAMPLES_SHARE = 4  # samples of a full score for one sample of a proxy score: benchmarks/samples_needed.py


def _at_home(path: Path) -> Path:
    return expanded(path)


Place = Annotated[Path, AfterValidator(_at_home)]
"""Path with ``~`` expanded to the home folder."""


class SearchSettings(Settings):
    """Search the conv/attention split and the expertization probability of every expert of a MEME ensemble."""

    budget: Annotated[int, Field(ge=1)] = 50
    """Number of ensemble trainings at proxy length that the search may spend, including yardsticks. With N experts, one of these
    is N trainings of one expert. Trunks, scores and the stages after the search are extra: --dry-run prints what they cost with
    either strategy. Running the same command again with a larger budget continues the search."""
    strategy: Literal["factorised", "joint"] | None = None
    """factorised: propose and train candidates for every expert, and look for the best cascade of these. joint: each trial is a
    whole configuration. None: joint if a dimension belongs to all experts at once, else factorised."""
    data: str | None = None
    """Images to train on: digits (embedded), or the path of a folder or zip. None: those of the preset."""
    preset: str | None = None
    """Network and training to search around. None: digits-meme for the digits, cifar10-meme (32x32 colour) for other images."""
    image_size: Annotated[int, Field(ge=4)] | None = None
    """Image size in pixels a side. None: the preset's."""
    study: Place | None = None
    """Folder for all files of the search. None: results/ and the preset's name."""
    storage: str | None = None
    """URL of a database for the study's record, e.g. postgresql://user@host/name. None: a journal in the study's folder."""
    engine: Literal["ray", "local"] = "ray"
    """Run trials on Ray Tune, with its dashboard, or in processes of this machine without Ray."""
    ray_address: str | None = None
    """Join the Ray cluster at this address (host:port, or auto for one on this machine). None: start Ray on this machine."""
    dashboard_host: str = "127.0.0.1"
    """Address on which Ray's dashboard listens. 127.0.0.1: only this machine can open it. 0.0.0.0: everyone who can reach this
    machine can open it, and run programs on the cluster."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Number of trials that run at a time. None: as many as the CPU cores (and GPUs) hold."""
    cpus_per_trial: Annotated[int, Field(ge=1)] = 1
    """CPU cores of a trial, which is also its number of threads."""
    gpus_per_trial: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a GPU that a trial takes: with 0.25, four trials share one. Ignored on the CPU."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """Number format of training and sampling: bf16, fp16 or fp32. auto: bf16 on a GPU, fp32 elsewhere."""
    proxy_steps: Annotated[int, Field(ge=1)] | None = None
    """Training steps of an expert in a trial. None: one for every 44 of the preset's full training."""
    samples: Annotated[int, Field(ge=2)] | None = None
    """Number of images drawn for every score. None: the preset's number for the last scores of winner and yardsticks, a quarter
    of it for trials."""
    trunk_share: Annotated[float, Field(ge=0.0, lt=1.0)] = TRUNK_SHARE
    """Share of the full training's steps that go to the trunk, one network trained on all timesteps. Every candidate starts from
    it, also in the winner's full training. The budget does not count it. 0: candidates start from random weights."""
    training_seeds: Annotated[int, Field(ge=1)] = 1
    """Number of seeds with which every candidate is trained. Its score is their mean. The budget counts each training."""
    cascades_per_candidate: Annotated[int, Field(ge=1)] = 4
    """Factorised: number of cascades that are scored for every candidate of an expert."""
    rungs: Annotated[int, Field(ge=1, le=6)] = 1
    """Factorised: number of training lengths. 1: all candidates are trained to proxy length. 2: all are trained to half of it,
    and the better half, by non-dominated rank, to the whole. 3: the first length is a quarter, and so on. With more rungs the
    same budget pays for more candidates."""
    bank: Place | None = None
    """Folder of trained experts, which studies on the same data may share. None: bank in the study's folder."""
    bank_gib: Annotated[float, Field(gt=0.0)] | None = None
    """Largest size of the bank. Beyond it, the least recently used experts are deleted. None: no limit."""
    objectives: tuple[Objective, ...] = ("fid", "macs")
    """Quantities to minimise: fid or kid first, then any of macs, params and latency_ms."""
    dimensions: tuple[str, ...] = PAPER
    """Dimensions to search: split and p, which the paper sets by hand; also pool_stride, low_pool, high_pool and time inside the
    iFormer blocks, experts (their number) and boundaries (of their intervals). See docs/add-a-dimension.md."""
    max_macs: Annotated[float, Field(gt=0.0)] | None = None
    """Refuse, before any training, candidates with more multiply-accumulates per image and step than this, e.g. 4.2e6."""
    max_params: Annotated[float, Field(gt=0.0)] | None = None
    """Refuse candidates with more parameters, all experts together."""
    max_latency_ms: Annotated[float, Field(gt=0.0)] | None = None
    """Refuse candidates that take longer for an image, all sampler steps together. Each network is measured once for each kind of
    device, in a process like a trial's, and the study records the result."""
    sampler: Literal["model", "tpe", "nsga2", "random"] | None = None
    """Method that proposes candidates: Optuna's multi-objective TPE or NSGA-II, random points, or (model, factorised only) the
    surrogate. None: model for factorised, TPE for joint."""
    warm_start: Place | None = None
    """Folder of an earlier study whose Pareto front is proposed first."""
    proposal_lag: Annotated[int, Field(ge=1)] | None = None
    """Each proposal ignores the results of the last N trials, so up to N can run at a time without changing what is proposed.
    None: the number that run at a time, at least 2; a study that is continued keeps its own."""
    features: Literal["auto", "inception", "classifier", "random"] | None = None
    """Feature space of the FID. None: the preset's. auto: Inception if its weights are available, else chosen by the data."""
    inception_weights: Place | None = None
    """Inception's TorchScript file, for machines with no network (or the environment variable MEME_INCEPTION)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the proposals and of all noise, which is common to all candidates."""
    strict: bool = False
    """Refuse a data set with unreadable files instead of skipping them."""
    follow_links: bool = False
    """Follow links that lead out of the folder of images, and linked folders. Their targets are printed."""
    fresh: bool = False
    """Read the images again, even if the cache has them."""
    audit_factor: Annotated[int, Field(ge=0)] = 2
    """After the search, train the finalists and a random sample of other candidates this many times longer, choose the winner
    by these scores, and test the ranking at proxy length. 0: no audit."""
    audit_seeds: Annotated[int, Field(ge=1)] = 1
    """Number of training seeds of the audit. The first is the search's own."""
    audit_size: Annotated[int, Field(ge=LEAST_AUDITED)] | None = None
    """Number of audited configurations. None: a sixth of the budget, at least 4 and at most 8."""
    p_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.35
    """Share of the full training, including the trunk, at which p is chosen after the search: half and twice the p of each of the
    winner's experts are tried, because shorter trainings rank p wrongly. 0: p is searched like all other dimensions."""
    confirm_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    """At the end, train winner and hand-made pattern to this share of the full training, including the trunk, with seeds that
    chose neither, and recommend the better of the two. 0: no confirmation."""
    confirm_seeds: Annotated[int, Field(ge=2)] = 3
    """Number of training seeds of the confirmation."""
    watch: bool = False
    """Serve the report while the search runs, on this machine only. The address is printed."""
    watch_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of that address. 0: any free port."""
    retrain: bool = False
    """After the search, train the winner in full, draw samples from it and score it."""
    workers_per_expert: Annotated[int, Field(ge=1)] = 1
    """Number of processes that train one expert of the winner together, each with a part of every batch and a GPU of its own.
    Only with engine ray."""
    dry_run: bool = False
    """Print the settings, the size of the space and the cost of a trial, then exit."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.workers and self.proposal_lag and self.workers > self.proposal_lag:
            raise UserError(f"workers: at most proposal_lag {self.proposal_lag}, not {self.workers}: the others would only wait")
        if self.sampler == "model" and self.strategy_name == "joint":
            raise UserError("sampler: model needs strategy factorised; allowed with joint are tpe, nsga2 and random")
        if self.workers_per_expert > 1 and self.engine != "ray":
            raise UserError(f"workers_per_expert: must be 1 with engine local, not {self.workers_per_expert}; or take engine ray")
        self._check_rungs()
        self._check_lengths()
        first, rest = self.objectives[:1], self.objectives[1:]
        if not set(first) & set(QUALITIES) or set(rest) & set(QUALITIES) or len(set(rest)) < len(rest):
            raise UserError(
                f"objectives: fid or kid first, then any of macs, params and latency_ms, not {' '.join(self.objectives)}"
            )
        return self

    def _check_lengths(self) -> None:
        """Raise ``UserError`` if a share of the full training gives experts fewer steps than a trial."""
        shares = {"p_share": self.p_share if self.chooses_p_last else 0.0, "confirm_share": self.confirm_share}
        full = self.full_config()
        proxy = self.as_proxy(full).training
        least = (len(full.experts) * proxy.steps + proxy.trunk_steps) / self._all_steps(full)
        for name, share in shares.items():
            if 0 < share < least:
                raise UserError(f"{name}: must be 0, or at least {least:.3g}, which trunk and trial take, not {share:g}")

    def _check_rungs(self) -> None:
        if self.rungs == 1:
            return
        if self.strategy_name != "factorised":
            raise UserError("rungs: more than 1 needs strategy factorised")
        most = self.steps_of_a_proxy(self.full_config()).bit_length()
        if self.rungs > most:
            raise UserError(f"rungs: {self.rungs - 1} times half of the proxy length is less than one step; at most {most} here")

    @property
    def strategy_name(self) -> str:
        """Strategy in force."""
        shared = {"experts", "boundaries"} & set(self.dimensions)
        return self.strategy or ("joint" if shared else "factorised")

    @property
    def chooses_p_last(self) -> bool:
        """True if p is chosen for the winner alone and is no dimension of the searched space."""
        return self.p_share > 0 and "p" in self.dimensions and set(self.dimensions) != {"p"}

    @property
    def searched(self) -> tuple[str, ...]:
        """Dimensions of the searched space."""
        return tuple(name for name in self.dimensions if name != "p" or not self.chooses_p_last)

    @property
    def proposer(self) -> str:
        """Sampler in force."""
        return self.sampler or ("model" if self.strategy_name == "factorised" else "tpe")

    @property
    def first_objective(self) -> Literal["fid", "kid"]:
        """First objective, the quality of the images."""
        return "kid" if self.objectives[0] == "kid" else "fid"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds of every candidate."""
        return tuple(range(self.seed, self.seed + self.training_seeds))

    @property
    def audited(self) -> int:
        """Number of configurations that the audit trains."""
        return self.audit_size or min(MOST_AUDITED, max(LEAST_AUDITED, self.budget // AUDIT_SHARE))

    @property
    def limits(self) -> dict[str, float]:
        """Upper limits on the costs of candidates, by the name of the cost."""
        given = {"macs": self.max_macs, "params": self.max_params, "latency_ms": self.max_latency_ms}
        return {name: limit for name, limit in given.items() if limit is not None}

    @property
    def asks_latency(self) -> bool:
        """True if latency is minimised or limited."""
        return "latency_ms" in {*self.objectives, *self.limits}

    @property
    def preset_name(self) -> str:
        if self.preset:
            return self.preset
        return "digits-meme" if self.data in (None, "digits") else "cifar10-meme"

    @property
    def folder(self) -> Path:
        return self.study or Path("results") / self.preset_name

    @property
    def bank_folder(self) -> Path:
        """Folder of the experts that the search trains."""
        return self.bank or self.folder / "bank"

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files and folders outside the study that trials read on every machine."""
        data = Path(_absolute(self.data)) if self.data and self.data != "digits" else None
        return tuple(path.absolute() for path in (data, self.inception_weights, self.bank) if path)

    def full_config(self) -> Config:
        """Return the hand-made pattern at full training length. All other configs of the search are derived from it."""
        return self.applied_to(preset(self.preset_name))

    def applied_to(self, config: Config) -> Config:
        """Return ``config`` with this search's data, image size, scoring and seed."""
        image = {"size": self.image_size} if self.image_size else {}
        evaluation: dict[str, Any] = {"seed": self.seed}
        own_images = self.data not in (None, "digits")  # a preset's choice of features is for its own images
        evaluation |= {"features": self.features or "auto"} if self.features or own_images else {}
        evaluation |= {"samples": self.samples} if self.samples else {}
        return config.with_(
            data=_absolute(self.data) if self.data else config.data,
            follow_links=self.follow_links or config.follow_links,
            image=image,
            evaluation=evaluation,
            training={"seed": self.seed, "precision": self.precision},
            sampling={"precision": self.precision},
        )

    def trunk_steps_of(self, config: Config) -> int:
        """Return the steps of the trunk from which the experts of ``config`` start; 0 for a single model.

        ``config`` has the full training length.
        """
        full = preset(self.preset_name)
        if len(config.experts) == 1 or len(full.experts) == 1:
            return 0
        return round(self.trunk_share * self._all_steps(full))

    def steps_of_a_proxy(self, config: Config) -> int:
        """Return the training steps of an expert of ``config`` in a trial, after those of the trunk.

        ``config`` has the full training length, and the result is a fixed share of it. A single model, which has no trunk, also
        gets the trunk's share.
        """
        full = preset(self.preset_name)
        share = (self.proxy_steps or -(-full.training.steps // PROXY_SHARE)) / full.training.steps
        own = max(1, round(config.training.steps * share))
        alone = len(config.experts) == 1 and len(full.experts) > 1
        return own + (round(self.trunk_share * config.training.steps) if alone else 0)

    def as_proxy(self, config: Config) -> Config:
        """Return ``config``, which has the full training length, with the training length and number of samples of a trial."""
        samples = self.samples or -(-config.evaluation.samples // SAMPLES_SHARE)
        training = {"steps": self.steps_of_a_proxy(config), "trunk_steps": self.trunk_steps_of(config)}
        return config.with_(training=training, evaluation={"samples": max(2, samples)})

    def in_full(self, config: Config) -> Config:
        """Return ``config`` with this search's trunk as part of its full training, whose total number of steps stays the same."""
        trunk = self.trunk_steps_of(config)
        if not trunk:
            return config
        own = (self._all_steps(config) - trunk) // len(config.experts)
        return config.with_(training={"steps": max(1, own), "trunk_steps": trunk})

    def trained_to(self, config: Config, share: float) -> Config:
        """Return ``config``, which is a trial's, with ``share`` of the full training's steps, but at least the trial's."""
        total = share * self._all_steps(self.full_config())
        own = round((total - config.training.trunk_steps) / len(config.experts))
        return config.with_(training={"steps": max(config.training.steps, own)})

    @staticmethod
    def _all_steps(config: Config) -> int:
        """Return the training steps of all experts together, without a trunk."""
        return len(config.experts) * config.training.steps

    def in_force(self) -> dict[str, str | int | float | None]:
        """Return the settings that must not change when a study is continued, because they change its scores or proposals."""
        return {
            "preset": self.preset_name,
            "image_size": self.full_config().image.size,
            "precision": self.precision,
            "proxy_steps": self.steps_of_a_proxy(self.full_config()),
            "trunk_share": self.trunk_share,
            "set_alpha_to_one": self.full_config().sampling.set_alpha_to_one,
            "samples": self.as_proxy(self.full_config()).evaluation.samples,
            "strategy": self.strategy_name,
            "sampler": self.proposer,
            "training_seeds": self.training_seeds,
            "cascades_per_candidate": self.cascades_per_candidate if self.strategy_name == "factorised" else None,
            "rungs": self.rungs,
            "objectives": " ".join(self.objectives),
            "proposal_lag": self.proposal_lag or LEAST_LAG,
            "dimensions": " ".join(sorted(set(self.searched))) + (", p last" if self.chooses_p_last else ""),
            "max_macs": self.max_macs,
            "max_params": self.max_params,
            "max_latency_ms": self.max_latency_ms,
            "seed": self.seed,
        }


def _absolute(data: str) -> str:
    """Return the path of ``data`` as an absolute one, because workers and later commands run in other folders."""
    return data if data == "digits" else os.path.abspath(expanded(data))
