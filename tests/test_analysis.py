"""The analyses on real digits and small networks: what is seen of which expert, and what is drawn and written."""

import ast
import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import nn

from meme.analysis import figures
from meme.analysis import spectra as analysis
from meme.analysis.spectra import (
    COLUMNS,
    even_timesteps,
    expert_distances,
    experts,
    features,
    latents,
    layers_of,
    listening,
)
from meme.analysis.spectrum import spectrum, white_noise
from meme.config.presets import preset
from meme.data.images import open_images
from meme.diffusion.ensemble import Ensemble, expert_at
from meme.diffusion.process import forward_process
from meme.errors import UserError
from meme.network.blocks import timestep_embedding
from meme.network.unet import build_expert

MEME, MULTI_EXPERT = preset("digits-meme"), preset("digits-multi-expert")
LAYERS = {
    "digits-meme": [
        "enc 1 iFormer 16x8x8",
        "enc 2 down 32x4x4",
        "enc 3 iFormer 32x4x4",
        "middle residual+attention 32x4x4",
        "dec 1 residual 32x4x4",
        "dec 2 residual+up 32x8x8",
        "dec 3 residual 16x8x8",
        "dec 4 residual 16x8x8",
    ]
}
LAYERS["digits-multi-expert"] = [
    layer.replace("iFormer", "residual").replace("down 32", "down 16") for layer in LAYERS["digits-meme"]
]


@cache
def digits():
    return open_images("digits", size=8, channels=1)


@torch.no_grad()
def trained_looking(config, number: int, seed: int) -> nn.Module:
    """An expert none of whose layers is zero."""
    expert = build_expert(config, number, seed=seed)
    source = torch.Generator().manual_seed(seed)
    for weight in expert.parameters():
        weight.add_(torch.randn(weight.shape, generator=source) * 0.05)
    return expert.eval()


@cache
def ensemble(name: str) -> Ensemble:
    """Four unlike experts."""
    config = preset(name)
    return Ensemble(config, [trained_looking(config, number, seed=number) for number in range(1, 5)])


@cache
def latents_table() -> pd.DataFrame:
    return latents(digits(), MEME.diffusion, count=600)


@cache
def features_table() -> pd.DataFrame:
    return features(ensemble("digits-meme"), digits(), count=20)


@cache
def experts_table() -> pd.DataFrame:
    both = {"ours": ensemble("digits-meme"), "theirs": ensemble("digits-multi-expert")}
    return experts(both, digits(), count=10)


TABLES = {"latents": latents_table, "features": features_table, "experts": experts_table}


def relative(table: pd.DataFrame, **where) -> np.ndarray:
    """The one curve for which all columns are as told."""
    chosen = table.set_index(list(where)).loc[tuple(where.values())]
    assert chosen["frequency"].is_monotonic_increasing
    return chosen["relative_log_amplitude"].to_numpy()


