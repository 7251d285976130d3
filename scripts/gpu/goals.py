"""Judges what `check` found, and tells it as a page.

A goal is a bound on a figure or on a ratio of two. What was not measured is neither reached nor missed.
"""

# Kernels that should be as fast as memory, at 10^8 elements.
BANDWIDTH = [
    f"{kernel}/{dtype}"
    for kernel in ("check_norm", "unscale", "sgd", "sgd_momentum", "adamw")
    for dtype in ("f32", "f16", "bf16")
] + ["adamw_split/bf16", "adamw_bf16_moments/bf16"]
CEILING = "copies/copy/1GiB"
SIZES = ("512B", "64KiB", "4MiB")


def number(figures, key, unit):
    return figures.get(key, {}).get(unit)


def ratio(value, base):
    return None if value is None or not base else value / base


def goals(found):
    """(goal, word, bound, measured) one by one; measured is None if it was not.

    >>> figures = {"copies/copy/1GiB": {"gb_per_s": 4000.0}, "kernels/adamw/f32": {"gb_per_s": 3000.0}}
    >>> figures.update({"pairs/kitsune/512B": {"ns": 20.0}, "pairs/torch/512B": {"ns": 800.0}})
    >>> [(word, bound, value) for _, word, bound, value in goals({"figures": figures}) if value is not None]
    [('at least', 0.9, 0.75), ('at most', 0.1, 0.025)]
    """
    figures = found.get("figures", {})
    copy = number(figures, CEILING, "gb_per_s")
    for kernel in BANDWIDTH:
        share = ratio(number(figures, f"kernels/{kernel}", "gb_per_s"), copy)
        yield f"{kernel}: bandwidth over a copy's", "at least", 0.90, share
    for size in ("1e8", "1e9"):
        ours = number(figures, f"steps/kitsune/{size}", "us")
        for way, bound in (("fused", 0.67), ("foreach", 0.33)):
            theirs = number(figures, f"steps/torch-{way}/{size}", "us")
            yield f"unscale, clip, AdamW, {size} parameters: time over PyTorch's {way} path", "at most", bound, ratio(ours, theirs)
    for peer in ("torch", "torch-native", "cudaMallocAsync"):
        for size in SIZES:
            ours, theirs = (number(figures, f"pairs/{name}/{size}", "ns") for name in ("kitsune", peer))
            yield f"{size} allocated and freed: time over {peer}'s", "at most", 0.10, ratio(ours, theirs)
    waits = number(figures, "steps/calls", "host_synchronisations")
    yield "host synchronisations in ten steps", "at most", 0, waits


