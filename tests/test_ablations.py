"""Ablations: the rows are the paper's, nothing is trained twice, and the words claim no more than the scores allow."""

import csv
import io
import re
import statistics
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from meme.cli.verbs import main
from meme.config.presets import SOFT_PROBABILITIES, preset, preset_names
from meme.errors import UserError
from meme.paper import ablations
from meme.paper.ablation_tables import (
    command,
    fids_by_seed,
    markdown,
    paired_difference,
    print_report,
    quantity,
    report_of,
    sentence,
    spread,
)
from meme.paper.ablations import FAMILIES, RECIPES, ROWS, Ablation, Scored, run

TINY = {"steps": 1, "samples": 16, "seeds": 2, "features": "random"}

# The paper's Tables 6, 7 and 1 (FFHQ; CelebA-HQ) and 2 (CelebA), as printed.
PAPER = {
    ("probabilities", "digits"): [["10.42", "9.20"], ["10.13", "9.08"], ["9.58", "8.52"]],
    ("experts", "digits"): [["-"], ["10.97"], ["10.42"], ["10.28"]],
    ("assignment", "celebahq"): [["10.42"], ["9.58"], ["9.20"], ["8.52"]],
    ("architecture", "cifar10"): [["11.41"], ["11.64"], ["9.58"], ["8.52"], ["9.14"], ["17.3"]],
    ("architecture", "celebahq"): [["9.11"], ["9.06"], ["7.00"], ["5.55"], ["5.92"], ["14.3"]],
    ("architecture", "celeba64"): [["49.56"], ["50.08"], ["47.29"], ["43.09"]],
}


@pytest.fixture
def calls(monkeypatch):
    """How often anything was trained and scored in truth."""
    counted = SimpleNamespace(train=0, evaluate=0)

    def count(name):
        original = getattr(ablations, name)

        def counting(*arguments, **options):
            setattr(counted, name, getattr(counted, name) + 1)
            return original(*arguments, **options)

        monkeypatch.setattr(ablations, name, counting)

    count("train")
    count("evaluate")
    return counted


@pytest.fixture
def pretended(monkeypatch):
    """Training and scoring at no cost: the configs trained, the (config, sampling seed) scored; an FID follows from both."""
    done = SimpleNamespace(trained=[], scored=[], fails_at=None)

    def train(config, data, *, folder, device, on_progress):
        assert (folder / ".lock").exists()
        done.trained.append(config)
        return SimpleNamespace(config=config)

    def evaluate(ensemble, images, space, *, seed, device):
        if len(done.scored) == done.fails_at:
            raise KeyboardInterrupt
        config = ensemble.config
        done.scored.append((config, seed))
        fid = len(config.experts) + 0.1 * config.training.seed + 0.001 * seed + 0.01 * len(config.name)
        samples = config.evaluation.samples
        return SimpleNamespace(fid=fid, macs=3e6, params=7, features=space.name, samples=samples, latency_ms=1.0)

    monkeypatch.setattr(ablations, "train", train)
    monkeypatch.setattr(ablations, "evaluate", evaluate)
    return done


def small(recipe, out, **changes) -> Ablation:
    return Ablation(recipe, **(TINY | {"out": out} | changes))


