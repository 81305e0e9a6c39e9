"""Use by many threads, or change by one."""

from __future__ import annotations

import threading

from fewstep.engines.turns import Turns


def test_a_change_waits_for_users_and_later_users_for_it() -> None:
    turns, order, inside, leave = Turns(), list[str](), threading.Event(), threading.Event()

    def use() -> None:
        with turns.using() as outermost:
            assert outermost
            inside.set()
            leave.wait(10)
            with turns.using() as again:  # at once, though a change waits
                assert not again
                order.append("used")

    def change() -> None:
        with turns.changing():
            order.append("changed")

    def use_later() -> None:
        with turns.using():
            order.append("used later")

    user = threading.Thread(target=use)
    user.start()
    assert inside.wait(10)
    changer = threading.Thread(target=change)
    changer.start()
    while not turns._waiting:
        threading.Event().wait(0.001)
    later = threading.Thread(target=use_later)
    later.start()
    leave.set()
    for thread in (user, changer, later):
        thread.join(10)
    assert order == ["used", "changed", "used later"]


def test_changes_come_one_at_a_time_and_errors_give_the_turn_back() -> None:
    turns, now, most = Turns(), [0], [0]

    def change() -> None:
        for _ in range(200):
            try:
                with turns.changing():
                    now[0] += 1
                    most[0] = max(most[0], now[0])
                    now[0] -= 1
                    raise ValueError
            except ValueError:
                pass

    threads = [threading.Thread(target=change) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1]
    with turns.using() as outermost:
        assert outermost
