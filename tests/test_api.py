"""The names that ``meme`` offers: all there, documented, typed, lazy where they need torch; and the example that uses them."""

import inspect
import re
import subprocess
import sys
import typing

import pytest
from conftest import ROOT

import meme
import meme_nas

EXAMPLE = ROOT / "docs" / "example.md"


def public_things():
    """Every public name, and what is public in the classes they are or return."""
    things, classes = {}, []
    for name in meme.__all__:
        thing = getattr(meme, name)
        things[name] = thing
        returned = thing if inspect.isclass(thing) else typing.get_type_hints(thing).get("return")
        classes += [kind for kind in (returned, *typing.get_args(returned)) if inspect.isclass(kind)]
    for kind in classes:
        if kind.__module__.startswith("meme."):
            things[kind.__name__] = kind
            members = {name: member for name, member in vars(kind).items() if not name.startswith("_")}
            for name, member in members.items():
                member = getattr(member, "__func__", getattr(member, "fget", member))
                if inspect.isfunction(member):
                    things[f"{kind.__name__}.{name}"] = member
    return things


THINGS = public_things()


def test_the_walk_finds_what_there_is():
    assert {"Config.load", "Config.architecture_id", "Ensemble.denoise", "Score.fid", "Images.tensor", "Cost", "train"} <= set(
        THINGS
    )


@pytest.mark.parametrize("name", THINGS)
def test_every_public_name_is_documented(name):
    words = (THINGS[name].__doc__ or "").split()
    assert len(words) >= 3, f"{name} has no docstring"
    assert not THINGS[name].__doc__.startswith(f"{name}(")  # a dataclass without one is given its signature


@pytest.mark.parametrize("name", [name for name, thing in THINGS.items() if inspect.isfunction(thing)])
def test_every_public_function_is_annotated_in_full(name):
    signature = inspect.signature(THINGS[name])
    parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    assert [each.name for each in parameters if each.annotation is inspect.Parameter.empty] == []
    assert signature.return_annotation is not inspect.Signature.empty
    assert typing.get_type_hints(THINGS[name])  # and they can be resolved


def test_every_field_of_every_setting_says_what_it_is():
    """Where the name and the type alone do not: a field has a docstring, or its section has one."""
    for section in ("NetworkConfig", "ExpertConfig"):
        from meme.config import schema as config

        fields = getattr(config, section).model_fields
        undocumented = [name for name, field in fields.items() if not field.description]
        assert set(undocumented) <= {"multipliers", "norm_groups", "dropout"}


def test_names_that_need_torch_wait_for_it():
    code = """
import sys, meme
assert {'torch', 'diffusers'}.isdisjoint(sys.modules)
assert 'train' in dir(meme)
meme.preset('digits-meme'), meme.preset_names()
assert 'torch' not in sys.modules
meme.build_expert
assert 'torch' in sys.modules
try:
    meme.trian
except AttributeError as error:
    assert 'trian' in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_type_checkers_see_what_is_imported():
    from meme import _LATER

    source = (ROOT / "meme" / "__init__.py").read_text().split("if TYPE_CHECKING:")[1].split("# Where")[0]
    seen = {name.strip(): module for module, names in re.findall(r"from (\S+) import (.*)", source) for name in names.split(",")}
    assert seen == _LATER
    assert set(meme.__all__) == set(_LATER) | {"Config", "UserError", "preset", "preset_names"}


def test_names_of_the_search_wait_for_torch_and_optuna():
    code = """
import sys, meme_nas
assert {'torch', 'optuna', 'ray'}.isdisjoint(sys.modules)
assert all(getattr(meme_nas, name).__doc__ for name in meme_nas.__all__)
from meme_nas.run import run
assert meme_nas.search is run
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert {*meme_nas._LATER, "SearchSettings"} == set(meme_nas.__all__)


# The example


def example(**tiny):
    """The code of docs/example.md as one program, with some of its numbers made smaller."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", EXAMPLE.read_text(), re.DOTALL))
    for name, value in tiny.items():
        code, changed = re.subn(rf"^{name} = .*$", f"{name} = {value}", code, flags=re.MULTILINE)
        assert changed == 1, f"the example has no line {name} = ..."
    return code


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(example(STEPS=4, SAMPLES=64), str(EXAMPLE), "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert re.search(r"hand-made +\d+\.\d+M MACs", said)
    assert re.search(r"FID \d+\.\d+", said)
    assert {path.name for path in (tmp_path / "trained").iterdir()} >= {"config.yaml", "expert-4.safetensors"}
    assert (tmp_path / "samples.png").is_file()
    assert (tmp_path / "exported" / "model_index.json").is_file()


def test_the_example_shows_every_public_name():
    code = example()
    assert [name for name in meme.__all__ if not re.search(rf"\b{name}\b", code)] == []
