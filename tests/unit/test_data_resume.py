"""A resume goes on with the same samples; shares of samples to come may change, what was read may not."""

from __future__ import annotations

import dataclasses
import json
import shlex
from fractions import Fraction
from typing import Any

import pytest

from megatron_slm.config.load import load
from megatron_slm.data.config import DataConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.mixture import MixtureOrder, Phase, Source
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.resume import OF_RUN, OF_SOURCE, check_lengths, check_resume
from megatron_slm.data.shares import configured_phases
from megatron_slm.errors import CheckpointError

SIZES = {"kjv": 1000, "code": 300, "web": 5000}
FIRST = {"kjv": "0.7", "code": "0.3"}


def source(name: str) -> Source:
    return Source(name, SampleOrder(SIZES[name], 1234, f"digest of {name}", 128))


def phase(start: int, **weights: str) -> Phase:
    return Phase.of(start, {name: Fraction(weight) for name, weight in weights.items()})


def cursor(*phases: Phase, sources: tuple[str, ...] = ("kjv", "code")) -> Cursor:
    return Cursor.start(MixtureOrder(tuple(map(source, sources)), phases), "hash")


def alone(**changes: Any) -> Cursor:
    order = dataclasses.replace(source("kjv").order, **changes)
    return Cursor.start(MixtureOrder.of_one("kjv", order), "hash")


def stored(saved: Cursor) -> Cursor:
    return Cursor.from_dict(json.loads(json.dumps(saved.to_dict())))


SAVED = stored(cursor(phase(0, **FIRST)).advance(9000))


def test_nothing_changed_is_nothing_to_say() -> None:
    assert check_resume(SAVED, cursor(phase(0, **FIRST))) == (SAVED, [])
    assert check_resume(stored(alone().advance(900)), alone()) == (alone().advance(900), [])


@pytest.mark.parametrize(
    ("field", "value", "now"),
    [
        ("dataset_digest", "c" * 64, alone(digest="c" * 64)),
        ("seed", 99, alone(seed=99)),
        ("num_samples", 1001, alone(num_samples=1001)),
        ("seq_length", 256, alone(seq_length=256)),
        ("tokenizer_hash", "other", dataclasses.replace(alone(), tokenizer_hash="other")),
    ],
)
def test_resume_with_other_samples_is_refused_by_name(field: str, value: Any, now: Cursor) -> None:
    with pytest.raises(CheckpointError) as refused:
        check_resume(alone().advance(900), now)
    message = str(refused.value)
    assert f"{value} now" in message and "after 900" in message
    assert [name for name in (*OF_RUN, *OF_SOURCE) if f"  {name}: " in message] == [field]


def test_every_changed_field_is_named_with_its_source() -> None:
    orders = [dataclasses.replace(one.order, seed=5) for one in map(source, ("kjv", "code"))]
    now = Cursor.start(
        MixtureOrder((Source("kjv", orders[0]), Source("code", orders[1])), (phase(0, **FIRST),)), "hash"
    )
    with pytest.raises(CheckpointError) as refused:
        check_resume(SAVED, now)
    assert "  seed of source kjv: 1234 in the checkpoint, 5 now" in str(refused.value)
    assert "  seed of source code: 1234 in the checkpoint, 5 now" in str(refused.value)


def test_a_change_from_here_on_is_accepted_said_and_kept() -> None:
    now = cursor(phase(0, **FIRST), phase(20_000, kjv="0.5", code="0.5"))
    resumed = check_resume(SAVED, now)
    assert resumed.changes == ["mixture changes at sample 20000: kjv 0.7 -> 0.5, code 0.3 -> 0.5"]
    went_on = resumed.cursor.advance(13_000)
    assert went_on.consumed_by_source == {"kjv": 14_000 + 1000, "code": 6000 + 1000}
    assert resumed.cursor.rolling_digest == SAVED.rolling_digest
    # Once it is in the checkpoint there is nothing more to say.
    assert check_resume(stored(went_on), now).changes == []


def test_a_change_exactly_here_is_accepted() -> None:
    assert check_resume(SAVED, cursor(phase(0, **FIRST), phase(9000, kjv="1"))).changes == [
        "mixture changes at sample 9000: kjv 0.7 -> 1, code 0.3 -> 0"
    ]


