"""Attention over 1 to 4 ranks (gloo, loopback) against libtorch's on one. Input: JSON on stdin, {kernels, tokens}, tokens
being the length for which memory is measured. Answer: a line of JSON, see ring.test.ts."""
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

WORLD = 4
NAMES = ["out", "dq", "dk", "dv"]
VARIANTS = ["ring_attention", "all_to_all_attention"]
ops = torch.ops.stroma


def sequence(B, N, K, T, H, V, dtype, documents, seed=0):
    """The whole sequence and a gradient of its result, equal on every rank."""
    g = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(B, n, T, w, generator=g, dtype=torch.float64) for n, w in [(N, H), (K, H), (K, V), (N, V)])
    ids = None
    if documents:  # of uneven lengths, other ones in every row, the last one padding
        ends = torch.sort(torch.randint(1, T - 1, (B, 4), generator=g), 1)[0]
        ids = (torch.arange(T).expand(B, T).unsqueeze(-1) >= ends.unsqueeze(1)).sum(-1)
    return [x.to(dtype) for x in (q, k, v, grad)], ids


def with_gradients(attention, q, k, v, grad):
    q, k, v = (x.detach().requires_grad_(True) for x in (q, k, v))
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def allowed(T, ids, causal):
    keep = torch.ones(1, 1, T, T, dtype=torch.bool)
    if ids is not None:
        keep = (ids.unsqueeze(2) == ids.unsqueeze(1)).unsqueeze(1)
    return keep.tril() if causal else keep


def libtorch(ids, causal, scale):
    """As a block of a model calls it (src/nn/attention.ts)."""

    def attention(q, k, v):
        mask = None if ids is None else allowed(q.shape[2], ids, causal)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped)

    return attention


