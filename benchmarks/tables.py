"""Write the tables of README.md, benchmarks/README.md and docs/ from the results, and the chart of docs/images/.

`python benchmarks/tables.py`. A table stands between two markers that name it, and says which commit its numbers were
measured at: in a column of its own or, where all rows share one, in the lines above it.
"""

import json
from pathlib import Path

from tidal_compile.bench.figures import METHODS as METHOD_LINES
from tidal_compile.bench.figures import attention_shares
from tidal_compile.bench.markdown import DECODE_COLUMNS, KERNEL_COLUMNS, about, decode_rows, kernel_rows, markdown
from tidal_compile.policy import Policy, resolve

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
READMES = (ROOT / "README.md", HERE / "README.md")
PAGES = (*READMES, *sorted((ROOT / "docs").glob("*.md")))
CHART = ROOT / "docs/images/decode-8b-100k.png"

DEVICE = "nvidia-h200"  # of the tables that compare rows of several results
HEADLINE = "decode-random-llama-3.1-8b-100k-nvidia-h200"  # the result that the chart shows
VARIANTS = {  # of it, in the words of the chart
    "reduce-overhead": "torch.compile,\nmode reduce-overhead",
    "flash": "the same with SDPA flash,\nwritten by hand, no mask",
    "tidal: full": "tidal_compile, policy full\n(exact)",
    "tidal: tidal 1024": "tidal_compile, policy tidal\n(sparse, budget 1,024)",
}
OPS = ("dense", "select", "sparse", "SDPA flash", "SDPA cuDNN", "dense + torch.topk")
METHODS = {  # ops, in the words of their columns
    "select": "`scores`, full output", "by scores, sparse output": "`scores`", "by pages, sparse output": "`pages`",
    "by pages, keep 4, sparse output": "`pages`, `keep: 4`", "by window, sparse output": "`window`",
}  # fmt: skip
POLICIES = {  # of the evaluations: a name in words, and the policy
    "l13": ("layers published for Llama-3-8B", HERE / "policies/l13.yaml"),
    "tidal": ("preset `tidal`", "tidal"),
    "two": ("calibrated, two selections", RESULTS / "calibrate-smollm2/256-2.yaml"),
    "smollm2": ("calibrated, four selections: the shipped file `smollm2`", "smollm2"),
}
LENGTH, BUDGET, LAYERS = 4096, 256, 30  # of the evaluations' summary: prompt, policies, SmolLM2


