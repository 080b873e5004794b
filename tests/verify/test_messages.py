"""What a failure says: tasks in the words of the model, buffers, boxes, values."""

from __future__ import annotations

from dataclasses import replace

import pytest
from verify import programs

from mpk_dynamo.errors import VerificationError
from mpk_dynamo.ir.region import Access
from mpk_dynamo.ir.tasks import Event
from mpk_dynamo.ir.types import BufferKind, DType
from mpk_dynamo.targets import known
from mpk_dynamo.verify import verify_schedule, verify_tasks


@pytest.fixture
def tg():
    b = programs.Builder()
    b.add("x", (4,), BufferKind.INPUT)
    b.add("h", (4,), BufferKind.SCRATCH)
    b.add("y", (4,), BufferKind.OUTPUT)
    b.node("h", (2,), same=["x"])
    b.node("y", (2,), every=["h"])
    return b.task_graph()


def message(check, *args) -> str:
    with pytest.raises(VerificationError) as error:
        check(*args)
    return str(error.value)


def changed(tg, t, **fields):
    return replace(tg, tasks=(*tg.tasks[:t], replace(tg.tasks[t], **fields), *tg.tasks[t + 1 :]))


def test_the_program_is_accepted_with_a_report(tg):
    report = verify_tasks(tg)
    assert report.counts["tasks"] == 4 and report.counts["access_pairs"] == 4 and report.seconds > 0
    assert list(report.rules) and "T4" in str(report)


def test_t4_names_the_pair_and_their_boxes(tg):
    text = message(verify_tasks, replace(tg, events=(Event(0, (0,), (2, 3)),)))
    assert text.startswith("T4: layer0#n0[1] (t1) is not ordered before layer1#n1[0] (t2); read after write of h")
    assert "t1 writes h[2:4]" in text and "t2 reads h[0:4]" in text and "at layer1" in text


def test_t3_names_both_ends(tg):
    text = message(verify_tasks, replace(tg, events=(*tg.events, Event(1, (3,), (0,)))))
    assert "layer0#n0[0] (t0) waits for layer1#n1[1] (t3), which comes later" in text


def test_t1_names_the_dimension(tg):
    text = message(verify_tasks, changed(tg, 1, writes=(Access("h", ((2, 5),)),)))
    assert "T1" in text and "writes h[2:5]: dimension 0: 2:5 is not inside 0:4" in text


def test_t6_names_a_hole(tg):
    text = message(verify_tasks, changed(tg, 3, writes=(Access("y", ((3, 4),)),)))
    assert "3 of 4 elements of output y are written; nobody writes y[2:3]" in text


def test_t11_names_what_is_not_declared(tg):
    text = message(verify_tasks, changed(tg, 2, reads=(Access("h", ((0, 3),)),)))
    assert "needs h: [0:4]; it declares to read [[(0, 3)]]" in text


def test_s2_tells_the_cycle(tg):
    s = programs.schedule(tg, 2)
    s = replace(s, queues=((2, 0), (3, 1)))
    text = message(verify_schedule, s)
    assert "S2: deadlock: worker 0 at layer1#n1[0] waits for event 0, which lacks layer0#n0[0] at place 1" in text


def test_s3_names_buffers_and_tasks():
    b = programs.Builder()
    b.add("x", (4,), BufferKind.INPUT)
    for name in ("h", "g"):
        b.add(name, (4,), BufferKind.SCRATCH)
    b.add("y", (4,), BufferKind.OUTPUT)
    b.node("h", (2,), same=["x"])
    b.node("g", (2,), every=["h"])
    b.node("y", (2,), same=["g"])
    s = programs.schedule(b.task_graph(), 2)
    verify_schedule(s)
    text = message(verify_schedule, replace(s, arena={"h": 0, "g": 0}))
    assert "h at 0:16, g at 0:16 share memory while both are in use" in text and "may run after" in text


def test_s6_compares_with_the_target(tg):
    target = known("h100")
    verify_schedule(programs.schedule(tg, target.sm_count), target)
    text = message(verify_schedule, programs.schedule(tg, target.sm_count + 1), target)
    assert f"{target.sm_count + 1} workers on {target.sm_count} multiprocessors" in text