def read_csv(path: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def scored(row: str, training_seed: int, fid: float, sampling_seed: int = 0) -> Scored:
    return Scored("assignment", row, training_seed, sampling_seed, fid, 3e6, 7, 4, 1, "random", 16, "ddim", 20, 1.0, "x")


# What is trained


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_build_for_every_family_and_are_its_presets(family, recipe):
    ablation = Ablation(recipe, family, all_rows=recipe == "architecture")
    for training in ablation.trainings():
        config = training.config
        if config.training.seed == 0 and config.name in preset_names():
            assert config.architecture_id == preset(config.name).architecture_id
            assert config.evaluation == preset(config.name).evaluation
    names = {ablation.config(row).name for row in ablation.rows}
    assert f"{family}-multi-expert{'-hard' if recipe == 'experts' else ''}" in names
    assert len({ablation.config(row).architecture_id for row in ablation.rows}) == len(ablation.rows)


def test_families_are_those_of_the_paper_and_of_a_laptop():
    assert set(FAMILIES) == {"ffhq", "celebahq", "celeba64", "cifar10", "thumbnails", "tiny", "digits"}
    assert [label for label, _ in Ablation("architecture", "celeba64", all_rows=True).lines] == [
        "ADM-S",
        "iU-ADM-S",
        "Multi-Expert",
        "MEME",
    ]


def test_probabilities_are_those_of_table_6():
    ablation = Ablation("probabilities", "ffhq")
    for label, columns in ablation.lines:
        for column, row in columns.items():
            config = ablation.config(row)
            assert str([expert.p for expert in config.experts]) == label
            assert config.network.splits_channels == (column == "MEME")
    assert ROWS["meme"].probabilities == SOFT_PROBABILITIES


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_numbers_of_experts_share_the_timesteps_and_are_hard(count):
    ablation = Ablation("experts")
    config = ablation.config(dict(ablation.lines)[str(count)]["FID"])
    assert len(config.experts) == count
    assert {expert.p for expert in config.experts} == {1.0}
    lengths = [end - first for first, end in (expert.interval for expert in config.experts)]
    assert max(lengths) - min(lengths) <= 1
    assert config.training.steps == preset("digits-multi-expert").training.steps


def test_equal_total_gives_every_number_of_experts_the_same_steps_together():
    ablation = Ablation("experts", steps=300, equal_total=True)
    configs = [ablation.config(row) for row in ablation.rows]
    assert [len(config.experts) * config.training.steps for config in configs] == [1200] * 4
    alone = Ablation("architecture", steps=300).config("ldm-s")
    assert configs[0].architecture_id == alone.architecture_id
    assert ablation.file("md").name == "experts-equal-total.md"


@pytest.mark.parametrize(("family", "steps"), [("digits", 400), ("celeba64", 100), ("ffhq", 400)])
def test_single_networks_are_trained_as_long_as_in_the_presets(family, steps):
    ablation = Ablation("architecture", family, steps=100)
    assert {row: ablation.config(row).training.steps for row in ablation.rows} == {
        "ldm-s": steps,
        "iu-ldm-s": steps,
        "multi-expert": 100,
        "meme": 100,
    }


def test_a_first_stage_of_ones_own(tmp_path):
    preset_stage = preset("ffhq-meme").first_stage
    found = Ablation("assignment", "ffhq", first_stage=str(tmp_path)).config("meme").first_stage
    assert found == preset_stage.model_copy(update={"source": str(tmp_path)})
    assert Ablation("assignment", "ffhq").config("meme").first_stage == preset_stage


def test_seeds_are_of_the_training_and_common_to_all_rows():
    trainings = Ablation("assignment", seeds=3).trainings()
    assert [training.config.training.seed for training in trainings] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({training.config.architecture_id for training in trainings}) == 12


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"recipe": "probability"}, "recipe: 'probability' is not one of probabilities, .*did you mean probabilities"),
        ({"family": "imagenet"}, "family: 'imagenet' is not one of ffhq"),
        ({"family": "cifar"}, "did you mean cifar10"),
        ({"steps": 0}, "steps: must be at least 1, not 0"),
        ({"seeds": 0}, "seeds: must be at least 1, not 0"),
        ({"sampling_seeds": -1}, "sampling_seeds: must be at least 1, not -1"),
        ({"samples": 1}, "samples: must be at least 2, not 1"),
        ({"first_stage": "x"}, "first_stage: digits denoises pixels and takes none"),
        ({"equal_total": True}, "equal_total: only recipe experts"),
        ({"all_rows": True}, "all_rows: only recipe architecture"),
    ],
)
def test_wrong_settings_are_one_sentence(wrong, named):
    with pytest.raises(UserError, match=named) as error:
        Ablation(**({"recipe": "assignment"} | wrong))
    assert "\n" not in str(error.value)


def test_data_must_be_named_where_the_family_has_none(tmp_path):
    with pytest.raises(UserError, match="data: name a folder"):
        run(small("experts", tmp_path, family="cifar10"))


def test_an_unwritable_folder_is_one_sentence(tmp_path, pretended):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: .* can't be written"):
        run(small("experts", tmp_path / "file"))


# What is run, in truth


def test_all_recipes_run_and_train_nothing_twice(tmp_path, calls):
    expected = {"probabilities": 6, "assignment": 0, "experts": 3, "architecture": 2}  # rows that no recipe before had
    for recipe, new in expected.items():
        before = calls.train
        scores, basis = run(small(recipe, tmp_path, seeds=1))
        assert (calls.train - before, len(scores)) == (new, len(Ablation(recipe).rows))
        assert all(score.fid > 0 for score in scores)
        report = report_of(small(recipe, tmp_path, seeds=1), scores, basis)
        assert len(report.table.lines) == len(RECIPES[recipe].lines)
    assert calls.evaluate == calls.train == 11

    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("expert-?.safetensors")}
    assert len(kept) == 6 * 4 + 1 + 2 + 6 + 2
    lost = next((tmp_path / "trained" / scores[0].trained).glob("score-*.json"))
    lost.unlink()
    again, _ = run(small("architecture", tmp_path, seeds=1))
    assert calls.evaluate == 12
    assert {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("expert-?.safetensors")
    } == kept  # experts that were there stay
    assert [score.fid for score in again] == [score.fid for score in scores]

    more, _ = run(small("architecture", tmp_path, seeds=2))
    assert calls.evaluate == 16
    assert len({score.fid for score in more}) == len(more)  # another seed is another training
    rows = read_csv(tmp_path / "architecture.csv")
    assert [float(row["fid"]) for row in rows] == [score.fid for score in more]
    assert {row["trained"] for row in rows} <= {path.name for path in (tmp_path / "trained").iterdir()}


