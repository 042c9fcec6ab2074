"""Which replica gets a request."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from backends.sglang.fleet.routing import SLACK, ranked, route

names = st.lists(
    st.text("abcdefgh0123456789.:/", min_size=1, max_size=12), min_size=1, max_size=8, unique=True
)
keys = st.text(min_size=1, max_size=20)


@given(keys, names, st.data())
def test_a_replica_that_goes_takes_only_its_own_keys_along(
    key: str, urls: list[str], data: st.DataObject
) -> None:
    order = ranked(key, dict.fromkeys(urls, 0))
    assert sorted(order) == sorted(urls)
    gone = data.draw(st.sampled_from(urls))
    left = [url for url in urls if url != gone]
    assert ranked(key, dict.fromkeys(left, 0)) == [url for url in order if url != gone]


@given(keys, names, st.data())
def test_no_replica_gets_more_than_its_share_and_a_quarter(
    key: str, urls: list[str], data: st.DataObject
) -> None:
    loads = {url: data.draw(st.integers(0, 100)) for url in urls}
    chosen = route(key, loads)
    limit = math.ceil(SLACK * (sum(loads.values()) + 1) / len(loads))
    assert loads[chosen] < limit
    # those that the key prefers are full
    for url in ranked(key, loads)[: ranked(key, loads).index(chosen)]:
        assert loads[url] >= limit


@given(names, st.data())
def test_without_a_key_the_one_with_the_least_to_do_is_taken(urls: list[str], data: st.DataObject) -> None:
    loads = {url: data.draw(st.integers(0, 100)) for url in urls}
    assert loads[route(None, loads)] == min(loads.values())


def test_what_belongs_together_stays_together_and_keys_are_spread() -> None:
    urls = [f"http://10.0.0.{index}:30000" for index in range(4)]
    keys = [f"conversation-{index}" for index in range(400)]
    found = {key: route(key, dict.fromkeys(urls, 0)) for key in keys}
    assert all(route(key, dict.fromkeys(urls, 20)) == url for key, url in found.items())
    assert all(60 <= count <= 140 for count in Counter(found.values()).values())