def test_a_change_to_come_may_be_taken_back() -> None:
    saved = stored(cursor(phase(0, **FIRST), phase(20_000, kjv="1")).advance(100))
    assert check_resume(saved, cursor(phase(0, **FIRST))).changes == [
        "mixture does not change to kjv 1 at sample 20000 any more"
    ]


def test_before_the_first_sample_anything_may_change() -> None:
    saved = stored(cursor(phase(0, **FIRST)))
    resumed = check_resume(saved, cursor(phase(0, kjv="1")))
    assert resumed.changes == ["mixture changes at sample 0: kjv 0.7 -> 1, code 0.3 -> 0"]
    assert resumed.cursor.order.phases == (phase(0, kjv="1"),)


@pytest.mark.parametrize(
    ("saved", "now", "key", "keep", "entry"),
    [
        (
            SAVED,
            cursor(phase(0, kjv="0.5", code="0.5")),
            "data.weights",
            "data.weights=code=0.3,kjv=0.7,",
            "9000: code=0.5 kjv=0.5",
        ),
        (SAVED, cursor(phase(0, **FIRST), phase(8999, kjv="1")), "data.phases", "code=0.3", "9000: kjv=1"),
        (
            cursor(phase(0, **FIRST), phase(100, kjv="1", code="2")).advance(200),
            cursor(phase(0, **FIRST), phase(100, kjv="2", code="1")),
            "data.phases",
            'data.weights=code=0.3,kjv=0.7 "data.phases=100: code=2 kjv=1",',
            "200: code=1 kjv=2",
        ),
        (
            cursor(phase(0, **FIRST), phase(100, kjv="1")).advance(200),
            cursor(phase(0, **FIRST)),
            "data.phases",
            '"data.phases=100: kjv=1"',
            "200: code=0.3 kjv=0.7",
        ),
        (
            SAVED,
            cursor(phase(0, kjv="1", code="1", web="2"), sources=("kjv", "code", "web")),
            "data.weights",
            "code=0.3",
            "9000: code=0.25 kjv=0.25 web=0.5",
        ),
    ],
)  # fmt: skip
def test_a_changed_past_is_refused_with_the_way_to_do_it_now(
    saved: Cursor, now: Cursor, key: str, keep: str, entry: str
) -> None:
    with pytest.raises(CheckpointError) as refused:
        check_resume(stored(saved), now)
    message = str(refused.value)
    assert message.startswith(key) and keep in message and entry in message
    # What it says to type is accepted, as it is.
    for typed, changes in zip(
        message.rpartition("Go on as before with ")[2].split(", or "), (False, True), strict=True
    ):
        options = load(None, shlex.split(typed.rpartition(" with ")[2].removesuffix("."))).config.data
        followed = MixtureOrder(now.order.sources, configured_phases(options, {}))
        assert bool(check_resume(stored(saved), Cursor.start(followed, "hash")).changes) is changes


def test_shares_by_size_are_set_back_by_temperature_unless_a_source_has_joined() -> None:
    before = DataConfig(sources=("kjv=a", "code=b"))
    with pytest.raises(
        CheckpointError, match=r'with data\.temperature=1\.0 \(and no data\.weights\) "data\.phases=9000: '
    ):
        check_resume(SAVED, cursor(phase(0, kjv="0.6", code="0.4")), before)
    joined = cursor(phase(0, kjv="0.6", code="0.2", web="0.2"), sources=("kjv", "code", "web"))
    with pytest.raises(CheckpointError, match=r'with data\.weights=code=0\.3,kjv=0\.7 "data\.phases=9000: code=0\.2 '):
        check_resume(SAVED, joined, before)


def test_windows_of_samples_to_come_may_change_and_those_of_the_past_may_not() -> None:
    check_lengths(100, ["0: 8"], ["0: 8", "100: 32"])
    check_lengths(100, ["0: 8", "200: 16"], ["0: 8"])
    with pytest.raises(CheckpointError, match=r"100 samples.*was 0: 8 in the checkpoint, but is empty now.*sample 100"):
        check_lengths(100, ["0: 8"], ["100: 32"])
    with pytest.raises(CheckpointError, match="99: 32"):
        check_lengths(100, ["0: 8"], ["0: 8", "99: 32"])


