"""The figures of docs/experiments.md are those of its CSVs."""

from doc_tables import (
    HELD_OUT,
    ROOT,
    TUNING,
    assert_presets,
    assert_says,
    find,
    held_out,
    read,
    says,
    table_with,
    tables_in,
    words_of,
)

from pbs_attn.bench import curves

PAGE = ROOT / "docs" / "experiments.md"


def test_a_summary_loses_repeats():
    rows = read("quality_summary_smollm2_cpu.csv")
    found = table_with({"selection", "density of the repeat"}, PAGE)
    assert len(found) == len(rows) / 2
    for said in found:
        place = {name: said[name] for name in ("tokens", "threshold")}
        place["settings"] = said["selection"].replace("per KV head", "a KV head")
        text = {"loss": "loss_above_dense", "density": "density"}
        assert_says(said, find(rows, probe="text", **place), text)
        copy = {"loss of a repeat": "loss_above_dense", "density of the repeat": "density"}
        assert_says(said, find(rows, probe="copy", **place), copy)


def test_preset_table():
    """The presets of 0.2.0."""
    presets = {
        "8 samples, threshold 0.008 (0.2.0's `fast`)": "PBSConfig.fast()",
        "16 samples (0.2.0's default)": "PBSConfig()",
        "32 samples (0.2.0's `accurate`)": "PBSConfig.accurate()",
        "`paper`": "PBSConfig.paper()",
    }
    found = table_with({"settings", "agreement", "loss of a repeat"}, PAGE)
    assert_presets([said | {"preset": f"`{presets[said['settings']]}`"} for said in found])


def test_threshold_tables():
    """There is one table per model, in the order of these files, with both settings side by
    side."""
    path = PAGE
    tables = [rows for names, rows in tables_in(path) if names[0] == "threshold"]
    files = [f"quality_{name}_h200.csv" for name in ("qwen_32768", "qwen_16384", "smollm2")]
    for file, table in zip(files, tables, strict=True):
        rows = [row for row in read(file) if row["selection"] == "pbs"]
        assert len(table) == len({row["threshold"] for row in rows})
        for threshold, *cells in table:
            for settings, said in (("paper", cells[:4]), ("narrow", cells[4:])):
                values = []
                for probe, columns in (
                    ("text", ("density", "loss_above_dense", "agreement")),
                    ("pass key", ("right",)),
                ):
                    group = [
                        row
                        for row in rows
                        if (row["settings"], row["threshold"], row["probe"])
                        == (settings, threshold, probe)
                    ]
                    values += [sum(float(r[c]) for r in group) / len(group) for c in columns]
                for text, value in zip(said, values, strict=True):
                    assert says(text, value), (file, threshold, settings, values)


def assert_reaches(said, density, curve):
    """Checks a lowest density. "At most" means that the sparsest measurement reaches the target,
    and "above" that the densest does not."""
    if density is None:
        above = float(said.removeprefix("above "))
        assert above <= curve[-1][0] < above + 0.01, said
    elif density == curve[0][0]:
        assert said.startswith("at most ") and says(said.removeprefix("at most "), density), said
    else:
        assert says(said, density), said


def test_goals_on_held_out_texts():
    names = {
        "loss ≤ 0.02": ("text", "loss .02"),
        "loss ≤ 0.01": ("text", "loss .01"),
        "visited attention mass ≥ 0.95": ("text", "mass .95"),
        "perplexity of a repeat ≤ 1.1 × dense": ("copy", "repeat 1.1"),
        "recall of pass keys ≥ dense - 0.02": ("pass key", "keys"),
    }
    columns = {
        "pbs, balanced": ("16 samples", "ms"),
        "pbs, num_samples=8": ("8 samples", "ms of 8 samples"),
        "pbs, paper": ("`paper`", "ms of `paper`"),
    }
    found = table_with({"target", "ms of `paper`"}, PAGE)
    assert {said["model, tokens"] for said in found} == HELD_OUT.keys()
    for said in found:
        rows = held_out(said["model, tokens"])
        probe, goal = names[said["target"]]
        times = curves.summarize(rows, "op_ms")["text"]
        for name, (cell, ms) in columns.items():
            if name not in times:
                assert said[cell] == said[ms] == ""
                continue
            density = curves.goals(rows)[name][goal]
            assert_reaches(said[cell], density, curves.summarize(rows)[probe][name])
            time = None if density is None else curves.at_density(times[name], density)
            assert said[ms] == "" if time is None else says(said[ms], time), said
    text = words_of(PAGE)
    dense = [
        curves.summarize(held_out(model), "op_ms")["text"]["dense"][0][1] for model in HELD_OUT
    ]
    assert (
        "takes {:.2f} ms per layer of SmolLM2, and {:.2f} and {:.2f} ms per layer of Qwen".format(
            *dense
        )
        in text
    )
    own, few, paper = (
        curves.goals(held_out("Qwen2.5-Coder-1.5B, 32768"))[name]["ms, loss .01"]
        for name in columns
    )
    shares = f"{few / paper:.2f} of the time of the paper's settings, and 16 "
    assert f"{shares}samples take {own / paper:.2f}" in text
    masses = [
        curves.goals(held_out("Qwen2.5-Coder-1.5B, 16384"))[name]["mass .95"]
        for name in ("pbs, balanced", "pbs, paper")
    ]
    assert f"they need {masses[0] / masses[1]:.2f} of that density" in text


