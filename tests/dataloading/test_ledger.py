"""The ledger's sums, its stop rule and its state."""

from __future__ import annotations

import errno
import json

import pytest

from mlip.dataloading.ledger import DataError, Ledger, listed, most_bad, unreadable


def test_every_row_of_a_finished_epoch_is_accounted_for() -> None:
    ledger = Ledger(100, {"blank_report": 7, "other_split_val": 13}, bad_share=0.1)
    ledger.add_trained(0, 78)
    ledger.add_bad(0, 5, "missing")
    ledger.add_bad(0, 9, "truncated")
    epoch = ledger.summary()["epochs"]["0"]
    total = epoch["trained"] + sum(epoch["quarantined"].values()) + 7 + 13
    assert total == ledger.summary()["rows"] == 100
    assert epoch["ahead"] == 0


def test_reasons_stand_by_name_whatever_came_first() -> None:
    """Two runs on the same files then say the same, and their lines compare."""
    assert listed({"truncated": 1, "missing": 3}) == "missing 3, truncated 1" and listed({}) == ""


def test_counts_add_up_in_order_and_the_commonest_reasons_are_told() -> None:
    reasons = ["unsupported", *["truncated"] * 2, *["missing"] * 3, "a", "b", "c"]
    ledger = Ledger(50, {"nan_report": 2, "blank_report": 1}, bad_share=0.0)
    for row, reason in enumerate(reasons):
        ledger.add_bad(1, row, reason)
    for epoch, trained in ((1, 4), (0, 47), (1, 5)):
        ledger.add_trained(epoch, trained)
    counts = {"a": 1, "b": 1, "c": 1, "missing": 3, "truncated": 2, "unsupported": 1}
    whole = {"trained": 47, "quarantined": {}, "replacements": 0, "ahead": 0}
    part = {"trained": 9, "quarantined": counts, "replacements": 0, "ahead": 29}
    wanted = {"rows": 50, "excluded": {"blank_report": 1, "nan_report": 2}}
    wanted |= {"quarantined_rows": counts, "epochs": {"0": whole, "1": part}}
    assert json.dumps(ledger.summary()) == json.dumps(wanted)  # in this order, too
    told = r"9 of 47 .* \(missing 3, truncated 2, unsupported 1, a 1, b 1\); data.bad_share=0.0"
    with pytest.raises(DataError, match=told):
        ledger.check()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        *((code, "no_permission") for code in (errno.EACCES, errno.EPERM)),
        *((code, "missing") for code in (errno.ENOENT, errno.ENOTDIR)),
        *((code, "missing") for code in (errno.ENAMETOOLONG, errno.ELOOP)),
        *((code, "not_a_file") for code in (errno.ENXIO, errno.ENODEV)),
        (errno.EAGAIN, "io_error"),  # another program's lease
    ],
)
def test_what_the_system_says_of_a_file_is_a_reason_with_what_was_read(code, reason):
    found = unreadable(OSError(code, "", "/films/Jane Doe.png"), "shard")
    assert found.reason == reason and str(found).startswith(f"{reason}: shard")
    assert "Jane" not in str(found)


def test_an_error_without_the_system_s_number_is_told_by_its_name():
    assert str(unreadable(OSError("of a library"))) == "io_error: OSError"


def test_a_row_met_by_a_replacement_draw_is_bad_but_leaves_the_epoch_sum() -> None:
    ledger = Ledger(10, {}, bad_share=1.0)
    ledger.add_bad(0, 3, "missing", in_order=False)
    assert ledger.bad == {3: "missing"}
    assert ledger.epochs == {}


@pytest.mark.parametrize("rows, share, allowed", [(1000, 0.01, 10), (155, 0.01, 1), (99, 0.01, 0)])
def test_the_run_stops_at_the_first_bad_row_beyond_the_share(
    rows: int, share: float, allowed: int
) -> None:
    ledger = Ledger(rows + 50, {"other_split_val": 50}, bad_share=share)
    for row in range(allowed):
        ledger.add_bad(0, row, "missing")
        ledger.check()
    ledger.add_bad(0, 999, "truncated")
    with pytest.raises(DataError, match=f"{allowed + 1} of {rows} .* allows {allowed}:") as caught:
        ledger.check()
    assert caught.value.exit_code == 3


