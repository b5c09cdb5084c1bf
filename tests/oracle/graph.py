"""Runs a graph's JSON with PyTorch's own dispatcher, and compares with transformers. Input: JSON on stdin."""
import json
import sys

import torch

DTYPES = {n: getattr(torch, n) for n in ["float32", "float64", "bfloat16", "float16", "int64", "int32", "bool"]}
NAMES = {v: k for k, v in DTYPES.items()}
torch.set_num_threads(2)


def size(dim, names):
    return dim if isinstance(dim, int) else int(eval(dim, {"__builtins__": {}}, names))


def argument(a, values, names):
    (kind, v), = a.items()
    if kind == "value":
        return values[v]
    if kind == "values":
        return [None if i is None else values[i] for i in v]
    if kind == "dim":
        return size(v, names)
    if kind == "dims":
        return [size(d, names) for d in v]
    if kind == "float":
        return float(v)
    if kind == "dtype":
        return DTYPES[v]
    return v


def cross_entropy_head(x, weight, bias, labels, scale, chunk, ignore_index):
    """What the kernel means, without its memory: chunks in order, summed."""
    total = None
    for i in range(0, x.shape[0], chunk):
        logits = torch.nn.functional.linear(x[i : i + chunk], weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        part = torch.nn.functional.cross_entropy(logits, labels[i : i + chunk], ignore_index=ignore_index, reduction="sum")
        total = part if total is None else total + part
    return total * scale


def call(op, args, kwargs):
    """Ours are the kernels themselves, but for the head's, which saves as no operator does, and for what draws."""
    if op == "stroma::cross_entropy_head":
        return cross_entropy_head(*args)
    if op == "stroma::dropout":
        return args[0] * (1 / (1 - args[1]))
    space, rest = op.split("::")
    name, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, space), name), overload or "default")(*args, **kwargs)


def run(graph, parameters, batch, scales, visit=lambda block, id, value: None, around=None):
    names = {}
    for i in graph["inputs"]:
        for d, s in zip(i["shape"], batch[i["name"]].shape):
            if isinstance(d, str) and d.isidentifier():
                assert names.setdefault(d, s) == s
    outputs = []
    for b, block in enumerate(graph["blocks"]):
        program = graph["programs"][block["program"]]
        values = []
        for s in block["inputs"]:
            if "block" in s:
                values.append(outputs[s["block"]][s["output"]])
            elif "batch" in s:
                values.append(batch[s["batch"]])
            elif "lossScale" in s:
                values.append(scales[s["lossScale"]])
            else:
                values.append(torch.tensor([1, 2, 3, b]))
        values += [parameters[n] for n in block["parameters"]]

        def body():
            for node in program["nodes"]:
                args = [argument(a, values, names) for a in node["args"]]
                kwargs = {k: argument(a, values, names) for k, a in node.get("kwargs", {}).items()}
                values.append(call(node["op"], args, kwargs))
                visit(b, len(values) - 1, values[-1])

        body() if around is None else around(b, values, body)
        outputs.append([values[o["value"]] for o in program["outputs"]])
    return outputs


def random_batch(graph, names, limit):
    batch = {}
    for i in graph["inputs"]:
        shape = [size(d, names) for d in i["shape"]]
        dtype = DTYPES[i["dtype"]]
        batch[i["name"]] = torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.randint(0, limit, shape)
    return batch


def random_parameters(graph):
    dtype = DTYPES[graph.get("dtype", "float32")]
    return {p["name"]: (torch.rand(p["shape"], dtype=dtype) + 0.5).requires_grad_(p["trainable"]) for p in graph["parameters"]}


def metas(job):
    """dtype, shape and requires_grad of every value, as PyTorch gives them."""
    torch.manual_seed(0)
    graph = job["graph"]
    seen = {}

    def visit(block, id, value):
        seen[f"{block}:{id}"] = [NAMES[value.dtype], list(value.shape), value.requires_grad]

    scales = {l["name"]: torch.tensor(0.5) for l in graph["losses"]}
    run(graph, random_parameters(graph), random_batch(graph, job["sizes"], job["limit"]), scales, visit)
    return seen


