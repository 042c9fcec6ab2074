"""Any conversation with any real chat template: prompts extend what was sampled, or a fork is reported."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.conversations import Move, Player, conversations
from support.template_tokenizers import renderers

from backends.prefix import Step
from backends.rehearsal import Scenario, check

NAMES = sorted(renderers())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(moves=conversations(), tools=st.booleans())
def test_nothing_drifts_in_silence_and_no_turn_is_dropped(name: str, moves: list[Move], tools: bool) -> None:
    Player(renderers()[name], tools=tools).play(moves)


@pytest.mark.parametrize("name", NAMES)
def test_plain_and_truncated_turns_are_bridged(name: str) -> None:
    found = check(renderers()[name])
    plays = {play.scenario: play for play in found.plays}
    assert plays[Scenario.PLAIN].summary == plays[Scenario.TRUNCATED].summary == "bridge"
    assert plays[Scenario.EDITED].steps[1] is Step.FORK
    assert not any(play.drifts for play in found.plays)
    assert not any(play.agrees is False for play in found.plays)