def results(kind):
    """The results of one kind, by file name."""
    files = sorted(RESULTS.glob(f"{kind}-*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


def evaluation(name):
    """The rows of an evaluation of SmolLM2, and a line that says where they come from."""
    file = RESULTS / "eval-smollm2" / name / "results.json"
    found = json.loads(file.read_text())
    return found["rows"], f"`{file.relative_to(ROOT)}` ({found['device']}, {found['dtype']}, commit {found['commit']})"


def headline():
    """ms of each variant that the chart shows, and the whole result."""
    result = json.loads((RESULTS / f"{HEADLINE}.json").read_text())
    ms = {one["name"]: one["ms"]["median"] for one in result["decode"]}
    return {name: ms[name] for name in VARIANTS}, result


def headline_caption():
    """What the chart shows, in words."""
    ms, result = headline()
    eager, flash, full, sparse = ms.values()
    return (
        f"The time of one decode step of a model with the shape of Llama-3.1-8B and random weights, at 100,000 tokens "
        f"and batch size 1, on one {result['device']} in {result['dtype']}. `torch.compile` with `reduce-overhead` "
        f"takes {eager:.2f} ms. The same with SDPA's flash attention, written by hand for one known length and without "
        f"a mask, takes {flash:.2f} ms. `tidal_compile` takes {full:.2f} ms under the exact policy `full` and "
        f"{sparse:.2f} ms under the sparse policy `tidal`: {eager / sparse:.1f} times as fast as `reduce-overhead`, "
        f"and {flash / sparse:.1f} times as fast as flash attention. "
        f"Source: `benchmarks/results/{HEADLINE}.json`, commit {result['commit']}.\n"
    )


def decode_summary():
    """Every variant of every model in one table: ms, against the floor, and what a user sees through generate."""
    rows = []
    for name, result in (results("decode") | results("figures")).items():
        if not name.endswith(DEVICE):
            continue
        depth = f", {result['layers']} layers" if result.get("layers") else ""
        shape = result["model"].removeprefix("random:") + depth
        steps = [str(one["steps"]) for one in result["decode"]]
        rows += [(shape, *row, n, result["commit"]) for row, n in zip(decode_rows(result), steps, strict=True)]
    return markdown(("shape", *DECODE_COLUMNS, "steps", "commit"), rows)


def kernel_summary():
    """us of each op, a row a size of the main result."""
    (result,) = (one for name, one in results("kernels").items() if name.count("-") == 2)
    rows = {}
    for one in result["kernels"]:
        size = f"{one['heads']}/{one['kv_heads']} heads, {one['context']:,} tokens"
        rows.setdefault(size, {})[one["op"]] = f"{one['us']['median']:.1f}"
    return markdown(
        ("us", *OPS, "commit"), [(size, *(us[op] for op in OPS), result["commit"]) for size, us in rows.items()]
    )


def method_summary():
    """us of what chooses tokens and attends to them, and its share of dense attention: a row a size."""
    rows = []
    for name in ("pages", "methods-1m", "methods-batch-8"):
        result = results("kernels")[f"kernels-{name}-nvidia-h200"]
        sizes = {}
        for one in result["kernels"]:
            size = f"{one['batch']} x {one['context']:,} tokens, {one['heads']}/{one['kv_heads']} heads"
            sizes.setdefault(size, {})[one["op"]] = one["us"]["median"]
        for size, us in sizes.items():
            shares = (f"{us[op]:.1f} ({us[op] / us['dense']:.2f})" for op in METHODS)
            rows.append((size, f"{us['dense']:.1f}", *shares, result["commit"]))
    return markdown(("us", "dense", *METHODS.values(), "commit"), rows)


def sampling_summary():
    """us of attention by samples beside dense attention, and ms of whole steps."""
    kernels = results("kernels")["kernels-lsh-nvidia-h100"]
    us = {one["op"]: one["us"]["median"] for one in kernels["kernels"]}
    decode = results("decode")["decode-random-llama-3.1-8b-lsh-nvidia-h100"]
    ms = {one["name"].removeprefix("tidal: "): one["ms"]["median"] for one in decode["decode"]}
    rows = [
        (words, f"{us[op]:.1f}", f"{us[op] / us['dense']:.2f}", f"{us[op] / us['dense, no mask']:.2f}", step)
        for words, op, step in (
            ("dense", "dense", f"{ms['full']:.2f} (`full`)"),
            ("SDPA cuDNN, no mask", "SDPA cuDNN", "-"),
            ("`lsh`, (10, 150)", "by lsh, sparse output", f"{ms['magicpig']:.2f} (`magicpig`)"),
            ("`lsh`, (9, 120)", "by lsh, 9 bits, 120 tables, sparse output", "-"),
            ("`lsh`, (8, 75)", "by lsh, 8 bits, 75 tables, sparse output",
             f"{ms['magicpig_8_75']:.2f} (`magicpig_8_75`)"),
        )
    ]  # fmt: skip
    table = markdown(("attention", "us", "of dense", "of dense without a mask", "ms a step of Llama-3.1-8B"), rows)
    return f"{table}\n{kernels['device']}, 100,000 tokens, commits {kernels['commit']} and {decode['commit']}.\n"


def capacity_summary():
    """What a GPU that is held to a limit decodes with caches in host memory: a row a case and variant."""
    rows, commits, devices = [], {}, {}
    for result in results("capacity").values():
        commits[result["commit"]] = devices[f"{result['device']} held to {result['limit_gib']:.0f} GiB"] = None
        for one in result["records"]:
            variant = f"`{one['variant']}`" + (f", prompt read in {one['fill_s']:.0f} s" if one["prompt"] else "")
            case = f"{one['batch']} x {one['context']:,}", variant, f"{one['kv_bytes'] / 1e9:.1f}"
            if "error" in one:
                rows.append((*case, "out of memory", "-", "-", "-"))
                continue
            speed = f"{one['ms']:.1f}", f"{one['tokens_per_s']:.1f}", f"{one['first_step_s']:.2f}"
            rows.append((*case, *speed, f"{one['peak_gpu_bytes'] / 1e9:.1f}"))
    rows.sort(key=lambda row: row[0])
    columns = ("batch x context", "variant", "KV cache, GB", "ms a step", "tokens/s", "first step, s", "GPU peak, GB")
    source = f"{', '.join(devices)}, commit {', '.join(commits)}, `benchmarks/results/capacity-*.json`."
    return f"{markdown(columns, rows)}\n{source}\n"


def fp8_summary():
    """What a cache in float8 costs: a row a model, policy and cache."""
    return quality_table("fp8", ("cache",))


def weights_summary():
    """What quantised weights cost: a row a model, policy, kind of weights and cache."""
    return quality_table("weights", ("weights", "cache"))


def quality_table(start, kinds):
    """The results of benchmarks/fp8.py that begin with a word."""
    rows, sources = [], []
    for name, result in results(start).items():
        sources.append(f"`{name}.json` ({result['device']}, {result['dtype']}, commit {result['commit']})")
        for one in result["records"]:
            asked = result["prompts"]
            found = (f"{one[key]} of {asked}" if asked else "-" for key in ("found", "same_text"))
            quality = f"{one['kl']:.4f}", f"{one['agreement']:.1%}", f"{one['perplexity']:.2f}", *found
            stored = ({**result, **one}[kind] for kind in kinds)
            rows.append((result["model"], f"`{one['policy']}`", *stored, *quality))
    columns = ("model", "policy", *kinds, "KL", "same token", "perplexity", "pass keys found", "same text")
    return f"{markdown(columns, rows)}\nSources: {', '.join(sources)}.\n"


def float8_steps():
    """Steps over both kinds of caches, with weights as they are: a row a policy and cache."""
    rows, sources = [], []
    for name, result in results("quantised-fp8").items():
        about = f"{result['layers'] or 32} layers, {result['batch']} x {result['context']:,}"
        sources.append(f"`{name}.json` ({result['device']}, commit {result['commit']})")
        for one in result["records"]:
            times = f"{one['ms']:.2f}", f"{one['attention_us'] / 1e3:.2f}", f"{one['cache_bytes'] / 1e9:.2f}"
            rows.append((about, f"`{one['policy']}`", one["cache"], *times))
    columns = ("shape and tokens", "policy", "cache", "ms a step", "of it attention", "cache, GB")
    return f"{markdown(columns, rows)}\nSources: {', '.join(sources)}.\n"


def quantised_steps():
    """Steps with quantised weights: a row a kind of weights, cache, policy and setting."""
    rows, sources = [], []
    for name, result in results("quantised-weights").items():
        sources.append(f"`{name}.json` ({result['device']}, {result['context']:,} tokens, commit {result['commit']})")
        size = f"{result['batch']} x {result['context']:,}"
        for one in result["records"]:
            linear = f"{one['linear_us'] / 1e3:.2f}", f"{one['weights_share_of_copy']:.2f}"
            times = f"{one['ms']:.2f}", *linear, f"{one['attention_us'] / 1e3:.2f}", f"{one['weight_bytes'] / 1e9:.2f}"
            rows.append((size, f"`{one['policy']}`", one["weights"], one["cache"], *times, result["commit"][:7]))
    kinds = ("auto", "torchao-int8", "int8", "torchao-int4", "int4-32", "int4")
    rows.sort(key=lambda row: (row[0], row[1] != "`tidal`", row[1], kinds.index(row[2]), row[3], -float(row[4])))
    columns = (
        "tokens", "policy", "weights", "cache", "ms a step", "of it linear", "of the copy rate", "of it attention",
        "weights, GB", "commit",
    )  # fmt: skip
    return f"{markdown(columns, rows)}\nSources: {', '.join(sources)}.\n"


def paper_summary():
    """TidalDecode's Figures 1 and 2 as a table: a row a budget and context, for TidalDecode and Quest."""
    (result,) = results("figures").values()
    ms = {(one["name"], one["context"]): one["ms"]["median"] for one in result["decode"]}
    depths = 32, 64
    shares = {(by, depth): attention_shares(result["kernels"], depth, by) for by in METHOD_LINES for depth in depths}
    rows = []
    for context, budget in sorted(shares["tidal", 32]):
        dense = ms["tidal: full", context]
        cells = []
        for by in METHOD_LINES:
            step = ms[f"tidal: {by} {budget}", context]
            cells.append(f"{step:.2f} ({dense / step:.2f})")
            cells += [f"{shares[by, depth][context, budget]:.3f}" for depth in depths]
        rows.append((f"{context:,}", f"{budget:,}", f"{dense:.2f}", *cells))
    names = [
        f"{by}, {what}" for by in METHOD_LINES for what in ("step", *(f"attention, {one} layers" for one in depths))
    ]
    table = markdown(("context", "budget", "`full`, step", *names), rows)
    return f"{table}\nSource: `figures-random-llama-2-7b-nvidia-h200.json`, commit {result['commit']}.\n"


def full_tables(kinds, columns, rows):
    """Every result of some kinds, each with its command and provenance."""
    parts = []
    for name, result in (item for kind in kinds for item in results(kind).items()):
        parts.append(f"`{name}`: `{result['command']}`  \n{about(result)}\n\n{markdown(columns, rows(result))}")
    return "\n".join(parts)


def decode_tables():
    """Every decode result."""
    return full_tables(("decode", "figures"), DECODE_COLUMNS, decode_rows)


def kernel_tables():
    """Every kernel result."""
    return full_tables(("kernels",), KERNEL_COLUMNS, kernel_rows)


def demo():
    """What `make demo` found on each device."""
    return run_table("run-smollm2")


def run_table(name):
    """Results of `tidal-compile run` on one model: a row a variant, and two columns a device."""
    runs = results(name)
    devices = [result["device"] for result in runs.values()]
    rows = {}  # by what a variant is called in words
    for result in runs.values():
        for one in result["variants"]:
            row = rows.setdefault(_variant(one), {"share": f"{one['kv_share']:.0%}"})
            row[result["device"]] = (_found(result, one), f"{one['median_ms']:.1f}")
    columns = [f"{what}, {device}" for device in devices for what in ("found", "ms per token")]
    cells = [
        (name, row["share"], *(cell for one in devices for cell in row.get(one, "--"))) for name, row in rows.items()
    ]
    sources = "; ".join(
        f"{one['device']}: {one['dtype']}, {one['context']:,} tokens, `benchmarks/results/{file}.json`, commit "
        f"{one.get('commit', 'not recorded')}"
        for file, one in runs.items()
    )
    return f"{markdown(('variant', 'KV cache read', *columns), cells)}\nSources: {sources}.\n"


def _variant(one):
    """A variant of a run in words: a policy by the layers that select."""
    if one["policy"] is None:
        return {"eager": "eager", "inductor": "`torch.compile` (on a GPU: `reduce-overhead`)"}[one["name"]]
    policy = Policy.from_dict(one["policy"])
    name, selections = one["name"].removeprefix("tidal: "), _selections(policy)
    return f"policy `{name}`" + (
        f" (selections at {selections}; budget {policy.defaults.budget})" if selections else ""
    )


def _found(result, variant):
    """How many of the hidden numbers a variant of a run found."""
    return f"{variant['found']} of {len(result['prompts'])}"


def _selections(policy):
    return ", ".join(str(role.layer) for role in policy.roles if role.role == "select")


def quality_summary():
    """What each policy costs in quality, in one row: answers kept, and how far its predictions are from dense."""
    needles, needle_source = evaluation("needle")
    predictions, prediction_source = evaluation("perplexity")
    rows = [("dense: every layer reads everything", "100%", "100% / 100%", "100% / 100%", "0", "0")]
    for name in POLICIES:
        kept = _kept_by_task(needles, name, BUDGET)
        kl = {task: _row(predictions, task, LENGTH, None, name) for task in ("text", "answers")}
        share = f"{kl['text']['kv_share']:.0%}"
        rows.append((_policy(name), share, *kept, *(f"{one['kl']:.3f}" for one in kl.values())))
    return (
        f"{markdown(('policy', *QUALITY), rows)}\nSources: answers from {needle_source}; KL from {prediction_source}.\n"
    )


def flat_summary():
    """What a policy without a scan costs beside the calibrated one that scans, at two budgets."""
    return _quality_table("flat", [(name, n * BUDGET) for name in ("smollm2", "smollm2-flat") for n in (1, 2)])


def equal_bytes_summary():
    """Every way to choose tokens at as many bytes a step, the nearest to the dense model's prose first."""
    found, _ = evaluation("equal-bytes-perplexity")
    policies = [one for one in found if one["task"] == "text" and one["subject"] != "dense"]
    policies.sort(key=lambda one: one["kl"])  # of the text
    return _quality_table("equal-bytes", [one["subject"].split(" @") for one in policies])


def _quality_table(name, policies):
    """What dense answers that each of the policies (name, budget) answers too, and its KL, from two evaluations."""
    needles, needle_source = evaluation(f"{name}-needle")
    predictions, prediction_source = evaluation(f"{name}-perplexity")
    rows = []
    for policy, budget in policies:
        kl = [_row(predictions, task, LENGTH, None, policy, budget) for task in ("text", "answers")]
        share, far = f"{kl[0]['kv_share']:.0%}", (f"{one['kl']:.4f}" for one in kl)
        rows.append((f"`{policy}`", f"{budget}", share, *_kept_by_task(needles, policy, budget), *far))
    table = markdown(("policy", "budget", *QUALITY), rows)
    return f"{table}\nSources: answers from {needle_source}; KL from {prediction_source}.\n"


QUALITY = ("KV cache read", "pass keys kept", "needles kept", "KL on prose", "KL on answers")
NEEDLES = {"passkey": "pass key", "needle": "needle in a text"}
ASKED = {"dense": "with the prompt", "sparse": "decoded"}


def needle_summary():
    """Of what dense answers, the share that a policy answers too, by the length of the prompt."""
    found, source = evaluation("needle")
    lengths = sorted({row["length"] for row in found})
    rows = [
        (f"{words}, `{name}`", how, *(_kept(found, task, length, question, name) for length in lengths))
        for task, words in NEEDLES.items()
        for question, how in ASKED.items()
        for name in ("tidal", "smollm2")
    ]
    table = markdown(("task, policy", "question", *(f"{length:,} tokens" for length in lengths)), rows)
    return f"{table}\nSource: {source}.\n"


def steps_summary():
    """The same predictions from one pass over many tokens, and token by token with the compiled step."""
    found, source = evaluation("perplexity-steps")
    how = {"text": "many tokens in a pass", "text_steps": "token by token, compiled"}
    rows = [
        (how[row["task"]], row["subject"], f"{row['perplexity']:.3f}", f"{row['kl']:.4f}", f"{row['agreement']:.1%}")
        for row in found
        if row["task"] in how
    ]
    return f"{markdown(('decoded', 'policy', 'perplexity', 'KL', 'agreement'), rows)}\nSource: {source}.\n"


def _policy(name):
    """A policy of the evaluations in words."""
    words, given = POLICIES[name]
    policy = resolve(given, LAYERS)
    return f"{words} (selections at {_selections(policy)})"


def _row(rows, task, length, question, name, budget=BUDGET):
    """The row of a policy at a budget; None if it was not evaluated."""
    wanted = (task, length, question, f"{name} @{budget}")
    return next(
        (one for one in rows if tuple(one[key] for key in ("task", "length", "question", "subject")) == wanted), None
    )


def _kept_by_task(rows, name, budget):
    """What a policy keeps of each task at `LENGTH`, with the question read with the prompt / decoded."""
    return [" / ".join(_kept(rows, task, LENGTH, how, name, budget) for how in ASKED) for task in NEEDLES]


def _kept(rows, task, length, question, name, budget=BUDGET):
    row = _row(rows, task, length, question, name, budget)
    return "-" if row is None else f"{row['kept']:.0%}"


def index():
    """Every result, with the command that made it."""
    rows = []
    for file in sorted(RESULTS.rglob("*.json")):
        result = json.loads(file.read_text())
        command = f"`{result['command']}`" if "command" in result else "-"
        rows.append(
            (f"`{file.relative_to(RESULTS)}`", command, result["device"], result.get("commit", "-"), result["date"])
        )
    return markdown(("file", "command", "device", "commit", "date"), rows)


SECTIONS = {
    "headline": headline_caption, "quality summary": quality_summary, "demo": demo,
    "decode summary": decode_summary, "kernel summary": kernel_summary, "method summary": method_summary,
    "sampling summary": sampling_summary, "capacity summary": capacity_summary, "paper summary": paper_summary,
    "decode tables": decode_tables, "kernel tables": kernel_tables,
    "fp8 summary": fp8_summary, "float8 steps": float8_steps, "quantised steps": quantised_steps,
    "weights summary": weights_summary,
    "needle summary": needle_summary, "flat summary": flat_summary,
    "equal bytes summary": equal_bytes_summary, "steps summary": steps_summary, "index": index,
}  # fmt: skip


def with_tables(text):
    """A text with the tables of today between its markers."""
    for name, table in SECTIONS.items():
        begin, end = f"<!-- {name}: written by benchmarks/tables.py -->\n", f"<!-- end of {name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = before + begin + table() + end + rest.split(end)[1]
    return text


def chart_data():
    """What the chart shows, as text that is kept in the picture, so that a test can see whether it is of today."""
    ms, result = headline()
    return json.dumps({"ms": ms, "device": result["device"], "commit": result["commit"]})


def draw_chart(file):
    """The headline's variants as bars, on a background of its own: readable on light and on dark pages."""
    from matplotlib.figure import Figure

    ms, result = headline()
    slowest, flash = ms["reduce-overhead"], ms["flash"]
    figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="#fbfbf9", edgecolor="#c8ccd0", linewidth=2)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = figure.subplots()
    axes.set_facecolor("none")
    colours = ["#9aa3ab", "#9aa3ab", "#3b7ea1", "#c8572f"]
    bars = axes.barh(list(VARIANTS.values()), ms.values(), color=colours, height=0.62)
    labels = []
    for name, time in ms.items():
        faster = "" if name == "reduce-overhead" else f"   {slowest / time:.1f} times as fast"
        beside = f" ({flash / time:.1f} times as fast as flash)" if name.startswith("tidal") else ""
        labels.append(f"{time:.2f} ms{faster}{beside}")
    axes.bar_label(bars, labels, padding=6, fontsize=10, color="#1f2429")
    axes.invert_yaxis()
    axes.set_xlim(0, slowest * 1.13)
    axes.set_xlabel("ms for each token (shorter is better)", color="#1f2429")
    axes.tick_params(colors="#1f2429", left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    title = "One decode step of the Llama-3.1-8B shape at 100,000 tokens"
    under = f"{result['device']}, {result['dtype']}, batch 1, random weights; commit {result['commit']}"
    axes.set_title(f"{title}\n", loc="left", fontsize=12, fontweight="bold", color="#1f2429")
    axes.text(0, 1.04, under, transform=axes.transAxes, fontsize=9, color="#4a5258")
    figure.savefig(file, dpi=150, metadata={"Description": chart_data(), "Software": None})


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(with_tables(file.read_text()))
    draw_chart(CHART)