class Recorder(nn.Module):
    """Stands where a network does; keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.classes = None  # unconditional
        self.encoder = nn.ModuleList([nn.Sequential(nn.Identity())])
        self.middle = nn.Sequential(nn.Identity())
        self.decoder = nn.ModuleList([nn.Sequential(nn.Identity())])
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, torch.Tensor]] = []

    def forward(self, x, t):
        assert t.shape == (len(x),)
        self.seen.append((t[0].item(), x.clone()))
        return self.decoder[0](self.middle(self.encoder[0](x)))


def recorders(config=MEME) -> SimpleNamespace:
    return SimpleNamespace(config=config, experts=[Recorder() for _ in config.experts])


# Latents: Fig. 2


def test_noise_flattens_the_spectrum_of_digits():
    table = latents_table()
    times = even_timesteps(1000)
    clean = table[table["timestep"].isna()]["relative_log_amplitude"].to_numpy()
    noise = white_noise(torch.linspace(0, 1, 5)).numpy()
    from_flat = [np.abs(relative(table, timestep=t) - (noise - noise[0])).max() for t in times]
    assert np.abs(clean - (noise - noise[0])).max() > 3.5
    assert from_flat[0] > 3
    assert from_flat[:7] == sorted(from_flat[:7], reverse=True)
    assert max(from_flat[7:]) < 0.2  # five standard errors of 600 images


def test_x_t_is_that_of_equation_1_with_noise_common_to_all_timesteps():
    both = recorders()
    experts({"one": both}, digits(), [10, 600], count=5, seed=3)
    alphas = forward_process(MEME.diffusion).alphas_cumprod
    clean, noises = digits().tensor(analysis._Images(digits(), 5, 3)._indices), []
    for network in both.experts:
        assert [t for t, _ in network.seen] == [10, 600]
        noises += [(x - alphas[t].sqrt() * clean) / (1 - alphas[t]).sqrt() for t, x in network.seen]
    assert all(torch.allclose(noise, noises[0], atol=1e-4) for noise in noises)
    assert noises[0].std() == pytest.approx(1, abs=0.15)
    table = latents(digits(), MEME.diffusion, [10, 600], count=5, seed=3)
    for t, x in both.experts[0].seen:
        assert relative(table, timestep=t) == pytest.approx(spectrum(x).relative_log_amplitude.numpy(), abs=1e-6)
    assert table[table["timestep"].isna()]["log_amplitude"].to_numpy() == pytest.approx(
        spectrum(clean).log_amplitude.numpy(), abs=1e-6
    )


def noise_of_images(count: int, seed: int) -> dict[int, torch.Tensor]:
    images = analysis._Images(digits(), count, seed)
    batches = [epsilon for _, epsilon in images.batches("cpu")]
    return dict(zip(images._indices, torch.cat(batches), strict=True))


def test_an_image_keeps_its_noise_whatever_others_are_looked_at():
    few, many, other = noise_of_images(5, 0), noise_of_images(200, 0), noise_of_images(200, 1)
    assert few.keys() < many.keys()
    assert all(torch.equal(few[index], many[index]) for index in few)
    shared = many.keys() & other.keys()
    assert shared
    assert many.keys() != other.keys()
    assert not any(torch.equal(many[index], other[index]) for index in shared)
    assert len({noise.flatten()[0].item() for noise in many.values()}) == 200


def test_the_batch_size_does_not_matter(monkeypatch):
    monkeypatch.setattr(analysis, "BATCH", 7)
    pd.testing.assert_frame_equal(features(ensemble("digits-meme"), digits(), count=20), features_table(), rtol=1e-4, atol=1e-5)


def test_count_is_at_most_the_data():
    table = latents(digits(), MEME.diffusion, [500], count=10**6)
    assert set(table["images"]) == {len(digits())}


# Features: Fig. 3


@pytest.mark.parametrize("name", LAYERS)
def test_the_list_of_layers_is_complete_and_in_order(name):
    table = features(ensemble(name), digits(), [0, 999], count=2)
    for _, at_t in table.groupby("timestep"):
        layers = at_t.drop_duplicates("depth").sort_values("depth")
        assert layers["layer"].tolist() == LAYERS[name]
        assert layers["depth"].tolist() == list(range(1, 9))


def test_every_layer_has_its_frequencies():
    for layer, rows in features_table().groupby("layer"):
        size = int(layer.rsplit("x", 1)[1])
        for _, curve in rows.groupby("timestep"):
            assert curve["frequency"].tolist() == [2 * place / size for place in range(size // 2 + 1)]


@torch.no_grad()
def test_the_spectra_are_those_of_the_stages_outputs():
    network, t = ensemble("digits-meme").experts[2], 600
    x, epsilon = next(analysis._Images(digits(), 20, 0).batches("cpu"))
    x = forward_process(MEME.diffusion).add_noise(x, epsilon, torch.tensor([t]))
    outputs = []
    handles = [module.register_forward_hook(lambda *call: outputs.append(call[2])) for _, module in layers_of(network)]
    network(x, torch.full((20,), t))
    for handle in handles:
        handle.remove()
    by_hand = network.conv_in(x)  # as Denoiser.forward begins: the outputs above are what the next stage is given
    embedding = network.time(timestep_embedding(torch.full((20,), t), network.channels))
    for stage, output in zip(network.encoder, outputs, strict=False):
        by_hand = stage(by_hand, embedding)
        assert torch.equal(by_hand, output)
    for depth, output in enumerate(outputs, start=1):
        found = relative(features_table(), timestep=t, depth=depth)
        assert found == pytest.approx(spectrum(output).relative_log_amplitude.numpy(), abs=1e-5)
    assert len(outputs) == 8


def test_each_timestep_is_seen_by_the_expert_in_charge():
    config = MEME.with_(experts=[{"interval": edges, "low_channels": (8, 16)} for edges in ((0, 51), (51, 900), (900, 1000))])
    table = features(recorders(config), digits(), [999, 0, 50, 51, 899, 900], count=3)
    assert dict(zip(table["timestep"], table["expert"], strict=True)) == {0: 1, 50: 1, 51: 2, 899: 2, 900: 3, 999: 3}
    assert table["own"].all()
    assert set(table["ensemble"]) == {"digits-meme"}


def test_listening_leaves_no_trace_and_changes_nothing():
    network, x, t = trained_looking(MEME, 1, seed=0), digits().tensor(range(4)), torch.full((4,), 7)
    weights = {name: weight.clone() for name, weight in network.state_dict().items()}
    before, heard = network(x, t), []
    with listening(network, lambda depth, output: heard.append(depth) or torch.zeros_like(output)):
        inside = network(x, t)
    features(Ensemble(MEME, [network] * 4), digits(), [0, 999], count=2)
    assert torch.equal(inside, before)
    assert torch.equal(network(x, t), before)
    assert heard == list(range(1, 9))
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(weight, weights[name]) for name, weight in network.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())


def test_hooks_are_removed_after_an_error():
    network = trained_looking(MEME, 1, seed=0)
    with pytest.raises(ZeroDivisionError), listening(network, lambda depth, output: 1 / 0):
        network(digits().tensor([0]), torch.tensor([0]))
    assert not any(module._forward_hooks for module in network.modules())


# Experts: Fig. 6


def test_every_expert_sees_every_timestep_and_knows_its_own():
    table = experts_table()
    times = [41, 125, 208, 291, 375, 458, 541, 625, 708, 791, 875, 958]
    curves = table.drop_duplicates(["ensemble", "expert", "timestep", "depth"])
    assert len(curves) == 2 * 4 * 12 * 8
    assert sorted(set(table["timestep"])) == times
    assert all(row.own == (expert_at(MEME, row.timestep) == row.expert) for row in curves.itertuples())
    per_expert = curves[curves["own"]].groupby(["ensemble", "expert"])["timestep"].nunique()
    assert per_expert.tolist() == [3] * 8
    for name, rows in table.groupby("ensemble"):
        known = LAYERS["digits-meme" if name == "ours" else "digits-multi-expert"]
        assert rows.sort_values("depth")["layer"].drop_duplicates().tolist() == known


def test_an_expert_in_charge_is_seen_as_among_the_features():
    table = experts({"one": ensemble("digits-meme")}, digits(), [100, 600], count=20)
    for t, number in ((100, 1), (600, 3)):
        for depth in range(1, 9):
            assert relative(table, timestep=t, expert=number, depth=depth) == pytest.approx(
                relative(features_table(), timestep=t, depth=depth), abs=1e-6
            )


class LoadedOnAccess:
    """Experts of which one at a time is in memory."""

    def __init__(self, number: int):
        self.held, self.loads = None, []
        self._number = number

    def __getitem__(self, index):
        if not 0 <= index < self._number:
            raise IndexError
        if self.held != index:
            self.held = index
            self.loads.append(index)
        return Recorder()


def test_each_expert_is_loaded_once():
    lazy = SimpleNamespace(config=MEME, experts=LoadedOnAccess(4))
    experts({"lazy": lazy}, digits(), count=70)
    assert lazy.experts.loads == [0, 1, 2, 3]
    features(SimpleNamespace(config=MEME, experts=(again := LoadedOnAccess(4))), digits(), count=70)
    assert again.loads == [0, 1, 2, 3]


def test_identical_experts_are_no_distance_apart_and_others_are():
    one = trained_looking(MULTI_EXPERT, 1, seed=0)
    same = Ensemble(MULTI_EXPERT, [one] * 4)
    table = experts({"same": same, "other": ensemble("digits-multi-expert")}, digits(), [10, 900], count=5)
    distances = expert_distances(table)
    assert len(distances) == 2 * 2 * 8
    assert (distances[distances["ensemble"] == "same"]["distance"] == 0).all()
    assert (distances[distances["ensemble"] == "other"]["distance"] > 0.01).all()


def made_up(*curves: tuple[str, int, list[float]]) -> pd.DataFrame:
    """A table of experts from (ensemble, expert, relative log amplitudes)."""
    rows = [
        {"ensemble": name, "expert": number, "timestep": 5, "depth": 1, "layer": "enc 1", "frequency": place / 2}
        | {"relative_log_amplitude": value}
        for name, number, values in curves
        for place, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_distances_by_hand():
    table = made_up(("two", 1, [0, 1, 2]), ("two", 2, [0, 4, 6]), ("three", 1, [0, 0, 0]), ("three", 2, [0, 0, 0]))
    table = pd.concat([table, made_up(("three", 3, [0, 3, 0]), ("alone", 1, [0, 9, 9]))])
    found = expert_distances(table).set_index("ensemble")["distance"].to_dict()
    assert found == pytest.approx({"two": math.sqrt((9 + 16) / 2), "three": math.sqrt(2 * 9 / 6)})


def test_one_expert_has_no_distance():
    assert len(expert_distances(made_up(("alone", 1, [0, 1, 2])))) == 0


@settings(max_examples=25)
@given(values=st.lists(st.floats(-9, 9), min_size=8, max_size=8), shift=st.floats(-9, 9))
def test_distances_do_not_see_the_order_of_experts_nor_a_common_shift(values, shift):
    first, second = [0, *values[:4]], [0, *values[4:]]
    moved = [[0, *(value + shift for value in curve[1:])] for curve in (first, second)]
    straight = expert_distances(made_up(("e", 1, first), ("e", 2, second)))["distance"]
    turned = expert_distances(made_up(("e", 1, moved[1]), ("e", 2, moved[0])))["distance"]
    assert turned.to_numpy() == pytest.approx(straight.to_numpy(), abs=1e-9)


# Settings and errors


@given(total=st.integers(1, 3000), count=st.integers(1, 40))
def test_even_timesteps_reach_both_ends(total, count):
    times = even_timesteps(total, count)
    assert times[0] == 0
    assert times[-1] == total - 1
    assert times == sorted(set(times))
    assert len(times) <= count + 1
    gaps = np.diff(times[:-1])
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_timesteps_are_taken_in_order_and_once():
    assert latents(digits(), MEME.diffusion, [7, 3, 7], count=2)["timestep"].dropna().unique().tolist() == [3, 7]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: latents(digits(), MEME.diffusion, [1000]), "timesteps: must be 0 to 999, not 1000"),
        (lambda: features(ensemble("digits-meme"), digits(), [-1]), "timesteps: must be 0 to 999, not -1"),
        (lambda: latents(digits(), MEME.diffusion, count=0), "images: must be at least 1, not 0"),
        (lambda: experts({}, digits()), "name at least one trained ensemble"),
        (lambda: experts({"one": recorders()}, digits(), per_interval=0), "per_interval: must be at least 1, not 0"),
        (
            lambda: experts({"one": recorders(), "two": recorders(preset("cifar10-meme"))}, digits()),
            "must agree in their image, first_stage and diffusion settings",
        ),
    ],
)
def test_wrong_use_is_one_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_progress_ends_at_the_total():
    told = []
    experts({"one": recorders()}, digits(), [3, 4], count=70, on_progress=lambda *call: told.append(call))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {70 * 2 * 4}
    assert told[-1] == (560, 560)


# Tables and figures


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_tidy_and_come_back_from_csv_as_they_were(kind, tmp_path):
    table = TABLES[kind]()
    assert {column: str(dtype) for column, dtype in table.dtypes.items()} == COLUMNS
    assert set(table["kind"]) == {kind}
    assert np.isfinite(table[["frequency", "log_amplitude", "relative_log_amplitude"]].to_numpy()).all()
    assert (table.loc[table["frequency"] == 0, "relative_log_amplitude"] == 0).all()
    key = ["ensemble", "expert", "timestep", "layer", "frequency"]
    assert not table.duplicated(key).any()
    path = figures.write_table(table, tmp_path / "new" / "table.csv")
    pd.testing.assert_frame_equal(figures.read_table(path), table, check_exact=True)


WRITERS = {
    "latents": (figures.write_latents, ["latents.csv", "latents.png"]),
    "features": (figures.write_features, ["features.csv", "features.png"]),
    "experts": (figures.write_experts, ["experts.csv", "experts.png", "experts-own.png", "experts-distance.csv"]),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_files_are_written_whole_and_pictures_can_be_seen(kind, tmp_path):
    write, names = WRITERS[kind]
    paths = write(TABLES[kind](), tmp_path / "out")
    assert paths == [tmp_path / "out" / name for name in names]
    assert sorted(paths) == sorted((tmp_path / "out").iterdir())
    for path in paths:
        if path.suffix == ".png":
            picture = Image.open(path)
            assert all(500 <= length <= 4000 for length in picture.size)
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 20


def drawn_lines(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_ydata() for line in axes.get_lines()}


def visible(figure):
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]


def test_figure_2_has_a_line_a_timestep():
    (axes,) = visible(figure := figures.draw_latents(latents_table()))
    assert len(axes.get_lines()) == 11 + 2
    lines = drawn_lines(axes)
    assert lines["clean data"] == pytest.approx(
        latents_table()[latents_table()["timestep"].isna()]["relative_log_amplitude"].to_numpy()
    )
    assert lines["white noise, expected"] == pytest.approx(np.array([0, 1, 1, 1, 0]) * math.log(2) / 2)
    assert {axes.get_xlabel(), figure.get_supylabel()} == {"frequency / π", "relative log amplitude (ln)"}
    assert [other.get_ylabel() for other in figure.axes if other is not axes] == ["timestep $t$"]


def test_figure_3_has_a_panel_a_layer_and_a_line_a_timestep():
    panels = visible(figures.draw_features(features_table()))
    assert [axes.get_title().replace("\n", " ") for axes in panels] == LAYERS["digits-meme"]
    times = even_timesteps(1000)
    for depth, axes in enumerate(panels, start=1):
        curves = [line.get_ydata() for line in axes.get_lines()]
        assert len(curves) == len(times)
        for t, curve in zip(times, curves, strict=True):
            assert curve == pytest.approx(relative(features_table(), timestep=t, depth=depth))


def test_figure_6_has_a_row_an_ensemble_and_a_line_an_expert():
    panels = visible(figures.draw_experts(experts_table()))
    places = [(name, t) for name in ("ours", "theirs") for t in (125, 375, 625, 875)]
    assert len(panels) == len(places)
    for axes, (name, t) in zip(panels, places, strict=True):
        assert axes.get_title().startswith(f"{name}, $t$ = {t}\nenc 3 ")
        for number, line in enumerate(axes.get_lines(), start=1):
            expected = relative(experts_table(), ensemble=name, timestep=t, expert=number, depth=3)
            assert line.get_ydata() == pytest.approx(expected)
        assert len(axes.get_lines()) == 4


def test_own_intervals_are_averaged_over_their_timesteps():
    panels = visible(figures.draw_own_intervals(experts_table()))
    own = experts_table()[experts_table()["own"]]
    assert len(panels) == 8
    places = [(name, depth) for name in ("ours", "theirs") for depth in (1, 3, 4, 8)]
    for axes, (name, depth) in zip(panels, places, strict=True):
        assert axes.get_title().split("\n")[0] == name
        for number, line in enumerate(axes.get_lines(), start=1):
            rows = own[(own["ensemble"] == name) & (own["expert"] == number) & (own["depth"] == depth)]
            assert line.get_ydata() == pytest.approx(rows.groupby("frequency")["relative_log_amplitude"].mean().to_numpy())


@pytest.mark.parametrize("draw", [figures.draw_latents, figures.draw_experts, figures.draw_own_intervals])
def test_legends_cover_no_panel(draw):
    figure = draw(latents_table() if draw is figures.draw_latents else experts_table())
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in visible(figure))
    assert figure.bbox.containsx(box.x0)
    assert figure.bbox.containsx(box.x1)


@pytest.mark.parametrize("layers", [1, 7, 24])
def test_any_number_of_layers_is_drawn(layers):
    one = features_table()[features_table()["depth"] == 1]
    table = pd.concat([one.assign(depth=depth, layer=f"enc {depth} residual 16x8x8") for depth in range(1, layers + 1)])
    figure = figures.draw_features(table)
    assert len(visible(figure)) == layers
    places = [(round(axes.get_position().x0, 3), axes.get_position().y0) for axes in visible(figure)]
    lowest = [(x, min(y for other, y in places if other == x)) for x, _ in places]
    labelled = [bool(axes.get_xlabel()) for axes in visible(figure)]
    assert labelled == [place == low for place, low in zip(places, lowest, strict=True)]


def test_one_timestep_and_one_expert_are_drawn(tmp_path):
    config = MEME.with_(experts=[{"interval": (0, 1000), "low_channels": (8, 16)}])
    alone = Ensemble(config, [trained_looking(config, 1, seed=0)])
    assert len(figures.write_features(features(alone, digits(), [5], count=2), tmp_path)) == 2
    assert len(figures.write_experts(experts({"alone": alone}, digits(), [5], count=2), tmp_path)) == 4


def test_no_global_state_of_pyplot():
    names = {
        node.module
        for node in ast.walk(ast.parse((ROOT / "meme" / "analysis" / "figures.py").read_text()))
        if hasattr(node, "module")
    }
    assert "matplotlib.figure" in names
    assert "matplotlib.pyplot" not in names
