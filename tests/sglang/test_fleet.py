"""Several SGLangs as one engine: scripted ones, which can be killed, filled and started again."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from support.fake_sglang import FakeRouter, FakeSGLang
from transformers import AutoModelForCausalLM

from backends.engine import (
    BroadcastWeights,
    FinishReason,
    FolderWeights,
    Generation,
    GenerationRequest,
    TensorWeights,
    WeightsGroup,
)
from backends.sglang import FleetConfig, SGLangConfig, SGLangFleet
from backends.sglang.fleet.replica import Replica
from gym_sdk.errors import CheckpointError, ConfigurationError, PolicyError, TransportError
from gym_sdk.schema.weights import TensorSpec

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

WATCH = FleetConfig(check_s=0.1, health_s=0.5, away_s=20.0)
CONFIG = SGLangConfig(connect_s=2.0, control_s=2.0, refused_retries=0, shared_memory=None)


@pytest_asyncio.fixture
async def fakes(untrained_policy: Path) -> AsyncIterator[list[FakeSGLang]]:
    servers = [FakeSGLang(untrained_policy, number) for number in (1, 2, 3)]
    for server in servers:
        await server.start()
    yield servers
    for server in servers:
        if server.hold is not None:
            server.hold.set()
        await server.die()


@asynccontextmanager
async def fleet_of(servers: list[FakeSGLang], watch: FleetConfig = WATCH) -> AsyncIterator[SGLangFleet]:
    async with await SGLangFleet.connect(
        [server.url for server in servers], config=CONFIG, watch=watch
    ) as fleet:
        yield fleet


def ask(name: object, affinity: str | None = None) -> GenerationRequest:
    return GenerationRequest(str(name), [5], affinity=affinity)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def serving(fleet: SGLangFleet) -> list[bool]:
    return [replica.serves for replica in fleet.info.replicas]


def folder(untrained_policy: Path, tmp_path: Path, name: str) -> FolderWeights:
    shutil.copytree(untrained_policy, tmp_path / name)
    return FolderWeights(tmp_path / name)


async def test_conversations_stay_on_a_replica_and_are_spread(fakes: list[FakeSGLang]) -> None:
    async with fleet_of(fakes) as fleet:
        first = {key: (await fleet.generate(ask(key, key))).token_ids[0] for key in map(str, range(60))}
        again = {key: (await fleet.generate(ask(key, key))).token_ids[0] for key in first}
    assert again == first
    assert min(Counter(first.values()).values()) >= 8
    assert set(first.values()) == {1, 2, 3}


async def test_one_key_alone_fills_no_replica_while_others_idle(fakes: list[FakeSGLang]) -> None:
    for server in fakes:
        server.hold = asyncio.Event()
    async with fleet_of(fakes) as fleet:
        tasks = [asyncio.create_task(fleet.generate(ask(index, "one group"))) for index in range(30)]
        await until(lambda: sum(len(server.prompts) for server in fakes) == 30)
        assert max(len(server.prompts) for server in fakes) <= 14  # an even share is 10
        assert fleet.info.running == 30
        for server in fakes:
            assert server.hold is not None
            server.hold.set()
        await asyncio.gather(*tasks)


async def test_a_dead_replica_is_left_out_and_comes_back_with_the_weights_that_count(
    fakes: list[FakeSGLang], untrained_policy: Path, tmp_path: Path
) -> None:
    fakes[0].hold = asyncio.Event()
    async with fleet_of(fakes) as fleet:
        tasks = [asyncio.create_task(fleet.generate(ask(index, str(index)))) for index in range(12)]
        await until(lambda: bool(fakes[0].prompts) and fleet.info.running == len(fakes[0].prompts))
        await fakes[0].die()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        lost = [result for result in results if not isinstance(result, Generation)]
        assert len(lost) == len(fakes[0].prompts) > 0  # what may have been sampled is the caller's to retry
        assert all(isinstance(error, TransportError) and error.retryable for error in lost)
        await until(lambda: serving(fleet) == [False, True, True])
        assert {(await fleet.generate(ask(index, str(index)))).token_ids[0] for index in range(12)} == {2, 3}
        await fleet.update_weights(folder(untrained_policy, tmp_path, "new"), version="7")
        assert fleet.info.weight_version == "7"
        fakes[0].hold = None
        await fakes[0].start()
        assert fakes[0].version == "0"
        await until(lambda: serving(fleet) == [True, True, True])
        assert fakes[0].version == "7"
        assert fakes[0].path == str(tmp_path / "new")
        assert {(await fleet.generate(ask(index, str(index)))).token_ids[0] for index in range(12)} == {
            1,
            2,
            3,
        }


async def test_a_replica_that_hangs_is_left_out_and_its_requests_may_be_sent_again(
    fakes: list[FakeSGLang],
) -> None:
    fakes[0].hold = asyncio.Event()
    async with fleet_of(fakes[:1]) as fleet:
        task = asyncio.create_task(fleet.generate(ask("one")))
        await until(lambda: bool(fakes[0].prompts))
        fakes[0].silent = True
        with pytest.raises(TransportError, match="lost: it did not answer") as caught:
            await task
        assert caught.value.retryable
        assert serving(fleet) == [False]
        waiting = asyncio.create_task(fleet.generate(ask("two")))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        assert fleet.info.waiting == 1
        fakes[0].silent = False
        fakes[0].hold.set()
        assert (await waiting).token_ids == [1]


async def test_requests_wait_for_a_replica_within_bounds(fakes: list[FakeSGLang]) -> None:
    watch = FleetConfig(check_s=0.1, health_s=0.5, away_s=0.3)
    async with fleet_of(fakes[:1], watch) as fleet:
        await fakes[0].die()
        await until(lambda: serving(fleet) == [False])
        with pytest.raises(TransportError, match=r"no SGLang serves.*waited 0\.3 s") as caught:
            await fleet.generate(ask("one"))
        assert caught.value.retryable
        with pytest.raises(TransportError, match="no SGLang serves"):
            await fleet.update_weights(FolderWeights(fakes[0].model), version="1")


async def test_what_waits_for_a_replica_can_be_aborted(fakes: list[FakeSGLang]) -> None:
    async with fleet_of(fakes[:1]) as fleet:
        await fakes[0].die()
        await until(lambda: serving(fleet) == [False])
        tasks = [asyncio.create_task(fleet.generate(ask(index))) for index in range(3)]
        await until(lambda: fleet.info.waiting == 3)
        assert await fleet.abort("1") == 1
        assert (await tasks[1]).finish_reason is FinishReason.ABORT
        with pytest.raises(ConfigurationError, match="in use"):
            await fleet.generate(ask("2"))
        tasks[2].cancel()
        await asyncio.wait([tasks[2]])
        assert await fleet.abort() == 1
        assert (await tasks[0]).token_ids == []


async def test_a_full_queue_sends_what_was_not_sampled_elsewhere(fakes: list[FakeSGLang]) -> None:
    async with fleet_of(fakes) as fleet:
        fakes[0].full = fakes[1].full = True
        assert {(await fleet.generate(ask(index, str(index)))).token_ids[0] for index in range(12)} == {3}
        fakes[2].full = True
        with pytest.raises(TransportError, match="queue is full") as caught:
            await fleet.generate(ask("full"))
        assert caught.value.status == 503
        assert serving(fleet) == [True, True, True]


async def test_an_update_reaches_all_and_what_refuses_it_is_left_out(
    fakes: list[FakeSGLang], untrained_policy: Path, tmp_path: Path
) -> None:
    async with fleet_of(fakes) as fleet:
        await fleet.update_weights(folder(untrained_policy, tmp_path, "one"), version="1")
        assert [server.version for server in fakes] == ["1", "1", "1"]
        fakes[1].refuses = True
        await fleet.update_weights(folder(untrained_policy, tmp_path, "two"), version="2")
        assert serving(fleet) == [True, False, True]
        assert "did not take the weights" in (fleet.info.replicas[1].problem or "")
        assert {(await fleet.generate(ask(index, str(index)))).token_ids[0] for index in range(12)} == {1, 3}
        fakes[1].refuses = False
        await fleet.update_weights(folder(untrained_policy, tmp_path, "three"), version="3")
        assert serving(fleet) == [True, True, True]
        for server in fakes:
            server.refuses = True
        with pytest.raises(CheckpointError):
            await fleet.update_weights(folder(untrained_policy, tmp_path, "four"), version="4")
        assert fleet.info.weight_version == "3"


async def test_who_leaves_an_update_early_does_not_part_the_replicas(
    fakes: list[FakeSGLang], untrained_policy: Path, tmp_path: Path
) -> None:
    async with fleet_of(fakes) as fleet:
        update = asyncio.create_task(
            fleet.update_weights(folder(untrained_policy, tmp_path, "one"), version="1")
        )
        await asyncio.sleep(0)
        update.cancel()
        await asyncio.wait([update])
        await until(lambda: [server.version for server in fakes] == ["1", "1", "1"])
        await until(lambda: all("/continue_generation" in server.calls for server in fakes))


async def test_a_replica_that_comes_back_in_a_pause_is_paused(fakes: list[FakeSGLang]) -> None:
    async with fleet_of(fakes[:2]) as fleet:
        await fakes[0].die()
        await until(lambda: serving(fleet) == [False, True])
        await fleet.pause("retract")
        await fakes[0].start()
        await until(lambda: serving(fleet) == [True, True])
        assert "/pause_generation" in fakes[0].calls
        before = fakes[0].calls.count("/continue_generation")
        await fleet.continue_generation()
        assert fakes[0].calls.count("/continue_generation") == before + 1


async def test_replicas_with_other_weights_are_refused_at_the_start(
    fakes: list[FakeSGLang],
) -> None:
    fakes[1].version = "5"
    with pytest.raises(ConfigurationError, match="other weights"):
        async with fleet_of(fakes[:2]):
            pass


async def test_who_is_not_there_yet_is_waited_for_and_nobody_is_an_error(fakes: list[FakeSGLang]) -> None:
    await fakes[0].die()
    async with fleet_of(fakes[:2]) as fleet:
        assert serving(fleet) == [False, True]
        await fakes[0].start()
        await until(lambda: serving(fleet) == [True, True])
    await fakes[0].die()
    with pytest.raises(TransportError, match="no answer from SGLang"):
        async with fleet_of(fakes[:1]):
            pass
    with pytest.raises(ConfigurationError, match="at least one"):
        await SGLangFleet.connect([])


async def test_a_router_stands_for_its_workers(fakes: list[FakeSGLang]) -> None:
    router = FakeRouter([fakes[0].url])
    runner = await router.start()
    try:
        watch = FleetConfig(check_s=0.05, health_s=0.5, away_s=20.0)
        async with await SGLangFleet.connect([router.url], config=CONFIG, watch=watch) as fleet:
            assert [replica.url for replica in fleet.info.replicas] == [fakes[0].url]
            router.workers = [fakes[0].url, fakes[1].url]  # one joins
            await until(lambda: serving(fleet) == [True, True])
            router.workers = [fakes[1].url]  # one leaves
            await until(lambda: [replica.url for replica in fleet.info.replicas] == [fakes[1].url])
            assert (await fleet.generate(ask("one"))).token_ids == [2]
        router.kind = "prefill"
        with pytest.raises(ConfigurationError, match="worker_type='prefill'"):
            await SGLangFleet.connect([router.url], config=CONFIG)
        router.workers = []
        with pytest.raises(ConfigurationError, match="no workers"):
            await SGLangFleet.connect([router.url], config=CONFIG)
    finally:
        await runner.cleanup()


async def test_a_group_holds_all_replicas_and_is_unknown_once_one_has_changed(
    fakes: list[FakeSGLang],
) -> None:
    async with fleet_of(fakes[:2]) as fleet:
        assert fleet.ranks == 2
        await fleet.join_group(WeightsGroup("g", "127.0.0.1", 9, "gloo", first_rank=1, world_size=3))
        assert (fakes[0].ranks, fakes[1].ranks) == ([1], [2])
        await fakes[1].die()
        await until(lambda: serving(fleet) == [True, False])
        weights = BroadcastWeights("g", (TensorSpec("a", "float32", (1,)),))
        with pytest.raises(PolicyError) as caught:
            await fleet.update_weights(weights, version="1")
        assert caught.value.code == "weights_group_unknown"
        await fakes[1].start()
        await until(lambda: serving(fleet) == [True, True])  # it is there, and in no group
        with pytest.raises(PolicyError) as caught:
            await fleet.update_weights(weights, version="1")
        assert caught.value.code == "weights_group_unknown"
        assert not any("/pause_generation" in server.calls for server in fakes)
        await fleet.leave_group("g")


async def test_weights_that_came_as_tensors_keep_a_replica_out_until_the_next_update(
    fakes: list[FakeSGLang], untrained_policy: Path, tmp_path: Path
) -> None:
    async with fleet_of(fakes[:2]) as fleet:
        model = AutoModelForCausalLM.from_pretrained(str(untrained_policy))
        await fleet.update_weights(TensorWeights(model.state_dict()), version="1")
        for server in fakes[:2]:
            assert "/update_weights_from_tensor" in server.calls
            server.version = "1"
        await fakes[0].die()
        await until(lambda: serving(fleet) == [False, True])
        await fakes[0].start()
        await until(lambda: "can't be sent again" in (fleet.info.replicas[0].problem or ""))
        assert {(await fleet.generate(ask(index, str(index)))).token_ids[0] for index in range(12)} == {2}
        await fleet.update_weights(folder(untrained_policy, tmp_path, "new"), version="2")
        assert serving(fleet) == [True, True]


async def test_an_update_from_tensors_that_is_left_early_is_undone_on_all(
    fakes: list[FakeSGLang], untrained_policy: Path, tmp_path: Path
) -> None:
    async with fleet_of(fakes[:2]) as fleet:
        first = folder(untrained_policy, tmp_path, "one")
        await fleet.update_weights(first, version="1")
        for server in fakes[:2]:
            server.slow = True
        model = AutoModelForCausalLM.from_pretrained(str(untrained_policy))
        update = asyncio.create_task(fleet.update_weights(TensorWeights(model.state_dict()), version="2"))
        await until(lambda: all("/update_weights_from_tensor" in server.calls for server in fakes[:2]))
        update.cancel()
        await asyncio.wait([update])
        assert update.cancelled()
        assert fleet.info.weight_version == "1"
        assert [server.calls.count("/update_weights_from_disk") for server in fakes[:2]] == [2, 2]
        assert serving(fleet) == [True, True]


@pytest.mark.parametrize("pushed", [False, True])
async def test_the_start_is_what_a_replica_gets_unless_others_had_pushed_before(
    fakes: list[FakeSGLang], pushed: bool
) -> None:
    if pushed:
        fakes[0].version = fakes[1].version = "5"
    async with fleet_of(fakes[:2]) as fleet:
        await fakes[0].die()
        await until(lambda: serving(fleet) == [False, True])
        await fakes[0].start()
        fakes[0].version = "3"  # of something else
        if pushed:
            await until(lambda: "can't be sent again" in (fleet.info.replicas[0].problem or ""))
            assert fakes[0].version == "3"
        else:
            await until(lambda: serving(fleet) == [True, True])
            assert fakes[0].version == "0"


async def test_a_replica_of_another_model_stays_out(fakes: list[FakeSGLang]) -> None:
    async with fleet_of(fakes[:2]) as fleet:
        await fakes[0].die()
        await until(lambda: serving(fleet) == [False, True])
        fakes[0].length = 90
        await fakes[0].start()
        await until(lambda: "serves another model" in (fleet.info.replicas[0].problem or ""))
        assert serving(fleet) == [False, True]
        fakes[0].length = 100
        await until(lambda: serving(fleet) == [True, True])


async def test_a_pause_that_one_replica_does_not_take_leaves_none_paused(fakes: list[FakeSGLang]) -> None:
    async with fleet_of(fakes[:2], FleetConfig(check_s=60.0)) as fleet:
        await fakes[1].die()
        with pytest.raises(TransportError):
            await fleet.pause("retract")
        assert "/pause_generation" in fakes[0].calls
        assert fakes[0].calls[-1] == "/continue_generation"


async def test_a_failure_of_the_watch_is_not_its_end(
    fakes: list[FakeSGLang], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet_of(fakes[:1]) as fleet:

        async def fails(_: Replica) -> str | None:
            raise RuntimeError("of the watch")

        with monkeypatch.context() as patch:
            patch.setattr(Replica, "ailing", fails)
            await until(lambda: "of the watch" in caplog.text)
        await fakes[0].die()
        await until(lambda: serving(fleet) == [False])
        await fakes[0].start()
        await until(lambda: serving(fleet) == [True])
