"""The optimizer kernels against PyTorch and bitsandbytes. Reads {"kernels": library} on stdin, prints the figures of every
check as one line of JSON; tests/oracle/optim.test.ts says what they must be.

Nearest codes: bitsandbytes' own CPU kernel for float32 looks a code up in a table of 65,536 equal steps over [-1, 1], so
what is smaller than 1.5e-5 of its block's absmax becomes zero there. For float64 input the same operator searches the
whole map (argmin), which is the published algorithm: that one is the oracle of equality."""
import json
import sys

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch

S = torch.ops.stroma
B = torch.ops.bitsandbytes
BETAS, EPS, LR = (0.9, 0.999), 1e-8, 1e-3


def unequal(a, b):
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}[a.element_size()]
    return int((a.contiguous().view(kind) != b.contiguous().view(kind)).sum())


def blocks(n):
    return (n + 255) // 256


def quantize(x, signed):
    code, absmax = torch.empty(x.shape, dtype=torch.uint8), torch.empty(blocks(x.numel()))
    S.quantize_blockwise_(x, code, absmax, signed)
    return code, absmax


def dequantize(code, absmax, signed, dtype=torch.float32):
    out = torch.empty(code.shape, dtype=dtype)
    S.dequantize_blockwise_(code, absmax, signed, out)
    return out


class Adam8:
    """State of one tensor, under bitsandbytes' names; `weight` is (param, master)."""

    def __init__(self, param, master=None, decay=0.01, lr=LR):
        n = param.numel()
        self.param, self.master, self.decay, self.lr, self.steps = param, master, decay, lr, 0
        self.state1, self.state2 = (torch.zeros(param.shape, dtype=torch.uint8) for _ in range(2))
        self.absmax1, self.absmax2 = (torch.zeros(blocks(n)) for _ in range(2))

    def step(self, grad, key=(1, 0, 0), scale=1.0):
        self.steps += 1
        S.adamw_(self.param, self.master, grad, self.state1, self.state2, self.absmax1, self.absmax2, self.lr, *BETAS, EPS,
                 self.decay, self.steps, scale, [key[0], self.steps, *key[2:]])

    def moments(self):
        return dequantize(self.state1, self.absmax1, True), dequantize(self.state2, self.absmax2, False)


class Adam32:
    def __init__(self, param, master=None, decay=0.01, lr=LR, dtype=torch.float32):
        self.param, self.master, self.decay, self.lr, self.steps = param, master, decay, lr, 0
        self.exp_avg, self.exp_avg_sq = (torch.zeros(param.shape, dtype=dtype) for _ in range(2))

    def step(self, grad, key=(1, 0, 0), scale=1.0):
        self.steps += 1
        S.adamw_(self.param, self.master, grad, self.exp_avg, self.exp_avg_sq, None, None, self.lr, *BETAS, EPS,
                 self.decay, self.steps, scale, [key[0], self.steps, *key[2:]])


def check_maps():
    return {name: unequal(S.dynamic_map(signed), F.create_dynamic_map(signed, 7, 8))
            for name, signed in (("signed", True), ("unsigned", False))}