# What is run, pretended


def test_a_killed_run_goes_on(tmp_path, pretended):
    pretended.fails_at = 3
    ablation = small("assignment", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(ablation)
    assert [row["row"] for row in read_csv(tmp_path / "assignment.csv")] == ["multi-expert-hard", "multi-expert", "meme-hard"]
    pretended.fails_at = None
    scores, _ = run(ablation)
    assert len(scores) == len(pretended.scored) == 8
    assert len({(config.architecture_id, seed) for config, seed in pretended.scored}) == 8
    assert len(read_csv(tmp_path / "assignment.csv")) == 8


def test_more_seeds_add_to_what_is_there(tmp_path, pretended):
    run(small("experts", tmp_path, seeds=1))
    scores, _ = run(small("experts", tmp_path, seeds=3))
    assert [config.training.seed for config in pretended.trained] == [0] * 4 + [1] * 4 + [2] * 4
    assert {score.training_seed for score in scores} == {0, 1, 2}


def test_scores_of_another_number_of_samples_are_not_reused(tmp_path, pretended):
    run(small("assignment", tmp_path, seeds=1))
    scores, _ = run(small("assignment", tmp_path, seeds=1, samples=20))
    assert len(pretended.scored) == 8
    assert {score.samples for score in scores} == {20}


def test_scores_in_another_feature_space_are_not_reused(tmp_path, pretended, monkeypatch):
    run(small("assignment", tmp_path, seeds=1))
    space = SimpleNamespace(feature_id="another", name="another")
    monkeypatch.setattr(ablations, "choose_features", lambda *arguments, **options: space)
    scores, _ = run(small("assignment", tmp_path, seeds=1))
    assert len(pretended.scored) == 8
    assert {score.features for score in scores} == {"another"}


def test_other_data_are_other_trainings(tmp_path, pretended, monkeypatch):
    run(small("assignment", tmp_path, seeds=1))
    monkeypatch.setattr(ablations, "training_data", lambda *arguments: SimpleNamespace(content_id="another"))
    run(small("assignment", tmp_path, seeds=1))
    assert len(pretended.trained) == len(pretended.scored) == 8


def test_other_steps_are_other_trainings(tmp_path, pretended):
    run(small("assignment", tmp_path, seeds=1))
    scores, _ = run(small("assignment", tmp_path, seeds=1, steps=2))
    assert [config.training.steps for config in pretended.trained] == [1] * 4 + [2] * 4
    assert {score.steps for score in scores} == {2}


@pytest.mark.parametrize("damage", ["", "{}", '{"fid": 1'])
def test_a_damaged_score_is_made_again(tmp_path, pretended, damage):
    before, _ = run(small("assignment", tmp_path, seeds=1))
    next(tmp_path.rglob("score-*.json")).write_text(damage)
    after, _ = run(small("assignment", tmp_path, seeds=1))
    assert after == before
    assert len(pretended.scored) == 5


def test_every_training_seed_has_sampling_noise_of_its_own(tmp_path, pretended):
    scores, _ = run(small("assignment", tmp_path, sampling_seeds=2))
    by_row = {row: {score.sampling_seed for score in scores if score.row == row} for row in ("meme", "multi-expert-hard")}
    assert by_row == {row: {0, 1, 1000, 1001} for row in by_row}
    assert len(pretended.trained) == 8
    assert len({score.fid for score in scores if score.row == "meme"}) == 4
    first = [score.fid for score in scores if score.row == "meme" and score.training_seed == 0]
    assert fids_by_seed(scores, "meme")[0] == pytest.approx(statistics.fmean(first))


def test_a_second_command_waits_for_the_training_of_the_first(tmp_path, pretended):
    ablation = small("assignment", tmp_path, seeds=1)
    run(ablation)
    claimed = next((tmp_path / "trained").iterdir())
    next(claimed.glob("score-*.json")).unlink()
    waiting = threading.Thread(target=run, args=(ablation,), daemon=True)
    with filelock.FileLock(claimed / ".lock"):
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive()
        assert len(pretended.scored) == 4
    waiting.join(timeout=30)
    assert len(pretended.scored) == 5


# What is said


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), min_size=2, max_size=6))
def test_differences_are_scipys_paired_t(pairs):
    fids, others = zip(*pairs, strict=True)
    found = paired_difference(fids, others)
    differences = [a - b for a, b in pairs]
    assert found.mean == pytest.approx(statistics.fmean(differences))
    assert found.standard_error == pytest.approx(float(stats.sem(differences)), abs=1e-9)
    if statistics.stdev(differences) > 1e-6:  # else scipy has no interval
        low, high = stats.ttest_rel(fids, others).confidence_interval(0.95)
        assert found.interval == pytest.approx((low, high), rel=1e-6, abs=1e-6)
    words = sentence("A", "B", found, -1.0, 3)
    low, high = found.interval
    assert ("scored better" in words) == (high < 0)
    assert ("scored worse" in words) == (low > 0)
    assert ("no difference shown" in words) == (low <= 0 <= high)


