"""PyTorch FSDP2 (`fully_shard`) on the decoder of bench/ranks.ts: the same weights, rows and optimizer as the other side
of the comparison, ranks over Gloo on processors (bench/card.ts: one on a card), every block a unit of its own.

    torchrun --nproc-per-node 2 bench/fsdp2.py [--dim 512] [--layers 8] [--steps 4] [--setup FILE]

--setup names a JSON file whose fields replace the flags' values: `config` (the decoder's), `weights` (a safetensors file
with Hugging Face's names; without it normal, std initStd, by --seed), `tokens` and `labels` (rows of the whole batch).
A rank takes a stretch of batch / ranks rows, in micro-batches; gradients are summed in place and scattered after the last
(`set_requires_gradient_sync`). Rank 0 prints one JSON line: seconds of each step are those of the slowest rank, losses the
mean over all tokens of the batch; memory is what /proc says, of each rank, before the model is made and at the highest.
"""
import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard


def weight(*shape):
    return nn.Parameter(torch.empty(*shape))


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Linear(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = weight(outputs, inputs)

    def forward(self, x):
        return F.linear(x, self.weight)


class Norm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = weight(dim), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Embedding(nn.Module):
    def __init__(self, rows, dim):
        super().__init__()
        self.weight = weight(rows, dim)

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c["headDim"]
        n, k = c["heads"] * c["headDim"], c["kvHeads"] * c["headDim"]
        self.q_proj, self.k_proj = Linear(c["dim"], n), Linear(c["dim"], k)
        self.v_proj, self.o_proj = Linear(c["dim"], k), Linear(n, c["dim"])

    def forward(self, x, cos, sin):  # x (B, T, D)
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj, self.up_proj = Linear(c["dim"], c["ffn"]), Linear(c["dim"], c["ffn"])
        self.down_proj = Linear(c["ffn"], c["dim"])

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = Norm(c["dim"], c["normEps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = Norm(c["dim"], c["normEps"])
        self.mlp = Mlp(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(nn.Module):
    """Norm, product and loss: the mean over the rows that it is given."""

    def __init__(self, c, tied):
        super().__init__()
        self.norm = Norm(c["dim"], c["normEps"])
        self.weight = tied if tied is not None else weight(c["vocabSize"], c["dim"])

    def forward(self, x, labels):
        logits = F.linear(self.norm(x), self.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = Embedding(c["vocabSize"], c["dim"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["layers"]))
        self.head = Head(c, self.embed_tokens.weight if c["tiedEmbeddings"] else None)

    def forward(self, tokens, labels):
        H = self.c["headDim"]
        frequency = 1.0 / (self.c["ropeTheta"] ** (torch.arange(0, H, 2, device=tokens.device).float() / H))
        angle = torch.outer(torch.arange(tokens.shape[1], device=tokens.device).float(), frequency)
        angle = torch.cat((angle, angle), -1)
        x = self.embed_tokens(tokens)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(x, labels)


def hugging_face(name):
    """This module's name of a parameter -> Hugging Face's."""
    if name == "head.weight":
        return "lm_head.weight"
    return f"model.norm.{name.removeprefix('head.norm.')}" if name.startswith("head.norm.") else f"model.{name}"


def fill(model, setup, rank, ranks):
    """Each rank its own rows (Shard(0): those of torch.chunk), so that no rank ever holds a whole model."""
    mine = lambda full: full.chunk(ranks)[rank] if rank < len(full.chunk(ranks)) else full[:0]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        if setup.get("weights"):
            from safetensors import safe_open

            with safe_open(setup["weights"], "pt") as file:
                for name, p in parameters.items():
                    p.to_local().copy_(mine(file.get_tensor(hugging_face(name))))
            return
        if setup.get("offload"):  # for its time alone: the same million of random numbers everywhere
            some = torch.randn(1 << 20) * setup["config"]["initStd"]
            for p in parameters.values():
                flat = p.to_local().view(-1)
                flat.copy_(torch.ones_like(flat) if p.dim() == 1 else some.repeat(-(-flat.numel() // (1 << 20)))[: flat.numel()])
            return
        for i, (name, p) in enumerate(parameters.items()):
            generator = torch.Generator().manual_seed(setup["seed"] * 100_003 + i)
            full = torch.ones(p.shape) if p.dim() == 1 else torch.randn(p.shape, generator=generator) * setup["config"]["initStd"]
            p.to_local().copy_(mine(full))


def memory(field):
    """Bytes: VmRSS now, VmHWM at the highest."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def rows(setup):
    """decoderBatch of bench/support/steps.ts: row m is micro-batch m there."""
    if "tokens" in setup:
        return torch.tensor(setup["tokens"]), torch.tensor(setup["labels"])
    T, V = setup["rowTokens"], setup["config"]["vocabSize"]
    text = torch.tensor([[(i * 7919 + m * 104_729 + 17) % V for i in range(T + 1)] for m in range(setup["batch"])])
    return text[:, :-1], text[:, 1:]


def settings():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"dim": 512, "layers": 8, "vocab": 2048, "tokens": 128, "batch": 8, "micro-batches": 1, "steps": 4,
                        "warm-up": 1, "threads": 1, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of gathered weights and passes")
    parser.add_argument("--reshard", action=argparse.BooleanOptionalAction, default=True, help="free weights after the forward")
    parser.add_argument("--setup", help="JSON file")
    a = parser.parse_args()
    heads = max(1, a.dim // 64)
    setup = {
        "config": {"vocabSize": a.vocab, "dim": a.dim, "layers": a.layers, "heads": heads, "kvHeads": 2, "headDim": a.dim // heads,
                   "ffn": a.dim * 3, "ropeTheta": 10_000, "normEps": 1e-5, "tiedEmbeddings": False, "initStd": 0.02},
        "rowTokens": a.tokens, "batch": a.batch, "microBatches": a.micro_batches, "steps": a.steps, "warmUp": a.warm_up,
        "threads": a.threads, "seed": a.seed, "learningRate": a.learning_rate, "dtype": a.dtype, "reshard": a.reshard,
        # Of bench/card.ts: a card, what lies on the host, what parameters are stored as, how much of the card is used.
        "device": "cpu", "offload": False, "storage": "float32", "deviceBytes": None,
    }
    if a.setup:
        with open(a.setup) as file:
            setup |= json.load(file)
    return setup


def main():
    setup = settings()
    torch.set_num_threads(setup["threads"])
    device = torch.device(setup["device"])
    card = device.type == "cuda"
    if card:
        torch.cuda.set_device(device)
        if setup["deviceBytes"] is not None:
            torch.cuda.set_per_process_memory_fraction(setup["deviceBytes"] / torch.cuda.mem_get_info()[1])
    dist.init_process_group("cpu:gloo,cuda:nccl" if card else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokens, labels = (x.to(device) for x in rows(setup))
    micro_batches, batch = setup["microBatches"], len(tokens)
    if batch % (ranks * micro_batches):
        raise SystemExit(f"[fsdp2] {batch} rows are not a multiple of {ranks} ranks x {micro_batches} micro-batches")
    mine = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
    parts = list(zip(tokens[mine].chunk(micro_batches), labels[mine].chunk(micro_batches)))
    mesh = init_device_mesh(device.type, (ranks,))
    before = memory("VmRSS")

    with torch.device("meta"):
        model = Decoder(setup["config"]).to(getattr(torch, setup["storage"]))
    dtype = getattr(torch, setup["dtype"])
    options = {"mesh": mesh, "reshard_after_forward": setup["reshard"]}
    if setup["offload"]:
        options["offload_policy"] = CPUOffloadPolicy()
    if dtype != getattr(torch, setup["storage"]):
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # A tied weight belongs to the root: two units cannot both own it.
    untied = not setup["config"]["tiedEmbeddings"]
    for block in ([model.embed_tokens] if untied else []) + list(model.layers) + ([model.head] if untied else []):
        fully_shard(block, **options)
    fully_shard(model, **options)
    model.to_empty(device="cpu" if setup["offload"] else device)
    fill(model, setup, rank, ranks)
    made = memory("VmHWM")
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  lr=setup["learningRate"], betas=(0.9, 0.95), eps=1e-8, fused=True)
    parameters = sum(p.numel() for p in model.parameters())

    seconds, losses, norms = [], [], []
    for step in range(setup["warmUp"] + setup["steps"]):
        dist.barrier()
        begin = time.perf_counter()
        total = torch.zeros((), device=device)
        for i, (x, y) in enumerate(parts):
            # Offloaded, a whole model's gradients do not stay on the card: they are added up on the host.
            model.set_requires_gradient_sync(setup["offload"] or i == micro_batches - 1)
            loss = model(x, y) / micro_batches
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        if card:
            torch.cuda.synchronize()
        took = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        dist.all_reduce(total)
        losses[-1] = total.item() / ranks
        norms.append(norm.full_tensor().item())
        if step >= setup["warmUp"]:
            seconds.append(took.item())

    each = [None] * ranks
    dist.all_gather_object(each, {"rank": rank, "rssBeforeModelBytes": before, "peakRssBeforeStepsBytes": made,
                                  "peakRssBytes": memory("VmHWM")})
    if rank == 0:
        print(json.dumps({
            "name": "fsdp2", "secondsPerStep": statistics.median(seconds), "seconds": seconds, "losses": losses, "norms": norms,
            "memory": each, "ranks": ranks, "threads": setup["threads"], "parameters": parameters, "batch": list(tokens.shape),
            "microBatches": micro_batches, "dtype": setup["dtype"], "reshardAfterForward": setup["reshard"],
            "wrapped": sum(isinstance(m, FSDPModule) for m in model.modules()), "backend": dist.get_backend(),
            "torch": torch.__version__, "peakDeviceBytes": torch.cuda.max_memory_reserved() if card else None,
        }), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