def near_boundaries(map):
    """Blocks of 256 led by 1.0 (so that nothing is rescaled): every float within 40 steps of each midpoint, and a spread."""
    middle = ((map[1:].double() + map[:-1].double()) / 2).float()
    x = torch.cat([(middle.view(torch.int32) + k).view(torch.float32) for k in range(-40, 41)]
                  + [torch.rand(60000) * 2 - 1, (torch.rand(60000) * 2 - 1) * 10 ** (-9 * torch.rand(60000)), map])
    x = x.clamp(-1, 1) if map[0] < 0 else x.abs().clamp(max=1)
    x = x[: x.numel() // 255 * 255].view(-1, 255)
    return torch.cat([torch.ones(x.shape[0], 1), x], 1).contiguous().view(-1)


def check_codes():
    result = {}
    for name, signed in (("signed", True), ("unsigned", False)):
        map = F.create_dynamic_map(signed, 7, 8)
        x = near_boundaries(map)
        code, _ = quantize(x, signed)
        want, _ = B.quantize_blockwise(x.double(), map, 256)
        table, _ = B.quantize_blockwise(x, map, 256)
        farther = (map[table.int()].double() - x).abs() - (map[code.int()].double() - x).abs()
        codes = absmaxes = values = 0
        for n in (1, 255, 256, 257, 4096, 300_001):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                y = torch.randn(n, dtype=torch.float64).pow(3).to(dtype)
                y = y if signed else y.abs()
                y[: n // 3 // 256 * 256] *= 1e-6
                if n > 1000:
                    y[256:512] = 0
                mine, absmax = quantize(y, signed)
                theirs, their_absmax = B.quantize_blockwise(y.double(), map, 256)
                codes += unequal(mine, theirs)
                absmaxes += unequal(absmax, their_absmax)
                for out in (torch.float32, torch.bfloat16):
                    values += unequal(dequantize(mine, absmax, signed, out),
                                      B.dequantize_blockwise(mine, absmax, map, 256, out))
        result[name] = {"nearBoundaries": unequal(code, want), "floats": x.numel(), "codes": codes, "absmaxes": absmaxes,
                        "dequantized": values, "tableNearer": float(-farther.min()), "tableFarther": float(farther.max())}
    return result


def check_step_codes():
    """With both betas 0 the moments are the gradient and its square: the step's own encoding against the whole search.
    Below zero a first moment never has zero's code."""
    x = near_boundaries(F.create_dynamic_map(True, 7, 8))
    run = Adam8(torch.zeros(x.shape))
    S.adamw_(run.param, None, x, run.state1, run.state2, run.absmax1, run.absmax2, LR, 0.0, 0.0, EPS, 0.0, 1, 1.0, [1, 1, 0])
    first, _ = B.quantize_blockwise(x.double(), F.create_dynamic_map(True, 7, 8), 256)
    first[(x < 0) & (first == 127)] = 126
    # A block whose moments' absmax is 1: its second moment is the gradient's root squared, rounded, and again searched.
    y = near_boundaries(F.create_dynamic_map(False, 7, 8)).sqrt()
    other = Adam8(torch.zeros(y.shape))
    S.adamw_(other.param, None, y, other.state1, other.state2, other.absmax1, other.absmax2, LR, 0.0, 0.0, EPS, 0.0, 1, 1.0,
             [1, 1, 0])
    second, _ = B.quantize_blockwise((y * y).double(), F.create_dynamic_map(False, 7, 8), 256)
    return {"first": unequal(run.state1, first), "second": unequal(other.state2, second), "floats": x.numel() + y.numel()}


def check_lost():
    """Values that cannot be encoded come back as no number, in their block alone; tiny blocks come back as zeros."""
    x = torch.randn(3 * 256)
    x[5], x[300] = float("nan"), float("inf")
    code, absmax = quantize(x, True)
    y = dequantize(code, absmax, True)
    tiny = torch.full((256,), 1e-40)
    return {"finite": [int(b.isfinite().sum()) for b in y.view(3, 256)],
            "tiny": float(dequantize(*quantize(tiny, True), True).abs().max())}


def check_exact():
    """The first and last cases' gradients reach from 1 to nothing: second moments are zeros and subnormal numbers, too, and
    parameters are small enough to be moved by what those give."""
    result = {}
    for dtype in (torch.float32, torch.float64):
        differing = 0
        least = {torch.float32: 40, torch.float64: 320}[dtype]
        for n, decay, scale in ((9000, 0.0, 1.0), (1, 0.0, 1.0), (8191, 0.1, 0.37), (50_001, 0.01, 1.0)):
            plain = n in (1, 8191)
            p = torch.randn(n, dtype=dtype) * (1 if plain else 1e-16 if dtype == torch.float32 else 1e-150)
            size = 0.01 if plain else 10.0 ** -(torch.rand(n, dtype=dtype) * least)
            size = torch.where(torch.arange(n) % 7 == 6, 0.0, size)
            q = torch.nn.Parameter(p.clone())
            mine, stock = Adam32(p, decay=decay, dtype=dtype), torch.optim.AdamW([q], LR, BETAS, EPS, decay, foreach=False)
            for _ in range(20):
                g = torch.randn(n, dtype=dtype) * size
                q.grad = g * torch.tensor(scale, dtype=dtype)
                mine.step(g, scale=float(torch.tensor(scale, dtype=dtype)))
                stock.step()
            s = stock.state[q]
            differing += unequal(p, q.data) + unequal(mine.exp_avg, s["exp_avg"]) + unequal(mine.exp_avg_sq, s["exp_avg_sq"])
        result[str(dtype)] = differing
    return result


def check_masters():
    """split16 and float32 masters against a float32 run over 120 steps, both kinds of moments."""
    result = {}
    for kind, Adam in (("32", Adam32), ("8", Adam8)):
        n = 20_003
        w = torch.randn(n) * 0.1
        high, low, joined = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16), torch.empty(n)
        S.split16_(w, high, low)
        S.join16_(high, low, joined)
        plain, split, master = Adam(w.clone()), Adam(high, low), Adam(w.bfloat16(), w.clone())
        differing = {"start": unequal(joined, w)}
        for _ in range(120):
            g = torch.randn(n) * 0.01
            for a in (plain, split, master):
                a.step(g)
        S.join16_(high, low, joined)
        nearest = plain.param.bfloat16()
        tie = (plain.param.view(torch.int32) & 0xFFFF) == 0x8000
        differing["split"] = unequal(joined, plain.param)
        differing["splitParam"] = int(((high != nearest) & ~tie).sum())
        differing["master"] = unequal(master.master, plain.param)
        differing["masterParam"] = unequal(master.param, nearest)
        names = ("exp_avg", "exp_avg_sq") if kind == "32" else ("state1", "state2", "absmax1", "absmax2")
        differing["moments"] = sum(unequal(getattr(plain, k), getattr(a, k)) for k in names for a in (split, master))
        result[kind] = differing
    every = torch.arange(1 << 16, dtype=torch.int32)
    w = torch.cat([(0x3F800000 + every), (-0x40800000 + every), (0x7F7F0000 + every)]).view(torch.float32)
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-42])
    odd = torch.cat([odd, torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    back = []
    for x in (w, odd):
        high, low, joined = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(x.shape, dtype=torch.int16), x.clone()
        S.split16_(x, high, low)
        S.join16_(high, low, joined)
        back.append((high, joined))
    result["everyLowHalf"] = unequal(back[0][1], w)
    result["odd"] = {"nanParam": back[1][0].isnan().tolist(), "nan": back[1][1].isnan().tolist(),
                     "others": unequal(back[1][1][1:6], odd[1:6])}
    return result


def round_once(values, key=(11, 0, 5), threads=None, cut=None):
    """Stochastically rounds p * (1 - lr * decay): the gradient and the moments are zero."""
    param = values.clone()
    parts = [(0, param.numel())] if cut is None else [(0, cut), (cut, param.numel())]
    if threads:
        torch.set_num_threads(threads)
    for begin, end in parts:
        Adam32(param[begin:end], decay=0.3183, lr=1.0).step(torch.zeros(end - begin), key=(*key, begin))
    torch.set_num_threads(2)
    return param


def check_stochastic():
    n = 1 << 20
    p = torch.randn(n).bfloat16()
    exact = p.float() * torch.tensor(1 - 1.0 * 0.3183)
    bits = exact.view(torch.int32)
    down = (bits & -65536).view(torch.float32)
    up = ((bits & -65536) + 65536).view(torch.float32)
    chance = (bits & 0xFFFF).double() / 65536
    out = round_once(p).float()
    rose = (out == up).double()
    error = rose - chance
    deviation = (chance * (1 - chance)).sum().sqrt()
    standard = error / (chance * (1 - chance)).clamp(min=1e-12).sqrt()
    inside = (chance > 0.02) & (chance < 0.98)
    # Each tenth of the chances must come true at its own rate.
    tenths = []
    for k in range(10):
        mask = (chance >= k / 10) & (chance < (k + 1) / 10)
        tenths.append(float(error[mask].sum() / (chance[mask] * (1 - chance[mask])).sum().sqrt()))
    lags = [float((standard[:-k] * standard[k:])[inside[:-k] & inside[k:]].mean()
                  * (inside[:-k] & inside[k:]).sum().double().sqrt()) for k in (1, 2, 3, 4, 7, 8, 16)]
    mean = float((out.double() - exact.double()).sum() / ((up - down).double() ** 2 * chance * (1 - chance)).sum().sqrt())
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0] * 100, dtype=torch.bfloat16)
    kept = round_once(odd)
    return {"neither": int(((out != up) & (out != down)).sum()), "exact": int(((chance == 0) & (out != down)).sum()),
            "deviation": float(error.sum() / deviation), "tenths": tenths, "lags": lags, "mean": mean,
            "threads": [unequal(round_once(p, threads=t), out.bfloat16()) for t in (1, 2, 3)],
            "cuts": [unequal(round_once(p, cut=c), out.bfloat16()) for c in (1, 4099, 8192, n - 3)],
            "otherSeed": unequal(round_once(p, key=(12, 0, 5)), out.bfloat16()) / n,
            "otherTensor": unequal(round_once(p, key=(11, 0, 6)), out.bfloat16()) / n,
            "odd": [int(kept.isnan().sum()), int((kept == float("inf")).sum()), int((kept == float("-inf")).sum()),
                    int((kept == 0).sum())]}


