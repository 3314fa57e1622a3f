"""One run that is killed again and again: each kill at its moment, then the wait for the next finished step."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from torture.disk import SmallDisk
from torture.schedule import PlannedKill
from torture.targets import ENDS_THE_JOB, GOES_ON_AFTER_S, LONGEST_FULL_S, Targets
from torture.terminal import STOP_JOB, SUBMIT, Terminal
from torture.timeline import Event, Timeline

TICK_S = 0.1
LONGEST_RECOVERY_S = 180.0
LONGEST_DELAY_S, LONGEST_START_DELAY_S = 10.0, 15.0


class Stuck(Exception):
    """The run does not come back."""


@dataclass
class Kill:
    """One that was made."""

    number: int
    kind: str
    at: float
    step: int
    """Finished steps then."""
    in_start: bool
    recovered: Event | None = None
    """The next finished step. None: killed again before that."""
    commands: tuple[str, ...] = ()
    """That were needed for it."""

    @property
    def seconds(self) -> float | None:
        return self.recovered.at - self.at if self.recovered else None

    @property
    def how(self) -> str:
        return f"by {', '.join(self.commands)}" if self.commands else "by itself"


class Attack:
    """Kills one run and has it brought back."""

    def __init__(self, terminal: Terminal, timeline: Timeline, disk: SmallDisk | None, say: Callable[[str], None]):
        self.terminal, self.timeline, self.disk, self.say = terminal, timeline, disk, say
        self.targets = Targets(terminal, disk)
        self.kills: list[Kill] = []
        self._began = self._last_sign = time.monotonic()

    def run(self, planned: list[PlannedKill], longest_delay_s: float, seed: int) -> None:
        """Until the run is finished; fewer kills than planned are made when that is the case before. Raises Stuck."""
        for number, kill in enumerate(planned, 1):
            self._await_moment(kill, longest_delay_s)
            hit = self._hit(kill, random.Random(f"{seed} {number}"))
            if not hit:
                break
            self._record(Kill(number, kill.kind, time.monotonic(), self.timeline.step, kill.in_start), hit, planned)
        self._wait(lambda: self.terminal.finished)
        self._settle()

    def commands(self) -> list[str]:
        """Those that brought the run back."""
        first = self.kills[0].at if self.kills else float("inf")
        return [name for at, name in self.terminal.commands if at > first and name != STOP_JOB]

    def _await_moment(self, kill: PlannedKill, longest_delay_s: float) -> None:
        since = self.kills[-1].at if self.kills else self._began
        if kill.in_start:
            moment = since + kill.share * LONGEST_START_DELAY_S
        else:
            self._wait(lambda: bool(self._is_training()))
            moment = time.monotonic() + kill.share * longest_delay_s
        self._wait(lambda: time.monotonic() >= moment)

    def _hit(self, kill: PlannedKill, draw: random.Random) -> str:
        hit = ""

        def is_hit() -> bool:
            nonlocal hit
            hit = self.targets.hit(kill.kind, draw)
            return bool(hit)

        self._wait(is_hit)
        return hit

    def _record(self, kill: Kill, hit: str, planned: list[PlannedKill]) -> None:
        if self.kills and self.kills[-1].recovered is None:
            self.say(f"kill {self.kills[-1].number}: killed again before the next step")
        self.kills.append(kill)
        self._last_sign = kill.at
        where = "in a start, " if kill.in_start else ""
        self.say(f"kill {kill.number}/{len(planned)}: {kill.kind} ({hit}), {where}{kill.step} steps finished")

    # ---- waiting

    def _wait(self, until: Callable[[], bool]) -> None:
        """Returns when `until()`, or when the run is finished. Raises Stuck."""
        while not self.terminal.finished and not until():
            time.sleep(TICK_S)
            self._tick()

    def _tick(self) -> None:
        seen = len(self.timeline.steps)
        self.timeline.poll()
        self.terminal.tick()
        self._free_disk()
        self._settle()
        now = time.monotonic()
        if len(self.timeline.steps) > seen:
            self._last_sign = now
        last = self.kills[-1] if self.kills else None
        waiting_since = last.at if last and last.recovered is None else self._last_sign
        if now > waiting_since + LONGEST_RECOVERY_S:
            raise Stuck(f"no finished step for {now - waiting_since:.0f} s, at step {self.timeline.step}")

    def _is_training(self) -> Event | None:
        """The step that shows that the run goes on after the last kill."""
        if self.kills:
            return self.kills[-1].recovered
        return self.timeline.steps[0] if self.timeline.steps else None

    def _settle(self) -> None:
        """Whether the last kill has been got over."""
        last = self.kills[-1] if self.kills else None
        if last is None or last.recovered:
            return
        last.recovered = self._recovery(last)
        if last.recovered:
            last.commands = self._commands(last)
            self.say(f"kill {last.number}: step {last.recovered.step} after {last.seconds:.1f} s, {last.how}")

    def _recovery(self, kill: Kill) -> Event | None:
        if kill.kind == "disk" and self.disk and self.disk.is_filled:
            return None
        killed, now = kill.at, time.monotonic()
        if self.terminal.finished:
            return self.timeline.recovery(killed, now, goes_on_after=0.0)
        if kill.kind in ENDS_THE_JOB:
            # Until the end has come, ranks of the old job may come up and finish steps.
            submitted = [at for at, name in self.terminal.commands if name == SUBMIT and at > kill.at]
            if not submitted:
                return None
            killed = submitted[0]
        return self.timeline.recovery(killed, now, GOES_ON_AFTER_S.get(kill.kind))

    def _commands(self, kill: Kill) -> tuple[str, ...]:
        assert kill.recovered
        return tuple(
            name for at, name in self.terminal.commands if kill.at < at < kill.recovered.at and name != STOP_JOB
        )

    def _free_disk(self) -> None:
        """As soon as the job has ended for it: the person makes room, and then goes on."""
        full = next((kill for kill in reversed(self.kills) if kill.kind == "disk"), None)
        if full is None or self.disk is None or not self.disk.is_filled:
            return
        ended = not self.terminal.following
        self.terminal.hands_off = True
        if ended or time.monotonic() > full.at + LONGEST_FULL_S:
            self.disk.free()
            self.terminal.hands_off = False
            why = "the job has ended" if ended else f"the job lives after {LONGEST_FULL_S:.0f} s"
            self.say(f"kill {full.number}: {why}; there is room again")