def test_t12_names_what_cannot_be_flagged(tg):
    tg = programs.flagged(tg, ["h"])
    assert verify_tasks(tg).counts["polled_boxes"] == 1 and not tg.events
    assert "flagged y is a output, not scratch" in message(verify_tasks, replace(tg, flagged=frozenset("y")))
    assert "'?' is the storage of 0 buffers" in message(verify_tasks, replace(tg, flagged=frozenset("?")))
    narrow = {**tg.buffers, "h": replace(tg.buffers["h"], dtype=DType.I32)}
    integer = replace(tg, buffers=narrow, graph=replace(tg.graph, buffers=narrow))
    assert "T12: flagged h is i32, which has no value to spare" in message(verify_tasks, integer)
    text = message(verify_tasks, changed(tg, 1, writes=(Access("h", ((1, 4),)),)))
    assert "elements of flagged h are written more than once: by layer0#n0[0] (t0), layer0#n0[1] (t1)" in text
    text = message(verify_tasks, changed(tg, 1, writes=(Access("h", ((3, 4),)),)))
    assert "T12: 3 of 4 elements of flagged h are written" in text


def test_t4_says_that_a_flag_went_missing(tg):
    text = message(verify_tasks, replace(programs.flagged(tg, ["h"]), flagged=frozenset()))
    assert "T4: layer0#n0[0] (t0) is not ordered before layer1#n1[0] (t2); read after write of h" in text


def test_polls_of_later_tasks_and_of_own_writes_are_refused(tg):
    tg = programs.flagged(tg, ["h"])
    reads = (*tg.tasks[0].reads, Access("h", ((3, 4),)))
    assert "T3: layer0#n0[0] (t0) polls h[3:4], which layer0#n0[1] (t1) writes later" in message(
        verify_tasks, changed(tg, 0, reads=reads)
    )
    own = message(verify_tasks, changed(tg, 1, reads=reads))
    assert "T3: layer0#n0[1] (t1) polls h[3:4], which it writes itself" in own


def test_s2_names_polls_in_a_deadlock(tg):
    s = programs.schedule(programs.flagged(tg, ["h"]), 1)
    text = message(verify_schedule, replace(s, queues=((0, 2, 1, 3),)))
    assert "S2: deadlock: worker 0 at layer1#n1[0] waits for h[0:4], which lacks layer0#n0[1] at place 2 of" in text


def test_s8_says_what_lies_in_flagged_memory(tg):
    b = programs.Builder()
    b.add("x", (4,), BufferKind.INPUT)
    for name in "hgp":
        b.add(name, (4,), BufferKind.SCRATCH)
    b.add("y", (4,), BufferKind.OUTPUT)
    b.node("h", (2,), same=["x"])
    b.node("g", (2,), every=["h"])
    b.node("p", (1,), every=["h"])
    b.node("y", (2,), every=["g", "p"])
    s = programs.schedule(programs.flagged(b.task_graph(), "gh"), 2)
    verify_schedule(s)
    assert s.flagged_start == 256 and s.flagged_bytes == 256 and s.arena == {"p": 0, "h": 256, "g": 384}
    for arena, text in (
        ({**s.arena, "g": 256}, "S8: flagged g and h share bytes 256:272"),
        (
            {**s.arena, "g": 400},
            "S8: flagged g of 16 bytes at 400: not a multiple of 128 inside the first set, 256:5",
        ),
        ({**s.arena, "g": 512}, "S8: flagged g of 16 bytes at 512"),
        ({**s.arena, "p": 512}, "S8: p at 512:528 is no flagged storage and lies in flagged memory, 256:768"),
    ):
        assert text in message(verify_schedule, replace(s, arena=arena))
    assert "S8: flagged memory at 128, two sets" in message(verify_schedule, replace(s, flagged_start=128))
    assert "inside an arena of 512 bytes" in message(verify_schedule, replace(s, arena_bytes=512))