def check_parity():
    """bitsandbytes' own test (tests/test_optim.py, test_optimizer8bit): 50 steps beside torch.optim.AdamW in float32, the
    two brought together again after every step, since they drift apart."""
    result = {}
    kinds = {"float32": (torch.float32, None), "float32 master": (torch.bfloat16, torch.float32),
             "split16": (torch.bfloat16, torch.int16), "stochastic": (torch.bfloat16, None)}
    for name, (dtype, master) in kinds.items():
        for shape in ((1024, 32), (333, 77), (1024, 1024)):
            if shape == (1024, 1024) and master == torch.float32:
                continue
            p1 = (torch.randn(shape) * 0.1).to(dtype).float()
            mine = Adam8(p1.to(dtype), None if master is None else torch.empty(shape, dtype=master))
            q = torch.nn.Parameter(p1.clone())
            stock = torch.optim.AdamW([q], LR, BETAS, EPS, 0.01, foreach=False)
            worst = {"outliers": 0, "error": 0.0, "relative": 0.0}
            for _ in range(50):
                g = (torch.randn(shape) * 0.01).to(dtype)
                if master == torch.int16:
                    S.split16_(q.data, mine.param, mine.master)
                elif master == torch.float32:
                    mine.master.copy_(q.data)
                q.grad = g.float()
                stock.step()
                mine.step(g, key=(3, 0, 1))
                s = stock.state[q]
                for kept, got in zip((s["exp_avg"], s["exp_avg_sq"]), mine.moments()):
                    worst["outliers"] = max(worst["outliers"], int((~torch.isclose(kept, got, atol=3e-3, rtol=1e-3)).sum()))
                    kept.copy_(got)
                error = (q.data - mine.param.float()).abs()
                worst["error"] = max(worst["error"], float(error.mean()))
                worst["relative"] = max(worst["relative"], float((error / (q.data.abs() + 1e-9)).mean()))
                q.data.copy_(q.data.to(dtype).float())
                mine.param.copy_(q.data)
            result[f"{name} {shape[0]}x{shape[1]}"] = worst
    return result