def test_pairs_are_of_one_seed():
    steady = paired_difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert steady.interval == (-0.5, -0.5)
    assert steady.standard_error == 0


def test_words_say_how_the_paper_has_it():
    better, undecided = paired_difference([1.0, 1.1, 1.2], [2.0, 2.2, 2.3]), paired_difference([1.0, 2.0], [1.4, 1.8])
    assert sentence("A", "B", better, -0.84, 2) == (
        "A scored better than B: FID is lower by 1.07 (95 % interval -1.21 to -0.92, 3 seeds); "
        "in the paper FID is lower by 0.84, too."
    )
    assert sentence("A", "B", better, 0.84, 2).endswith("in the paper FID is higher by 0.84, the other way round.")
    assert sentence("A", "B", better, None, 2).endswith("3 seeds).")
    assert sentence("A", "B", undecided, -0.84, 2).startswith(
        "A against B: no difference shown (95 % interval -3.91 to +3.71 holds 0, 2 seeds)"
    )
    assert "neither confirms nor contradicts" in sentence("A", "B", undecided, -0.84, 2)
    worse = paired_difference([2.0, 2.2, 2.3], [1.0, 1.1, 1.2])
    assert sentence("B", "A", worse, 0.5, 2).startswith("B scored worse than A: FID is higher by 1.07")


def test_one_seed_claims_nothing():
    assert spread([1.0]).deviation is None
    alone = paired_difference([1.0], [2.0])
    assert alone.interval is None
    words = sentence("A", "B", alone, -1.0, 2)
    assert "nothing is claimed" in words
    assert "better" not in words


# What is shown


def report_with(recipe="assignment", family="digits", seeds=3, **options):
    """A report of invented scores: row k scores k + 1 and a little more each seed."""
    ablation = Ablation(recipe, family, seeds=seeds, **options)
    scores = [
        scored(row, seed, place + 1 + 0.01 * seed + 0.004 * seed * place)
        for seed in range(seeds)
        for place, row in enumerate(ablation.rows)
    ]
    images = type("Images", (), {"name": "digits", "__len__": lambda self: 1797})()
    basis = SimpleNamespace(images=images, device=SimpleNamespace(type="cpu"))
    return report_of(ablation, scores, basis)


@pytest.mark.parametrize(("recipe", "family"), PAPER)
def test_the_papers_figures_stand_beside_ours(recipe, family):
    report = report_with(recipe, family, all_rows=recipe == "architecture")
    places = [place for place, heading in enumerate(report.table.headings) if heading.endswith(", paper")]
    fids = [
        place for place in places if "Param" not in report.table.headings[place] and "MACs" not in report.table.headings[place]
    ]
    assert [[line[place] for place in fids] for line in report.table.lines] == PAPER[recipe, family]


def test_table_1_has_costs_of_both():
    report = report_with("architecture", "ffhq")
    assert report.table.headings[1:7] == (
        "#Param, paper",
        "MACs, paper",
        "FID, paper",
        "#Param, ours",
        "MACs, ours",
        "steps",
    )
    assert [line[1:7] for line in report.table.lines] == [
        ("89.5M", "94.2G", "11.41", "89.5M", "34.3G", "540,000"),
        ("82.6M", "90.5G", "11.64", "82.6M", "31.9G", "540,000"),
        ("89.5M x4", "94.2G", "9.58", "89.5M x4", "34.3G", "135,000 x4"),
        ("82.56-83.32M x4", "90.4G", "8.52", "82.6M-83.3M x4", "31.9G", "135,000 x4"),
    ]