def verdict(word, bound, value):
    """Whether a bound holds.

    >>> verdict("at least", 0.9, 0.9), verdict("at most", 0.1, 0.11), verdict("at most", 0, None)
    ('reached', '**missed**', 'not measured')
    """
    if value is None:
        return "not measured"
    return "reached" if (value >= bound if word == "at least" else value <= bound) else "**missed**"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def rounded(value):
    """As many digits as say something; texts as they are."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def figure_table(found, part, columns):
    """The figures of a part, a line each, with those of `columns` (unit, heading) that there are."""
    lines = {key[len(part) + 1 :]: figure for key, figure in found.get("figures", {}).items() if key.startswith(part + "/")}
    if not lines:
        return "Not measured.\n"

    def told(figure, unit):
        ended = figure.get("failed") or figure.get("passed_over")
        return ended if ended and unit == columns[0][0] else rounded(figure.get(unit))

    rows = [[name, *(told(figure, unit) for unit, _ in columns)] for name, figure in lines.items()]
    return table([part, *(heading for _, heading in columns)], rows)


def matrix(found, part, unit):
    """Figures named `peer/work`: a line for each work, a column for each peer."""
    figures = {key[len(part) + 1 :].rsplit("/", 1)[0]: 0 for key in found.get("figures", {}) if key.startswith(part + "/")}
    works = {key.rsplit("/", 1)[1]: 0 for key in found.get("figures", {}) if key.startswith(part + "/")}
    if not figures:
        return "Not measured.\n"

    def cell(peer, work):
        figure = found["figures"].get(f"{part}/{peer}/{work}", {})
        return "failed" if "failed" in figure else rounded(figure.get(unit))

    return table([unit, *figures], [[work, *(cell(peer, work) for peer in figures)] for work in works])


def suites_table(found):
    if "suites" not in found:
        return "Not run.\n"

    def outcome(suite):
        if suite["status"] == 0:
            return "passed"
        return "took too long" if suite["status"] is None else "failed: " + (", ".join(suite["failed"]) or "ended early")

    rows = [[name, suite["passed"], outcome(suite), suite["seconds"]] for name, suite in found["suites"].items()]
    return table(["suite", "tests passed", "outcome", "s"], rows)


def sanitizers_table(found):
    if "sanitizers" not in found:
        return "Not run.\n"

    def outcome(tool):
        ended = ", ended early" if tool["ended_early"] else ""
        return ("clean" if tool["clean"] else "**not clean**") + ended

    rows = [[name, tool["tests"], outcome(tool), "; ".join(tool["summary"])] for name, tool in found["sanitizers"].items()]
    return table(["tool", "kernel tests", "outcome", "summary"], rows)


def machine_lines(found):
    about, machine, device = found["about"], found["machine"], found["doctor"]["devices"][0]
    memory = device["total_bytes"] / 2**30
    lines = [
        f"- {device['name']}, compute capability {device['compute_capability']}, {memory:.0f} GiB, {device['multiprocessors']} multiprocessors",
        f"- driver for CUDA {found['doctor']['driver_cuda_version']}; nvidia-smi: {machine.get('nvidia_smi') or 'not there'}",
        f"- {machine['system']}, {machine['processors']} processors",
        f"- commit {about['commit']}{' with changes' if about['changed'] else ''}, {about['rustc']}, profile `{about['profile']}`",
        f"- PyTorch {machine['torch'] or 'not there'}, CuPy {machine['cupy'] or 'not there'}, Python {machine['python']}",
    ]
    return "\n".join(lines) + "\n"


def page(found):
    judged = [
        [goal, f"{word} {bound}", rounded(value), verdict(word, bound, value)] for goal, word, bound, value in goals(found)
    ]
    simulated = found["doctor"]["devices"][0]["name"].startswith("Simulated")
    warning = "**The device is simulated: no figure on this page means anything.**\n\n" if simulated else ""
    rate = [("us", "µs"), ("gb_per_s", "GB/s"), ("tflop_per_s", "TFLOP/s")]
    step = [("us", "µs on the device"), ("host_us", "µs on the host"), ("check_us", "check"), ("adamw_us", "AdamW")]
    step += [("host_synchronisations", "host synchronisations"), ("elements", "parameters")]
    return f"""# {found["doctor"]["devices"][0]["name"]}, {found["date"]}

{warning}Written by `scripts/gpu/check`; [testing](../testing.md) tells what is measured and how.

{machine_lines(found)}
## Goals

{table(["goal", "bound", "measured", ""], judged)}
## Suites

{suites_table(found)}
## Sanitizers

{sanitizers_table(found)}
## Memory

Bytes read and written, over the device's time.

{figure_table(found, "copies", rate)}
## Kernels

{figure_table(found, "kernels", rate)}
## Steps

Unscale, check, clip to a total norm, AdamW, next scale, in f32.

{figure_table(found, "steps", step)}
## One block, allocated and freed

{matrix(found, "pairs", "ns")}
## Runs

Time for an allocation with its free, and memory that the device lacks after the first pass over the most bytes asked for.

{matrix(found, "runs", "ns")}
{matrix(found, "runs", "ratio")}
## Driver calls

{figure_table(found, "costs", [("us", "µs"), ("unmap_us", "µs to unmap")])}"""
