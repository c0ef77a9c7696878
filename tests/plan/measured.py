"""The memory of a real run on the CPU: imported by the tests of the plan."""

from __future__ import annotations

import contextlib

import torch
from torch.profiler import ProfilerActivity, profile


def measured_peak(method, batch: dict, autocast: bool, accumulation: int = 1) -> int:
    """Bytes that torch's allocator holds at most over two AdamW steps, weights included, by torch's profiler."""
    parameters = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in method.parameters()}
    method.train()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], fused=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):
            for _ in range(accumulation):
                with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                    loss = method(**batch).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return sum(parameters.values()) + peak
