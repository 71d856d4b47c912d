"""What a search is told: one validated place for every option of ``run_search.py``."""

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
LEAST_LAG = 2  # so that one worker and two propose the same
TRUNK_SHARE = 0.25  # docs/proxy.md says why
PROXY_SHARE = 44  # a proxy training has one step for so many of the full training
LEAST_AUDITED, MOST_AUDITED = 4, 8  # fewer say nothing of a ranking; more are for those who ask
AUDIT_SHARE = 6  # so that small searches do not spend most of their time on it
SAMPLES_SHARE = 4  # and its score one sample for so many of a full score: benchmarks/samples_needed.py


def _at_home(path: Path) -> Path:
    return expanded(path)


Place = Annotated[Path, AfterValidator(_at_home)]
"""A path, in which ``~`` is the home folder."""


class SearchSettings(Settings):
    """Search the conv/attention split and the expertization probability of every expert of a MEME ensemble."""

    budget: Annotated[int, Field(ge=1)] = 50
    """Trainings of a whole ensemble at proxy length, yardsticks included, that the search may spend: with N experts, N times as
    many trainings of one expert. Trunks, scores and what follows the search come on top: --dry-run says what they take with
    either strategy. Running the same command again with a larger budget continues the search."""
    strategy: Literal["factorised", "joint"] | None = None
    """factorised: propose and train candidates for every expert, and look for the best cascade of those in the bank. joint: a
    trial is a whole configuration. None: factorised, but where dimensions belong to all experts at once joint."""
    data: str | None = None
    """Images to train on: digits (embedded), or the path of a folder or zip. None: what the preset names."""
    preset: str | None = None
    """Network and training to search around. None: digits-meme for the digits, cifar10-meme (32x32 colour) for other images."""
    image_size: Annotated[int, Field(ge=4)] | None = None
    """Pixels a side to train at. None: the preset's."""
    study: Place | None = None
    """Folder for everything the search leaves. None: results/ and the preset's name."""
    storage: str | None = None
    """URL of a database for the study's record, e.g. postgresql://user@host/name. None: a journal in the study's folder."""
    engine: Literal["ray", "local"] = "ray"
    """Run trials on Ray Tune, with its dashboard, or in processes of this machine without Ray."""
    ray_address: str | None = None
    """Join the Ray cluster at this address (host:port, or auto for one on this machine). None: start Ray on this machine."""
    dashboard_host: str = "127.0.0.1"
    """Where Ray's dashboard listens. 127.0.0.1: for this machine alone; 0.0.0.0: for everyone who can reach it, who may then
    run programs on the cluster."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Trials at a time. None: as many as the CPU cores (and GPUs) hold."""
    cpus_per_trial: Annotated[int, Field(ge=1)] = 1
    """CPU cores, and threads, of a trial."""
    gpus_per_trial: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a GPU a trial takes: 0.25 puts four trials on each. Ignored on the CPU."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """Numbers that networks calculate with, trained or sampled: bf16, fp16 or fp32; auto is bf16 on a GPU, fp32 elsewhere."""
    proxy_steps: Annotated[int, Field(ge=1)] | None = None
    """Training steps an expert in a trial. None: one for every 44 of the preset's full training."""
    samples: Annotated[int, Field(ge=2)] | None = None
    """Images drawn for every score. None: for those of winner and yardsticks in the end as many as the preset says, for those of
    trials a quarter."""
    trunk_share: Annotated[float, Field(ge=0.0, lt=1.0)] = TRUNK_SHARE
    """Share of the full training's steps for which one network, the trunk, is trained on all timesteps; every candidate starts
    from it, in the winner's full training too. The budget does not count it. 0: candidates start fresh."""
    training_seeds: Annotated[int, Field(ge=1)] = 1
    """Seeds with which every candidate is trained; its score is their mean, and the budget pays for each."""
    cascades_per_candidate: Annotated[int, Field(ge=1)] = 4
    """Factorised: cascades to put together from the bank and score for every candidate an expert gets."""
    rungs: Annotated[int, Field(ge=1, le=6)] = 1
    """Factorised: lengths at which candidates are trained. 1: proxy length alone. 2: all to half of it, and the better half of
    them, by non-dominated rank, on to the whole; 3: from a quarter; and so on. The same budget then pays for more candidates."""
    bank: Place | None = None
    """Folder of trained experts, which studies on the same data may share. None: bank in the study's folder."""
    bank_gib: Annotated[float, Field(gt=0.0)] | None = None
    """Size the bank may have; beyond it the least recently used experts are deleted. None: no limit."""
    objectives: tuple[Objective, ...] = ("fid", "macs")
    """What is minimised: fid or kid first, then any of macs, params and latency_ms."""
    dimensions: tuple[str, ...] = PAPER
    """What is searched: split and p, which the paper sets by hand; also pool_stride, low_pool, high_pool and time inside the
    iFormer blocks, experts (their number) and boundaries (of their intervals). See docs/add-a-dimension.md."""
    max_macs: Annotated[float, Field(gt=0.0)] | None = None
    """Refuse, before any training, candidates with more multiply-accumulates per image and step than this, e.g. 4.2e6."""
    max_params: Annotated[float, Field(gt=0.0)] | None = None
    """Refuse candidates with more parameters, all experts together."""
    max_latency_ms: Annotated[float, Field(gt=0.0)] | None = None
    """Refuse candidates that take longer for an image, all sampler steps together. Each network is measured once for each kind of
    device, in a process like a trial's, and the study keeps what was measured."""
    sampler: Literal["model", "tpe", "nsga2", "random"] | None = None
    """Who proposes: Optuna's multi-objective TPE or NSGA-II, chance, or (factorised only) the surrogate itself. None: the
    surrogate for factorised, TPE for joint."""
    warm_start: Place | None = None
    """Folder of an earlier study whose Pareto front is proposed first."""
    proposal_lag: Annotated[int, Field(ge=1)] | None = None
    """A proposal knows all results but those of the last so many trials. So many can run at a time, and the proposals do not
    depend on how many do. None: 2, or as many as run at a time; a study that goes on keeps its own."""
    features: Literal["auto", "inception", "classifier", "random"] | None = None
    """Feature space of the FID. None: the preset's; auto: Inception if its weights can be had, else by the data."""
    inception_weights: Place | None = None
    """Inception's TorchScript file, for machines with no network (or the environment variable MEME_INCEPTION)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the proposals and of all noise, which is common to all candidates."""
    strict: bool = False
    """Refuse a data set with unreadable files instead of skipping them."""
    follow_links: bool = False
    """Follow links that lead out of the folder of images, and linked folders; where they lead is printed."""
    fresh: bool = False
    """Read the images again, whatever the cache holds."""
    audit_factor: Annotated[int, Field(ge=0)] = 2
    """After the search, train the finalists and a random sample of other candidates this many times longer, choose the winner
    among the finalists, and say how far the ranking can be trusted. 0: do not."""
    audit_seeds: Annotated[int, Field(ge=1)] = 1
    """Training seeds of the audit; the first is the search's own."""
    audit_size: Annotated[int, Field(ge=LEAST_AUDITED)] | None = None
    """Configurations that are audited. None: a sixth of the budget, but at least 4 and at most 8."""
    p_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.35
    """Share of the full training, trunk included, at which p is chosen once the rest is: half and twice the p of each of the
    winner's experts are tried there, since short trainings can't tell. 0: p is searched like all other dimensions."""
    confirm_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    """At the end, train winner and hand-made pattern to this share of the full training, trunk included, with seeds that chose
    neither, and recommend the better of the two. 0: do not."""
    confirm_seeds: Annotated[int, Field(ge=2)] = 3
    """Training seeds of that comparison."""
    watch: bool = False
    """Serve the report while the search runs, at an address on this machine that is printed."""
    watch_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of that address. 0: any that is free."""
    retrain: bool = False
    """After the search, train the winner in full, draw samples from it and score it."""
    workers_per_expert: Annotated[int, Field(ge=1)] = 1
    """Processes that train one expert of the winner together, each with its part of every batch and a GPU of its own. Only with
    engine ray."""
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
        """Refuse a share of the full training that leaves experts less than they have in a trial."""
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
        """The strategy in force."""
        shared = {"experts", "boundaries"} & set(self.dimensions)
        return self.strategy or ("joint" if shared else "factorised")

    @property
    def chooses_p_last(self) -> bool:
        """Whether p is chosen for the winner alone, and no dimension of the space that is searched."""
        return self.p_share > 0 and "p" in self.dimensions and set(self.dimensions) != {"p"}

    @property
    def searched(self) -> tuple[str, ...]:
        """The dimensions of the space that is searched."""
        return tuple(name for name in self.dimensions if name != "p" or not self.chooses_p_last)

    @property
    def proposer(self) -> str:
        """The sampler in force."""
        return self.sampler or ("model" if self.strategy_name == "factorised" else "tpe")

    @property
    def first_objective(self) -> Literal["fid", "kid"]:
        """The quality that is minimised."""
        return "kid" if self.objectives[0] == "kid" else "fid"

    @property
    def seeds(self) -> tuple[int, ...]:
        """With which every candidate is trained."""
        return tuple(range(self.seed, self.seed + self.training_seeds))

    @property
    def audited(self) -> int:
        """Configurations that the audit takes."""
        return self.audit_size or min(MOST_AUDITED, max(LEAST_AUDITED, self.budget // AUDIT_SHARE))

    @property
    def limits(self) -> dict[str, float]:
        """What candidates may cost at most, by the name of the cost."""
        given = {"macs": self.max_macs, "params": self.max_params, "latency_ms": self.max_latency_ms}
        return {name: limit for name, limit in given.items() if limit is not None}

    @property
    def asks_latency(self) -> bool:
        """Whether latency is minimised or limited."""
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
        """Files and folders outside the study's that trials use, wherever they run."""
        data = Path(_absolute(self.data)) if self.data and self.data != "digits" else None
        return tuple(path.absolute() for path in (data, self.inception_weights, self.bank) if path)

    def full_config(self) -> Config:
        """The hand-made pattern, to be trained in full; every other config of the search is made from it."""
        return self.applied_to(preset(self.preset_name))

    def applied_to(self, config: Config) -> Config:
        """``config`` with this search's data, size, scoring and seed."""
        image = {"size": self.image_size} if self.image_size else {}
        evaluation: dict[str, Any] = {"seed": self.seed}
        own_images = self.data not in (None, "digits")  # which a preset's choice of features does not know
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
        """Return the steps of the trunk that the experts of ``config``, a config in full, start from; a single model has none."""
        full = preset(self.preset_name)
        if len(config.experts) == 1 or len(full.experts) == 1:
            return 0
        return round(self.trunk_share * self._all_steps(full))

    def steps_of_a_proxy(self, config: Config) -> int:
        """Return the training steps an expert of ``config``, a config in full, gets in a trial after those of the trunk.

        It is the same share of its full training for every config. A single model gets the trunk's share of it too.
        """
        full = preset(self.preset_name)
        share = (self.proxy_steps or -(-full.training.steps // PROXY_SHARE)) / full.training.steps
        own = max(1, round(config.training.steps * share))
        alone = len(config.experts) == 1 and len(full.experts) > 1
        return own + (round(self.trunk_share * config.training.steps) if alone else 0)

    def as_proxy(self, config: Config) -> Config:
        """Return ``config``, a config in full, with the training length and the samples of a trial."""
        samples = self.samples or -(-config.evaluation.samples // SAMPLES_SHARE)
        training = {"steps": self.steps_of_a_proxy(config), "trunk_steps": self.trunk_steps_of(config)}
        return config.with_(training=training, evaluation={"samples": max(2, samples)})

    def in_full(self, config: Config) -> Config:
        """Return ``config``, a config in full, with the trunk of this search as part of its training, which stays as long."""
        trunk = self.trunk_steps_of(config)
        if not trunk:
            return config
        own = (self._all_steps(config) - trunk) // len(config.experts)
        return config.with_(training={"steps": max(1, own), "trunk_steps": trunk})

    def trained_to(self, config: Config, share: float) -> Config:
        """Return ``config``, one of a trial, trained to a share of the full training."""
        total = share * self._all_steps(self.full_config())
        own = round((total - config.training.trunk_steps) / len(config.experts))
        return config.with_(training={"steps": max(config.training.steps, own)})

    @staticmethod
    def _all_steps(config: Config) -> int:
        """Return the training steps of all experts of a config without a trunk."""
        return len(config.experts) * config.training.steps

    def in_force(self) -> dict[str, str | int | float | None]:
        """What must not change while a study goes on, because it would make its scores or proposals incomparable."""
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
    """Paths are kept absolute, because workers and later commands run elsewhere."""
    return data if data == "digits" else os.path.abspath(expanded(data))