def saved(job):
    """Bytes that autograd saves in each block beside its inputs and parameters."""
    torch.manual_seed(0)
    graph = job["graph"]
    counts = []

    def around(block, values, body):
        given = {v.untyped_storage().data_ptr() for v in values}
        storages = {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in given:
                storages[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            body()
        counts.append(sum(n for n, _ in storages.values()))

    scales = {l["name"]: torch.tensor(0.5) for l in graph["losses"]}
    run(graph, random_parameters(graph), random_batch(graph, job["sizes"], job["limit"]), scales, around=around)
    return counts


def wide_transformers():
    """transformers computes norms and rotations in float32 whatever the model's dtype; here in float64, as written there."""
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self, x, position_ids):
        frequency = self.inv_freq.to(torch.float64)
        at = position_ids[:, :, None].to(torch.float64) * frequency
        both = torch.cat((at, at), dim=-1)
        return both.cos() * self.attention_scaling, both.sin() * self.attention_scaling

    for module, stem in ((llama, "Llama"), (qwen3, "Qwen3")):
        getattr(module, f"{stem}RMSNorm").forward = norm
        getattr(module, f"{stem}RotaryEmbedding").forward = rotary


def wide_frequencies(rotary, config):
    """inv_freq made in float64 by transformers' own function."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rotary.rope_type
    function = rotary.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    narrow = torch.float32, torch.Tensor.float, torch.float
    torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        inv_freq, _ = function(config)
    finally:
        _, torch.Tensor.float, torch.float = narrow
    assert inv_freq.dtype == torch.float64
    rotary.register_buffer("inv_freq", inv_freq, persistent=False)


def compare(job):
    """Relative errors against transformers: logits of the last position, loss, the worst of all gradients."""
    import transformers

    torch.manual_seed(job["seed"])
    dtype = DTYPES[job["dtype"]]
    wide = dtype == torch.float64
    if wide:
        wide_transformers()
    kind = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[job["config"]["model_type"]]
    config = kind(**job["config"])
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    if wide:
        wide_frequencies(model.model.rotary_emb, config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.08 + (1 if p.dim() == 1 else 0))
    B, T, V = job["B"], job["T"], config.vocab_size
    ids = torch.randint(0, V, (B, T))
    labels = torch.randint(0, V, (B, T))
    labels[torch.rand(B, T) < 0.2] = -100
    documents = job.get("documents")
    batch = {"input_ids": ids, "labels": labels}
    if documents is None:
        batch["position_ids"] = torch.arange(T).expand(B, T)
        logits = model(ids).logits
    else:
        # Every document by itself, then side by side: what packing must equal.
        batch["position_ids"] = torch.cat([torch.arange(n) for n in documents]).expand(B, T)
        batch["segment_ids"] = torch.cat([torch.full((n,), i) for i, n in enumerate(documents)]).expand(B, T)
        logits = torch.cat([model(part).logits for part in ids.split(documents, dim=1)], dim=1)
    scale = torch.tensor(1 / int((labels != -100).sum()), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), reduction="sum") * scale.to(dtype)
    loss.backward()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    unknown = set(parameters) ^ {p["name"] for p in job["train"]["parameters"]}
    assert not unknown, f"names differ: {unknown}"
    for p in job["train"]["parameters"]:
        assert list(parameters[p["name"]].shape) == p["shape"], p["name"]
    ours = run(job["train"], parameters, batch, {"loss": scale})[-1][0]
    ours.backward()

    def error(a, b):
        return ((a - b).norm() / b.norm()).item()

    gradients = {n: error(parameters[n].grad, p.grad) for n, p in model.named_parameters()}
    worst = max(gradients, key=gradients.get)
    with torch.no_grad():
        generated = run(job["generate"], parameters, batch, {})[-1][0] if job.get("generate") else None
    return {
        "loss": abs(ours.item() - loss.item()) / abs(loss.item()),
        "worst": worst,
        "gradient": gradients[worst],
        "logits": None if generated is None else error(generated.to(dtype), logits[:, -1].detach()),
    }


TASKS = {"metas": metas, "saved": saved, "compare": compare}
torch.ops.load_library(sys.argv[1])
print(json.dumps([TASKS[job["task"]](job) for job in json.load(sys.stdin)]))
