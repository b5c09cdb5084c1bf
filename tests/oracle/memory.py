"""Bytes that libtorch allocates in the passes of blocks, by its own profiler. Input: JSON on stdin, {kernels, jobs}."""
import json
import sys

import torch
from torch.profiler import ProfilerActivity, profile

DTYPES = {n: getattr(torch, n) for n in ["float32", "float64", "bfloat16", "int64", "bool"]}
torch.set_num_threads(1)
torch.autograd.set_multithreading_enabled(False)


def size(dim, names):
    return dim if isinstance(dim, int) else int(eval(dim, {"__builtins__": {}}, names))


def values_of(node):
    given = list(node["args"]) + list((node.get("kwargs") or {}).values())
    return [v for a in given for v in ([a["value"]] if "value" in a else a.get("values", [])) if v is not None]


def releases_of(program):
    """By node: values that nobody reads after it, as the engine lets them go."""
    seen = {o["value"] for o in program["outputs"]}
    releases = []
    for node in reversed(program["nodes"]):
        ids = [i for i in dict.fromkeys(node["outputs"] + values_of(node)) if i not in seen]
        seen.update(ids)
        releases.append(ids)
    return releases[::-1]


def run(program, leaves, dims):
    values = dict(enumerate(leaves))

    def argument(a):
        ((kind, v),) = a.items()
        if kind == "value":
            return values[v]
        if kind == "values":
            return [None if i is None else values[i] for i in v]
        if kind in ("dim", "dims"):
            return size(v, dims) if kind == "dim" else [size(d, dims) for d in v]
        return {"float": float, "dtype": DTYPES.get}.get(kind, lambda x: x)(v)

    for node, gone in zip(program["nodes"], releases_of(program)):
        space, _, rest = node["op"].partition("::")
        name, _, overload = rest.partition(".")
        op = getattr(getattr(getattr(torch.ops, space), name), overload or "default")
        kwargs = {k: argument(a) for k, a in (node.get("kwargs") or {}).items()}
        values[node["outputs"][0]] = op(*[argument(a) for a in node["args"]], **kwargs)
        for i in gone:
            values.pop(i, None)
    return [values[o["value"]] for o in program["outputs"]]


def leaf(spec, dims):
    shape = [size(d, dims) for d in spec["shape"]]
    if spec["dtype"].startswith("int"):
        return torch.zeros(shape, dtype=DTYPES[spec["dtype"]])
    return torch.randn(shape).to(DTYPES[spec["dtype"]]).requires_grad_(spec["grad"])


def parameter(spec, dtype):
    """Its gradient is added into an fp32 sum as it appears and freed."""
    p = (torch.randn(spec["shape"]) * 0.02).to(dtype).requires_grad_(True)
    total = torch.zeros(spec["shape"])

    def add(p):
        total.add_(p.grad)
        p.grad = None

    p.register_post_accumulate_grad_hook(add)
    return p


def measured(work):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = work()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        live += e.nbytes()
        peak = max(peak, live)
    return result, live, peak


def answer(graph, block, dims):
    program = graph["programs"][graph["blocks"][block]["program"]]
    dtype = DTYPES[graph["dtype"]]
    leaves = [leaf(i, dims) for i in program["inputs"]] + [parameter(p, dtype) for p in program["parameters"]]
    with torch.no_grad():
        outputs, _, forward = measured(lambda: run(program, leaves, dims))
        seeds = [torch.ones_like(y) for y in outputs]
        del outputs
    outputs, kept, keeping = measured(lambda: run(program, leaves, dims))
    _, _, backward = measured(lambda: torch.autograd.backward(outputs, seeds))
    return {"forward": forward, "keepingForward": keeping, "kept": kept, "keptBackward": kept + backward}


job = json.load(sys.stdin)
torch.ops.load_library(job["kernels"])
print(json.dumps([answer(**j) for j in job["jobs"]]))
