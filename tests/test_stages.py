"""A search and its audit as one run of an engine: what begins when, and what is shown meanwhile."""

from contextlib import contextmanager

import pytest
from toys import score

from meme.config.presets import preset
from meme_nas.engines.stages import Stage, Stages
from meme_nas.record.tasks import Task

CONFIG = preset("digits-meme")


class Counted:
    """So many tasks, all of which may run at a time."""

    def __init__(self, unit: str, count: int):
        self.unit, self._tasks = unit, [Task(number, CONFIG, unit) for number in range(count)]
        self.left, self.recorded = count, []

    @property
    def done(self) -> bool:
        return not self.left

    def next_task(self) -> Task | None:
        return self._tasks.pop(0) if self._tasks else None

    def record(self, outcome) -> None:
        self.left -= 1
        self.recorded.append(outcome.number)


def shown_in(events: list[str], source: Counted) -> Stage:
    @contextmanager
    def shown():
        events.append(f"{source.unit} begins")
        try:
            yield lambda: events.append(f"{source.unit} changes")
        finally:
            events.append(f"{source.unit} ends")

    return Stage(source, shown)


def test_a_stage_begins_when_all_of_the_one_before_is_recorded():
    events, search, audit = [], Counted("search", 2), Counted("audit", 1)
    with Stages([shown_in(events, search), shown_in(events, audit)]) as stages:
        first, second = stages.next_task(), stages.next_task()
        assert stages.next_task() is None and not stages.done, "two are running"
        stages.record(score(first))
        stages.on_change()
        assert stages.next_task() is None and events == ["search begins", "search changes"]
        stages.record(score(second))
        assert not stages.done, "the audit is to come"
        third = stages.next_task()
        assert third.kind == "audit" and events[2:] == ["search ends", "audit begins"]
        stages.on_change()
        stages.record(score(third))
        assert stages.done and stages.next_task() is None
    assert events[4:] == ["audit changes", "audit ends"]
    assert (search.recorded, audit.recorded) == ([0, 1], [0])


def test_a_stage_with_nothing_left_to_do_is_passed():
    events, stages = [], [Counted("search", 1), Counted("audit", 0), Counted("more", 1)]
    with Stages([shown_in(events, each) for each in stages]) as source:
        source.record(score(source.next_task()))
        assert source.next_task().kind == "more"
    assert events == ["search begins", "search ends", "more begins", "more ends"]


def test_the_only_stage_is_the_source_itself():
    with Stages([shown_in([], Counted("audit", 1))]) as source:
        assert source.unit == "audit" and not source.done
        source.record(score(source.next_task()))
        assert source.done


def test_what_is_shown_ends_with_an_error():
    events = []
    with (
        pytest.raises(KeyboardInterrupt),
        Stages([shown_in(events, Counted("search", 1)), shown_in(events, Counted("audit", 1))]),
    ):
        raise KeyboardInterrupt
    assert events == ["search begins", "search ends"]