def test_permutation_on_held_out_texts():
    probes = {"loss": "text", "loss of a repeat": "copy", "keys": "pass key"}
    columns = {
        "16 samples": "pbs, balanced",
        "no permutation": "unpermuted, balanced",
        "pooled means": "pooled, balanced",
    }
    found = table_with({"probe", *columns}, PAGE)
    for said in found:
        of_probe = curves.summarize(held_out(said["model, tokens"]))[probes[said["probe"]]]
        for cell, name in columns.items():
            value = curves.at_density(of_probe.get(name, []), float(said["density"]))
            assert said[cell] == "" if value is None else says(said[cell], value), said


def test_number_of_samples_for_a_larger_model():
    found = table_with({"samples", "lowest density"}, PAGE)
    names = {"16": "balanced", "8": "num_samples=8", "4": "num_samples=4"}
    goals = curves.goals(read("quality_tuning_qwen_32768_h100.csv"))
    assert [said["samples"] for said in found] == list(names)
    for said in found:
        reached = goals[f"pbs, {names[said['samples']]}"]
        assert says(said["lowest density"], reached["loss .01"])
        assert says(said["ms"], reached["ms, loss .01"])


# The settings in recall_*.csv, by the names of rows that differ from them.
RECALLED = {
    "16 samples": "PBSConfig()",
    "16 samples, one order per query head, 64 heavy keys": (
        'PBSConfig(permute_per="query_head", num_heavy=64)'
    ),
    "16 samples, sum of masses": 'PBSConfig(mass="causal")',
    "16 samples, one order per query head, 64 heavy keys, sum of masses": (
        'PBSConfig(permute_per="query_head", num_heavy=64, mass="causal")'
    ),
    "`paper`": "PBSConfig.paper()",
}
RECALLED_IN_LAYERS = {
    "16 samples": 'PBSConfig(mass="causal")',
    "32 samples": 'PBSConfig(mass="causal", num_samples=32)',
    "one order per query head": "an order a query head",
    "a full sort, one order per query head": "a full sort, an order a query head",
    "a full sort, one order per query head, mean scores": "the same with mean scores",
    "mean scores, sum of masses": 'PBSConfig(score="mean", mass="causal")',
    "`paper`": "PBSConfig.paper()",
}


def test_recall_of_qwen_layers():
    rows = read("recall_qwen_layers_cpu.csv")
    found = table_with({"settings", "layer 14"}, PAGE)
    names = [RECALLED_IN_LAYERS.get(said["settings"], said["settings"]) for said in found]
    assert sorted(names) == sorted({row["settings"] for row in rows})
    for name, said in zip(names, found, strict=True):
        for layer in ("14", "26"):
            curve = sorted(
                (float(row["density"]), -float(row["recalled"]))
                for row in rows
                if (row["settings"], row["layer"]) == (name, layer)
            )
            value = curves.least_density(curve, -0.95)
            text = said[f"layer {layer}"]
            if value is None:
                assert float(text.removeprefix("above ")) <= curve[-1][0]
            else:
                assert says(text, value), (name, layer)


def test_recall_of_qwen():
    rows = read("recall_qwen_8192_cpu.csv")
    of_bench = {"selection": "pbs", "probe": "text", "loss_above_dense": "", "op_ms": ""}
    goals = curves.goals([row | of_bench for row in rows])
    found = table_with({"settings", "lowest density for a mass of 0.95"}, PAGE)
    assert sorted(said["settings"] for said in found) == sorted(RECALLED)
    assert sorted(RECALLED.values()) == sorted({row["settings"] for row in rows})
    for said in found:
        value = goals[f"pbs, {RECALLED[said['settings']]}"]["mass .95"]
        assert says(said["lowest density for a mass of 0.95"], value), said


def test_goals_table():
    goals = curves.goals(read(TUNING))
    names = {
        "16 samples": "pbs, balanced",
        "8 samples": "pbs, num_samples=8",
        "32 samples": "pbs, accurate",
        "16 samples, one order per query head, 64 heavy keys": (
            "pbs, permute_per=query_head,num_heavy=64"
        ),
        "16 samples, sum of masses": "pbs, mass=causal",
        "8 samples, sum of masses": "pbs, mass=causal,num_samples=8",
        "`paper`": "pbs, paper",
    }
    columns = {
        "loss ≤ 0.02": "loss .02",
        "visited attention mass ≥ 0.95": "mass .95",
        "perplexity of a repeat ≤ 1.1 × dense": "repeat 1.1",
        "recall of pass keys ≥ dense - 0.02": "keys",
    }
    found = table_with(columns, PAGE)
    assert len(found) == len(names)
    densest = curves.summarize(read(TUNING))["text"]
    for said in found:
        name = names[said["settings"]]
        for column, goal in columns.items():
            assert_reaches(said[column], goals[name][goal], densest[name])
    of_causal = curves.goals(read("quality_tuning_causal_smollm2_h100.csv"))
    long, short = (
        [f"{of_causal[name][goal]:.3f}" for goal in columns.values()]
        for name in ("pbs, segment_size=512", "pbs")
    )
    words = "are {}, {}, {} and {} with segments of 512, and {}, {}, {} and {} with segments of 256"
    assert words.format(*long, *short) in words_of(PAGE)