def test_replayed_samples_have_no_weight_to_be_typed_and_one_share_all_through() -> None:
    def replaying(share: str, **weights: str) -> Cursor:
        rest = 1 - Fraction(share)
        shares = {name: str(Fraction(weight) * rest) for name, weight in weights.items()}
        replay = Source("replay", SampleOrder(50, 1234, "digest of replay", 128))
        order = MixtureOrder((source("kjv"), source("code"), replay), (phase(0, **shares, replay=share),))
        return Cursor.start(order, "hash")

    saved = stored(replaying("0.1", **FIRST).advance(100))
    with pytest.raises(
        CheckpointError, match=r'data\.weights=code=0\.27,kjv=0\.63 "data\.phases=100: code=0\.45 kjv=0\.45"'
    ):
        check_resume(saved, replaying("0.1", kjv="0.5", code="0.5"))
    for now, value in ((replaying("0.2", **FIRST), "0.2"), (cursor(phase(0, **FIRST)), "0")):
        with pytest.raises(CheckpointError, match=rf"was 0\.1 in the checkpoint and is {value} now|source replay"):
            check_resume(saved, now)
    with pytest.raises(CheckpointError, match="was 0 in the checkpoint and is 0.1 now"):
        check_resume(SAVED, replaying("0.1", **FIRST))


def test_a_source_may_be_added_for_samples_to_come() -> None:
    now = cursor(phase(0, **FIRST), phase(9500, kjv="0.5", code="0.1", web="0.4"), sources=("web", "kjv", "code"))
    resumed = check_resume(SAVED, now)
    assert resumed.changes == ["mixture changes at sample 9500: web 0 -> 0.4, kjv 0.7 -> 0.5, code 0.3 -> 0.1"]
    assert resumed.cursor.consumed_by_source == {"web": 0, "kjv": 6300, "code": 2700}
    assert resumed.cursor.advance(1500).consumed_by_source == {"web": 400, "kjv": 6650 + 500, "code": 2850 + 100}


def test_one_corpus_may_become_a_mixture() -> None:
    saved = stored(alone().advance(900))
    now = cursor(phase(0, kjv="1"), phase(900, kjv="0.5", code="0.5"))
    assert check_resume(saved, now).changes == ["mixture changes at sample 900: kjv 1 -> 0.5, code 0 -> 0.5"]


def test_a_source_that_was_read_stays_and_one_that_was_not_may_go() -> None:
    with pytest.raises(CheckpointError, match=r"source code: 2700 of its samples were read.*keep it in data.sources"):
        check_resume(SAVED, cursor(phase(0, kjv="1"), sources=("kjv",)))
    unread = stored(cursor(phase(0, **FIRST), phase(99_999, web="1"), sources=("kjv", "code", "web")).advance(9000))
    assert check_resume(unread, cursor(phase(0, **FIRST))).changes == [
        "mixture does not change to web 1 at sample 99999 any more"
    ]


def test_a_renamed_source_is_the_same_source() -> None:
    bible = Source("bible", source("kjv").order)
    now = MixtureOrder((bible, source("code")), (phase(0, bible="0.7", code="0.3"),))
    resumed = check_resume(SAVED, Cursor.start(now, "hash"))
    assert resumed.changes == [] and resumed.cursor.consumed_by_source == {"bible": 6300, "code": 2700}
    assert resumed.cursor.advance(10).rolling_digest == SAVED.advance(10).rolling_digest


def test_what_the_run_decided_itself_survives_a_resume() -> None:
    live = cursor(phase(0, **FIRST)).advance(500).with_phase({"kjv": Fraction(1), "code": Fraction(1)}).advance(100)
    resumed = check_resume(stored(live), cursor(phase(0, **FIRST), phase(5000, kjv="1")))
    assert resumed.changes == ["mixture changes at sample 5000: kjv 0.5 -> 1, code 0.5 -> 0"]
    assert [(one.start, one.adaptive) for one in resumed.cursor.order.phases] == [
        (0, False),
        (500, True),
        (5000, False),
    ]
    assert resumed.cursor.advance(50).rolling_digest == live.advance(50).rolling_digest