def check_interchange():
    """Our state into bitsandbytes by its own field names and load_state_dict, a step on both sides, and back again."""
    shape = (512, 130)
    mine = Adam8(torch.randn(shape) * 0.1)
    for _ in range(12):
        mine.step(torch.randn(shape) * 0.01)
    q = torch.nn.Parameter(mine.param.clone())
    theirs = bnb.optim.AdamW8bit([q], LR, BETAS, EPS, 0.01)
    state = {"step": mine.steps, "state1": mine.state1.clone(), "state2": mine.state2.clone(),
             "absmax1": mine.absmax1.clone(), "absmax2": mine.absmax2.clone(),
             "qmap1": S.dynamic_map(True), "qmap2": S.dynamic_map(False)}
    theirs.load_state_dict({"state": {0: state}, "param_groups": theirs.state_dict()["param_groups"]})

    def apart():
        s = theirs.state[q]
        grid = [(dequantize(a, b, sign) - dequantize(c, d, sign)).abs().max() / b.max()
                for a, b, c, d, sign in ((mine.state1, mine.absmax1, s["state1"], s["absmax1"], True),
                                         (mine.state2, mine.absmax2, s["state2"], s["absmax2"], False))]
        return {"param": float((mine.param - q.data).abs().max()), "absmax": max(
            float(((mine.absmax1 - s["absmax1"]) / s["absmax1"]).abs().max()),
            float(((mine.absmax2 - s["absmax2"]) / s["absmax2"]).abs().max())), "state": float(max(grid))}

    def step():
        g = torch.randn(shape) * 0.01
        q.grad = g.clone()
        mine.step(g)
        theirs.step()
        return apart()

    there = step()
    saved = theirs.state_dict()["state"][0]
    saved = saved.get("__bnb_optimizer_quant_state__", saved)
    mine.param.copy_(q.data)
    for name in ("state1", "state2", "absmax1", "absmax2"):
        getattr(mine, name).copy_(saved[name])
    maps = unequal(saved["qmap1"], S.dynamic_map(True)) + unequal(saved["qmap2"], S.dynamic_map(False))
    return {"there": there, "back": step(), "maps": maps, "steps": [mine.steps, theirs.state[q]["step"]]}


