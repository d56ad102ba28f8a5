"""When the stages of a pipeline are busy, if all of them take equally long for a patch and transfers take no time."""

from __future__ import annotations

Span = tuple[float, float]


def simulate(stages: int, patches: int, steps: int) -> list[list[Span]]:
    """Spans of work of each stage, a patch taking one unit of time in each.

    Every stage computes its patches in the order of steps and patches. It waits for the stage before it; the first one
    for the last, which gives it the same patch of the step before.
    """
    done: dict[tuple[int, int, int], float] = {}
    spans: list[list[Span]] = [[] for _ in range(stages)]
    for step in range(steps):
        for patch in range(patches):
            for stage in range(stages):
                before = (stage - 1, step, patch) if stage else (stages - 1, step - 1, patch)
                free = spans[stage][-1][1] if spans[stage] else 0.0
                begin = max(free, done.get(before, 0.0))
                spans[stage].append((begin, begin + 1.0))
                done[stage, step, patch] = begin + 1.0
    return spans


def idle_share(spans: list[list[Span]]) -> float:
    """The part of the time from the first work to the last in which stages wait, over all of them."""
    begin = min(stage[0][0] for stage in spans)
    end = max(stage[-1][1] for stage in spans)
    busy = sum(stop - start for stage in spans for start, stop in stage)
    return 1 - busy / (len(spans) * (end - begin))
