"""Read a YAML file as plain data, whoever wrote it: nothing in it is executed, and no reference multiplies its size."""

from pathlib import Path
from typing import Any

import yaml

from meme.errors import UserError, in_one_line

MAX_BYTES = 2**18  # the paper's largest preset has 2 kB


class _PlainLoader(yaml.SafeLoader):
    """A loader that refuses references: a few lines of them stand for gigabytes once they are followed, merged or printed."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"the reference *{self.peek_event().anchor} is not followed; write out what it stands for")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file of at most ``MAX_BYTES``. Raises ``UserError``, of one sentence, for anything wrong
    with it."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES // 2**10} KiB")
        return yaml.load(content.decode("utf-8"), Loader=_PlainLoader)  # a subclass of SafeLoader
    except MemoryError:
        raise
    except Exception as error:  # PyYAML's constructors raise nearly anything: !!int '' is an IndexError, !!bool x a KeyError
        raise UserError(f"{path}: not a readable YAML file ({in_one_line(error)})") from None