def composite(ids, causal, scale):
    """Every op in the dtype of its arguments."""

    def attention(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        s = (q @ k.mT) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        return s.masked_fill(~allowed(q.shape[2], ids, causal), -math.inf).softmax(-1) @ v

    return attention


def share(x, dim, group, zigzag):
    return None if x is None else ops.split_sequence(x, dim, dist.get_rank(group), dist.get_world_size(group), zigzag)


def over_ranks(variant, whole, ids, causal, scale, group, zigzag=None):
    """Result and gradients of this rank's share. Views as in a model: [B, N, t, H] over [B, t, N, H]."""
    zigzag = causal if zigzag is None else zigzag
    view = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    q, k, v, grad = (view(share(x, 2, group, zigzag)) for x in whole)
    attend = lambda q, k, v: getattr(ops, variant)(q, k, v, share(ids, 1, group, zigzag), causal, scale, group.group_name)
    return with_gradients(attend, q, k, v, grad)


def distance(ours, reference, whole=None):
    """Largest error in units of the (whole) reference's largest element; NaN counts as infinite."""
    largest = (reference if whole is None else whole).double().abs().max()
    d = ((ours.double() - reference.double()).abs().max() / largest).item()
    return d if d == d else math.inf


SHAPES = {  # B, N, K, T, H, V; T is a multiple of 2, 4, 6 and 8
    "even heads": (1, 12, 12, 48, 8, 8),
    "grouped": (3, 12, 4, 48, 16, 16),
    "one kv head": (1, 12, 1, 24, 8, 8),
    "long": (1, 12, 2, 1200, 8, 8),
    "other value width": (2, 12, 2, 48, 8, 12),
}
TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def parity(groups):
    answers = []
    for variant in VARIANTS:
        for shape, (B, N, K, T, H, V) in SHAPES.items():
            for causal in [True, False]:
                for documents in [False, True]:
                    scale = 0.3 if documents else None
                    # More keys than the kernel takes at once (512); one dtype and two ranks are enough, and it takes long.
                    few = shape == "long"
                    for name, dtype in TYPES.items() if not few else [("float32", torch.float32)]:
                        whole, ids = sequence(B, N, K, T, H, V, dtype, documents)
                        # Beyond what the kernel takes at once its own sums round in another order, too: both against fp64.
                        wide = [x.to(torch.float64 if name == "float64" or few else torch.float32) for x in whole]
                        reference = with_gradients(libtorch(ids, causal, scale), *wide)
                        plain = None
                        if name == "bfloat16":
                            plain = with_gradients(composite(ids, causal, scale), *whole)
                        elif few:
                            plain = with_gradients(libtorch(ids, causal, scale), *whole)
                        for R, group in groups.items():
                            if few and R > 2:
                                continue
                            ours = over_ranks(variant, whole, ids, causal, scale, group)
                            cut = lambda xs: [share(x, 2, group, causal) for x in xs]
                            case = {"case": f"{variant}, {shape}, {'causal' if causal else 'full'}{', documents' if documents else ''}", "ranks": R, "dtype": name}
                            case["errors"] = [distance(*ab) for ab in zip(ours, cut(reference), reference)]
                            case["dtypes"] = all(a.dtype == dtype for a in ours)
                            if plain:
                                case["plain"] = [distance(*ab) for ab in zip(plain, reference)]
                            answers.append(case)
    return answers


def bits(groups):
    """Numbers of unequal elements: one rank against libtorch, two runs, a rank that comes late."""
    unequal = lambda a, b: sum((x != y).sum().item() for x, y in zip(a, b))
    answer = {"oneRank": 0, "twice": 0, "late": 0, "zigzagFull": 0.0}
    for variant in VARIANTS:
        for dtype in TYPES.values():
            for documents in [False, True]:
                whole, ids = sequence(2, 12, 4, 24, 8, 8, dtype, documents)
                view = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
                if 1 in groups:
                    ours = over_ranks(variant, whole, ids, True, None, groups[1])
                    answer["oneRank"] += unequal(ours, with_gradients(libtorch(ids, True, None), *map(view, whole)))
                first = over_ranks(variant, whole, ids, True, None, groups[WORLD])
                answer["twice"] += unequal(first, over_ranks(variant, whole, ids, True, None, groups[WORLD]))
                if dist.get_rank() == 1:
                    time.sleep(0.1)
                answer["late"] += unequal(first, over_ranks(variant, whole, ids, True, None, groups[WORLD]))
        # Not causal: any split will do.
        whole, ids = sequence(2, 12, 4, 24, 8, 8, torch.float64, True)
        if variant == "ring_attention":
            ours = over_ranks(variant, whole, ids, False, None, groups[WORLD], zigzag=True)
            reference = with_gradients(libtorch(ids, False, None), *whole)
            errors = [distance(a, share(b, 2, groups[WORLD], True)) for a, b in zip(ours, reference)]
            answer["zigzagFull"] = max(answer["zigzagFull"], *errors)
    return answer


def splitting():
    x = torch.randn(2, 24, 3)
    whole = True
    for R in range(1, 5):
        for zigzag in [True, False]:
            shares = [ops.split_sequence(x, 1, r, R, zigzag) for r in range(R)]
            whole &= torch.equal(ops.merge_sequence(shares, 1, zigzag), x)
            whole &= all(torch.equal(s, x[:, ops.sequence_positions(24, r, R, zigzag)]) for r, s in enumerate(shares))
    return {"whole": whole, "positions": [ops.sequence_positions(8, r, 2, True).tolist() for r in range(2)]}


def message(work):
    """The first line of what it throws."""
    try:
        work()
    except Exception as e:
        return f"{type(e).__name__}: {str(e).splitlines()[0]}"
    return "nothing thrown"


def refusals(groups):
    group, rank = groups[2], dist.get_rank(groups[2])
    x = torch.randn(1, 2, 4, 8)
    name = group.group_name
    ids = torch.zeros(1, 4, dtype=torch.int64)

    def twice(variant):
        q = x.clone().requires_grad_(True)
        torch.autograd.grad(getattr(ops, variant)(q, x, x, None, True, None, name).sum(), q, create_graph=True)

    answer = {
        "length": message(lambda: ops.split_sequence(torch.zeros(1, 10), 1, 0, 2, True)),
        "lengthFull": message(lambda: ops.split_sequence(torch.zeros(1, 10), 1, 0, 3, False)),
        "positions": message(lambda: ops.sequence_positions(10, 0, 2, True)),
    }
    for variant in VARIANTS:
        op = getattr(ops, variant)
        answer[variant] = {
            "odd": message(lambda: op(x[:, :, :3], x[:, :, :3], x[:, :, :3], None, True, None, name)),
            "shape": message(lambda: op(x, x[:, :, :2], x, None, True, None, name)),
            "heads": message(lambda: op(x[:, :1], x, x, None, True, None, name)),
            "dtype": message(lambda: op(x, x.double(), x, None, True, None, name)),
            "documents": message(lambda: op(x, x, x, ids.int(), True, None, name)),
            "dropout": message(lambda: op(x, x, x, None, True, None, name, 0.1)),
            "group": message(lambda: op(x, x, x, None, True, None, "nobody")),
            "double": message(lambda: twice(variant)),
        }
    answer["all_to_all_attention"]["ranks"] = message(
        lambda: ops.all_to_all_attention(x[:, :1], x[:, :1], x[:, :1], None, True, None, name)
    )
    return answer


def failures(rank):
    """What each rank says, and after how long, when one of three fails or stays away. A group of its own each."""
    answer = {}
    x = torch.randn(1, 3, 4, 8)
    for variant in VARIANTS:
        for what in ["absent", "mistaken", "disagreeing", "absentInBackward"]:
            group = dist.new_group([0, 1, 2])
            if rank > 2:
                continue
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
            op = lambda t: getattr(ops, variant)(t, t, t, None, True, None, group.group_name)

            def work():
                if what == "absentInBackward":
                    out = op(x.clone().requires_grad_(True))
                    if rank == 1:
                        raise RuntimeError("elsewhere")
                    return out.sum().backward()
                if rank != 1:
                    return op(x)
                if what == "absent":
                    raise RuntimeError("elsewhere")
                return op(x[:, :, :3] if what == "mistaken" else x[:, :, :2])

            start = time.monotonic()
            text = message(work)
            answer[f"{variant} {what}"] = {"message": text, "seconds": time.monotonic() - start}
            time.sleep(3 if rank == 1 else 0)  # nobody is told by a connection that closes
    return answer


def memory(groups, tokens):
    """Bytes that libtorch holds at the most beside q, k, v and the gradient's seed, forward and backward."""
    answer = {}
    for R in [1, 2, 4]:
        if R not in groups:
            continue
        whole, _ = sequence(1, 4, 2, tokens, 64, 64, torch.float32, False)
        q, k, v, grad = (share(x, 2, groups[R], True) for x in whole)
        q, k, v = (x.requires_grad_(True) for x in (q, k, v))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            out = ops.ring_attention(q, k, v, None, True, None, groups[R].group_name)
            torch.autograd.grad(out, (q, k, v), grad)
        live = peak = 0
        for e in sorted((e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            live += e.nbytes()
            peak = max(peak, live)
        answer[R] = {"peakBytes": peak, "shareBytes": k.nbytes + v.nbytes}
    return answer


def worker(rank, job, store, pipe):
    torch.set_num_threads(1)
    torch.ops.load_library(job["kernels"])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    groups = {R: dist.new_group(list(range(R))) for R in range(1, WORLD + 1)}
    groups = {R: g for R, g in groups.items() if rank < R}
    answer = {}
    parts = job.get("parts", ["parity", "bits", "refusals", "memory", "failures"])
    if "parity" in parts:
        answer["parity"] = parity(groups)
    if "bits" in parts:
        answer["bits"] = bits(groups)
    if "refusals" in parts and rank < 2:
        answer["refusals"] = refusals(groups)
    if "memory" in parts:
        answer["memory"] = memory(groups, job["tokens"])
    answer["splitting"] = splitting()
    dist.barrier()
    if "failures" in parts:
        answer["failures"] = failures(rank)
    pipe.send(answer)
    pipe.close()
    os._exit(0)  # groups that failed on purpose are not to be waited for


def main():
    job = json.load(sys.stdin)
    # Forked, so that torch is loaded once; nothing has run in it yet.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for rank in range(WORLD):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=worker, args=(rank, job, os.path.join(folder, "store"), theirs))
            process.start()
            theirs.close()
            workers.append((process, ours))
        deadline = time.monotonic() + 500
        answers = []
        for rank, (process, pipe) in enumerate(workers):
            try:
                answers.append(pipe.recv() if pipe.poll(max(0, deadline - time.monotonic())) else None)
            except EOFError:
                answers.append(None)
        for process, _ in workers:
            process.join(5)
            process.kill()
    missing = [rank for rank, answer in enumerate(answers) if answer is None]
    if missing:
        sys.exit(f"no answer from ranks {missing}")
    print(json.dumps(answers))


main()