def test_differences_stand_beside_the_papers():
    report = report_with("experts")
    assert [(line[0], line[1]) for line in report.differences.lines] == [
        ("N = 2 - N = 1", "-"),
        ("N = 4 - N = 2", "-0.55"),
        ("N = 6 - N = 4", "-0.14"),
    ]
    assert report.table.lines[1][-1] == "2.01 +- 0.01"
    assert report.sentences[0].startswith("N = 2 scored worse than N = 1: FID is higher by 1.00")


def test_a_difference_with_a_row_left_out_is_left_out():
    assert not any("LDM-L" in line[0] for line in report_with("architecture").differences.lines)
    assert any("LDM-L" in line[0] for line in report_with("architecture", all_rows=True).differences.lines)


@pytest.mark.parametrize(
    ("recipe", "family", "options", "said"),
    [
        (
            "experts",
            "digits",
            {},
            "every expert is trained 2,000 steps, as in the paper, so that more experts cost more training",
        ),
        ("experts", "digits", {"equal_total": True}, "the experts of a row together are trained 8,000 steps"),
        ("architecture", "digits", {"steps": 50}, "every expert is trained 50 steps, and a small network alone 4 times as many"),
        ("architecture", "celeba64", {}, "every expert is trained 200,000 steps, and a small network alone as many"),
        ("assignment", "cifar10", {}, "Table 1: FFHQ, DDIM-200, 50,000 samples"),
        ("assignment", "cifar10", {}, "Compare the order of rows, not the values"),
        ("architecture", "celebahq", {}, "Values compare only where ours are of the same protocol"),
        ("assignment", "digits", {"seeds": 1}, "no difference is claimed"),
    ],
)
def test_notes_say_what_holds(recipe, family, options, said):
    assert said in "\n".join(report_with(recipe, family, **options).notes)


def test_markdown_has_everything():
    report = report_with("probabilities")
    text = markdown(report)
    assert "    python -m meme ablate probabilities --family digits\n" in text
    assert re.search(r"^\d{4}-\d\d-\d\d, \d+ threads? on \d+ cores of .+, no GPU used; Python 3", text, re.MULTILINE)
    assert "random features, 16 samples of 20 ddim steps against all 1,797 images of digits" in text
    assert "| [0.8, 0.4, 0.2, 0.1] | 9.58 | 5.03 +- 0.03 | 8.52 | 6.03 +- 0.03 |" in text
    assert all(line in text for line in (*report.sentences, *report.notes))


def test_a_narrow_terminal_loses_no_figure():
    report = report_with("assignment", "ffhq")
    file = io.StringIO()
    print_report(report, Console(file=file, width=60, soft_wrap=True))
    shown = file.getvalue()
    assert "…" not in shown
    assert all(cell in shown for cells in (report.table, report.differences) for line in cells.lines for cell in line)


def test_brackets_are_not_taken_for_markup():
    file = io.StringIO()
    print_report(report_with("probabilities"), Console(file=file, width=200))
    assert "[0.6, 0.6, 0.6, 0.6]" in file.getvalue()


def test_the_command_names_what_was_not_left_to_itself():
    plain = Ablation("experts")
    assert command(plain) == "python -m meme ablate experts --family digits"
    changed = replace(plain, steps=5, seeds=4, out=Path("my results"), equal_total=True)
    assert command(changed) == (
        "python -m meme ablate experts --family digits --steps 5 --seeds 4 --equal-total --out 'my results'"
    )


@pytest.mark.parametrize(
    ("value", "said"), [(7, "7.00"), (163_618, "164k"), (999_600, "1.00M"), (3.856e6, "3.86M"), (1e11, "100G")]
)
def test_quantities_have_three_figures(value, said):
    assert quantity(value) == said


def test_the_command_prints_the_table_and_leaves_it(tmp_path, capsys):
    arguments = [
        "--steps",
        "2",
        "--seeds",
        "2",
        "--samples",
        "16",
        "--features",
        "random",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    main(["ablate", "assignment", *arguments])
    said = capsys.readouterr().out
    assert "10.42" in said and "8.52" in said  # the paper's
    assert (tmp_path / "assignment.md").read_text().count("|") > 20
    assert (tmp_path / "assignment.csv").read_text().count("\n") == 1 + 4 * 2  # a line for each row and seed


def test_a_wrong_family_is_refused_by_the_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["ablate", "experts", "--family", "digit"])
    assert stopped.value.code == 2 and "did you mean digits" in capsys.readouterr().err