def test_a_row_that_is_bad_in_every_epoch_counts_once_towards_the_share() -> None:
    ledger = Ledger(10, {}, bad_share=0.1)
    for epoch in range(5):
        ledger.add_bad(epoch, 4, "truncated" if epoch else "missing")
        ledger.add_replacement(epoch)
        ledger.check()
    assert ledger.bad == {4: "missing"}  # what was found first
    assert [count.replacements for count in ledger.epochs.values()] == [1] * 5


def test_state_survives_json() -> None:
    ledger = Ledger(20, {"nan_report": 2}, bad_share=0.5)
    ledger.add_trained(0, 17)
    ledger.add_bad(0, 11, "hash_mismatch")
    ledger.add_replacement(0)
    again = Ledger.from_state(json.loads(json.dumps(ledger.state_dict())))
    assert again.summary() == ledger.summary()
    assert again.epochs == ledger.epochs  # numbers again: its next batch is of the same epoch
    assert (again.bad, again.bad_share) == (ledger.bad, 0.5)  # a resumed run stops where it would


def test_merged_ranks_add_up() -> None:
    ranks = [Ledger(20, {"no_report": 4}, bad_share=0.2) for _ in range(2)]
    for rank, trained, bad in ((0, 7, 5), (1, 7, 3)):
        ranks[rank].add_trained(0, trained)
        ranks[rank].add_bad(0, bad, "missing")
        ranks[rank].add_replacement(0)
    merged = Ledger.merge(ranks)
    assert merged.bad_share == 0.2
    assert merged.bad == {5: "missing", 3: "missing"}
    assert merged.summary()["epochs"]["0"] == {
        "trained": 14,
        "quarantined": {"missing": 2},
        "replacements": 2,
        "ahead": 0,
    }
    ranks[1].bad[5] = "truncated"
    assert Ledger.merge(ranks).bad[5] == "missing"  # each row once
    for other in (Ledger(21, {}), Ledger(20, {"no_report": 1})):
        with pytest.raises(ValueError, match="one manifest"):
            Ledger.merge([Ledger(20, {}), other])


@pytest.mark.parametrize(
    ("share", "rows", "most"),
    [(0.29, 100, 29), (0.35, 180, 63), (0.33, 3, 0), (0.34, 3, 1), (0.01, 99, 0), (0.01, 100, 1)],
)
def test_a_share_of_bad_rows_is_meant_as_it_is_written(share: float, rows: int, most: int) -> None:
    ledger = Ledger(rows, {}, bad_share=share)
    for row in range(most):
        ledger.add_bad(0, row, "missing")
    ledger.check()
    ledger.add_bad(0, most, "missing")
    with pytest.raises(DataError, match=f"data.bad_share={share} allows {most}:"):
        ledger.check()


def test_no_bad_row_and_every_bad_row_may_be_allowed() -> None:
    assert (most_bad(0.0, 10), most_bad(1.0, 10), most_bad(1e-07, 10**8)) == (0, 10, 10)


@pytest.mark.parametrize("value", [-1, "3", 2.5, True, None, 1e300])
@pytest.mark.parametrize("place", ["rows", "excluded", "trained", "quarantined", "replacements"])
def test_a_saved_count_that_is_no_count_is_refused(place, value):
    """2.5 was taken as 2, -1 as it is: the rows of the page add up to another sum."""
    epoch = [4, {"missing": 1}, 0]
    state = {"rows": 6, "excluded": {"no_image": 1}, "bad_share": 0.1, "epochs": {"0": epoch}}
    state["bad"] = {}
    Ledger.from_state(state)
    if place == "rows":
        state["rows"] = value
    elif place == "excluded":
        state["excluded"]["no_image"] = value
    else:
        at = ["trained", "quarantined", "replacements"].index(place)
        epoch[at] = {"missing": value} if place == "quarantined" else value
    with pytest.raises(TypeError, match="expected a whole number"):
        Ledger.from_state(state)
