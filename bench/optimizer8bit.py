"""The work of bench/optimizer8bit.ts: one JSON line of set-up in, one JSON line of seconds out. The sides take turns."""
import json
import statistics
import sys
import time

import torch

setup = json.loads(sys.stdin.readline())
torch.ops.load_library(setup["kernels"])
torch.set_num_threads(setup["threads"])
torch.set_default_device(setup["device"])
card = setup["device"] != "cpu"
n, dtype = setup["elements"], getattr(torch, setup["param"])
grad = (torch.randn(n) * 0.01).to(getattr(torch, setup["grad"]))
start = torch.randn(n) * 0.1

param = start.to(dtype)
state = [torch.zeros(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8), *(torch.zeros((n + 255) // 256) for _ in "12")]
steps = 0


def ours():
    global steps
    steps += 1
    torch.ops.stroma.adamw_(param, None, grad, *state, 1e-3, 0.9, 0.999, 1e-8, 0.01, steps, 1.0, [1, steps, 0])


def stepper(make):
    p = torch.nn.Parameter(start.clone())
    p.grad = grad.to(p.dtype)
    return make([p]).step


# What a step reads and writes: half of it is read by a copy, half written.
moved = 2 * param.nbytes + grad.nbytes + 2 * sum(t.nbytes for t in state)
source = torch.ones(moved // 2, dtype=torch.uint8)
target = torch.empty_like(source)
sides = {
    "ours": ours,
    "copy": lambda: target.copy_(source),
    "fused": stepper(lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)),
}
try:
    import bitsandbytes as bnb

    sides["bitsandbytes"] = stepper(lambda p: bnb.optim.AdamW8bit(p, lr=1e-3))
except ImportError:
    pass


def timed(side):
    """On a card, by its own clock: what it takes to begin is hidden behind the step before."""
    if not card:
        begin = time.perf_counter()
        side()
        return time.perf_counter() - begin
    marks = [torch.cuda.Event(enable_timing=True) for _ in "12"]
    marks[0].record()
    side()
    marks[1].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / 1e3


seconds = {name: [] for name in sides}
for turn in range(setup["steps"] + 2):
    for name, side in sides.items():
        taken = timed(side)
        if turn >= 2:  # after a warm-up
            seconds[name].append(taken)
print(json.dumps({"bytes": moved, "seconds": {k: statistics.median(v) for k, v in seconds.items()}}))