def curves_of_prototypes(name):
    rows = [{**row, "selection": row["variant"], "settings": ""} for row in read(name)]
    return curves.summarize(rows)


def test_antidiagonal_table():
    by_probe = curves_of_prototypes("quality_antidiagonal_smollm2_cpu.csv")
    column = "score of a block, at 4096 tokens"
    names = {
        "the largest share of 16 queries": "s16 max top",
        "antidiagonals, stride 8": "antidiagonal 8",
        "antidiagonals, stride 16": "antidiagonal 16",
        "antidiagonals, stride 8, no permutation": "antidiagonal 8 unpermuted",
    }
    found = table_with({column, "loss of a repeat"}, PAGE)
    assert {said[column] for said in found} == names.keys()
    for said in found:
        for cell, probe in (("loss", "text"), ("loss of a repeat", "copy")):
            value = curves.at_density(by_probe[probe][names[said[column]]], 0.2)
            assert says(said[cell], value), said


def test_prototype_tables():
    by_probe = curves_of_prototypes("quality_prototypes_smollm2_h100.csv")
    variants = {
        "score of a block": {
            "the largest share of 16 queries": "s16 max",
            "the root mean square of 16": "s16 rms",
            "the mean of 16": "s16",
            "the mean of 32": "s32",
            "half the mean of 8, half the pooled mean": "s8 mix mean",
            "the mean of 8": "s8",
            "the attention of the means of 16 groups of 8 queries": "g16",
            "pooled means, narrow blocks": "narrow mean",
        },
        "change to the mean of 16": {
            "none": "s16",
            "for each head, the order that visits less": "s16 both",
            "no permutation": "s16 unpermuted",
            "a full sort": "s16 sort",
            "16 heavy keys": "s16 heavy16",
            "64 heavy keys": "s16 heavy64",
            "importance from sampled queries of all query blocks": "s16 imp samp",
            "previous segment always visited": "s16 window1",
            "a fixed threshold for each block instead of one for the sum": "s16 abs",
            "key blocks of 64": "s16 kv64",
        },
    }
    for column, names in variants.items():
        found = table_with({column, "loss of a repeat"}, PAGE)
        assert {said[column] for said in found} == names.keys()
        for said in found:
            name = names[said[column]]
            for cell, probe in (("loss", "text"), ("loss of a repeat", "copy")):
                curve = by_probe[probe][name]
                value = curves.at_density(curve, 0.2)
                if value is None or said[cell].startswith("at most"):
                    value = next(y for x, y in reversed(curve) if x <= 0.201)
                assert says(said[cell].removeprefix("at most "), value), (name, cell)


def test_heads_that_permutation_harms():
    rows = read("heads_smollm2_h100.csv")
    gains = {}
    for row in rows:
        sign = 1 if row["selection"] == "pbs" else -1
        place = row["layer"], row["head"]
        gains[place] = gains.get(place, 0.0) + sign * float(row["density"]) / 5
    harmed = [gain for gain in gains.values() if gain > 1e-9]
    assert {row["threshold"] for row in rows} == {"0.01"}
    words = f"{len(harmed)} of {len(gains)} heads of SmolLM2 visit more"
    text = words_of(PAGE)
    assert words in text
    assert f"by at most {max(harmed):.4f} of all pairs" in text


def test_heads_of_a_larger_model():
    """Counts the heads that need a higher density for 0.95 of their mass in permuted order."""
    points = {}
    for row in read("heads_qwen_8192_cpu.csv"):
        place = row["layer"], int(row["head"])
        point = float(row["density"]), -float(row["recalled"])
        points.setdefault(place, {}).setdefault(row["selection"], []).append(point)
    losses = [
        curves.least_density(sorted(of["pbs"]), -0.95)
        - curves.least_density(sorted(of["unpermuted"]), -0.95)
        for of in points.values()
    ]
    harmed = [loss for loss in losses if loss > 0]
    words = f"{len(harmed)} of {len(losses)} need more, by at most {max(harmed):.4f}, and the mean "
    words += f"head needs {-sum(losses) / len(losses):.3f} less"
    assert words in words_of(PAGE)


def test_settings_table():
    by_probe = curves.summarize(read("quality_settings_cpu.csv"))
    probes = {"loss of the last half": "text", "loss of a repeat": "copy"}
    found = table_with({"settings", *probes}, PAGE)
    assert len(found) == len(by_probe["text"]) - 1  # all but dense
    for said in found:
        for column, probe in probes.items():
            curve = by_probe[probe]["pbs, " + said["settings"].strip("`")]
            assert says(said[column], curves.at_density(curve, 0.4)), (said["settings"], column)