def check_beside():
    """50 steps of both from one start on the same gradients, never brought together."""
    shape = (512, 512)
    mine = Adam8(torch.randn(shape) * 0.1)
    q, r = (torch.nn.Parameter(mine.param.clone()) for _ in range(2))
    theirs, stock = bnb.optim.AdamW8bit([q], LR, BETAS, EPS, 0.01), torch.optim.AdamW([r], LR, BETAS, EPS, 0.01)
    for _ in range(50):
        g = torch.randn(shape) * 0.01
        q.grad, r.grad = g.clone(), g.clone()
        mine.step(g)
        theirs.step()
        stock.step()
    return {"ours": float((mine.param - r.data).abs().mean()), "theirs": float((q.data - r.data).abs().mean())}


def check_elements():
    """A gradient element that is no number; the sign of small first moments; thread counts; dtypes of the gradient."""
    n = 3 * 256 + 17
    bad = torch.tensor([3, 300, 301, n - 1])
    clean = torch.randn(n)
    clean[bad] = 0
    dirty = clean.clone()
    dirty[bad] = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e30])
    start = torch.randn(n)
    a, b = Adam8(start.clone()), Adam8(start.clone())
    a.step(clean)
    b.step(dirty)
    rest = torch.ones(n, dtype=torch.bool)
    rest[bad] = False
    m, v = b.moments()
    result = {"skippedParam": unequal(b.param[bad], start[bad]), "skippedState": float((m[bad].abs() + v[bad]).max()),
              "others": unequal(a.param[rest], b.param[rest]) + unequal(a.state1[rest], b.state1[rest])
              + unequal(a.state2[rest], b.state2[rest]) + unequal(a.absmax1, b.absmax1) + unequal(a.absmax2, b.absmax2)}
    g = torch.full((256,), -1e-9)
    g[0], g[128:] = 1.0, 1e-9
    small = Adam8(torch.zeros(256))
    small.step(g)
    m = small.moments()[0]
    result["signs"] = [int((m[1:128] < 0).sum()), int((m[128:] >= 0).sum())]
    n = 100_003
    start, grads = torch.randn(n), [(torch.randn(n) * 0.01).bfloat16() for _ in range(3)]
    runs = []
    for threads, dtype in ((1, torch.float32), (2, torch.float32), (3, torch.float32), (2, torch.bfloat16), (2, torch.float64)):
        torch.set_num_threads(threads)
        run = Adam8(start.clone())
        for g in grads:
            run.step(g.to(dtype))
        runs.append(run)
    torch.set_num_threads(2)
    result["runs"] = [sum(unequal(getattr(runs[0], k), getattr(r, k)) for k in ("param", "state1", "state2", "absmax1", "absmax2"))
                      for r in runs[1:]]
    return result


def check_head():
    """Chunks' weight gradients of a bfloat16 head are added in float32."""
    N, D, V, chunk = 96, 16, 40, 8
    labels, scale = torch.randint(0, V, (N,)), torch.tensor(1 / N)
    result = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, w, b = (torch.randn(s).to(dtype).requires_grad_() for s in ((N, D), (V, D), (V,)))
        S.cross_entropy_head(x, w, b, labels, scale, chunk, -100).backward()
        dw, db, wide_w, wide_b = None, None, None, None
        for i in reversed(range(0, N, chunk)):
            logits = torch.nn.functional.linear(x[i:i + chunk], w, b).detach().float().requires_grad_()
            loss = torch.nn.functional.cross_entropy(logits, labels[i:i + chunk], reduction="sum", ignore_index=-100) * scale
            loss.backward()
            d = logits.grad.to(dtype)
            gw, gb = (d.t() @ x[i:i + chunk]).detach(), d.sum(0, dtype=torch.float32)
            wide_w, wide_b = gw.float() if wide_w is None else wide_w + gw.float(), gb if wide_b is None else wide_b + gb
            dw = gw if dw is None else dw + gw
        result[str(dtype)] = {"weight": unequal(w.grad, wide_w.to(dtype)), "bias": unequal(b.grad, wide_b.to(dtype)),
                              "narrowSums": unequal(w.grad, dw)}
    return result


def main():
    torch.ops.load_library(json.load(sys.stdin)["kernels"])
    result = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            torch.manual_seed(20)
            torch.set_num_threads(2)
            with torch.enable_grad() if name == "check_head" else torch.no_grad():
                result[name.removeprefix("check_")] = check()
    print(json.dumps(result))


main()
